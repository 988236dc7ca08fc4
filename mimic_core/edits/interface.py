"""Edits inside attention: transformers' `AttentionInterface` is wrapped while any edit needs it.

A model calls `AttentionInterface.get_interface` to get its attention function at every attention call. The wrapper
returns a function that looks for a slot of edits in the `__dict__` of the calling module. Without a slot, it calls the
original function. So masks, configs, the vision tower and cross-attention are not affected.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from ..errors import UnsupportedModelError
from .call import UNUSUAL, AttentionCall, Plan, is_sdpa_of_torch, shifted
from .entry import Entry
from .replaced import ReplacedMethod

SLOT = "_mimic_core_sites"
"""Key of a module's slot in its `__dict__`. So deepcopy and pickle include the slot, and state_dict does not."""


class AttentionSlot:
    """The edits inside the attention of one module, in order. The wrapper stays while any slot exists.

    Attributes:
        plan: The edits of a call. It is made when edits change, because making it at each decoded token is too slow.
            None if no edit is active.
    """

    plan: Plan | None

    def __init__(self) -> None:
        self.hold(())
        self._release = wrapper.retain(self)

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
        return {"entries": self.entries}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy or a loaded pickle of a patched model is patched too, so it also needs the wrapper. The owners of its
        # entries may not be complete yet, so the first call makes the plan.
        self.entries = state["entries"]
        self.plan, self.asks = Plan(()), True
        self._release = wrapper.retain(self)


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
