"""Where data comes from: embedded, a folder of images, files, or the Hub; always a dataset a split."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    List,
    Value,
    get_dataset_config_names,
    load_dataset,
)
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from hfprune.data.builtin import builtin
from hfprune.errors import ConfigError, DataError, NotReachable
from hfprune.hub.reach import HUB_ERRORS, fetch, looks_like_path, missing_path, not_reachable
from hfprune.recipe import DataSection
from hfprune.registry import did_you_mean, nearest
from hfprune.speech.recordings import SOUND_FILES, holds_recordings, read_recordings

# File name endings and the loaders of `datasets` that read them.
LOADERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text"}
IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
# What was said when, in a recording that may be cut: lists of `start`, `stop` (seconds) and `text`.
CAPTIONS = List({"start": Value("float64"), "stop": Value("float64"), "text": Value("string")})
SPLIT_PREFIXES = {"train": "train", "test": "test", "valid": "validation", "val": "validation", "dev": "validation"}


def open_splits(section: DataSection) -> dict[str, Dataset]:
    """Every split that `data.name` holds, by its name.

    Raises:
        DataError: a path that is not there, holds nothing usable or can't be read.
        ConfigError: a configuration that the dataset does not have.
        NotReachable: the dataset lies on the Hub, and the Hub can't be reached.
    """
    name = section.name
    if name in builtin:
        return builtin[name]()
    path = Path(name).expanduser()
    if path.suffix.lower() in SOUND_FILES and path.is_file():
        raise DataError(f"data.name: '{name}' is one recording; name the folder that holds it and its transcript")
    if path.is_file():
        return _read_files({"train": [path]}, section)
    if section.task == "speech-recognition" and path.is_dir() and holds_recordings(path):
        return _recordings(path, section)
    if path.is_dir():
        return _open_folder(path, section)
    if looks_like_path(name) or path.suffix in LOADERS:
        raise DataError(f"data.name: no file or folder '{name}'; {missing_path(name)}")
    return _open_hub(section)


def is_on_hub(name: str) -> bool:
    """Whether `data.name` is that of a dataset on the Hub, as `open_splits` takes it."""
    path = Path(name).expanduser()
    return not (name in builtin or path.exists() or looks_like_path(name) or path.suffix in LOADERS)


def is_lines(section: DataSection) -> bool:
    """Whether the rows are the lines of a running text, whose order means something, rather than documents."""
    if section.task == "speech-recognition":
        return False
    path = Path(section.name).expanduser()
    if path.is_dir():
        return any(file.suffix == ".txt" for file in _data_files(path, section))
    return path.suffix == ".txt"


def _open_folder(folder: Path, section: DataSection) -> dict[str, Dataset]:
    files = _data_files(folder, section)
    if not files:
        return _image_folders(folder, section)
    kinds = sorted({LOADERS[file.suffix] for file in files})
    if len(kinds) > 1:
        raise DataError(f"data.name: '{folder}' holds files of several kinds ({', '.join(kinds)}); name one file")
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file.name) or "train", []).append(file)
    return _read_files(splits, section)


def _data_files(folder: Path, section: DataSection) -> list[Path]:
    """The table and text files of a folder; of the configuration's sub-folder or the only one, where there are such."""
    candidates = [folder / section.config] if section.config else []
    candidates += [folder, folder / "data"]
    below = [entry for entry in folder.iterdir() if entry.is_dir()]
    candidates += below if len(below) == 1 else []
    for candidate in candidates:
        if candidate.is_dir():
            files = sorted(file for file in candidate.iterdir() if file.suffix in LOADERS and file.is_file())
            split_files = [file for file in files if _split_of(file.name)]
            if files:
                # Files with a split's name are the data; a readme.txt or info.json beside them is not.
                return split_files or files
    return []


def _split_of(name: str) -> str | None:
    match = re.match(r"(train|test|validation|valid|val|dev)(?![a-z])", name.lower())
    return SPLIT_PREFIXES["valid" if match[1].startswith("valid") else match[1]] if match else None


