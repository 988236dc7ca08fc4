"""Whether anybody trains the shifts in a model: an optimizer made of the model's parameters has none of theirs."""

from __future__ import annotations

import gc
import warnings
from typing import Any
from weakref import WeakSet

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from .errors import PatchStateError
from .heads import ShiftStack

_asked: WeakSet[ShiftStack] = WeakSet()
_hook: RemovableHandle | None = None


def watch(shifts: ShiftStack) -> None:
    """Look before each optimizer's step, until it is known which optimizer has a stack's parameters."""
    global _hook
    _asked.add(shifts)
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_before_step)


def forget(shifts: ShiftStack) -> None:
    """The stack has left the model, or has its optimizer."""
    global _hook
    _asked.discard(shifts)
    if not _asked and _hook is not None:
        _hook.remove()
        _hook = None


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for shifts in list(_asked):
        waiting = [x for x in shifts.parameters() if x.requires_grad and x.grad is not None]
        if not waiting:
            continue
        wanted = {id(x) for x in waiting}
        # Another optimizer may have them: a search of all objects, once a stack.
        others = (x for x in gc.get_objects() if issubclass(type(x), Optimizer))
        if _has(optimizer, wanted) or any(_has(other, wanted) for other in others):
            forget(shifts)
            continue
        problem = (
            f"the {shifts.name!r} shifts in the model have gradients, but no optimizer has their parameters: "
            f"model.parameters() does not have them. Give shifts.parameters() to the optimizer, or train with "
            f"mimic_core.integrations.trainer.ShiftTrainer, or give a module that holds the stack to another trainer, "
            f"or freeze the stack with shifts.requires_grad_(False)"
        )
        if not any(x.grad is not None for group in optimizer.param_groups for x in group["params"]):
            raise PatchStateError(f"this {type(optimizer).__name__} has nothing to train: {problem}")
        warnings.warn(problem, stacklevel=2)  # parameters of its own that stand for them can't be told from others
        forget(shifts)


def _has(optimizer: Optimizer, wanted: set[int]) -> bool:
    return any(id(x) in wanted for group in optimizer.param_groups for x in group["params"])
