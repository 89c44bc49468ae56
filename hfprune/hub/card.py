"""The model card: README.md with metadata that the Hub understands, made from the report and nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

import jinja2
from jinja2 import meta
from jinja2.sandbox import SandboxedEnvironment
from pydantic import ValidationError

from hfprune.checkpoint.files import write_text
from hfprune.checkpoint.metadata import read_block, read_config
from hfprune.config import PruningConfig
from hfprune.errors import CheckpointError, ConfigError
from hfprune.hub.loading import Kind, architecture, kind_of, loading_lines
from hfprune.hub.metadata import base_model, card_data, data_name, is_local, section
from hfprune.hub.validation import check_card
from hfprune.hub.words import code, fence, method, removed, trained_first
from hfprune.registry import did_you_mean
from hfprune.report.tables import (
    as_markdown,
    comparison_rows,
    conditions,
    is_fraction,
    main_metric,
    metrics,
    percent,
    sizes_rows,
    steps_rows,
    strategy_sentence,
    title,
)
from hfprune.strict import one_line

CARD_FILE = "README.md"
RECIPE_FILE = "recipe.yaml"
REPORT_FILE = "pruning_report.json"
PICTURES = ("trajectory.png", "units.png", "sparsity.png")
TEMPLATE = "card.md.jinja"
VARIABLES = (
    *("card_data", "name", "summary", "caveat", "comparison", "conditions", "evaluated_on", "steps", "pictures"),
    *("main_metric", "sizes", "loading", "recipe", "environment", "limits"),
)
"""What a template may use; None or empty where it is not known."""

LIMITS = (
    "Only what stands in the tables was measured; other data, robustness and fairness were not looked at.",
    "Pruning can hurt rare classes and unusual inputs more than the average shows.",
    "A latency holds for the machine, batch size and dtype that it was measured with.",
    "The model inherits the licence, the biases and the intended use of what it was made from.",
)
CHOSEN = "The data that the pruned model was measured on also chose its best weights: expect a little less on new data."
# What an expression in a template may raise, apart from jinja2's own errors.
_IN_TEMPLATES = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


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
        recipe_yaml: the effective recipe, shown word for word, but for what comes before the last part of a full path
            on this machine; None leaves its section out.
        kind: which library loads the model; `module` is the user's own class.
        loading: Python lines that load the model.
        license, datasets, language: metadata as the Hub writes it; by default what the report says of the base model.
        pipeline_tag: by default that of the recipe's task.
        template: a Jinja template of one's own, with the variables of the one in `model_cards/`. It is the text below
            the metadata, or, where it begins with `---`, the whole card, in which `card_data` is the metadata.
        name: the model's name; by default that of the recipe's output folder.
        pictures: which of `trajectory.png`, `units.png` and `sparsity.png` to show.

    Raises:
        ConfigError: for a template that is missing or does not render, and for metadata that the Hub would not take.
    """
    name = " ".join((name or _output_name(report)).split())
    known = {"license": license, "datasets": datasets, "language": language, "pipeline_tag": pipeline_tag}
    data = card_data(report, name, kind, **known).to_yaml()
    compared, steps, sizes = comparison_rows(report), steps_rows(report), sizes_rows(report)
    body = _render(
        template,
        card_data=data,
        name=name,
        summary=_summary(report),
        caveat=_caveat(report),
        comparison=as_markdown(compared) if compared.rows else None,
        conditions="\n\n".join(conditions(report)) or None,
        evaluated_on=_evaluated_on(report),
        steps="\n\n".join(filter(None, (as_markdown(steps), strategy_sentence(report)))) if steps.rows else None,
        pictures=list(pictures),
        main_metric=title(main_metric(report)),
        sizes=as_markdown(sizes) if sizes.rows else None,
        loading=_fenced(loading, "python"),
        recipe=_fenced(_without_places(recipe_yaml, report), "yaml") if recipe_yaml else None,
        environment=_environment(report),
        limits=_limits(report),
    ).strip()
    text = f"{body}\n" if body.startswith("---\n") else f"---\n{data}\n---\n\n{body}\n"
    check_card(text)
    return text


def write_card(folder: str | os.PathLike, report: Mapping[str, Any] | None = None, **parts: Any) -> Path:
    """Writes `README.md` into a checkpoint's folder; it appears under its name only when it is complete.

    Example:
        >>> report = {"dense": dense.to_dict(), "pruned": hfprune.measure(model).to_dict()}
        >>> hfprune.write_card("pruned", report)

    Args:
        folder: the checkpoint.
        report, **parts: as `card_of` takes them.

    Raises:
        ConfigError, CheckpointError: see `card_of`.
    """
    path = Path(folder) / CARD_FILE
    write_text(path, card_of(folder, report, **parts))
    return path


