"""The run: every item of a plan through every model, each result kept as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from hfprune.errors import CheckpointError, ConfigError, HfpruneError, ModelError
from hfprune.hub.reach import first_line
from hfprune.speech.measures import measure_texts
from hfprune.speech.needs import needed
from hfprune.speech.normalise import normaliser
from hfprune.wild.cache import Cache
from hfprune.wild.plan import Plan, PlanItem, read_plan
from hfprune.wild.prepare import Prepared, Preparer
from hfprune.wild.recogniser import Recogniser
from hfprune.wild.store import COLUMNS, DATABASE, Store, moment
from hfprune.wild.videos import Videos

Tell = Callable[[str, int, int], None]

# What decoders, sites and models raise where an item is not as they take it: it becomes the item's reason.
ITEM_ERRORS = (
    *(HfpruneError, OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError),
    *(AssertionError, ArithmeticError, MemoryError),
)
MEASURES = ("wer", "mer", "wil", "wip", "cer", "hits", "substitutions", "deletions", "insertions", "words")
PLAN_SECONDS = 10.0
"""How often the plan's file is brought up to date while a run goes on; the database always is."""


@dataclass(frozen=True)
class Settings:
    """How a run goes.

    Attributes:
        workers: items that are fetched and decoded at a time, while others are transcribed.
        language: of speech and references, and of no others; by default each item's own, on YouTube the plan's.
        retry: whether what failed is tried again.
        cache: the folder of downloads; by default `cache` beside the database.
        cache_size: bytes that downloads may take together.
        delete_cache: whether downloads are deleted after use.
        device: where models run; by default CUDA where there is one.
        batch_size: chunks of a recording that a model takes at a time.
        chunk: seconds of a chunk.
        beams: hypotheses that an encoder-decoder follows.
    """

    workers: int = 2
    language: str | None = None
    retry: bool = False
    cache: Path | None = None
    cache_size: int = 2_000_000_000
    delete_cache: bool = False
    device: str | None = None
    batch_size: int = 8
    chunk: float = 30.0
    beams: int = 1


def run(
    plan_file: str | Path,
    models: list[str],
    output: str | Path = "runs/wild",
    settings: Settings | None = None,
    *,
    videos: Videos | None = None,
    tell: Tell | None = None,
) -> int:
    """Transcribes and measures the items of a plan that the database does not have yet.

    Args:
        plan_file: the test plan; its items' results are written into it.
        models: checkpoint folders or names on the Hub, the dense one first.
        output: the folder of the database `wild.sqlite`.
        settings: how.
        videos: what downloads.
        tell: is told of every item: words, how many are done, how many there are.

    Returns:
        The number of the plan in the database.

    Raises:
        DataError: the plan or the database can't be read.
        ModelError: none of the models can transcribe.
        CheckpointError: results can't be written; those that were stay.
    """
    settings = settings or Settings()
    plan = read_plan(plan_file)
    _check(plan, models, settings)
    output = Path(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"can't write to '{output}': {error.strerror}") from error
    with Store(output / DATABASE) as store:
        number = store.add_plan(plan.name, plan.source, plan.args, plan.created)
        runner = _Runner(plan, Path(plan_file), store, number, names_of(models, store.results()), settings, tell)
        runner.enter_items()
        runner.go(lambda: Cache(settings.cache or output / "cache", settings.cache_size), videos)
        return number


