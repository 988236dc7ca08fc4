"""The way into attention: transformers' `AttentionInterface`, wrapped while any site is in use.

A model asks `AttentionInterface.get_interface` for its attention function at every call. The wrap returns one that
looks for a slot of edits in the calling module's `__dict__` and otherwise passes straight through, so masks, configs,
the vision tower and cross-attention never notice.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers.integrations import sdpa_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from .. import ops
from ..errors import PatchStateError, ShapeError, UnsupportedModelError
from ..types import READ_ONLY_SITES, At, AttentionView, ForwardView, Site
from .scope import LayerScope

SLOT = "_mimic_core_sites"
"""Key of a module's slot in its `__dict__`: travels with deepcopy and pickle, is no submodule, leaves no state."""

# Arguments of attention functions that change the logits: those the LSE follows (where an implementation heeds them),
# and those it does not.
_FOLLOWED = ("softcap", "s_aux")
_CHANGES_LOGITS = ("position_bias", "indices", "block_indices")


@dataclass(frozen=True)
class SiteEdit:
    """One function at one site of one layer.

    Attributes:
        run: Given the value and an `At`, returns the new value, or None to leave it.
        fused: At `attn_heads`: attention and edit in one; may return None to decline.
        needs_lse: `run` reads `at.lse`; at site `lse` it is what it is given.
        needs_prompt_end: `run` may read `at.prompt_end`, so the forward's mask and cache are looked at.
    """

    layer: int
    site: Site
    run: Callable[[Tensor, At], Tensor | None]
    fused: Callable[[At], Tensor | None] | None = None
    needs_lse: bool = False
    needs_prompt_end: bool = False


@runtime_checkable
class Owner(Protocol):
    """Who put an edit there: says whether it is on, and hears when it has run."""

    @property
    def active(self) -> bool: ...

    @property
    def in_forward(self) -> bool: ...

    @property
    def forward(self) -> ForwardView | None: ...

    def reached(self, layer: int, site: Site) -> None: ...


@dataclass(frozen=True)
class Entry:
    """An edit and its owner, as a slot holds it; `scope` where the module does not tell which layer runs."""

    edit: SiteEdit
    owner: Owner
    scope: LayerScope | None = None

    @property
    def active(self) -> bool:
        """Whether the edit should run now."""
        return self.owner.active and (self.scope is None or self.scope.runs(self.owner.in_forward))

    def apply(self, value: Tensor, module: nn.Module, attention: AttentionCall | None = None) -> Tensor:
        """Run the edit on a value and check what comes back."""
        edit = self.edit
        forward = self.owner.forward if edit.needs_prompt_end else None
        result = edit.run(value, At(edit.layer, edit.site, module, attention, forward, value))
        self.owner.reached(edit.layer, edit.site)
        return value if result is None else self._checked(result, value)

    def _checked(self, result: Tensor, value: Tensor) -> Tensor:
        site, layer = self.edit.site, self.edit.layer
        if site in READ_ONLY_SITES:
            raise PatchStateError(
                f"site {site!r} can be read, not edited: the function at layer {layer} must return None"
            )
        if not isinstance(result, Tensor):
            raise ShapeError(f"the edit at {site!r} of layer {layer} returned a {type(result).__name__}, not a tensor")
        if result.shape != value.shape or result.dtype != value.dtype or result.device != value.device:
            found, wanted = ((tuple(x.shape), x.dtype, x.device) for x in (result, value))
            raise ShapeError(
                f"the edit at {site!r} of layer {layer} must return the shape, dtype and device it was given: "
                f"{_words(*wanted)}; found {_words(*found)}"
            )
        return result