def card_of(
    folder: str | os.PathLike,
    report: Mapping[str, Any] | None = None,
    *,
    repo: str | None = None,
    name: str | None = None,
    **parts: Any,
) -> str:
    """The card of a checkpoint's folder: see `write_card`.

    Args:
        folder: the checkpoint. Its files say how it is loaded and what was pruned, its pictures are shown.
        report: as a run writes it, or any part of it, such as `dense` and `pruned` by `measure`; by default what a run
            left in the folder, else what config.json says. Nothing stands in the card that none of these says.
        repo: the repository that the checkpoint goes to, where the card is to load it from.
        name: the model's; by default the repository's or the folder's.
        **parts: the other arguments of `render_card`, which are otherwise read from the folder.

    Raises:
        ConfigError: see `render_card`.
        CheckpointError: the folder holds no checkpoint that hfprune has pruned.
    """
    folder = Path(folder)
    report = _whole_report(folder, report)
    name = name or (repo.rpartition("/")[2] if repo else folder.resolve().name)
    recipe = folder / RECIPE_FILE
    if "recipe_yaml" not in parts:
        parts["recipe_yaml"] = recipe.read_text(encoding="utf-8") if recipe.is_file() else None
    if "kind" not in parts:
        parts["kind"] = kind_of(read_config(folder))
    if "loading" not in parts:
        files = [path.name for path in folder.iterdir()]
        lines = {"on_hub": repo is not None, "beside": files, "maker": report.get("maker")}
        parts["loading"] = loading_lines(read_config(folder), repo or name, **lines)
    parts.setdefault("pictures", [picture for picture in PICTURES if (folder / picture).is_file()])
    return render_card(report, name=name, **parts)


def template_path() -> Path:
    """The card's template: beside this module in an installed package, else in the source tree's `model_cards/`."""
    installed = Path(__file__).with_name(TEMPLATE)
    return installed if installed.is_file() else Path(__file__).parents[2] / "model_cards" / TEMPLATE


def check_template(path: str | os.PathLike) -> None:
    """Checks a template of one's own, as far as that can be done before there is anything to fill in.

    Raises:
        ConfigError: it can't be read, is no Jinja, or uses a variable that cards don't have.
    """
    path = Path(path)
    try:
        names = meta.find_undeclared_variables(_jinja().parse(_read(path)))
    except jinja2.TemplateError as error:
        raise ConfigError(f"the card's template '{path}' does not render: {error}") from error
    if unknown := sorted(names - set(VARIABLES)):
        hint = did_you_mean(unknown[0], VARIABLES)
        raise ConfigError(f"the card's template '{path}' uses the unknown variable '{unknown[0]}'; {hint}")


def _jinja() -> SandboxedEnvironment:
    # A recipe by someone else may name the template: it can show values, and do nothing else.
    return SandboxedEnvironment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )


def _read(template: Path) -> str:
    try:
        return template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the card's template '{template}' can't be read: {error}") from error


def _render(template: str | os.PathLike | None, **values: Any) -> str:
    path = template_path() if template is None else Path(template)
    text = _read(path)
    try:
        return _jinja().from_string(text).render(values)
    except _IN_TEMPLATES as error:
        raise ConfigError(f"the card's template '{path}' does not render: {' '.join(str(error).split())}") from error


