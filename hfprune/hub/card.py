"""The model card: README.md with metadata that the Hub understands, made from the report and nothing else."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

import jinja2
from huggingface_hub import EvalResult, ModelCardData
from pydantic import ValidationError

from hfprune.checkpoint.files import write_text
from hfprune.config import PruningConfig
from hfprune.errors import ConfigError
from hfprune.hub.words import code, fence, method, removed
from hfprune.report.tables import (
    as_markdown,
    comparison_rows,
    conditions,
    is_fraction,
    main_metric,
    metrics,
    percent,
    steps_rows,
    strategy_sentence,
    title,
)
from hfprune.strict import one_line

Kind = Literal["transformers", "timm", "module"]
PICTURES = ("trajectory.png", "units.png", "sparsity.png")
PIPELINE_TAGS = {"causal-lm": "text-generation"}
TEMPLATE = "card.md.jinja"
LIMITS = (
    "Only what stands in the tables was measured; other data, robustness and fairness were not looked at.",
    "Pruning can hurt rare classes and unusual inputs more than the average shows.",
    "A latency holds for the machine, batch size and dtype that it was measured with.",
    "The model inherits the licence, the biases and the intended use of what it was made from.",
)
CHOSEN = "The data that the pruned model was measured on also chose its best weights: expect a little less on new data."


def render_card(
    report: Mapping[str, Any],
    *,
    recipe_yaml: str | None,
    kind: Kind,
    loading: str,
    license: str | None = None,
    datasets: str | Sequence[str] | None = None,
    pipeline_tag: str | None = None,
    language: str | Sequence[str] | None = None,
    template: str | os.PathLike | None = None,
    name: str | None = None,
    pictures: Collection[str] = (),
) -> str:
    """The card's whole text: YAML metadata between `---` lines, then Markdown.

    Args:
        report: the report; what it does not hold is left out of the card.
        recipe_yaml: the effective recipe, shown word for word; None leaves its section out.
        kind: which library loads the model; `module` is the user's own class.
        loading: Python lines that load the model.
        license, datasets, language: metadata as the Hub writes it, where known.
        pipeline_tag: by default that of the recipe's task.
        template: a Jinja template of one's own, with the variables of the one in `model_cards/`.
        name: the model's name; by default that of the recipe's output folder.
        pictures: which of `trajectory.png`, `units.png` and `sparsity.png` to show.

    Raises:
        ConfigError: for a template that is missing or does not render.
    """
    name = " ".join((name or _output_name(report)).split())
    tag = pipeline_tag or _pipeline_tag(report)
    known = {"license": license, "datasets": _as_list(datasets), "language": _as_list(language), "pipeline_tag": tag}
    data = ModelCardData(model_name=name, eval_results=_results(report, tag), **_lineage(report, kind), **known)
    steps = steps_rows(report)
    body = _render(
        template,
        name=name,
        summary=_summary(report),
        caveat=_caveat(report),
        comparison=as_markdown(comparison_rows(report)),
        conditions="\n\n".join(conditions(report)) or None,
        evaluated_on=_evaluated_on(report),
        steps="\n\n".join(filter(None, (as_markdown(steps), strategy_sentence(report)))) if steps.rows else None,
        pictures=list(pictures),
        main_metric=title(main_metric(report)),
        loading=_fenced(loading, "python"),
        recipe=_fenced(recipe_yaml, "yaml") if recipe_yaml else None,
        environment=_environment(report),
        limits=[*LIMITS, *([CHOSEN] if any(step.get("metric_before") for step in report.get("steps") or ()) else [])],
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body.strip()}\n"


def write_card(folder: str | os.PathLike, report: Mapping[str, Any], **parts: Any) -> Path:
    """Writes `README.md` into a folder; it appears under its name only when it is complete.

    Args:
        folder: the checkpoint's folder: its name is the model's, and its pictures are shown.
        report: see `render_card`.
        **parts: the other arguments of `render_card`.

    Raises:
        ConfigError: see `render_card`.
    """
    folder = Path(folder)
    parts.setdefault("name", folder.resolve().name)
    parts.setdefault("pictures", [picture for picture in PICTURES if (folder / picture).is_file()])
    text = render_card(report, **parts)
    path = folder / "README.md"
    write_text(path, text)
    return path


def template_path() -> Path:
    """The card's template: beside this module in an installed package, else in the source tree's `model_cards/`."""
    installed = Path(__file__).with_name(TEMPLATE)
    return installed if installed.is_file() else Path(__file__).parents[2] / "model_cards" / TEMPLATE


def _render(template: str | os.PathLike | None, **values: Any) -> str:
    path = template_path() if template is None else Path(template)
    settings = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    try:
        return settings.from_string(path.read_text(encoding="utf-8")).render(values)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the card's template '{path}' can't be read: {error}") from error
    except jinja2.TemplateError as error:
        raise ConfigError(f"the card's template '{path}' does not render: {error}") from error


def _lineage(report: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """Metadata on what the model is and what it was made from. The Hub has no relation that says pruned."""
    base = _base_model(report)
    return {
        "base_model": base,
        "base_model_relation": "finetune" if base else None,
        "library_name": None if kind == "module" else kind,
        "tags": [
            "pruned",
            *_kind_tags(report),
            "hfprune",
            *_pattern_tags(report),
            *(["pytorch"] if kind == "module" else []),
        ],
    }


def _pruning(report: Mapping[str, Any]) -> PruningConfig | None:
    section = (report.get("recipe") or {}).get("pruning")
    if section is None:
        return None
    try:
        return PruningConfig.model_validate(section)
    except ValidationError as error:
        raise ConfigError(one_line(error, "pruning")) from error


def _section(report: Mapping[str, Any], section: str, key: str) -> Any:
    return ((report.get("recipe") or {}).get(section) or {}).get(key)


def _output_name(report: Mapping[str, Any]) -> str:
    return Path(_section(report, "output", "folder") or "").name or "pruned-model"


def _base_model(report: Mapping[str, Any]) -> str | None:
    """The model's id on the Hub; a local folder is none."""
    base = report.get("base_model")
    return base if base and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", base) and not _is_local(base) else None


