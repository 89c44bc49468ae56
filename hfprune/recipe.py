"""Recipe: the YAML file that says the whole run: model, data, baseline, pruning, training, output."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from hfprune.config import PruningConfig
from hfprune.errors import ConfigError
from hfprune.grid import Grid
from hfprune.secrets import key_of_token
from hfprune.strict import StrictModel, one_line
from hfprune.study import Study

Task = Literal["image-classification", "text-classification", "causal-lm", "speech-recognition"]
Name = Annotated[str, Field(min_length=1)]
Pixels = Annotated[int, Field(ge=1)]


class ModelSection(StrictModel):
    """Which model.

    Attributes:
        name: `timm/ARCHITECTURE[.TAG]`, a Hub id, a local folder, or `package.module:function` that returns a module,
            or a module and its tokenizer.
        args: for timm, arguments of `timm.create_model`; for transformers, values of its config; else of the function.
        pretrained: load weights (timm and transformers); false builds the architecture with random ones.
        revision: a branch, tag or commit on the Hub.
    """

    name: Name
    args: dict[str, Any] = Field(default_factory=dict)
    pretrained: bool = True
    revision: str | None = None

    @classmethod
    def named(cls, name: str, overrides: list[str] | None = None) -> ModelSection:
        """A model by its name, with overrides as a recipe's: `model.args.depth=3`.

        Raises:
            ConfigError: an override of anything but `model`, an unknown key or a wrong value.
        """
        values: dict[str, Any] = {"model": {"name": name}}
        for override in overrides or []:
            apply_override(values, override)
        if other := [key for key in values if key != "model"]:
            raise ConfigError(f"--set {other[0]}: only `model` has keys here, e.g. --set model.args.depth=3")
        try:
            return cls.model_validate(values["model"])
        except ValidationError as error:
            raise ConfigError(one_line(error, "model")) from error


class DataSection(StrictModel):
    """Which data.

    Attributes:
        name: `digits`, `python_docs` or `python_sentences` (embedded), a folder of images with one sub-folder a class,
            a folder of recordings with transcripts beside them, a parquet, json, csv or text file or a folder of them,
            or the name of a dataset on the Hub.
        task: `image-classification`, `text-classification`, `causal-lm` or `speech-recognition`.
        config: the dataset's configuration, for those that have several.
        train_split, eval_split: the splits used; by default train, and the first of test, validation.
        eval_fraction: the part of the training split held out where there is no split to evaluate on.
        image_column, audio_column, label_column, text_columns: by default found by type and by usual names.
        image_size: height and width in pixels; by default what the model takes.
        mean, std: normalisation, one value a channel; by default the model's own.
        augment: random shifts and crops (and mirror images, except for digits) while training.
        max_length: tokens a text for classification; block_size: tokens a sequence for causal-lm.
        language: of speech, a code such as `en` or `de-AT`: chooses transcripts, Whisper's prompt, and by which rules
            texts are written alike before they are compared.
        max_seconds: recordings of speech that are longer are cut between their captions, or left out without any.
        train_samples, eval_samples: use only so many, drawn by the seed.
        metrics: what is measured; by default accuracy for classification, perplexity for causal-lm, wer for
            speech-recognition.
    """

    name: Name
    task: Task = "image-classification"
    config: str | None = None
    train_split: str = "train"
    eval_split: str | None = None
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    image_column: str | None = None
    audio_column: str | None = None
    label_column: str | None = None
    text_columns: list[str] | None = None
    image_size: Pixels | Annotated[list[Pixels], Field(min_length=2, max_length=2)] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    augment: bool = True
    max_length: Annotated[int, Field(ge=1)] = 128
    block_size: Annotated[int, Field(ge=2)] = 256
    language: Annotated[str, Field(pattern=r"^[A-Za-z]{2,3}([-_][A-Za-z0-9]+)*$")] | None = None
    max_seconds: Annotated[float, Field(gt=0)] = 30.0
    train_samples: Annotated[int, Field(ge=1)] | None = None
    eval_samples: Annotated[int, Field(ge=1)] | None = None
    metrics: list[str] | None = None


class OutputSection(StrictModel):
    """Where results go.

    Attributes:
        folder: of the checkpoint, card, report and pictures.
        sparse: `bitmask` stores masked tensors sparse; the checkpoint then needs `import hfprune` to load.
        remote_code: add a modeling file by which an uneven transformers model loads without hfprune.
        template: a Jinja file that takes the place of the card's own (`model_cards/card.md.jinja`).
        batch_sizes: at which latency is measured.
        push_to_hub: `OWNER/NAME` on the Hub to which the result is pushed; false keeps it here.
        private: whether that repository is private when it is made; by default as the owner's settings say.
        revision: the branch that is pushed to; by default main.
        push_every_step: whether each pruning step is pushed once it is fine-tuned, as a commit with a tag.
    """

    folder: Name
    sparse: Literal["bitmask"] | None = None
    remote_code: bool = False
    template: Name | None = None
    batch_sizes: list[Annotated[int, Field(ge=1)]] = Field(default_factory=lambda: [1, 32])
    push_to_hub: Literal[False] | Name = False
    private: bool | None = None
    revision: Name | None = None
    push_every_step: bool = False

    @model_validator(mode="after")
    def _a_repository_for_what_is_pushed(self) -> Self:
        for key in ("private", "revision", "push_every_step"):
            if getattr(self, key) and not self.push_to_hub:
                raise ValueError(f"{key}: says how to push, but nothing is pushed; add push_to_hub: OWNER/NAME")
        return self

    @field_validator("push_to_hub")
    @classmethod
    def _a_valid_repository(cls, value: str | Literal[False]) -> str | Literal[False]:
        if value and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", value):
            raise ValueError(f"must be OWNER/NAME on the Hub, or false, not '{value}'")
        return value


class Recipe(StrictModel):
    """A whole run. `baseline` trains the dense model first: TrainingArguments fields, `epochs` among them, that replace
    those of `training` for that part. `training` holds any TrainingArguments field by its own name. `compare` says what
    `hfprune compare` runs, `wild` what `hfprune wild study` does; a single run takes no notice of them.

    Example:
        >>> recipe = Recipe.from_yaml("recipes/vit_hybrid.yaml", overrides=["pruning.target.ratio=.7"])
        >>> recipe.pruning.ratio
        0.7
    """

    model: ModelSection
    data: DataSection
    baseline: dict[str, Any] | None = None
    pruning: PruningConfig
    training: dict[str, Any] = Field(default_factory=dict)
    output: OutputSection
    compare: Grid | None = None
    wild: Study | None = None

    @field_validator("baseline")
    @classmethod
    def _baseline_says_how_long(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and not {"epochs", "max_steps"} & set(value):
            raise ValueError("epochs: missing, e.g. {epochs: 30}; leave out `baseline` to prune the model as it is")
        return value

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: list[str] | None = None) -> Recipe:
        """Reads a recipe file.

        Args:
            path: the YAML file.
            overrides: `key.key=value` each, the value in YAML, applied in order.

        Raises:
            ConfigError: one line that names the key, the value and, where there is one, a nearby valid one.
        """
        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"--recipe: no file '{path}'{_nearby(path)}")
        try:
            values = load_yaml(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: a recipe is a map with the keys {', '.join(cls.model_fields)}")
        for override in overrides or []:
            apply_override(values, override)
        return cls.parse(values)

    @classmethod
    def parse(cls, values: dict[str, Any]) -> Recipe:
        """A recipe from plain values; a ConfigError in one line where they are wrong.

        A recipe goes into the report, the card and the repository: one that holds a token is refused.
        """
        if (key := key_of_token(values)) is not None:
            raise ConfigError(
                f"{key}: holds what looks like an access token, which a recipe would make public; take it out and "
                "log in with `hf auth login`, or set HF_TOKEN"
            )
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(one_line(error)) from error

    def to_yaml(self) -> str:
        """The recipe as YAML that reads back as the same recipe; what was not said is left out."""
        values = self.model_dump(mode="json", exclude_unset=True)
        return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _nearby(path: Path) -> str:
    from hfprune.registry import nearest

    beside = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    match = nearest(path.name, beside)
    return f"; did you mean '{path.parent / match}'?" if match else ""


def apply_override(values: dict[str, Any], override: str) -> None:
    """Puts a `key.key=value` of the command line into a recipe's plain values.

    Raises:
        ConfigError: it is not of that form, or leads into something that has no keys.
    """
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {override}: expected key.key=value, e.g. --set pruning.target.ratio=.7")
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: '{text}' is not valid YAML") from error
    section = values
    for part in parts[:-1]:
        if section.get(part) is None:
            section[part] = {}
        if not isinstance(section[part], dict):
            section[part] = _unfold(part, section[part], override)
        section = section[part]
    section[parts[-1]] = value


def _unfold(key: str, value: Any, override: str) -> dict[str, Any]:
    """The long form of the shorthands that a recipe allows, so that an override can reach inside."""
    long_form = {"target": "ratio", "schedule": "kind", "criterion": "name", "strategy": "kind"}
    if key not in long_form:
        raise ConfigError(f"--set {override}: '{key}' is {value!r}, which has no keys of its own")
    return {long_form[key]: value}


class _Loader(yaml.SafeLoader):
    """YAML 1.2's rules for plain words: `1e-3` is a number, `2:4` and `no` are words; a repeated key is an error."""

    yaml_implicit_resolvers: dict[str, list] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1 and key != "<<":
                raise yaml.MarkedYAMLError(problem=f"the key '{key}' stands twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, list] = {}


_PLAIN_WORDS = {
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9]+", list("-+0123456789")),
    "tag:yaml.org,2002:float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "tag:yaml.org,2002:merge": (r"<<", ["<"]),
}
for _tag, (_pattern, _first) in _PLAIN_WORDS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def load_yaml(text: str) -> Any:
    """Plain values from YAML; no object is ever built from it."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader with YAML 1.2's plain words)