def _read_files(splits: dict[str, list[Path]], section: DataSection) -> dict[str, Dataset]:
    first = next(iter(splits.values()))[0]
    if first.suffix not in LOADERS:
        raise DataError(f"data.name: '{first}' is not of a known kind; known: {', '.join(LOADERS)}")
    data_files = {split: [str(file) for file in files] for split, files in splits.items()}
    # Line breaks are kept, so that the lines put together again are the text.
    options = {"keep_linebreaks": True} if first.suffix == ".txt" else {}
    try:
        return dict(load_dataset(LOADERS[first.suffix], data_files=data_files, **options))
    except (DatasetGenerationError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        raise DataError(f"data.name: '{section.name}' can't be read: {_first_line(cause)}") from error


def _recordings(folder: Path, section: DataSection) -> dict[str, Dataset]:
    """Recordings with their transcripts; their split is what the table says, or a folder train/, test/ or validation/
    at the top."""
    splits: dict[str, dict[str, list]] = {}
    for recording in read_recordings(folder, section.language):
        top = recording.path.relative_to(folder).parts[0] if recording.path.parent != folder else ""
        split = recording.facts.get("split") or _split_of(top) or "train"
        rows = splits.setdefault(split, {"audio": [], "text": [], "captions": []})
        rows["audio"].append({"bytes": None, "path": str(recording.path)})
        rows["text"].append(recording.text)
        rows["captions"].append(recording.captions and [asdict(caption) for caption in recording.captions])
    # The storage of `datasets.Audio`, which itself wants torchcodec to be installed.
    audio = {"bytes": Value("binary"), "path": Value("string")}
    features = Features({"audio": audio, "text": Value("string"), "captions": CAPTIONS})
    return {split: Dataset.from_dict(rows, features=features) for split, rows in splits.items()}


def _image_folders(folder: Path, section: DataSection) -> dict[str, Dataset]:
    """One sub-folder a class, or train/, test/ or validation/ above such sub-folders."""
    entries = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    roots = {_split_of(entry.name): entry for entry in entries if _split_of(entry.name)}
    if "train" not in roots:
        roots = {"train": folder}
    classes = {split: _class_folders(root) for split, root in roots.items()}
    if not classes["train"]:
        kinds = ", ".join(LOADERS)
        raise DataError(f"data.name: '{folder}' holds neither {kinds} files nor a sub-folder of images for each class")
    names = [entry.name for entry in classes["train"]]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    result = {}
    for split, folders in classes.items():
        rows = {"image": [], "label": []}
        for entry in folders:
            if entry.name not in names:
                raise DataError(f"data.name: '{entry}' is a class that train/ lacks; {did_you_mean(entry.name, names)}")
            files = sorted(str(file) for file in entry.rglob("*") if file.suffix.lower() in IMAGE_ENDINGS)
            rows["image"] += files
            rows["label"] += [names.index(entry.name)] * len(files)
        result[split] = Dataset.from_dict(rows, features=features)
    return result


def _class_folders(root: Path) -> list[Path]:
    entries = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return [entry for entry in entries if any(file.suffix.lower() in IMAGE_ENDINGS for file in entry.rglob("*"))]


def _open_hub(section: DataSection) -> dict[str, Dataset]:
    name = section.name
    try:
        # One small question first: the loader itself asks a Hub that does not answer for half a minute.
        fetch("data.name", name, kind="dataset", patterns=["README.md"])
    except NotReachable as error:
        hint = nearest(name, builtin)
        raise NotReachable(f"{error}{f'; or did you mean the embedded {hint!r}?' if hint else ''}") from None
    try:
        splits = load_dataset(name, section.config)
    except DatasetNotFoundError as error:
        raise DataError(f"data.name: {_first_line(error)}") from error
    except HUB_ERRORS as error:
        raise not_reachable("data.name", name, error) from None
    except ValueError as error:
        if "config" not in str(error).lower():
            raise DataError(f"data.name: '{name}' can't be read: {_first_line(error)}") from error
        known = get_dataset_config_names(name)
        wrong = f"'{name}' has no '{section.config}'" if section.config else f"'{name}' has several, name one"
        raise ConfigError(f"data.config: {wrong}; {did_you_mean(section.config or '', known)}") from error
    if not isinstance(splits, DatasetDict):
        raise DataError(f"data.name: '{name}' has no splits")
    return dict(splits)


def text_features(dataset: Dataset) -> list[str]:
    """The names of the columns that hold text."""
    kinds = ("string", "large_string", "string_view")
    return [key for key, kind in dataset.features.items() if isinstance(kind, Value) and kind.dtype in kinds]


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
