"""AxesComparison: what the runs of several methods say, in one table of method, criterion, schedule and size."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Group as Stack
from rich.table import Table

from hfprune.analysis.axes_claims import AxesGroup, claims
from hfprune.analysis.comparison import COSTS, Comparison
from hfprune.analysis.verdicts import Claim, sentence
from hfprune.profiling import human_bytes
from hfprune.report.tables import UNKNOWN, percent, title

FRONTS = ("speed", "bytes")
_PLACE = ("method", "criterion", "schedule", "size", "budget", "patience")
_COLUMNS = (*_PLACE, "seed", "value", "dense", "params", "nonzero", "bytes", "macs")


@dataclass(frozen=True)
class AxesComparison(Comparison):
    """What `compare` found where its grid names methods."""

    @cached_property
    def groups(self) -> list[AxesGroup]:
        """The runs that differ only in their seed, together; the largest size first, and of each size the best."""
        found: dict[tuple, list[dict[str, Any]]] = {}
        for run in self.runs:
            found.setdefault(tuple(str(run[key]) for key in _PLACE), []).append(run)
        groups = [self._of_method(runs) for runs in found.values()]
        worst = float("-inf")
        return sorted(groups, key=lambda g: (-g.size, -(self.measure.gain(g.mean, 0.0) if g.values else worst)))

    def _of_method(self, runs: list[dict[str, Any]]) -> AxesGroup:
        first = runs[0]
        length = ("budget", first["budget"]) if first["budget"] is not None else ("patience", str(first["patience"]))
        plain = self._group((first["ratio"], length, first["criterion"], first["schedule"]), runs)
        models = [run["model"] for run in runs if run["value"] is not None]
        middle = {
            name: {batch: statistics.median(model[name][batch] for model in models) for batch in models[0][name]}
            for name in ("latency_ms", "speedup")
            if models
        }
        return AxesGroup(
            **{name: getattr(plain, name) for name in plain.__dataclass_fields__},
            method=first["method"],
            kind=first["kind"],
            size=first["size"],
            looks_at_data=first["looks_at_data"],
            nonzero=statistics.fmean(model["size"] for model in models) if models else None,
            bytes=statistics.fmean(model["bytes"] for model in models) if models else None,
            **middle,
        )

    @property
    def sizes(self) -> list[float]:
        """The sizes, the largest first."""
        return sorted({group.size for group in self.groups}, reverse=True)

    @cached_property
    def sentences(self) -> list[str]:
        """One for every size and length: which combination won, by how much, and whether the seeds spread less."""
        places = dict.fromkeys((group.size, group.length) for group in self.groups)
        many = len({length for _, length in places}) > 1
        return [
            sentence(self.measure, [one for one in self.groups if (one.size, one.length) == place], True, many)
            for place in places
        ]

    @cached_property
    def claims(self) -> list[Claim]:
        """The source's claims on its three axes, each confirmed, not confirmed or undecided by these runs."""
        return claims(self.measure, self.groups)

    @cached_property
    def rescored(self) -> AxesComparison | None:
        """The same runs judged by the word error rate after rescoring, and by their speed at an utterance's hypotheses;
        None where the grid names no n-best lists."""
        if not any("dense_rescoring" in run for run in self.runs):
            return None
        return AxesComparison([_by_words(run) for run in self.runs], self.planned)

    def pareto(self, cost: str) -> list[AxesGroup]:
        """The results that no other beats in the metric and in one cost, of all sizes; the cheapest last.

        Args:
            cost: `speed` (at the largest batch size) or `bytes`.
        """
        known = [group for group in self.groups if group.values]
        spent = {"speed": lambda g: -g.speed, "bytes": lambda g: g.bytes}[cost]
        points = [(spent(group), self.measure.gain(group.mean, 0.0)) for group in known]
        kept = [
            group
            for group, (cheap, good) in zip(known, points, strict=True)
            if not any(c <= cheap and g >= good and (c, g) != (cheap, good) for c, g in points)
        ]
        return sorted(kept, key=spent, reverse=True)

    # ---- what it shows ----------------------------------------------------------------------------------------------

    def table(self) -> Stack:
        """For `rich.print`: one row a method, criterion, schedule and size, then the sentences and the claims."""
        measure, whole = self.measure, self._dense_model()
        head = f"{title(measure.name)}, dense {measure.show(measure.dense)}"
        if whole:
            head += f", {whole['params']:,} parameters, {human_bytes(whole['bytes'])}"
        table = Table(title=head, title_justify="left")
        several = len({group.length for group in self.groups}) > 1
        batches = self._batches()
        names = ["size", "method", "criterion", "schedule", *(["length"] if several else []), title(measure.name)]
        names += ["left", "on disk", *(f"batch {batch}" for batch in batches), "seconds", "scored", "front"]
        if self.rescored is not None:
            head += f"; WER {self.rescored.measure.show(self.rescored.measure.dense)}"
            names[names.index("left") : names.index("left")] = ["WER", "ms"]
            names = [name for name in names if name not in ("seconds", "scored")]  # what fits; they stand in the CSV
        for name in names:
            words = name in ("method", "criterion", "schedule", "front")
            table.add_column(name, justify="left" if words else "right", no_wrap=True)
        fronts = {cost: self.pareto(cost) for cost in FRONTS}
        for size in self.sizes:
            for group in (group for group in self.groups if group.size == size):
                marks = [cost for cost, front in fronts.items() if group in front]
                table.add_row(*self._cells(group, several), "both" if len(marks) > 1 else "".join(marks))
            table.add_section()
        return Stack(table, *self._lines(several))

    def _lines(self, several: bool) -> list[str]:
        lines = []
        if self.groups and not several:
            length = self.groups[0].length
            every = "pruning step" if length.startswith("patience") else "run"
            lines.append(f"every {every}: {length} of fine-tuning" + (" in all" if every == "run" else ""))
        counts = sorted({len(group.values) for group in self.groups})
        if counts:
            lines.append(f"each row: {' to '.join(map(str, counts))} seed{'' if counts == [1] else 's'}, "
                         f"the mean ± their standard deviation")  # fmt: skip
        if (missing := self.planned - len(self.runs)) > 0:
            lines.append(f"{missing} of {self.planned} runs are still to be made")
        scored = "" if self.rescored is not None else "scored: batches seen for scores; "
        lines.append(f"size: what was asked for, left: the non-zero parameters, of all the dense model's, embeddings "
                     f"included; on disk: zeros as bitmasks; batch: how many times as fast as the dense model, in "
                     f"turns with it; {scored}front: nothing here is better at as much speed (at the largest batch), "
                     f"as few bytes, or both")  # fmt: skip
        lines += self._judged("the claims of arXiv 2310.03424 on these runs:")
        if self.rescored is not None:
            found = next(run["dense_rescoring"] for run in self.runs if "dense_rescoring" in run)
            turns = [run["rescoring"]["dense_milliseconds"] for run in self.runs if "rescoring" in run]
            dense = statistics.median(turns) if turns else found["milliseconds"]
            lines.append(f"WER: each list of hypotheses ranked anew with the model, weight and penalty chosen on other "
                         f"utterances; the recogniser's own choice {percent(found['first_best_wer'])}, the best that "
                         f"the lists allow {percent(found['oracle_wer'])}; ms: for an utterance's hypotheses "
                         f"({found['hypotheses'] / found['utterances']:.0f}), the median; dense "
                         f"{dense:.1f}; times as fast as the dense model in turns with it")  # fmt: skip
            lines += self.rescored._judged("the claims by the word error rate, and by the speed for an utterance:")
        return lines

    def _judged(self, head: str) -> list[str]:
        said = [f"{claim.number}. {claim.text}: {claim.verdict}. {claim.numbers}" for claim in self.claims]
        return [*(f"* {text}" for text in self.sentences), head, *said]

    def _cells(self, group: AxesGroup, several: bool) -> list[str]:
        measure = self.measure
        spread = "" if group.sd is None else f" ± {measure.difference(group.sd)}"
        failed = f" ({group.failed} failed)" if group.failed else ""
        cells = [f"{group.size:.4g}", group.method, group.criterion, group.schedule]
        cells += [*([group.length] if several else []), f"{measure.show(group.mean)}{spread}{failed}"]
        batches = self._batches()
        if not group.values:
            return [*cells, *[UNKNOWN] * (4 + len(batches))]
        if self.rescored is not None:
            cells += self.rescored._words(group)
        cells += [f"{group.nonzero:.1%}", human_bytes(group.bytes), *(f"{group.speedup[b]:.2f}x" for b in batches)]
        if self.rescored is not None:
            return cells
        return [*cells, f"{group.costs['seconds']:.1f}", f"{group.costs['scoring_batches']:.0f}"]

    def _words(self, other: AxesGroup) -> list[str]:
        """The word error rate and the milliseconds an utterance of what another comparison of these runs groups."""
        keys = ("method", "criterion", "schedule", "size", "length")
        group = next(g for g in self.groups if all(getattr(g, key) == getattr(other, key) for key in keys))
        spread = "" if group.sd is None else f" ± {self.measure.difference(group.sd)}"
        (spent,) = group.latency_ms.values()
        return [f"{self.measure.show(group.mean)}{spread}", f"{spent:.1f} ({group.speed:.2f}x)"]

    def _batches(self) -> list[str]:
        return sorted({batch for group in self.groups for batch in group.speedup}, key=int)

    def _dense_model(self) -> dict[str, Any]:
        return next((run["model"]["dense"] for run in self.runs if "model" in run), {})

    # ---- files ------------------------------------------------------------------------------------------------------

    def fronts(self) -> dict[str, Any]:
        """The fronts by speed and by bytes: method, criterion, schedule, size and length of each result."""
        return {
            cost: [[g.method, g.criterion, g.schedule, g.size, g.length] for g in self.pareto(cost)] for cost in FRONTS
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = super().to_dict() | {"dense_model": self._dense_model()}
        if self.rescored is not None:
            words = self.rescored.to_dict()
            kept = ("metric", "greater_is_better", "dense", "groups", "pareto", "sentences", "claims")
            values["rescored"] = {key: words[key] for key in kept}
        return values

    def to_csv(self) -> str:
        """One line a run, the columns named in the first."""
        batches = self._batches()
        text = io.StringIO()
        speed = [f"speedup_batch_{batch}" for batch in batches]
        words = ["wer", "milliseconds"] if self.rescored is not None else []
        writer = csv.DictWriter(
            text, [*_COLUMNS, *words, *speed, *COSTS, "failed"], extrasaction="ignore", lineterminator="\n"
        )
        writer.writeheader()
        for run in self.runs:
            model = run.get("model", {})
            own = {f"speedup_batch_{batch}": value for batch, value in model.get("speedup", {}).items()}
            spoken = {key: run.get("rescoring", {}).get(key) for key in words}
            writer.writerow({**model, **own, **spoken, **run, **run["cost"]})
        return text.getvalue()

    def pictures(self) -> dict[str, Callable[[dict[str, Any], Path], Path]]:
        """Name to what draws it from a report."""
        from hfprune.report.axes import sizes_plot, speed_plot

        drawn = {"sizes.png": sizes_plot, "speed.png": speed_plot}
        if self.rescored is not None:
            drawn["wer.png"] = lambda report, path: sizes_plot(report["rescored"], path)
        return drawn


def _by_words(run: dict[str, Any]) -> dict[str, Any]:
    """A run's result with the word error rate for its value, and the hypotheses of an utterance as the batch timed."""
    dense, found = run["dense_rescoring"], run.get("rescoring")
    own = {"main_metric": "wer", "greater_is_better": False, "dense": dense["wer"], "value": None}
    if found is not None:
        batch = str(round(found["hypotheses"] / found["utterances"]))
        speed = {"speedup": {batch: found["speedup"]}, "latency_ms": {batch: found["milliseconds"]}}
        own |= {"value": found["wer"], "model": run["model"] | speed}
    return {key: value for key, value in run.items() if key != "dense_rescoring"} | own
