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
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from .. import ops
from ..errors import PatchStateError, ShapeError, UnsupportedModelError
from ..types import READ_ONLY_SITES, At, AttentionView, Site

SLOT = "_mimic_core_sites"
"""Key of a module's slot in its `__dict__`: travels with deepcopy and pickle, is no submodule, leaves no state."""

# Arguments of attention functions that change the logits in ways the LSE here does not follow.
_CHANGES_LOGITS = ("softcap", "s_aux", "position_bias", "indices", "block_indices")


@dataclass(frozen=True)
class SiteEdit:
    """One function at one site of one layer.

    Attributes:
        run: Given the value and an `At`, returns the new value, or None to leave it.
        fused: At `attn_heads`: attention and edit in one; may return None to decline.
        needs_lse: `run` reads `at.lse`; at site `lse` it is what it is given.
    """

    layer: int
    site: Site
    run: Callable[[Tensor, At], Tensor | None]
    fused: Callable[[At], Tensor | None] | None = None
    needs_lse: bool = False


@runtime_checkable
class Owner(Protocol):
    """Who put an edit there: says whether it is on, and hears when it has run."""

    @property
    def active(self) -> bool: ...

    def reached(self, layer: int, site: Site) -> None: ...


@dataclass(frozen=True)
class Entry:
    """An edit and its owner, as a slot holds it."""

    edit: SiteEdit
    owner: Owner

    def apply(self, value: Tensor, module: nn.Module, attention: AttentionCall | None = None) -> Tensor:
        """Run the edit on a value and check what comes back."""
        edit = self.edit
        result = edit.run(value, At(edit.layer, edit.site, module, attention))
        return self.accept(result, value)

    def accept(self, result: Tensor | None, value: Tensor) -> Tensor:
        site, layer = self.edit.site, self.edit.layer
        self.owner.reached(layer, site)
        if result is None:
            return value
        if site in READ_ONLY_SITES:
            raise PatchStateError(
                f"site {site!r} can be read, not edited: the function at layer {layer} must return None"
            )
        if not isinstance(result, Tensor):
            raise ShapeError(f"the edit at {site!r} of layer {layer} returned a {type(result).__name__}, not a tensor")
        found, wanted = ((tuple(x.shape), x.dtype, x.device) for x in (result, value))
        if found != wanted:
            raise ShapeError(
                f"the edit at {site!r} of layer {layer} must return the shape, dtype and device it was given: "
                f"{_words(*wanted)}; found {_words(*found)}"
            )
        return result


def _words(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> str:
    return f"{list(shape)} {dtype} {device}"


class AttentionSlot:
    """The edits inside one module's attention, in the order they were installed. Alive, it holds the wrap in place."""

    def __init__(self) -> None:
        self.entries: tuple[Entry, ...] = ()
        self._release = _retain(self)

    def release(self) -> None:
        self._release()

    def __getstate__(self) -> dict[str, Any]:
        return {"entries": self.entries}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy or a loaded pickle of a patched model is patched too, and needs the wrap as much.
        self.entries = state["entries"]
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
        """No mask means causal where transformers' sdpa function takes it so; its eager function never does."""
        if self.mask is not None or self.implementation == "eager" or self.query.shape[2] == 1:
            return False
        asked = self.options.get("is_causal")
        return bool(getattr(self.module, "is_causal", True) if asked is None else asked)

    @property
    def lse(self) -> Tensor:
        if self._lse is None:
            self._check_lse()
            self._lse = ops.attention_lse(self.query, self.key, self.mask, self.scale, self.is_causal)
        return self._lse

    @property
    def lse_all_keys(self) -> Tensor:
        self._check_lse()
        return ops.attention_lse(self.query, self.key, None, self.scale, False)

    def _check_lse(self) -> None:
        problem = None
        odd = [name for name in _CHANGES_LOGITS if self.options.get(name) is not None]
        if odd:
            problem = f"{', '.join(odd)} enter(s) its attention logits, which is not supported"
        elif self.implementation not in ("sdpa", "eager"):
            problem = (
                f"attention implementation {self.implementation!r} hides its mask or logits; "
                f"use model.set_attn_implementation('sdpa') or 'eager'"
            )
        if problem:
            raise UnsupportedModelError(f"the LSE of {type(self.module).__name__} can't be computed: {problem}")

    def run(self, base: Callable[..., Any], entries: Sequence[Entry]) -> tuple[Tensor, Any]:
        """Attention with all edits of this call."""
        for entry in entries:
            if entry.edit.site in ("query", "key", "value"):
                setattr(self, entry.edit.site, entry.apply(getattr(self, entry.edit.site), self.module, self))
                self._lse = None  # an edit may have asked for it and then changed what it is made of
        heads = [e for e in entries if e.edit.site == "attn_heads"]
        readers = [e for e in entries if e.edit.needs_lse or e.edit.site == "lse"]
        if readers:
            self._check_lse()  # before attention is paid for
        weights = None
        if readers and self._kernel_is_ours(base):
            first = heads[0] if heads and readers == heads[:1] else None
            out = None
            if first is not None and first.edit.fused is not None:
                out = first.edit.fused(At(first.edit.layer, first.edit.site, self.module, self))
            if first is not None and out is not None:
                first.accept(out, out)
                heads = heads[1:]
            else:
                out, self._lse = ops.attention_with_lse(
                    self.query, self.key, self.value, self.mask, self.scale, self.is_causal
                )
        else:
            out, weights = base(self.module, self.query, self.key, self.value, self.mask, **self.options)
        for entry in entries:
            if entry.edit.site == "lse":
                entry.apply(self.lse, self.module, self)
        for entry in heads:
            out = entry.apply(out, self.module, self)
        return out, weights

    def _kernel_is_ours(self, base: Callable[..., Any]) -> bool:
        """Whether one call of `ops` gives the very bits the model's own sdpa would, and the LSE with them."""
        q, k, v, mask = self.query, self.key, self.value, self.mask
        if self.implementation != "sdpa" or base is not sdpa_attention_forward:
            return False
        if self.options.get("dropout") or ops.resolve_backend(q, k, v, mask).name != "cpu":
            return False
        grouped = k.shape[1] != q.shape[1]
        if grouped and q.shape[2] == 1 and (mask is not None or q.shape[-1] > 256):
            # transformers decodes such a token with a group's heads packed into one matrix, which rounds otherwise.
            return False
        # What torch's own dispatch asks; only its flash kernel is the one `ops` runs.
        choice = torch.ops.aten._fused_sdp_choice(
            q, k, v, mask, 0.0, self.is_causal, scale=self.scale, enable_gqa=grouped
        )
        return choice == SDPBackend.FLASH_ATTENTION.value


def _wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_interface(self: AttentionInterface, attn_implementation: str, default: Callable[..., Any]) -> Any:
        base = original(self, attn_implementation, default)
        if _live is not get_interface:
            return base  # kept underneath by a wrap put over this one; no patch of its time is left

        # transformers' models pass these by name or in this order; some pass the mask by keyword.
        def attention(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Any = None,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            slot: AttentionSlot | None = module.__dict__.get(SLOT)
            entries = [] if slot is None else [e for e in slot.entries if e.owner.active]
            if not entries:
                return base(module, query, key, value, attention_mask, *args, **kwargs)
            if args:
                raise UnsupportedModelError(
                    f"{type(module).__name__} passes {len(args)} arguments after the mask by position; its "
                    f"attention is understood with keywords only"
                )
            call = AttentionCall(attn_implementation or "eager", module, query, key, value, attention_mask, kwargs)
            return call.run(base, entries)

        return attention

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
