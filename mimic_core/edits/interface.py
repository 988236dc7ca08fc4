"""The way into attention: transformers' `AttentionInterface`, wrapped while any site is in use.

A model asks `AttentionInterface.get_interface` for its attention function at every call. The wrap returns one that
looks for a slot of edits in the calling module's `__dict__` and otherwise passes straight through, so masks, configs,
the vision tower and cross-attention never notice.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from ..errors import UnsupportedModelError
from .call import UNUSUAL, AttentionCall, Plan, shifted
from .entry import Entry

SLOT = "_mimic_core_sites"
"""Key of a module's slot in its `__dict__`: travels with deepcopy and pickle, is no submodule, leaves no state."""


class AttentionSlot:
    """The edits inside one module's attention, in the order they were installed. Alive, it holds the wrap in place.

    Attributes:
        plan: What is to do in a call: made when edits come, go or are switched, for a decoded token has no time for it.
            None: nothing.
    """

    plan: Plan | None

    def __init__(self) -> None:
        self.hold(())
        self._release = _retain(self)

    def hold(self, entries: tuple[Entry, ...]) -> None:
        """Replace the edits."""
        self.entries = entries
        self.refresh()

    def refresh(self) -> None:
        """Look again at which edits are on."""
        on = tuple(e for e in self.entries if e.owner.active)
        self.plan = Plan(on) if on else None
        # Where several layers share a module, each call has to ask which of them runs.
        self.asks = any(e.scope is not None for e in on)

    def asked(self) -> Plan | None:
        """The plan of this very call, where `asks`."""
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
        # A copy or a loaded pickle of a patched model is patched too, and needs the wrap as much. What its entries
        # belong to may not be whole yet: the first call looks.
        self.entries = state["entries"]
        self.plan, self.asks = Plan(()), True
        self._release = _retain(self)


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
    """What a model gets for its attention function: `base`, with the edits of the calling module if it has some.

    transformers' models pass these by name or in this order; some pass the mask by keyword.
    """
    slot: AttentionSlot | None = module.__dict__.get(SLOT)
    plan = None if slot is None else slot.plan
    if plan is None:
        return base(module, query, key, value, attention_mask, *args, **kwargs)
    # The shortest way, for what is patched most: a decoded token feels every step.
    if plan.only_shift is not None and implementation == "sdpa" and base is sdpa_attention_forward and not args:
        usual = UNUSUAL.isdisjoint(kwargs)
        out = shifted(plan.only_shift, module, query, key, value, attention_mask, kwargs) if usual else None
        if out is not None:
            return out, None
    if slot is not None and slot.asks and (plan := slot.asked()) is None:
        return base(module, query, key, value, attention_mask, *args, **kwargs)
    if args:
        raise UnsupportedModelError(
            f"{type(module).__name__} passes {len(args)} arguments after the mask by position; its "
            f"attention is understood with keywords only"
        )
    call = AttentionCall(base, implementation, module, query, key, value, attention_mask, kwargs)
    return call.run(plan)


def _wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_interface(self: AttentionInterface, attn_implementation: str, default: Callable[..., Any]) -> Any:
        base = original(self, attn_implementation, default)
        if _live is not get_interface:
            return base  # kept underneath by a wrap put over this one; no patch of its time is left
        return partial(_attention, base, attn_implementation or "eager")

    return get_interface


_lock = threading.RLock()  # a collected slot is dropped wherever the collector runs, under this lock too
_holders = 0
_below: Callable[..., Any] = AttentionInterface.get_interface
_live: Callable[..., Any] | None = None


def _retain(slot: AttentionSlot) -> Callable[[], object]:
    """Keep the wrap in place until the slot is released or collected."""
    global _holders, _below, _live
    with _lock:
        _holders += 1
        if _holders == 1:
            _below = AttentionInterface.get_interface
            _live = AttentionInterface.get_interface = _wrapped(_below)
    finalizer = weakref.finalize(slot, _drop)
    finalizer.atexit = False
    return finalizer


def _drop() -> None:
    global _holders, _live
    with _lock:
        _holders -= 1
        if _holders == 0:
            # Somebody may have wrapped it after us; ours then stays underneath and passes through.
            if AttentionInterface.get_interface is _live:
                AttentionInterface.get_interface = _below
            _live = None
