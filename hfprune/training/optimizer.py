"""Optimizers from phase to phase: one that the user gave is begun anew, and none trains what the model has no more."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from hfprune.errors import ConfigError, ModelError
from hfprune.lowrank.factor import of_dense_layer
from hfprune.structure.plan import Plan
from hfprune.structure.record import dense_path


class OwnOptimizer:
    """An optimizer, and perhaps a scheduler, that the user made: every phase begins with them as they were given.

    Args:
        optimizer, scheduler: as Trainer takes them; either may be None.
        model: whose parameters the optimizer holds.
        removal: whether the model gets smaller, so that the parameters are replaced.

    Raises:
        ConfigError: parameters are to be replaced, and the optimizer holds others than the model's.
    """

    def __init__(self, optimizer: Any, scheduler: Any, model: nn.Module, removal: bool):
        self.removal = removal
        self.optimizer_state = copy.deepcopy(optimizer.state_dict()) if optimizer else None
        self.scheduler_state = copy.deepcopy(scheduler.state_dict()) if scheduler else None
        self.group_of: dict[str, int] = {}
        if optimizer and removal:
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            for number, group in enumerate(optimizer.param_groups):
                for parameter in group["params"]:
                    if id(parameter) not in names:
                        raise ConfigError(
                            "optimizers: the optimizer holds a parameter that is not the model's, so that it can't "
                            "follow when the model gets smaller; leave it out, and name it in the arguments"
                        )
                    self.group_of[names[id(parameter)]] = number

    def renewed(self, optimizer: Any, scheduler: Any, model: nn.Module, plan: Plan | None) -> tuple[Any, Any]:
        """Optimizer and scheduler for a new phase; None stands for those that Trainer makes."""
        if self.optimizer_state is None:
            optimizer = None
        else:
            optimizer = getattr(optimizer, "optimizer", optimizer)
            optimizer.state.clear()
            if self.removal:
                self._follow(optimizer, model, plan or Plan())
            else:
                optimizer.load_state_dict(copy.deepcopy(self.optimizer_state))
        if self.scheduler_state is None:
            scheduler = None
        else:
            scheduler.load_state_dict(copy.deepcopy(self.scheduler_state))
        return optimizer, scheduler

    def _follow(self, optimizer: Any, model: nn.Module, plan: Plan) -> None:
        """Puts the model's parameters as they are now in their groups, which get their first settings back."""
        members: list[list[nn.Parameter]] = [[] for _ in optimizer.param_groups]
        for name, parameter in model.named_parameters():
            place = dense_path(plan, name)
            number = self.group_of.get(place, self.group_of.get(of_dense_layer(place)))
            if number is not None:
                members[number].append(parameter)
        for group, saved, now in zip(
            optimizer.param_groups, self.optimizer_state["param_groups"], members, strict=True
        ):
            group["params"][:] = now
            group.update({key: copy.deepcopy(value) for key, value in saved.items() if key != "params"})


def check_live(model: nn.Module, optimizer: Any, *, all_of_them: bool) -> None:
    """Refuses an optimizer that holds on to what is gone, or misses what is there.

    Args:
        model: what is trained.
        optimizer: what trains it.
        all_of_them: whether every parameter that takes a gradient must be in the optimizer.

    Raises:
        ModelError: it holds another tensor than the model's, or misses one.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if dead := held - names.keys():
        raise ModelError(f"the optimizer holds {len(dead)} parameters that the model does not have")
    missed = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if missed and all_of_them:
        raise ModelError(f"the optimizer misses {len(missed)} parameters of the model, the first '{missed[0]}'")
