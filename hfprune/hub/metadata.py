"""The card's metadata: what the Hub knows a model by, from the report and nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hfprune.hub.loading import Kind
from hfprune.hub.origin import REPO_ID
from hfprune.report.tables import metrics, title

PIPELINE_TAGS = {"causal-lm": "text-generation", "speech-recognition": "automatic-speech-recognition"}


def card_data(report: Mapping[str, Any], name: str, kind: Kind, **known: Any) -> ModelCardData:
    """The metadata of a pruned model's card.

    Args:
        report: the report; what it does not hold is left out.
        name: the model's name.
        kind: which library loads it.
        **known: metadata that goes before what the report says: `license`, `datasets`, `language`, `pipeline_tag`.
    """
    origin = report.get("origin") or {}
    known = {key: value for key, value in known.items() if value}
    tag = known.pop("pipeline_tag", None) or pipeline_tag(report)
    if "license" not in known:
        known |= {key: origin.get(key) for key in ("license", "license_name", "license_link")}
    for key in ("datasets", "language"):
        known[key] = _as_list(known.get(key) or origin.get(key))
    # The Hub has no relation that says pruned.
    base = base_model(report) or origin.get("base_model")
    results = _results(report, tag)
    return ModelCardData(
        model_name=name if results else None,
        eval_results=results,
        base_model=base,
        base_model_relation="finetune" if base else None,
        library_name=None if kind == "module" else kind,
        tags=[
            "pruned",
            *_kind_tags(report),
            "hfprune",
            *_pattern_tags(report),
            *(["pytorch"] if kind == "module" else []),
        ],
        pipeline_tag=tag,
        co2_eq_emissions=_emissions(report),
        **known,
    )


def section(report: Mapping[str, Any], part: str, key: str) -> Any:
    """A value of the recipe in the report; None where it is not there."""
    return ((report.get("recipe") or {}).get(part) or {}).get(key)


def base_model(report: Mapping[str, Any]) -> str | None:
    """The model's id on the Hub; a local folder is none."""
    base = report.get("base_model")
    return base if base and REPO_ID.fullmatch(base) and not is_local(base) else None


def is_local(name: str) -> bool:
    """Whether a model's or dataset's name means something on this machine."""
    return name.startswith((".", "~", "/")) or "\\" in name or Path(name).exists()


def pipeline_tag(report: Mapping[str, Any]) -> str | None:
    """The Hub's word for the recipe's task."""
    task = section(report, "data", "task")
    return PIPELINE_TAGS.get(task, task)


def data_name(report: Mapping[str, Any]) -> str | None:
    """The dataset's name; of a local path the last part only, since the rest tells of the machine."""
    name = section(report, "data", "name")
    return PureWindowsPath(name).name or None if name and is_local(name) else name


def _kind_tags(report: Mapping[str, Any]) -> list[str]:
    """`structured-pruning` where parts were removed, `sparse` where there are zeros."""
    structured = ["structured-pruning"] if report.get("removed") or report.get("plan") else []
    return structured + (["sparse"] if report.get("sparsity") or not structured else [])


def _pattern_tags(report: Mapping[str, Any]) -> list[str]:
    """`unstructured`, `nm` or `block` for the patterns that occur; one of another kind is its own tag."""
    found = [entry.get("pattern") for entry in (report.get("sparsity") or {}).values()]
    kinds = ["nm" if re.fullmatch(r"\d+:\d+", text) else text.partition(":")[0] for text in found if text]
    return list(dict.fromkeys("unstructured" if kind == "weight" else kind for kind in kinds))


def _results(report: Mapping[str, Any], task: str | None) -> list[EvalResult] | None:
    """The measured metrics, pruned first; none where the task or the data is not known, which the Hub demands."""
    dataset = data_name(report)
    if not task or not dataset:
        return None
    results = []
    for side, ending in (("pruned", ""), ("dense", " (dense, before pruning)")):
        for name, value in metrics((report.get(side) or {}).get("metric")).items():
            results.append(
                EvalResult(
                    task_type=task,
                    dataset_type=re.sub(r"[^\w./-]+", "-", dataset),
                    dataset_name=dataset,
                    dataset_config=section(report, "data", "config"),
                    dataset_split=section(report, "data", "eval_split"),
                    metric_type=name,
                    metric_name=f"{title(name)}{ending}",
                    metric_value=value,
                )
            )
    return results or None


def _emissions(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """As the Hub wants them: grams of CO2 equivalents, and where and how they were found."""
    known = report.get("emissions") or {}
    if "co2_grams" not in known:
        return None
    environment = report.get("environment") or {}
    device = environment.get("device")
    found = {
        "emissions": known["co2_grams"],
        "source": known.get("source"),
        "training_type": "pruning and fine-tuning",
        "geographical_location": known.get("location"),
        "hardware_used": environment.get("machine") if device in (None, "cpu") else device,
    }
    return {key: value for key, value in found.items() if value is not None}


def _as_list(values: str | Sequence[str] | None) -> list[str] | None:
    return [values] if isinstance(values, str) else list(values) if values else None
