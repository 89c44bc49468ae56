"""ShardingTrainer: a Trainer whose model is sharded by FSDP2 from the first score to the last checkpoint."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import (
    DistributedType,
    DynamoBackend,
    FullyShardedDataParallelPlugin,
    parse_flag_from_env,
    save_fsdp_optimizer,
)
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import PreTrainedModel, Trainer
from transformers.trainer import SCHEDULER_NAME

from hfprune.checkpoint.load import from_pretrained
from hfprune.checkpoint.metadata import refresh
from hfprune.errors import ConfigError
from hfprune.masks import MaskSet, ShardedMaskSet
from hfprune.sharded import ShardedPruner
from hfprune.sharding import AcrossProcesses, put_back, reshard
from hfprune.training.checkpoints.resume import ResumableTrainer
from hfprune.training.checkpoints.state import Held, held_by
from hfprune.training.rehearsal import input_embeddings
from hfprune.training.shards.whole import copied, dealt_out, empty_out, fill, filled, gathered, skeleton_of

if TYPE_CHECKING:
    from hfprune.training.trainer import PruningTrainer


_FLAT = "fsdp_version: 1 packs parameters into flat ones, in which masks can't find theirs; set it to 2"
_EMPTY = (
    "fsdp_cpu_ram_efficient_loading: true leaves the model empty in all processes but one; set it to false: the files "
    "are mapped, and processes share their memory"
)
_RENAMED = (
    "fsdp_activation_checkpointing: true renames the parameters; set it to false, and training.gradient_checkpointing "
    "to true"
)
_PUSHED = (
    "this run shards the model, and its card is measured on a whole one; push the folder afterwards: hfprune push "
    "FOLDER REPOSITORY"
)
_WHOLE = "looks at whole tensors, and this run shards them; use one process or DDP"
_OFFLOADED = "fsdp_offload_params: true is not tested with masks; set it to false"


class Shards:
    """What a trainer needs beside its sharded model: its processes, and the model's skeleton.

    Args:
        trainer: whose model is still whole.
    """

    def __init__(self, trainer: PruningTrainer):
        self.trainer = trainer
        self.across = AcrossProcesses(trainer.args.device)
        self.skeleton = skeleton_of(trainer.model)
        self.folder = Path(trainer.args.output_dir)
        self.begun = False
        self.groups: list[list[nn.Parameter]] = []

    def begin(self) -> None:
        """Shards the model; every process keeps the parts that lie there."""
        if self.begun:
            return
        trainer = self.trainer
        plugin: FullyShardedDataParallelPlugin = trainer.accelerator.state.fsdp_plugin
        if plugin.transformer_cls_names_to_wrap is None:
            plugin.transformer_cls_names_to_wrap = repeated_classes(trainer.model)
        self._shard(trainer.model)
        trainer.masks = self.own_masks(trainer.masks).bind(trainer.model)
        if trainer.pruning is not None and isinstance(trainer.pruner, ShardedPruner):
            trainer.pruner.follow(trainer.model)
        self.begun = True

    def _shard(self, model: nn.Module) -> None:
        # Needed for sharded models alone.
        from accelerate.utils import fsdp2_prepare_model

        trainer = self.trainer
        trainer.model = trainer.model_wrapped = fsdp2_prepare_model(trainer.accelerator, model)
        trainer.callback_handler.model = trainer.model
        trainer.accelerator._models.clear()

    def begin_anew(self) -> None:
        """Shards a copy of the skeleton in the model's place, with its values, or to be loaded where it has none."""
        full = {}
        for parameter in self.skeleton.parameters():
            values = torch.empty_like(parameter, device="cpu") if parameter.is_meta else parameter.detach()
            full[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
        self._shard(copied(self.skeleton, full))

    @contextmanager
    def cutting(self) -> Iterator[None]:
        """The skeleton with all its values in all processes; what has become of it is sharded in the model's place."""
        self.begin()
        fill(self.skeleton, self.trainer.model, self.across, True, self.folder)
        try:
            yield
            self.begin_anew()
        finally:
            empty_out(self.skeleton)

    def own_masks(self, masks: MaskSet) -> ShardedMaskSet:
        """The parts of whole masks that lie here."""
        return ShardedMaskSet.of_whole(masks, self.trainer.model, self.across)

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The model with all its values in the processes that save, with none in the others; all take part."""
        with filled(self.skeleton, self.trainer.model, self.across, self.trainer.args.should_save, self.folder):
            yield self.skeleton

    def copied(self, *, share_config: bool) -> nn.Module:
        """A copy of the model with all its values in the processes that save, mapped from a file; all take part."""
        found = skeleton_of(self.skeleton, share_config=share_config)
        fill(found, self.trainer.model, self.across, self.trainer.args.should_save, self.folder)
        return found

    def whole_masks(self) -> MaskSet:
        """The whole masks in the processes that save; all take part."""
        masks = self.trainer.masks
        return masks.joined(self.trainer.args.should_save) if isinstance(masks, ShardedMaskSet) else MaskSet({})

    def gather(self, held: Held) -> Held:
        """The whole of what every process holds a part of, in the processes that save."""
        args, like = self.trainer.args, self.trainer.model.state_dict()
        to = {"like": like, "across": self.across, "keep": args.should_save, "folder": self.folder}
        best = None if held.best is None else gathered(held.best, **to)
        return Held(self.whole_masks(), best, gathered(held.history, **to))

    def load(self, folder: str) -> None:
        """Fills the model from a checkpoint, which the first process reads and deals out."""
        trainer, state = self.trainer, {}
        with self.across.together():
            if trainer.args.process_index == 0:
                state = self._read(folder).state_dict()
        like = trainer.model.state_dict()
        put_back(trainer.model, {name: dealt_out(state.get(name), value) for name, value in like.items()})

    def _read(self, folder: str) -> nn.Module:
        skeleton = self.skeleton
        if isinstance(skeleton, PreTrainedModel):
            return type(skeleton).from_pretrained(folder, dtype=skeleton.dtype)
        empty = skeleton_of(skeleton).to_empty(device="cpu")
        return from_pretrained(folder, empty, check=False)

    def renew(self, optimizer: Any) -> None:
        """Puts the model's own parameters into its optimizer again.

        accelerate tells parameters apart by where they lie, and parts without rows lie nowhere.
        """
        for group, parameters in zip(optimizer.param_groups, self.groups, strict=True):
            group["params"][:] = parameters


class ShardingTrainer(ResumableTrainer):
    """The part of PruningTrainer that shards its model where the launcher asks for FSDP2, before it is scored or run.

    The model is never whole in one process again: checkpoints are gathered a tensor at a time, through a file.

    Raises:
        ConfigError: the launcher asks for what can't be followed on shards.
    """

    shards: Shards | None = None
    held: Held | None = None
    """While a checkpoint is written, what belongs to it beside the model."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled:
            check_plugin(self)
            self.shards = Shards(self)
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise ConfigError(
                "deepspeed_config.zero_stage: 3 cuts parameters into pieces that masks can't follow; FSDP2 shards them "
                "too (recipes/accelerate/fsdp2.yaml), or use stage 1 or 2"
            )

    def create_accelerator_and_postprocess(self) -> None:
        asked = parse_flag_from_env("ACCELERATE_USE_FSDP")
        if asked:  # accelerate itself fails over these where there are CPUs alone
            _refuse(_FLAT, os.environ.get("FSDP_VERSION", "1") != "2")
            _refuse(_EMPTY, parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"))
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if asked and state.distributed_type == DistributedType.MULTI_CPU:
            # accelerate shards on accelerators alone, and on CPUs would train whole copies without a word.
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True
        if self.is_fsdp_enabled and self.args.push_to_hub:  # before Trainer makes the repository
            raise ConfigError(f"training.push_to_hub: {_PUSHED}")

    def begin_sharding(self) -> None:
        """Shards the model, where it is to be sharded."""
        if self.shards is not None:
            self.shards.begin()

    def own_masks(self, masks: MaskSet) -> MaskSet:
        """The masks as this process holds them."""
        return masks if self.shards is None else self.shards.own_masks(masks)

    @contextmanager
    def whole_model(self) -> Iterator[nn.Module]:
        """The model, of a sharded one its whole in the processes that save; all take part."""
        with nullcontext(self.model) if self.shards is None else self.shards.whole() as model:
            yield model

    def copied_model(self) -> nn.Module:
        """A copy of the model on the CPU, of a sharded one its whole in the processes that save; all take part."""
        if self.shards is None:
            return copy.deepcopy(self.model).cpu()
        self.begin_sharding()
        return self.shards.copied(share_config=False)

    def end_sharding(self) -> None:
        """Leaves model and masks whole in the processes that save, where they are mapped from a file, with no values
        in the others. There is no training after it."""
        self.begin_sharding()
        masks, self.model = self.shards.whole_masks(), self.shards.copied(share_config=True)
        self.model_wrapped, self.shards = self.model, None
        if self.args.should_save:
            self.masks = masks.bind(self.model)
            refresh(self.model, masks)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.begin_sharding()
        return super().train(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.begin_sharding()
        if self.shards is not None and not self.accelerator._models:
            self.accelerator._models.append(self.model)  # it is prepared; accelerate refuses to do it without optimizer
        # Before it has trained, DeepSpeed evaluates in stage 3 alone; in the others the model is whole, as under DDP.
        plain = self.is_deepspeed_enabled and self.deepspeed is None
        self.is_deepspeed_enabled = self.is_deepspeed_enabled and not plain
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self.is_deepspeed_enabled = self.is_deepspeed_enabled or plain

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if self.shards is not None:
            reshard(self.model)
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.shards is not None and self.shards.begun:
            self.shards.groups = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.shards is not None and self.shards.begun:
            self.shards.renew(self.optimizer)
        return super().create_scheduler(num_training_steps, optimizer)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.is_deepspeed_enabled and self.shards is None:
            self._save(output_dir)  # in stages 1 and 2 every process holds the whole model
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
            return
        if self.shards is None:
            super().save_model(output_dir, _internal_call)
            return
        self.begin_sharding()
        masks = self.shards.whole_masks()
        with self.shards.whole() as model:
            if self.args.should_save:
                self.write_model(output_dir or self.args.output_dir, model, masks)
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.shards is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # Trainer would write the model a second time, pickled.
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        self.accelerator.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        held = held_by(self)
        self.held = held if self.shards is None else self.shards.gather(held)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.held = None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.shards is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.shards.load(resume_from_checkpoint)


def repeated_classes(model: nn.Module) -> list[str]:
    """Names of the classes of a model's blocks, which are gathered one at a time while it runs.

    They are what stands more than once in an outermost list of modules. transformers' own names (`_no_split_modules`)
    are of modules that must lie on one device; among them are some that hold the embeddings, and of timm's the model.
    """
    embeddings = input_embeddings(model)
    found: list[str] = []

    def look(module: nn.Module) -> None:
        for child in module.children():
            classes = [type(part) for part in child.children() if any(True for _ in part.children())]
            if isinstance(child, nn.ModuleList | nn.Sequential) and len(classes) > len(set(classes)):
                repeated = {kind for kind in classes if classes.count(kind) > 1}
                whole = all(part is not embeddings for part in child.modules())
                found.extend(sorted(kind.__name__ for kind in repeated) if whole else ())
            else:
                look(child)

    look(model)
    return list(dict.fromkeys(found))


def _refuse(words: str, found: bool) -> None:
    if found:
        raise ConfigError(f"fsdp_config.{words}")


def check_plugin(trainer: Trainer) -> None:
    """Refuses settings of FSDP that masks can't follow.

    Raises:
        ConfigError: one line that names the setting.
    """
    plugin: FullyShardedDataParallelPlugin = trainer.accelerator.state.fsdp_plugin
    _refuse(_FLAT, plugin.fsdp_version != 2)
    _refuse(_EMPTY, bool(plugin.cpu_ram_efficient_loading))
    _refuse(_RENAMED, bool(plugin.activation_checkpointing))
    _refuse(_OFFLOADED, isinstance(plugin.cpu_offload, CPUOffloadPolicy))
    if trainer.args.torch_compile or trainer.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ConfigError("training.torch_compile: is not tested with a model that this run shards; set it to false")
    for name in ("fp16_full_eval", "bf16_full_eval"):
        if getattr(trainer.args, name):
            raise ConfigError(f"training.{name}: would change the parts that masks hold on to; leave it out")
    if hasattr(trainer.model, "peft_config"):
        raise ConfigError("training: adapters are not tested with a model that this run shards; use one process or DDP")


def check_pruning(trainer: PruningTrainer) -> None:
    """Refuses, in a run that shards, what needs the model whole while it runs.

    Raises:
        ConfigError: one line that names the key.
    """
    if trainer.pruning is not None and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        if trainer.pruning.strategy is not None:
            raise ConfigError(f"pruning.strategy: ice {_WHOLE}")
        if "rank" in trainer.pruning.granularities:
            raise ConfigError(f"pruning.granularity: rank {_WHOLE}")
    criterion = trainer.pruning.criterion_name if trainer.pruning is not None else ""
    if trainer.is_deepspeed_enabled and criterion == "movement":
        raise ConfigError(
            "pruning.criterion: 'movement' adds up gradients while the model trains, and DeepSpeed keeps them to "
            "itself; use snip or taylor"
        )
    if trainer.shards is None:
        return
    if trainer.push_every_step:
        raise ConfigError(f"push_every_step: {_PUSHED}")
    if trainer.pruning is None:
        return
    if trainer.pruning.export_sizes is not None:
        raise ConfigError("pruning.export_sizes: is not tested where this run shards the model; use one process or DDP")
    whole = {"distill": "the teacher is a whole copy", "max_drop": "the way back needs a whole copy"}
    for name, reason in whole.items():
        if getattr(trainer.pruning.recovery, name) is not None:
            raise ConfigError(
                f"pruning.recovery.{name}: {reason} in every process, and this run shards the model; use one process "
                f"or DDP"
            )
