"""What a trainer pushes to the Hub: its checkpoint with our card, report and pictures, in one commit."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, HfApi, ModelCard
from transformers.trainer_utils import HubStrategy

from hfprune.checkpoint.files import side_folder, write_text
from hfprune.checkpoint.metadata import block_of
from hfprune.errors import ConfigError, HfpruneError, ModelError
from hfprune.hub.card import CARD_FILE, PICTURES, REPORT_FILE, card_of
from hfprune.hub.push import open_repo, push_to_hub
from hfprune.profiling import measure
from hfprune.report.environment import environment
from hfprune.report.plots import sparsity_plot, trajectory_plot, units_plot
from hfprune.training.checkpoints.resume import ResumableTrainer
from hfprune.training.removal import example_of

if TYPE_CHECKING:
    from hfprune.training.phases import Phase
    from hfprune.training.trainer import PruningTrainer


class PublishingTrainer(ResumableTrainer):
    """Trainer's ways to the Hub (`push_to_hub=True`, `hub_strategy`, `push_to_hub()`) through our own push.

    Attributes:
        push_every_step: whether the checkpoint at the end of each pruning step is pushed and tagged.
        tell: given a line on what a push does.
    """

    push_every_step: bool = False
    tell: Callable[[str], None] | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes the repository and its branch; Trainer calls it at its start, so that a run fails before it begins."""
        if not self.is_world_process_zero():
            return
        private = self.args.hub_private_repo if private is None else private
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        self.hub_model_id = open_repo(name, private, self.args.hub_revision, token or self.args.hub_token)
        self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Saves into `args.output_dir` and pushes that folder: model, card, report and pictures, in one commit.

        Args:
            commit_message: of the commit.
            blocking: false pushes in the background.
            token: by default `args.hub_token`, else that of `hf auth login` or HF_TOKEN.
            revision: the branch; by default `args.hub_revision`, else main.
            private: whether the repository is private when it is made; by default `args.hub_private_repo`.
            card: as `create_model_card` takes it.

        Returns:
            The commit, or its future where `blocking` is false; None on all processes but the first.

        Raises:
            NotReachable: one line that says what arrived and what is missing; the same call goes on from there.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**card)
        options = {
            "private": self.args.hub_private_repo if private is None else private,
            "revision": revision or self.args.hub_revision,
            "token": token or self.args.hub_token,
            "message": commit_message,
            "tell": self.tell,
        }
        if blocking:
            return push_to_hub(self.args.output_dir, self.hub_model_id, **options)
        return HfApi().run_as_future(push_to_hub, self.args.output_dir, self.hub_model_id, **options)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Writes our card into `args.output_dir`, with the report and the pictures that it shows.

        Args:
            language, license, tags, model_name: of the card's metadata.
            finetuned_from: the base model's id, where the trainer does not know it.
            tasks: the first is the card's `pipeline_tag`.
            dataset_tags: the datasets' ids on the Hub.
            dataset, dataset_args: taken as Trainer takes them, and not shown: a card says what was measured.
        """
        if not self.is_world_process_zero():
            return
        if not _is_pruned(self):
            given = (language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args)
            super().create_model_card(*given)
            return
        self.base_model = self.base_model or finetuned_from
        name = model_name or (self.hub_model_id or str(Path(self.args.output_dir).absolute())).rpartition("/")[2]
        task = tasks[0] if isinstance(tasks, list) else tasks
        known = {"language": language, "license": license, "datasets": dataset_tags, "pipeline_tag": task}
        with side_folder(self.args.output_dir) as side:
            publication(self, Path(self.args.output_dir), side, name, tags, known)

    def push_checkpoint(self, folder: str) -> None:
        """What Trainer's `hub_strategy` asks for once a checkpoint is written; training goes on where it fails."""
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        state = {}
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            place = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else Path(folder).name
            state = {f"{place}/{path.name}": path for path in Path(folder).iterdir() if path.is_file()}
        self._push_folder(Path(folder), f"Training in progress, step {self.state.global_step}", None, state)

    def push_step(self: PruningTrainer, phase: Phase) -> None:
        """Pushes the checkpoint of a pruning step that has ended, where that is asked for, as a commit with a tag."""
        if not self.push_every_step or not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        message = f"Step {phase.number} of {len(self.phases)}: {self.method.words(self.achieved)}"
        self._push_folder(folder, message, step_tag(self.progress.record.measured, phase.target), {})

    def _push_folder(self, folder: Path, message: str, tag: str | None, state: dict[str, Path]) -> None:
        try:
            if self.hub_model_id is None:
                self.init_hf_repo()
            with tempfile.TemporaryDirectory() as place:
                if _is_pruned(self):
                    publication(self, folder, Path(place), self.hub_model_id.rpartition("/")[2])
                push_to_hub(
                    folder,
                    self.hub_model_id,
                    revision=self.args.hub_revision,
                    token=self.args.hub_token,
                    message=message,
                    tag=tag,
                    beside={path.name: path for path in Path(place).iterdir()} | state,
                    tell=self.tell,
                )
        except HfpruneError as error:
            warnings.warn(f"'{folder}' was not pushed, and training goes on: {error}", stacklevel=2)


