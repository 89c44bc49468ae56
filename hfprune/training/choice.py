"""`schedule: auto`: the schedule that suits a model and the length of its fine-tuning, and why."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from hfprune.config import PruningConfig
from hfprune.schedules import AUTO, advise


def family_of(model: nn.Module) -> str:
    """What the findings on schedules tell apart: `convolutional`, `transformer`, `language` or `other`.

    A model is convolutional where it has more convolutions over several places than parts named attention, and a
    language model where it has attention and reads words.
    """
    convolutions = sum(_over_places(module) for module in model.modules())
    attentions = sum("attention" in type(module).__name__.lower() for module in model.modules())
    if convolutions > attentions:
        return "convolutional"
    if not attentions:
        return "other"
    return "language" if _reads_words(model) else "transformer"


def decide(config: PruningConfig, model: nn.Module, args: TrainingArguments, rows: Any) -> tuple[PruningConfig, str]:
    """The configuration with a schedule in place of `auto`, and a sentence on the choice; empty where nothing was left
    open.

    Args:
        config: of which `schedule.kind` may be `auto`.
        model: still dense.
        args: say how long a phase is where the configuration does not.
        rows: of training, for phases whose length is said in optimizer steps.
    """
    if config.schedule.kind != AUTO:
        return config, ""
    epochs, steps = (config.recovery.value(name, 0) for name in ("epochs", "steps"))
    if epochs is None:
        steps = args.max_steps if steps is None and args.max_steps > 0 else steps
        batch = args.train_batch_size * args.gradient_accumulation_steps * max(1, args.world_size)
        known = hasattr(rows, "__len__") and steps is not None
        epochs = round(steps * batch / max(1, len(rows)), 2) if known else args.num_train_epochs
    # Where units go by an absolute number the ratio is the model's to tell, and decides nothing.
    ratio = 0.0 if config.is_structural and config.target.fraction is None else config.ratio
    kind, reason = advise(family_of(model), ratio, epochs, removal=config.is_structural)
    decided = config.model_copy(update={"schedule": config.schedule.decided(kind)})
    return decided, f"schedule auto: {kind}, because {reason} (arXiv 2508.13836)"


def _over_places(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd) and max(module.kernel_size) > 1


def _reads_words(model: nn.Module) -> bool:
    if not isinstance(model, PreTrainedModel):
        return any(isinstance(module, nn.Embedding) for module in model.modules())
    try:
        return isinstance(model.get_input_embeddings(), nn.Embedding)
    except NotImplementedError:
        return False
