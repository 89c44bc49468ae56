"""A run beside a run: the same training around a copy of the model, of which nothing is saved, shown or logged."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from hfprune.strategy import Ice
from hfprune.training.callbacks import StopCallback
from hfprune.training.progress import PhaseProgress

if TYPE_CHECKING:
    from hfprune.training.trainer import PruningTrainer


def side_trainer(
    kind: type[PruningTrainer],
    trainer: PruningTrainer,
    strategy: Ice,
    train_dataset: Any,
    eval_dataset: Any,
    callbacks: list[Any],
) -> PruningTrainer:
    """A trainer like another one, around a copy of its model.

    Loss and teacher are those of the other; an optimizer that its user made stays behind, the arguments name one.

    Args:
        kind: the class of the trainer made.
        trainer: the other, before its first step.
        strategy: in place of the other's.
        train_dataset, eval_dataset: in place of the other's.
        callbacks: the only ones.
    """
    model = copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False))
    vars(model).pop("_is_accelerate_prepared", None)
    args = copy.copy(trainer.args)
    args.save_strategy, args.eval_strategy = type(args.save_strategy)("no"), type(args.eval_strategy)("no")
    args.logging_strategy = type(args.logging_strategy)("no")
    args.push_to_hub, args.load_best_model_at_end, args.report_to = False, False, []
    recovery = trainer.pruning.recovery.model_copy(
        update={"restore_best": eval_dataset is not None, "patience": None, "max_drop": None}
    )
    side = kind(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=trainer.data_collator,
        processing_class=trainer.processing_class,
        compute_metrics=trainer.compute_metrics,
        compute_loss_func=trainer.compute_loss_func,
        preprocess_logits_for_metrics=trainer.preprocess_logits_for_metrics,
        callbacks=callbacks,
        pruning=trainer.pruning.model_copy(update={"strategy": strategy, "recovery": recovery}),
    )
    side.pop_callback(PhaseProgress)
    side.pop_callback(StopCallback)
    side.teacher, side.compute_loss = trainer.teacher, trainer.compute_loss
    return side