def _is_pruned(trainer: PruningTrainer) -> bool:
    """Whether a card of ours would say the truth: a dense model in training gets Trainer's own."""
    return trainer.pruning is not None or block_of(trainer.accelerator.unwrap_model(trainer.model)) is not None


def step_tag(measured: str, target: float) -> str:
    """The tag of a pruning step, by its target as a recipe writes it: `ratio-0.8`, or `macs-0.5` for what is left."""
    return f"{measured}-{target if measured == 'ratio' else 1 - target:.4g}"


def publication(
    trainer: PruningTrainer,
    checkpoint: Path,
    folder: Path,
    name: str,
    tags: str | list[str] | None = None,
    metadata: dict[str, Any] | None = None,
) -> None:
    """Writes the report of a trainer, its pictures and its card into a folder.

    Args:
        trainer: says what was done and measured.
        checkpoint: its saved model.
        folder: where the files go.
        name: the model's.
        tags: more tags for the card.
        metadata: `license`, `language`, `datasets` and `pipeline_tag` of the card, where known.
    """
    report = _report(trainer)
    write_text(folder / REPORT_FILE, json.dumps(report, indent=2) + "\n")
    if report["sparsity"]:
        sparsity_plot(report, folder / "sparsity.png")
    if "removed" in report:
        units_plot(report, folder / "units.png")
    if any(step["metric"] for step in report["steps"]):
        trajectory_plot(report, folder / "trajectory.png")
    pictures = [picture for picture in PICTURES if (folder / picture).is_file()]
    known = {"repo": trainer.hub_model_id, "name": name, "recipe_yaml": None, "pictures": pictures}
    text = card_of(checkpoint, report, **known, **(metadata or {}))
    if tags:
        card = ModelCard(text)
        card.data.tags = list(dict.fromkeys([*card.data.tags, *([tags] if isinstance(tags, str) else tags)]))
        text = str(card)
    write_text(folder / CARD_FILE, text)


def _report(trainer: PruningTrainer) -> dict[str, Any]:
    """What the trainer knows: the dense model is gone, and what was not measured is left out."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    pruned: dict[str, Any] = {"metric": next((s.metric for s in reversed(trainer.steps) if s.metric), None) or {}}
    with suppress(ModelError):
        pruned |= measure(model, example_of(trainer), latency=False).to_dict()
    report = {
        "dense": {},
        "pruned": pruned,
        "steps": [step.to_dict() for step in trainer.steps],
        "sparsity": (block_of(model) or {}).get("sparsity", {}),
        "base_model": trainer.base_model,
        "seed": trainer.args.seed,
        "environment": environment(device, dtype),
    }
    if trainer.recovery is not None:
        report["main_metric"] = trainer.recovery.monitor.removeprefix("eval_")
    if trainer.pruning is None:
        return report
    return report | trainer.method.report() | {"recipe": {"pruning": trainer.pruning.model_dump(mode="json")}}


def check_pushing(trainer: PruningTrainer) -> None:
    """Refuses to push every step where no checkpoint is written that could be pushed."""
    if trainer.push_every_step and trainer.args.save_strategy == "no":
        raise ConfigError("push_every_step: pushes the checkpoint of each step, and save_strategy 'no' writes none")