def _is_local(name: str) -> bool:
    return name.startswith((".", "~", "/")) or "\\" in name or Path(name).exists()


def _pipeline_tag(report: Mapping[str, Any]) -> str | None:
    task = _section(report, "data", "task")
    return PIPELINE_TAGS.get(task, task)


def _data_name(report: Mapping[str, Any]) -> str | None:
    """The dataset's name; of a local path the last part only, since the rest tells of the machine."""
    name = _section(report, "data", "name")
    return PureWindowsPath(name).name or None if name and _is_local(name) else name


def _kind_tags(report: Mapping[str, Any]) -> list[str]:
    """`structured-pruning` where parts were removed, `sparse` where there are zeros."""
    structured = ["structured-pruning"] if report.get("removed") else []
    return structured + (["sparse"] if report.get("sparsity") or not structured else [])


def _pattern_tags(report: Mapping[str, Any]) -> list[str]:
    """`unstructured`, `nm` or `block` for the patterns that occur; one of another kind is its own tag."""
    found = [entry.get("pattern") for entry in (report.get("sparsity") or {}).values()]
    kinds = ["nm" if re.fullmatch(r"\d+:\d+", text) else text.partition(":")[0] for text in found if text]
    return list(dict.fromkeys("unstructured" if kind == "weight" else kind for kind in kinds))


def _results(report: Mapping[str, Any], task: str | None) -> list[EvalResult] | None:
    """The measured metrics, pruned first; none where the task or the data is not known, which the Hub demands."""
    dataset = _data_name(report)
    if not task or not dataset:
        return None
    results = []
    for side, ending in (("pruned", ""), ("dense", " (dense, before pruning)")):
        for name, value in metrics((report.get(side) or {}).get("metric")).items():
            results.append(
                EvalResult(
                    task_type=task,
                    dataset_type=dataset,
                    dataset_name=dataset,
                    dataset_split=_section(report, "data", "eval_split"),
                    metric_type=name,
                    metric_name=f"{title(name)}{ending}",
                    metric_value=value,
                )
            )
    return results or None


def _summary(report: Mapping[str, Any]) -> str:
    """What was pruned, how, and what it cost, in plain words."""
    pruning = _pruning(report)
    entries = (report.get("sparsity") or {}).values()
    zeros, numel = sum(e["zeros"] for e in entries), sum(e["numel"] for e in entries)
    model = report.get("base_model") if _base_model(report) else None
    link = f"[{model}](https://huggingface.co/{model})" if model else _architecture(report)
    parts = [f"{link}, pruned with hfprune{f' and evaluated on {_data_words(report)}' if _data_name(report) else ''}."]
    if numel:
        tensors = f"{len(entries)} tensor{'' if len(entries) == 1 else 's'}"
        parts.append(f"{percent(zeros / numel)} of the {numel:,} values in {tensors} are zero ({zeros:,}).")
    parts += removed(report)
    if pruning is not None:
        parts += method(pruning, report)
    steps = report.get("steps") or []
    epochs = sum(step.get("epochs") or 0 for step in steps)
    if epochs:
        held = ", with the zeros kept at zero" if numel else ""
        parts.append(f"Fine-tuning took {epochs:g} epochs in all{held}.")
    parts.append(_cost(report))
    return " ".join(part for part in parts if part)


def _architecture(report: Mapping[str, Any]) -> str:
    name = _section(report, "model", "name")
    if not name or _is_local(name):
        return "A model"
    return f"A model of the architecture {code(name)}"


def _cost(report: Mapping[str, Any]) -> str:
    name = main_metric(report)
    old, new = (metrics((report.get(side) or {}).get("metric")).get(name) for side in ("dense", "pruned"))
    if old is None or new is None:
        return ""
    if is_fraction(name, (old, new)):
        return f"The {title(name)} went from {percent(old)} to {percent(new)} ({100 * (new - old):+.2f} points)."
    return f"The {title(name)} went from {old:.4g} to {new:.4g}."


def _caveat(report: Mapping[str, Any]) -> str | None:
    """Zeros are not a smaller model: said wherever the shapes are the dense ones."""
    dense, pruned = report.get("dense") or {}, report.get("pruned") or {}
    if not report.get("sparsity") or pruned.get("params") != dense.get("params"):
        return None
    return (
        "**The zeros alone make neither the file smaller nor the model faster:** the tensors keep their shapes, and "
        "ordinary kernels multiply zeros like any other number. A gain needs a format or kernels that skip zeros."
    )


def _evaluated_on(report: Mapping[str, Any]) -> str | None:
    return _data_words(report) if _data_name(report) else None


def _data_words(report: Mapping[str, Any]) -> str:
    split = _section(report, "data", "eval_split")
    return f"{code(_data_name(report) or '')}{f' (split {code(split)})' if split else ''}"


def _environment(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    lines = [(key, str(value)) for key, value in (report.get("environment") or {}).items() if value is not None]
    if report.get("seed") is not None:
        lines.append(("seed", str(report["seed"])))
    if report.get("seconds") is not None:
        lines.append(("time for the whole run", _duration(report["seconds"])))
    return lines


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _as_list(values: str | Sequence[str] | None) -> list[str] | None:
    return [values] if isinstance(values, str) else list(values) if values else None


def _fenced(text: str, language: str) -> str:
    mark = fence(text, 3)
    return f"{mark}{language}\n{text.rstrip()}\n{mark}"
