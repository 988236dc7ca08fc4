"""Data parallel training: that the gradients of a stack are averaged over the processes."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakSet

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import PatchStateError
from .heads.stack import FORWARD_BEGINS
from .parallel import is_sharded

_WRAP = "mimic_core.patch(model, DistributedDataParallel(shifts))"
_HOLD = (
    f"put fully_shard around a module that holds the stack and runs the model, such as the model after "
    f"`model.shifts = shifts`; or keep the stack whole, as it is a few kilobytes: {_WRAP}"
)
_warned: WeakSet[nn.Module] = WeakSet()


class Averaging:
    """Called when a forward begins in a model with a stack.

    DistributedDataParallel averages in the backward what it was told of in the forward, so the one around the stack
    is called here. A copy of a model has no such wrapper. The fully_shard around a module that holds the stack and runs
    the model has gathered the parameters by then, and averages their gradients itself.

    Args:
        shifts: The stack, or a set of them.
        wrapper: The DistributedDataParallel around it; None: there is none.

    Raises:
        PatchStateError: fully_shard is around the stack itself, or the wrapper has an option that needs the stack's
            forward.
    """

    def __init__(self, shifts: nn.Module, wrapper: DistributedDataParallel | None) -> None:
        self._was_sharded = is_sharded(shifts)
        if self._was_sharded and _gathers_in_its_own_forward(shifts):
            raise PatchStateError(
                f"fully_shard gathers the parameters in the forward of what it is around, and a stack's forward is "
                f"never called: {_HOLD}"
            )
        if wrapper is not None and (wrapper.static_graph or wrapper.mixed_precision is not None):
            raise PatchStateError(
                "static_graph and mixed_precision of DistributedDataParallel need the forward of the stack, which is "
                "never called: leave them out, or wrap a module that holds the stack and runs the model"
            )
        self._shifts, self._wrapper = shifts, wrapper
        self._wrapped = _trainable(shifts)
        self._is_compiled = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_wrapper": None}

    def __call__(self, traced: bool) -> None:
        with_gradients = torch.is_grad_enabled()
        if not with_gradients and not self._was_sharded:
            return  # first, because the next question takes 5 microseconds of each decoded token
        in_processes = distributed.is_available() and distributed.is_initialized()
        if not (in_processes or self._was_sharded or self._wrapper is not None):
            return  # to look at all parameters takes 50 microseconds
        if (with_gradients or self._was_sharded) and is_sharded(self._shifts):
            raise PatchStateError(f"the parameters of these shifts are sharded while the model runs: {_HOLD}")
        trainable = _trainable(self._shifts) if with_gradients else None
        if not trainable:
            return
        if self._wrapper is not None:
            if trainable != self._wrapped:
                raise PatchStateError(
                    "parameters of the shifts were frozen or unfrozen after the patch, which their "
                    "DistributedDataParallel does not follow: make a new one, and patch with it"
                )
            self._is_compiled |= traced
            if self._is_compiled:
                raise PatchStateError(
                    "code made by torch.compile does not call the DistributedDataParallel around these shifts: put it "
                    "around a module that holds the shifts and runs the model, or run the model uncompiled"
                )
            self._wrapper(FORWARD_BEGINS)
            return
        if not in_processes or distributed.get_world_size() == 1:
            return
        # The DistributedDataParallel in whose forward this code runs.
        active: nn.Module | None = getattr(DistributedDataParallel, "_active_ddp_module", None)
        if active is None and not self._was_sharded and self._shifts not in _warned:
            _warned.add(self._shifts)
            warnings.warn(
                f"nothing is seen to average the gradients of these shifts over {distributed.get_world_size()} "
                f"processes: use {_WRAP}, unless your code does it",
                stacklevel=2,
            )
        if active is not None and not trainable <= _trainable(active):
            raise PatchStateError(
                f"this forward runs in a DistributedDataParallel that does not hold the shifts, so their gradients "
                f"would not be averaged over the processes: use {_WRAP}"
            )


def _gathers_in_its_own_forward(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule  # it takes a moment to import

    return any(isinstance(x, FSDPModule) for x in module.modules())


def _trainable(module: nn.Module) -> set[int]:
    return {id(x) for x in module.parameters() if x.requires_grad}
