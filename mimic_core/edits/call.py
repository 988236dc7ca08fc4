"""One attention call of a module with edits: the order of the edits, and where the LSE comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations import sdpa_attention
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .. import ops
from ..errors import UnsupportedModelError
from ..ops import like_sdpa
from ..types import At, AttentionView
from .entry import Entry
from .flash import flash_lse, why_not
from .given import LSEInside
from .named import is_sdpa_of_torch

# Arguments that change the logits. The LSE includes the first group, if the attention implementation does. The second
# group is not supported.
_FOLLOWED = ("softcap", "s_aux")
_CHANGES_LOGITS = ("indices", "block_indices")
# What transformers' functions add to the logits in several ways: it is seen when they run.
_ADDED = ("position_bias", "sinks")
UNUSUAL = frozenset((*_FOLLOWED, *_CHANGES_LOGITS, *_ADDED))


class Plan:
    """The edits of one attention call, by the time at which they run."""

    def __init__(self, entries: tuple[Entry, ...]) -> None:
        self.before = [e for e in entries if e.edit.site in ("query", "key", "value")]
        self.of_lse = [e for e in entries if e.edit.site == "lse"]
        self.heads = [e for e in entries if e.edit.site == "attn_heads"]
        readers = [e for e in entries if e.edit.needs_lse or e.edit.site == "lse"]
        self.reads_lse = bool(readers)
        # Attention and edit can be one call if no other edit reads the LSE or comes in between.
        alone = readers[0] if len(readers) == 1 and readers == self.heads[:1] else None
        alone = None if alone is None or alone.is_apart else alone
        self.fused = alone if alone is not None and (alone.edit.fused or alone.edit.shift) else None
        # The usual case has a faster path: a gated shift is the only edit.
        self.only_shift = entries[0] if entries == (self.fused,) and entries[0].is_shift_alone else None


class AttentionCall(AttentionView):
    """One attention call of a module with edits: its arguments, and the LSE, computed when it is needed."""

    def __init__(
        self,
        base: Callable[..., Any],
        implementation: str,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        options: dict[str, Any],
    ) -> None:
        self.base = base
        self.implementation = implementation
        self.module = module
        self.query, self.key, self.value, self.mask = query, key, value, mask
        self.options = options
        scaling = options.get("scaling")
        self.scale: float = query.shape[-1] ** -0.5 if scaling is None else scaling
        self._lse: Tensor | None = None

    @property
    def is_causal(self) -> bool:
        """Without a mask, only transformers' sdpa and flash functions can be causal."""
        return (
            (self.implementation == "sdpa" or self._is_flash)
            and self.query.shape[2] != 1
            and _is_causal(self.module, self.mask, self.options)
        )

    @property
    def lse(self) -> Tensor:
        if self._lse is None:
            self._check_lse()
            if self._is_biased:
                raise UnsupportedModelError(
                    f"`at.lse` of {type(self.module).__name__} is known only after its attention, because its logits "
                    f"have {self._words(_ADDED)} in them: read it at attn_heads or lse"
                )
            if self._is_flash:
                self._lse = flash_lse(self.module, self.query, self.key, self.mask, self.options)
                return self._lse
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
        odd = [name for name in (*_FOLLOWED, *_ADDED, "cu_seq_lens_k") if self.options.get(name) is not None]
        if odd:
            raise UnsupportedModelError(
                f"the LSE over all keys is only for attention like in the published models, but "
                f"{type(self.module).__name__} has {', '.join(odd)} in its attention logits; use log_z2='attended'"
            )
        return ops.attention_lse(self.query, self.key, None, self.scale, False)

    @property
    def logits(self) -> tuple[str, ...]:
        options = {name: x for name, x in self.options.items() if x is not None}
        words = [f"softcap {options['softcap']:g}"] if "softcap" in options else []
        words += ["sinks"] if "s_aux" in options else []
        words += [f"window {options['sliding_window']}"] if options.get("sliding_window") else []
        return (*words, *(name.replace("_", " ") for name in (*_ADDED, *_CHANGES_LOGITS) if name in options))

    def _words(self, names: tuple[str, ...]) -> str:
        return ", ".join(name for name in names if self.options.get(name) is not None)

    @property
    def _is_biased(self) -> bool:
        return any(self.options.get(name) is not None for name in _ADDED)

    def _check_lse(self) -> None:
        problem = None
        options, refused = self.options, _CHANGES_LOGITS
        if self.implementation == "sdpa":
            refused = _FOLLOWED + _CHANGES_LOGITS  # transformers' sdpa function supports none of them
        if self.implementation not in ("sdpa", "eager") or torch.compiler.is_compiling():
            refused += _ADDED
        if odd := self._words(refused):
            problem = f"{odd} enter(s) its attention logits, which is not supported"
        elif self.implementation == "sdpa" and not is_sdpa_of_torch():
            found: Any = functional.scaled_dot_product_attention
            problem = (
                f"torch.nn.functional.scaled_dot_product_attention was replaced by {found.__module__}."
                f"{getattr(found, '__qualname__', type(found).__qualname__)}, as torch's context_parallel and some "
                f"kernel packages do, and it is not known what it computes; leave it as it was, or use a head that "
                f"doesn't read the LSE, such as LIVE"
            )
        elif self._is_flash:
            problem = why_not(self.module, self.query, self.key, self.mask, options)
        elif self.implementation not in ("sdpa", "eager", "flex_attention"):
            problem = (
                f"the mask or the logits of attention implementation {self.implementation!r} are not known; "
                f"use model.set_attn_implementation('sdpa') or 'eager'"
            )
        if problem:
            raise UnsupportedModelError(f"the LSE of {type(self.module).__name__} can't be computed: {problem}")

    @property
    def _is_flash(self) -> bool:
        """Whether transformers' flash function runs, with any package or hub kernel."""
        return self.base is flash_attention_forward

    def run(self, plan: Plan) -> tuple[Tensor, Any]:
        if self.implementation.startswith("paged|") and any(e.edit.site != "query" for e in plan.before):
            raise UnsupportedModelError(
                f"attention implementation {self.implementation!r} gets only the keys and values of new tokens, before "
                f"they are in its cache, so an edit there would not see the cached ones; use another implementation"
            )
        for entry in plan.before:
            setattr(self, entry.edit.site, entry.apply(getattr(self, entry.edit.site), self.module, self))
            self._lse = None  # the edit may have read it and then changed the query or key
        if plan.reads_lse:
            self._check_lse()  # before the expensive part
        out = weights = None
        heads = plan.heads
        if plan.reads_lse and self._is_biased:
            with LSEInside(self.query) as inside:
                out, weights = self.base(self.module, self.query, self.key, self.value, self.mask, **self.options)
            self._lse = inside.lse()
            if self._lse is None:
                raise UnsupportedModelError(
                    f"the LSE of {type(self.module).__name__} can't be computed: {self._words(_ADDED)} enter(s) its "
                    f"attention logits in a way that can't be followed ({'; '.join(inside.odd) or 'no softmax'})"
                )
        elif plan.reads_lse and self._is_torchs:
            out = self._fused(plan.fused) if plan.fused is not None else None
            if out is not None:
                heads = heads[1:]
            else:
                out = self._with_lse()
        if out is None:
            out, weights = self.base(self.module, self.query, self.key, self.value, self.mask, **self.options)
        for entry in plan.of_lse:
            entry.apply(self.lse, self.module, self)
        for entry in heads:
            out = entry.apply(out, self.module, self)
        return out, weights

    @property
    def _is_torchs(self) -> bool:
        """Whether the model's attention is a call of torch's SDPA."""
        return self.implementation == "sdpa" and self.base is sdpa_attention_forward

    def _fused(self, entry: Entry) -> Tensor | None:
        """Attention and one edit in one call, if this gives the same bits as two calls."""
        edit, out = entry.edit, None
        if edit.shift is not None:
            return shifted(entry, self.module, self.query, self.key, self.value, self.mask, self.options)
        if edit.fused is not None and self._kernel_is_ours():
            out = edit.fused(At(edit.layer, edit.site, self.module, self))
        if out is not None:
            entry.owner.reached(entry.bit)
        return out

    def _with_lse(self) -> Tensor | None:
        """Attention from `ops`, which keeps the LSE, if it gives the same bits as the model's own."""
        if self.options.get("dropout"):
            return None
        found = like_sdpa.attention_with_lse(
            self.query, self.key, self.value, self.mask, self.options.get("scaling"), self.is_causal, _PACKS_GROUPS
        )
        if found is None:
            return None
        out, self._lse = found
        return out

    def _kernel_is_ours(self) -> bool:
        """Whether one call of `ops` gives the same bits as the model's own sdpa function."""
        q, k = self.query, self.key
        if self.options.get("dropout") or like_sdpa.is_packed(q, k, self.mask, _PACKS_GROUPS):
            return False
        return ops.follows_sdpa(q, k, self.value, self.mask, self.scale, self.is_causal)