def _whole_report(folder: Path, report: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The report, with what a run left, or else what config.json says, where it says nothing."""
    if report is not None and "sparsity" in report:
        return report
    path = folder / REPORT_FILE
    try:
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else _recorded(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
    return {**known, **(report or {})}


def _recorded(folder: Path) -> dict[str, Any]:
    """What the block in config.json says, in the form of a report."""
    block = read_block(folder)
    if block is None:
        raise CheckpointError(f"'{folder}' holds no pruned model: its config.json says nothing of pruning")
    done = block.get("pruning") or {}
    config = {key: done[key] for key in ("criterion", "granularity", "scope", "schedule", "target") if key in done}
    return {
        "sparsity": block.get("sparsity") or {},
        "plan": block.get("plan"),
        "stored_sparse": "encodings" in block,
        "architecture": architecture(read_config(folder)),
        "reached": done.get("reached"),
        "recipe": {"pruning": config} if _is_known(config) else {},
        "base_model": done.get("base_model"),
        "environment": {"hfprune": block.get("version")},
    }


def _is_known(pruning: Mapping[str, Any]) -> bool:
    """Whether it can be put into words: not where it names a criterion that was registered elsewhere."""
    try:
        PruningConfig.model_validate(pruning)
    except ValidationError:
        return False
    return bool(pruning)


def _pruning(report: Mapping[str, Any]) -> PruningConfig | None:
    section = (report.get("recipe") or {}).get("pruning")
    if section is None:
        return None
    try:
        return PruningConfig.model_validate(section)
    except ValidationError as error:
        raise ConfigError(one_line(error, "pruning")) from error


def _without_places(recipe_yaml: str, report: Mapping[str, Any]) -> str:
    """The recipe without the folders of this machine, which tell of its owner."""
    for part, key in (("model", "name"), ("data", "name"), ("output", "folder"), ("output", "template")):
        path = section(report, part, key)
        if path and (path.startswith("~") or Path(path).is_absolute() or PureWindowsPath(path).is_absolute()):
            recipe_yaml = recipe_yaml.replace(path, PureWindowsPath(path).name)
    return recipe_yaml


def _output_name(report: Mapping[str, Any]) -> str:
    return Path(section(report, "output", "folder") or "").name or "pruned-model"


def _summary(report: Mapping[str, Any]) -> str:
    """What was pruned, how, and what it cost, in plain words."""
    pruning = _pruning(report)
    entries = (report.get("sparsity") or {}).values()
    zeros, numel = sum(e["zeros"] for e in entries), sum(e["numel"] for e in entries)
    model = report.get("base_model") if base_model(report) else None
    link = f"[{model}](https://huggingface.co/{model})" if model else _architecture(report)
    parts = [f"{link}, pruned with hfprune{f' and evaluated on {_data_words(report)}' if data_name(report) else ''}."]
    parts += trained_first(report.get("recipe") or {})
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
    name = section(report, "model", "name")
    if not name or is_local(name):
        return f"A {code(report['architecture'])}" if report.get("architecture") else "A model"
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
    if not report.get("sparsity") or report.get("plan") or pruned.get("params") != dense.get("params"):
        return None
    if report.get("stored_sparse"):
        return (
            "**Only the file is smaller:** the zeros are not stored. The loaded model has tensors of the dense shapes "
            "and is as large and as fast as the dense one."
        )
    return (
        "**The zeros alone make neither the file smaller nor the model faster:** the tensors keep their shapes, and "
        "ordinary kernels multiply zeros like any other number. A gain needs a format or kernels that skip zeros."
    )


def _evaluated_on(report: Mapping[str, Any]) -> str | None:
    return _data_words(report) if data_name(report) else None


def _data_words(report: Mapping[str, Any]) -> str:
    split = section(report, "data", "eval_split")
    return f"{code(data_name(report) or '')}{f' (split {code(split)})' if split else ''}"


def _environment(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    lines = [(key, str(value)) for key, value in (report.get("environment") or {}).items() if value is not None]
    if report.get("seed") is not None:
        lines.append(("seed", str(report["seed"])))
    if spent := sum(step.get("seconds") or 0 for step in report.get("steps") or ()):
        lines.append(("time for pruning and fine-tuning", _duration(spent)))
    if report.get("seconds") is not None:
        lines.append(("time for the whole run", _duration(report["seconds"])))
    return lines + _energy(report.get("emissions") or {})


def _energy(known: Mapping[str, Any]) -> list[tuple[str, str]]:
    if "energy_kwh" not in known:
        return []
    by = f"the whole machine, estimated by {known['source']}"
    lines = [("energy", f"{1000 * known['energy_kwh']:.3g} Wh ({by})")]
    if "co2_grams" in known:
        lines.append(("emissions", f"{known['co2_grams']:.3g} g of CO2 equivalents ({known['location']})"))
    return lines


def _limits(report: Mapping[str, Any]) -> list[str]:
    """What a reader should not conclude; only of what stands in the card."""
    measured = any((report.get(side) or {}).get("latency_ms") for side in ("dense", "pruned"))
    chosen = any(step.get("metric_before") for step in report.get("steps") or ())
    told = [limit for limit in LIMITS if measured or not limit.startswith("A latency")]
    return [*told, *([CHOSEN] if chosen else [])]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _fenced(text: str, language: str) -> str:
    mark = fence(text, 3)
    return f"{mark}{language}\n{text.rstrip()}\n{mark}"