def names_of(models: list[str], results: list[dict[str, Any]]) -> dict[str, str]:
    """What models are called in the database, by their folder: as they were called before, or by the shortest end of
    their path that tells them apart."""
    folders = [str(Path(name).resolve()) if Path(name).is_dir() else name for name in models]
    if len(set(folders)) < len(folders):
        raise ConfigError(f"--models: '{next(f for f in folders if folders.count(f) > 1)}' is given twice")
    known = {row["folder"]: row["model"] for row in results}
    names: dict[str, str] = {}
    for folder in folders:
        parts = Path(folder).parts if Path(folder).is_dir() else (folder,)
        taken = {*names.values(), *(known[other] for other in known if other != folder)}
        others = {Path(other).parts[-1] for other in folders if other != folder}
        ends = ["/".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        free = [end for end in ends if end not in taken and end not in others]
        names[folder] = known.get(folder) or (free or [folder])[0]
    return names


def _check(plan: Plan, models: list[str], settings: Settings) -> None:
    if not models:
        raise ConfigError("--models: none given; the dense one goes first")
    if settings.workers < 1:
        raise ConfigError(f"--workers: {settings.workers} is not a number of threads; at least 1")
    modules = ["av", "jiwer", "pysubs2", "whisper_normalizer.basic"]
    for module in [*modules, "yt_dlp"] if plan.source == "youtube" else modules:
        needed(module)


class _Runner:
    def __init__(
        self,
        plan: Plan,
        path: Path,
        store: Store,
        number: int,
        names: dict[str, str],
        settings: Settings,
        tell: Tell | None,
    ) -> None:
        self.plan, self.path, self.store, self.number = plan, path, store, number
        self.names, self.settings, self.tell = names, settings, tell
        self.rows: dict[str, int] = {}
        self.status: dict[str, str] = {}
        self.recognisers: dict[str, Recogniser | str] = {}
        self.written = monotonic()

    def enter_items(self) -> None:
        """A row an item, in the plan's order; what is known to be impossible is failed from the start."""
        self.rows = {row["key"]: row["id"] for row in self.store.items(self.number)}
        for item in self.plan.items:
            if item.key not in self.rows:
                self.rows[item.key] = self.store.add_item(
                    self.number,
                    item.key,
                    title=item.title,
                    category=item.category,
                    language=item.default_audio_language or self.settings.language or self.plan.language,
                    region=item.region,
                    licence=item.licence,
                    duration=item.duration.total_seconds() if item.duration else None,
                    conditions=item.conditions,
                    status="failed" if item.reason else "planned",
                    reason=item.reason,
                )

    def missing(self) -> list[tuple[PlanItem, list[str]]]:
        """The items with something to do, and the models that have not heard them, or not as they now are."""
        again = self.settings.retry
        self.status = {row["key"]: row["status"] for row in self.store.items(self.number)}
        changed = {name: _changed(folder) for folder, name in self.names.items()}
        known = {
            (row["item_id"], row["model"]): row["status"]
            for row in self.store.results(self.number)
            if row["finished"] >= changed.get(row["model"], "")
        }
        found = []
        for item in self.plan.items:
            if self.status[item.key] == "failed" and not again:
                continue
            heard = {model: known.get((self.rows[item.key], model)) for model in self.names.values()}
            models = [model for model, state in heard.items() if state is None or (again and state == "failed")]
            if models:
                found.append((item, models))
        return found

    def go(self, cache: Callable[[], Cache], videos: Videos | None) -> None:
        """Everything that is missing; the plan's file has all results when this ends, however it ends."""
        todo = self.missing()
        try:
            if todo:
                self._load(len(todo))
                preparer = Preparer(self.plan, self.settings.language, cache, self.settings.delete_cache, videos)
                with closing(self._prepared(todo, preparer)) as ready:
                    for done, (item, models, future) in enumerate(ready):
                        self._say(item.title or item.key, done, len(todo))
                        self._one(item, models, future, preparer.address(item))
                        if monotonic() - self.written > PLAN_SECONDS:
                            self._write_plan()
        finally:
            self._write_plan()

    def _load(self, total: int) -> None:
        options = {name: getattr(self.settings, name) for name in ("device", "batch_size", "chunk", "beams")}
        for folder, name in self.names.items():
            self._say(f"loading {name}", 0, total)
            try:
                self.recognisers[name] = Recogniser(folder, **options)
            except ITEM_ERRORS as error:
                self.recognisers[name] = reason_of(error)
        reasons = [found for found in self.recognisers.values() if isinstance(found, str)]
        if len(reasons) == len(self.recognisers):
            raise ModelError(f"none of the models can transcribe: {'; '.join(reasons)}")

    def _prepared(
        self, todo: list[tuple[PlanItem, list[str]]], preparer: Preparer
    ) -> Iterator[tuple[PlanItem, list[str], Future]]:
        """Items as they get ready; so many threads fetch and decode while the models are at work."""
        with _threads(self.settings.workers, preparer.stop, preparer.clear) as pool:
            waiting: dict[Future, tuple[PlanItem, list[str]]] = {}
            coming = iter(todo)

            def fill() -> None:
                while len(waiting) < self.settings.workers and (new := next(coming, None)) is not None:
                    waiting[pool.submit(preparer.prepare, new[0])] = new

            fill()
            while waiting:
                wait(waiting, return_when=FIRST_COMPLETED)
                future = next(future for future in waiting if future.done())
                found = waiting.pop(future)
                fill()  # before the models are at work
                yield *found, future

    def _one(self, item: PlanItem, models: list[str], future: Future, url: str | None) -> None:
        try:
            prepared: Prepared = future.result()
        except ITEM_ERRORS as error:
            failed = {"status": "failed", "reason": reason_of(error)}
            if self.status[item.key] != "ok":
                self.store.add_item(self.number, item.key, **failed)
                return
            for model in models:  # others have heard it before
                self._enter(item, model, failed)
        else:
            facts = prepared.facts() | {"url": url, "status": "ok", "reason": None}
            self.store.add_item(self.number, item.key, **facts)
            for model in models:
                self._hear(item, model, prepared)

    def _hear(self, item: PlanItem, model: str, prepared: Prepared) -> None:
        """What a model makes of an item."""
        try:
            recogniser = self.recognisers[model]
            if isinstance(recogniser, str):
                raise ModelError(recogniser)
            found = recogniser.transcribe(prepared.samples, prepared.language)
            hypothesis = normaliser(prepared.language)(found.text)
            measures = measure_texts([prepared.normalised], [hypothesis]).to_dict()
        except ITEM_ERRORS as error:
            self._enter(item, model, {"status": "failed", "reason": reason_of(error)})
            return
        values = {name: measures[name] for name in MEASURES} | {
            "status": "ok",
            "hypothesis": found.text,
            "reference_normalised": prepared.normalised,
            "hypothesis_normalised": hypothesis,
            "seconds": found.seconds,
            "real_time_factor": found.seconds / prepared.duration,
            "peak_memory": found.peak_memory,
        }
        self._enter(item, model, values, [list(segment) for segment in found.segments])

    def _enter(self, item: PlanItem, model: str, values: dict[str, Any], segments: list[Any] | None = None) -> None:
        folder = next(folder for folder, name in self.names.items() if name == model)
        self.store.add_result(self.rows[item.key], model, folder=folder, **values)
        others = [entry for entry in item.results if entry.get("modelName") != model]
        item.results = [*others, {"modelName": model} | ({"segments": segments} if segments else {})]

    def _write_plan(self) -> None:
        """The plan's file, with what the database has; the times of segments are in the plan alone."""
        names = [name for name in COLUMNS["result"] if name not in ("id", "item_id", "model")]
        found: dict[int, list[dict[str, Any]]] = {}
        for row in self.store.results(self.number):
            found.setdefault(row["item_id"], []).append(row)
        rows = {row["key"]: row for row in self.store.items(self.number)}
        for item in self.plan.items:
            row = rows[item.key]
            item.failure = row["reason"] if row["status"] == "failed" else None
            item.reason = None if row["status"] == "ok" else item.reason
            entries = {entry.get("modelName"): entry for entry in item.results}
            for result in found.get(row["id"], []):
                entry = {"modelName": result["model"]}
                entry |= {name: result[name] for name in names if result[name] is not None}
                kept = entries.get(result["model"], {}).get("segments")
                entries[result["model"]] = entry | ({"segments": kept} if kept else {})
            item.results = list(entries.values())
        self.plan.write(self.path)
        self.written = monotonic()

    def _say(self, words: str, done: int, total: int) -> None:
        if self.tell is not None:
            self.tell(words, done, total)


def _changed(folder: str) -> str:
    """When a model's files were last written, as the database writes moments; empty for those on the Hub."""
    files = [path for pattern in ("config.json", "*.safetensors") for path in Path(folder).glob(pattern)]
    return max((moment(path.stat().st_mtime) for path in files), default="")


@contextmanager
def _threads(count: int, stop: Callable[[], None], clear: Callable[[], None]) -> Iterator[ThreadPoolExecutor]:
    """Threads that are told to stop when the block ends, begin nothing that waits, and have ended when it clears."""
    pool = ThreadPoolExecutor(count, thread_name_prefix="hfprune-wild")
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        stop()
        pool.shutdown(wait=True)
        clear()


def reason_of(error: BaseException) -> str:
    """An error as the reason of a failed row: one line."""
    line = first_line(error)
    if isinstance(error, HfpruneError):
        return line
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {line}"