def _words(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> str:
    return f"{list(shape)} {dtype} {device}"


class Plan:
    """The edits of one call of attention, by the moment they run."""

    def __init__(self, entries: tuple[Entry, ...]) -> None:
        self.before = [e for e in entries if e.edit.site in ("query", "key", "value")]
        self.of_lse = [e for e in entries if e.edit.site == "lse"]
        self.heads = [e for e in entries if e.edit.site == "attn_heads"]
        readers = [e for e in entries if e.edit.needs_lse or e.edit.site == "lse"]
        self.reads_lse = bool(readers)
        # Attention and edit can be one call where nobody else reads the LSE and no other edit comes between.
        alone = readers[0] if len(readers) == 1 and readers == self.heads[:1] else None
        self.fused = alone if alone is not None and alone.edit.fused is not None else None


class AttentionSlot:
    """The edits inside one module's attention, in the order they were installed. Alive, it holds the wrap in place."""

    def __init__(self) -> None:
        self.hold(())
        self._release = _retain(self)

    def hold(self, entries: tuple[Entry, ...]) -> None:
        """Replace the edits."""
        self.entries = entries
        self._plan = Plan(entries)

    def plan(self) -> Plan | None:
        """The edits that are on; None: there are none."""
        active = [e for e in self.entries if e.active]
        if len(active) == len(self.entries):
            return self._plan  # made when they were put there: a decoded token has no time for it
        return Plan(tuple(active)) if active else None

    def release(self) -> None:
        self._release()

    def __getstate__(self) -> dict[str, Any]:
        return {"entries": self.entries}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy or a loaded pickle of a patched model is patched too, and needs the wrap as much.
        self.hold(state["entries"])
        self._release = _retain(self)


class AttentionCall(AttentionView):
    """One call of attention at a module with edits: what attention sees, and the LSE when somebody asks."""

    def __init__(
        self,
        implementation: str,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        options: dict[str, Any],
    ) -> None:
        self.implementation = implementation
        self.module = module
        self.query, self.key, self.value, self.mask = query, key, value, mask
        self.options = options
        scaling = options.get("scaling")
        self.scale: float = query.shape[-1] ** -0.5 if scaling is None else scaling
        self._lse: Tensor | None = None

    @property
    def is_causal(self) -> bool:
        """No mask means causal where transformers' sdpa function takes it so; the others never do."""
        if self.mask is not None or self.implementation != "sdpa" or self.query.shape[2] == 1:
            return False
        asked = self.options.get("is_causal")
        return bool(getattr(self.module, "is_causal", True) if asked is None else asked)

    @property
    def lse(self) -> Tensor:
        if self._lse is None:
            self._check_lse()
            self._lse = ops.attention_lse(
                self.query,
                self.key,
                _dense(self.mask, self.query, self.key),
                self.scale,
                self.is_causal,
                softcap=self.options.get("softcap"),
                sinks=self.options.get("s_aux"),
            )
        return self._lse

    @property
    def lse_all_keys(self) -> Tensor:
        self._check_lse()
        odd = [name for name in _FOLLOWED if self.options.get(name) is not None]
        if odd:
            raise UnsupportedModelError(
                f"the LSE over all keys is that of the published models; {type(self.module).__name__} has "
                f"{', '.join(odd)} in its attention logits"
            )
        return ops.attention_lse(self.query, self.key, None, self.scale, False)

    @property
    def logits(self) -> tuple[str, ...]:
        options = {name: x for name, x in self.options.items() if x is not None}
        words = [f"softcap {options['softcap']:g}"] if "softcap" in options else []
        words += ["sinks"] if "s_aux" in options else []
        words += [f"window {options['sliding_window']}"] if options.get("sliding_window") else []
        return (*words, *(name.replace("_", " ") for name in _CHANGES_LOGITS if name in options))

    def _check_lse(self) -> None:
        problem = None
        options, refused = self.options, _CHANGES_LOGITS
        if self.implementation == "sdpa":
            refused = _FOLLOWED + _CHANGES_LOGITS  # transformers' sdpa function knows neither
        odd = [name for name in refused if options.get(name) is not None]
        if odd:
            problem = f"{', '.join(odd)} enter(s) its attention logits, which is not supported"
        elif self.implementation not in ("sdpa", "eager", "flex_attention"):
            problem = (
                f"attention implementation {self.implementation!r} hides its mask or logits; "
                f"use model.set_attn_implementation('sdpa') or 'eager'"
            )
        if problem:
            raise UnsupportedModelError(f"the LSE of {type(self.module).__name__} can't be computed: {problem}")

    def run(self, base: Callable[..., Any], plan: Plan) -> tuple[Tensor, Any]:
        """Attention with all edits of this call."""
        if self.implementation.startswith("paged|") and any(e.edit.site != "query" for e in plan.before):
            raise UnsupportedModelError(
                f"attention implementation {self.implementation!r} is handed the keys and values of new tokens alone, "
                f"before its cache has them, so edits there would be others than elsewhere; use another implementation"
            )
        for entry in plan.before:
            setattr(self, entry.edit.site, entry.apply(getattr(self, entry.edit.site), self.module, self))
            self._lse = None  # an edit may have asked for it and then changed what it is made of
        if plan.reads_lse:
            self._check_lse()  # before attention is paid for
        out = weights = None
        heads = plan.heads
        if plan.reads_lse and self.implementation == "sdpa" and base is sdpa_attention_forward:
            out = self._fused(plan.fused) if plan.fused is not None else None
            if out is not None:
                heads = heads[1:]
            else:
                out = self._with_lse()
        if out is None:
            out, weights = base(self.module, self.query, self.key, self.value, self.mask, **self.options)
        for entry in plan.of_lse:
            entry.apply(self.lse, self.module, self)
        for entry in heads:
            out = entry.apply(out, self.module, self)
        return out, weights

    def _fused(self, entry: Entry) -> Tensor | None:
        """Attention and one edit in one call, where it gives the bits of attention and edit apart."""
        edit = entry.edit
        if edit.fused is None or self._packed() or not self._kernel_is_ours(self.query):
            return None
        out = edit.fused(At(edit.layer, edit.site, self.module, self))
        if out is not None:
            entry.owner.reached(edit.layer, edit.site)
        return out

    def _with_lse(self) -> Tensor | None:
        """Attention from `ops`, which keeps the LSE, where it gives the very bits of the model's own."""
        q, groups = self.query, self.key.shape[1]
        if not self._packed():
            if not self._kernel_is_ours(q):
                return None
            out, self._lse = ops.attention_with_lse(q, self.key, self.value, self.mask, self.scale, self.is_causal)
            return out
        packed = q.reshape(q.shape[0], groups, -1, q.shape[-1])
        if (self.mask is not None and self.mask.shape[1] != 1) or not self._kernel_is_ours(packed):
            return None
        out, lse = ops.attention_with_lse(packed, self.key, self.value, self.mask, self.scale)
        self._lse = lse.reshape(q.shape[:3])
        return out.transpose(1, 2).reshape(q.shape[0], 1, q.shape[1], -1)

    def _packed(self) -> bool:
        """Whether transformers decodes this token with a group's heads as the rows of one matrix, which rounds so."""
        query = self.query
        if query.shape[2] != 1 or query.shape[1] == self.key.shape[1] or not _PACKS_GROUPS:
            return False
        return (self.mask is not None or query.shape[-1] > 256) and not torch.compiler.is_compiling()

    def _kernel_is_ours(self, query: Tensor) -> bool:
        """Whether one call of `ops` gives the very bits the model's own sdpa would, and the LSE with them."""
        if self.options.get("dropout"):
            return False
        return ops.follows_sdpa(query, self.key, self.value, self.mask, self.scale, self.is_causal)


_PACKS_GROUPS = hasattr(sdpa_attention, "pack_gqa")


def _dense(mask: Any, query: Tensor, key: Tensor) -> Tensor | None:
    """A mask as `ops` takes it; flex attention's is a function of the indices."""
    if mask is None:
        return None
    if isinstance(mask, Tensor):
        # Eager attention takes as much of a mask as there are keys.
        return mask if mask.shape[-1] <= key.shape[2] else mask[..., : key.shape[2]]
    from torch.nn.attention.flex_attention import create_mask

    b, _, t, _ = query.shape
    return create_mask(mask.mask_mod, b, 1, t, key.shape[2], device=str(query.device))


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
    plan = None if slot is None else slot.plan()
    if plan is None:
        return base(module, query, key, value, attention_mask, *args, **kwargs)
    if args:
        raise UnsupportedModelError(
            f"{type(module).__name__} passes {len(args)} arguments after the mask by position; its "
            f"attention is understood with keywords only"
        )
    call = AttentionCall(implementation, module, query, key, value, attention_mask, kwargs)
    return call.run(base, plan)


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
