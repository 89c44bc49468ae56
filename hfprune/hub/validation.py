"""Whether a card's metadata is what the Hub takes, by a schema. A push has the Hub look at it too."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from hfprune.errors import ConfigError
from hfprune.hub.origin import LANGUAGE, REPO_ID
from hfprune.registry import nearest
from hfprune.strict import one_line

LIBRARIES = ("transformers", "timm")
_TASK = r"^[a-z0-9]+(-[a-z0-9]+)*$"


def _known_library(value: str) -> str:
    near = nearest(value, LIBRARIES)
    if value not in LIBRARIES and near:
        raise ValueError(f"unknown library '{value}'; did you mean '{near}'?")
    return value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Word = Annotated[str, Field(min_length=1)]
Number = Annotated[float, Field(allow_inf_nan=False)]
RepoIds = Annotated[list[Annotated[str, Field(pattern=f"^{REPO_ID.pattern}$")]], BeforeValidator(_listed)]
Languages = Annotated[list[Annotated[str, Field(pattern=f"^({LANGUAGE.pattern})$")]], BeforeValidator(_listed)]


class _Part(BaseModel):
    # The Hub takes more keys than these.
    model_config = ConfigDict(extra="allow", strict=True)


class _Task(_Part):
    type: Annotated[str, Field(pattern=_TASK)]


class _Dataset(_Part):
    type: Annotated[str, Field(pattern=r"^[\w./-]+$")]
    name: Word


class _Metric(_Part):
    type: Word
    value: Number
    name: Word | None = None


class _Result(_Part):
    task: _Task
    dataset: _Dataset
    metrics: Annotated[list[_Metric], Field(min_length=1)]


class _Entry(_Part):
    name: Word
    results: Annotated[list[_Result], Field(min_length=1)]


class _Emissions(_Part):
    emissions: Annotated[Number, Field(ge=0)]


class _Metadata(_Part):
    """The keys of a model card's metadata that hfprune writes.

    Source: https://huggingface.co/docs/hub/model-cards.
    """

    tags: list[Word] = Field(default_factory=list)
    library_name: Annotated[Word, AfterValidator(_known_library)] | None = None
    pipeline_tag: Annotated[str, Field(pattern=_TASK)] | None = None
    base_model: RepoIds | None = None
    base_model_relation: Literal["finetune", "quantized", "adapter", "merge"] | None = None
    datasets: RepoIds | None = None
    license: Word | Annotated[list[Word], Field(min_length=1)] | None = None
    license_name: Word | None = None
    license_link: Word | None = None
    language: Languages | None = None
    model_index: Annotated[list[_Entry] | None, Field(alias="model-index")] = None
    co2_eq_emissions: Number | _Emissions | None = None

    @model_validator(mode="after")
    def _relation_has_a_base(self) -> _Metadata:
        if self.base_model_relation is not None and self.base_model is None:
            raise ValueError("base_model_relation: there is no base_model")
        return self


def check_card(text: str) -> None:
    """Checks a card's metadata without a network: its types and words, and that huggingface_hub reads it back.

    Args:
        text: the card: metadata in YAML between `---` lines, then Markdown.

    Raises:
        ConfigError: one line that names the key and what is wrong with it.
    """
    block = REGEX_YAML_BLOCK.search(text)
    if block is None:
        raise ConfigError("the card has no metadata: it must begin with YAML between two lines of ---")
    try:
        values = yaml.safe_load(block.group(2))
        _Metadata.model_validate(values)
        again = ModelCard(text).data.to_dict()
    except ValidationError as error:
        raise ConfigError(one_line(error, "the card's metadata")) from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"the card's metadata can't be read: {' '.join(str(error).split())}") from error
    if lost := sorted(values.keys() - again.keys()):
        raise ConfigError(f"the card's metadata: '{lost[0]}' does not read back")