class SDPACall(AttentionCall):
    """A call of torch's SDPA by a module with edits, without transformers' interface."""

    def __init__(
        self,
        original: Callable[..., Tensor],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        more: dict[str, Any] = {"enable_gqa": True} if enable_gqa else {}

        def base(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
            out = original(query, key, value, mask, dropout_p, is_causal, scale=scale, **more)
            return out.transpose(1, 2), None

        if attn_mask is not None:
            attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
        options = {"scaling": scale, "is_causal": is_causal, "dropout": dropout_p}
        super().__init__(base, "sdpa", module, query, key, value, attn_mask, options)

    def answer(self, plan: Plan) -> Tensor:
        """What the function returns, with the edits."""
        return self.run(plan)[0].transpose(1, 2)

    @property
    def is_causal(self) -> bool:
        return bool(self.options["is_causal"])

    @property
    def _is_torchs(self) -> bool:
        return True

    def _fused(self, entry: Entry) -> Tensor | None:
        edit = entry.edit
        if edit.shift is None:
            return super()._fused(entry)
        if not self._kernel_is_ours():
            return None
        q, k, v, shift = self.query, self.key, self.value, edit.shift(self.query)
        out = ops.shifted_attention(q, k, v, *shift, mask=self.mask, scale=self.scale, is_causal=self.is_causal)
        entry.owner.reached(entry.bit)
        return out

    def _with_lse(self) -> Tensor | None:
        if not self._kernel_is_ours():
            return None
        q, k, v = self.query, self.key, self.value
        out, self._lse = ops.attention_with_lse(q, k, v, mask=self.mask, scale=self.scale, is_causal=self.is_causal)
        return out

    def _kernel_is_ours(self) -> bool:
        q, k = self.query, self.key
        if self.options["dropout"] or q.shape[1] != k.shape[1]:
            return False
        return ops.follows_sdpa(q, k, self.value, self.mask, self.scale, self.is_causal)


_PACKS_GROUPS = hasattr(sdpa_attention, "pack_gqa")


def _is_causal(module: nn.Module, mask: Any, options: dict[str, Any]) -> bool:
    if mask is not None:
        return False
    asked = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if asked is None else asked)


def shifted(
    entry: Entry,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
) -> Tensor | None:
    """Attention and a gated shift in one call, if this gives the same bits as transformers' sdpa and the shift."""
    edit = entry.edit
    if edit.shift is None or options.get("dropout"):
        return None
    scale, is_causal = options.get("scaling"), _is_causal(module, mask, options)
    out = like_sdpa.shifted_attention(query, key, value, edit.shift(query), mask, scale, is_causal, _PACKS_GROUPS)
    if out is not None:
        entry.owner.reached(entry.bit)
    return out


def _dense(mask: Any, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask as a tensor for `ops`. The mask of flex attention is a function of the indices."""
    if mask is None:
        return None
    if isinstance(mask, Tensor):
        # Like eager attention: a mask may be longer than the keys.
        return mask if mask.shape[-1] <= key.shape[2] else mask[..., : key.shape[2]]
    from torch.nn.attention.flex_attention import create_mask

    b, _, t, _ = query.shape
    return create_mask(mask.mask_mod, b, 1, t, key.shape[2], device=str(query.device))
