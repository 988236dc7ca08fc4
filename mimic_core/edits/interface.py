"""Edits inside attention: transformers' `AttentionInterface` is wrapped while any edit needs it.

A model calls `AttentionInterface.get_interface` to get its attention function at every attention call. The wrapper
returns a function that looks for a slot of edits in the `__dict__` of the calling module. Without a slot, it calls the
original function. So masks, configs, the vision tower and cross-attention are not affected.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from ..errors import PatchStateError, UnsupportedModelError
from .call import UNUSUAL, AttentionCall, Plan, SDPACall, shifted
from .eager import EagerFrame, Recipe
from .eager_frames import frame_of
from .entry import Entry
from .named import SDPA, TORCHS, TORCHS_FILE, Called, Named, by_nobody, frames, is_sdpa_of_torch
from .paths import Paths
from .replaced import ReplacedMethod
from .signatures import reading

SLOT = "_mimic_core_sites"
"""Key of a module's slot in its `__dict__`. So deepcopy and pickle include the slot, and state_dict does not."""


class AttentionSlot:
    """The edits inside the attention of one module, in order. The wrapper stays while any slot exists.

    Args:
        own: The module does not ask the interface. Where it calls an attention function by name, or how it was seen to
            compute its attention by itself.

    Attributes:
        plan: The edits of a call. It is made when edits change, because making it at each decoded token is too slow.
            None if no edit is active.
        paths: See `frame_of`. Not in copies and pickles.
    """

    plan: Plan | None

    def __init__(self, own: Recipe | Named | None = None) -> None:
        self.own, self.paths = own, Paths()
        self.hold(())
        self._retain()

    def _retain(self) -> None:
        self._release = (self.own or wrapper).retain(self)

    def hold(self, entries: tuple[Entry, ...]) -> None:
        self.entries = entries
        self.refresh()

    def refresh(self) -> None:
        """Read again which edits are active."""
        on = tuple(e for e in self.entries if e.owner.active)
        self.plan = Plan(on) if on else None
        # If several layers share the module, each call must find out which of them runs.
        self.asks = any(e.scope is not None for e in on)

    def asked(self) -> Plan | None:
        """The plan of this call, if `asks` is True."""
        self.refresh()
        if not self.asks:
            return self.plan
        active = tuple(e for e in self.entries if e.active)
        return Plan(active) if active else None

    def release(self) -> None:
        self._release()

    def __getstate__(self) -> dict[str, Any]:
        return {"entries": self.entries, "own": self.own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy or a loaded pickle of a patched model is patched too, so it also needs the wrapper. The owners of its
        # entries may not be complete yet, so the first call makes the plan.
        self.entries, self.own, self.paths = state["entries"], state["own"], Paths()
        self.plan, self.asks = Plan(()), True
        self._retain()


class Attending:
    """Stands around the forward of a module that attends by itself: by a function, or by products and a softmax.

    Attributes:
        owner: Whose edits it serves.
        sees_calls: See `EditedForward.run`.
    """

    sees_calls = True

    def __init__(self, owner: object, slot: AttentionSlot, module: nn.Module) -> None:
        self.owner, self._slot, self._module = owner, slot, module

    @property
    def runs_uncompiled(self) -> bool:
        """See `EditedForward.run`."""
        own = self._slot.own
        seen = isinstance(own, Named) and own.is_sdpa and not isinstance(self._module, nn.MultiheadAttention)
        return self._slot.asks or not seen

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        around, slot = frames(), self._slot
        plan = slot.asked() if slot.asks else slot.plan
        if not isinstance(slot.own, Recipe) or plan is None:
            frame = _Frame(slot, self._module, args, kwargs, plan is not None)
            frame.look()
            around.append(frame)
        elif around and isinstance(around[-1], EagerFrame) and around[-1].module is self._module:
            around.append(around[-1])  # it has several edits, and something stands around it for each
        else:
            if _may_be_one_kernel(self._module):
                raise _one_kernel(self._module)
            frame = frame_of(self._module, slot.own, plan, args, kwargs, slot.paths)
            frame.begin()
            around.append(frame)

    def leave(self, raised: bool) -> None:
        around = frames()
        frame = around.pop()
        if isinstance(frame, EagerFrame):
            if around and around[-1] is frame:
                return
            frame.leave()
        elif isinstance(frame, _Frame):
            frame.look_away()
        else:
            return
        if not raised:
            frame.end()

    def traced(self) -> Traced | None:
        plan = self._slot.plan
        return None if plan is None else Traced(plan, self._module)


class Traced(TorchFunctionMode):
    """Stands around such a forward while torch.compile traces it, so that the edits of its SDPA are in the graph."""

    def __init__(self, plan: Plan, module: nn.Module) -> None:
        super().__init__()
        self._plan, self._module, self._calls = plan, module, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not TORCHS:
            return func(*args, **(kwargs or {}))
        self._calls += 1
        call = SDPACall(func, self._module, *args, **(kwargs or {}))
        # Otherwise `end` raises. To raise here would only let torch.compile look for another way.
        return call.answer(self._plan) if call.query.ndim == 4 else func(*args, **(kwargs or {}))

    def end(self) -> None:
        """The forward ends."""
        if self._calls != 1:
            raise PatchStateError(
                f"the edits inside the attention of {type(self._module).__name__} can't be made in code made by "
                f"torch.compile: it calls torch's SDPA {self._calls} times; run the model uncompiled"
            )


class _Seeing(TorchFunctionMode):
    """Shows a forward the calls of torch's SDPA that go by no name."""

    def __init__(self, frame: _Frame) -> None:
        super().__init__()
        self._frame = frame

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What goes by a name is taken by the frame, and then it is nobody's.
        if func is not TORCHS or frames()[-1] is not self._frame:
            return func(*args, **(kwargs or {}))
        return self._frame.attend(Called(SDPA, TORCHS_FILE, func), args, kwargs or {})


class _Frame:
    """One forward of such a module. It has edits, or those of its slot are of another layer or pass."""

    __slots__ = ("_given", "_has_edits", "_has_grad", "_module", "_ran", "_seeing", "_slot")

    def __init__(
        self, slot: AttentionSlot, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], has_edits: bool
    ) -> None:
        self._slot, self._module, self._ran, self._has_edits = slot, module, False, has_edits
        self._given = args, kwargs
        self._has_grad = torch.is_grad_enabled()
        self._seeing: _Seeing | None = None

    def look(self) -> None:
        """Begin to look for what goes by no name, if it does in this module."""
        if isinstance(self._slot.own, Named) and self._slot.own.is_hidden:
            self._seeing = _Seeing(self)
            self._seeing.__enter__()

    def look_away(self) -> None:
        if self._seeing is not None:
            self._seeing.__exit__(None, None, None)

    @property
    def is_on(self) -> bool:
        return self._slot.plan is not None

    def attend(self, called: Called, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        slot = self._slot
        plan = slot.asked() if slot.asks else slot.plan
        if plan is None:
            self._ran = True
            return called.original(*args, **kwargs)
        call = reading(called, self._module, args, kwargs, *self._given)
        odd = ""
        if self._ran:
            odd = "is called several times in one forward of it, and it is not known which call is its attention"
        elif isinstance(call, str):
            odd = call
        elif self._has_grad and not torch.is_grad_enabled():
            odd = "runs in reentrant gradient checkpointing inside of it, which would run it again without the edits"
        if odd or isinstance(call, str):
            raise UnsupportedModelError(
                f"the edits inside the attention of {type(self._module).__name__} can't be made: {called.kind} {odd}"
            )
        self._ran = True
        with by_nobody():
            return call.answer(plan)

    def end(self) -> None:
        """The forward ends.

        Raises:
            PatchStateError: there are edits, and the module called no function, or torch ran it as one kernel.
        """
        around = frames()[-1:]
        if self._ran and around and isinstance(around[0], _Frame) and around[0]._slot is self._slot:
            around[0]._ran = True  # the module has several edits, and something stands around it for each
        if self._ran or not self._has_edits or self._slot.plan is None:
            return
        if _may_be_one_kernel(self._module):
            raise _one_kernel(self._module)
        raise PatchStateError(
            f"the edits inside the attention of {type(self._module).__name__} can't be made: it attends another way "
            f"than when it was looked at, as some do if there is padding or for a dtype; let it be looked at on inputs "
            f"like these, with adapter=mimic_core.GenericAdapter(example=...), or give it others"
        )


def _may_be_one_kernel(module: nn.Module) -> bool:
    """Whether torch may run a module as one kernel, in which it calls no function that can be seen."""
    if not isinstance(module, nn.MultiheadAttention) or module.training:
        return False
    return module.batch_first and torch.backends.mha.get_fastpath_enabled()


def _one_kernel(module: nn.Module) -> PatchStateError:
    return PatchStateError(
        f"the edits inside the attention of {type(module).__name__} can't be made: in eval mode, torch runs it as one "
        f"kernel, which gives other bits too; call torch.backends.mha.set_fastpath_enabled(False) first"
    )


def _attention(
    base: Callable[..., Any],
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The attention function that a model gets: `base`, with the edits of the calling module if it has any.

    transformers' models pass these arguments by name or in this order. Some pass the mask by keyword.
    """
    slot: AttentionSlot | None = module.__dict__.get(SLOT)
    plan = None if slot is None else slot.plan
    if plan is None:
        return base(module, query, key, value, attention_mask, *args, **kwargs)
    # A fast path for the most common patch, because the overhead matters in decoding.
    if plan.only_shift is not None and implementation == "sdpa" and base is sdpa_attention_forward and not args:
        usual = UNUSUAL.isdisjoint(kwargs) and is_sdpa_of_torch()
        out = shifted(plan.only_shift, module, query, key, value, attention_mask, kwargs) if usual else None
        if out is not None:
            return out, None
    if slot is not None and slot.asks and (plan := slot.asked()) is None:
        return base(module, query, key, value, attention_mask, *args, **kwargs)
    if args:
        raise UnsupportedModelError(
            f"{type(module).__name__} passes {len(args)} arguments after the mask to its attention by position; only "
            f"keyword arguments are supported there"
        )
    call = AttentionCall(base, implementation, module, query, key, value, attention_mask, kwargs)
    return call.run(plan)


def _wrap(original: Callable[..., Any], in_use: Callable[[], bool]) -> Callable[..., Any]:
    def get_interface(self: AttentionInterface, attn_implementation: str, default: Callable[..., Any]) -> Any:
        base = original(self, attn_implementation, default)
        return partial(_attention, base, attn_implementation or "eager") if in_use() else base

    return get_interface


wrapper = ReplacedMethod(lambda: AttentionInterface, "get_interface", _wrap)
