"""Attention functions of packages, called by name: what a call of them means, and how it is run with edits."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import flash_attention

from .. import ops
from ..errors import UnsupportedModelError
from ..ops import with_sinks
from ..ops.sequences import Sequences
from ..types import AttentionView
from .call import Plan
from .flash import each_row, rows_lse


class Odd(Exception):  # noqa: N818
    """A call is not understood; the words say why."""


@cache
def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """The names of its parameters, each with the default."""
    return {name: p.default for name, p in inspect.signature(function).parameters.items()}


def arguments(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name. `inspect.Signature.bind` takes ten times as long."""
    return {**dict(zip(parameters(function), args, strict=False)), **kwargs}


class PackageCall(AttentionView):
    """One call of a function that computes the attention of a module.

    Attributes:
        given: Its arguments by name.
        attended: What it has returned.
    """

    def __init__(self, function: Callable[..., Any], module: nn.Module, given: dict[str, Any]) -> None:
        self._function, self._module, self.given = function, module, given
        self._lse: Tensor | None = None
        self.attended: Any = None

    def answer(self, plan: Plan) -> Any:
        """What the function returns, with the edits."""
        if plan.reads_lse:
            self.check_lse()  # before the expensive part
        for entry in plan.before:
            site = entry.edit.site
            setattr(self, site, entry.apply(getattr(self, site), self._module, self))
            self._lse = None  # the edit may have read it and then changed the query or key
        out = found = self.attend(plan.reads_lse)
        for entry in plan.of_lse:
            entry.apply(self.lse, self._module, self)
        for entry in plan.heads:
            out = entry.apply(out, self._module, self)
        return self.attended if out is found else self.returned(out)

    @abstractmethod
    def attend(self, reads_lse: bool) -> Tensor:
        """Call the function. Its output for each attention head, [b t h e]."""

    @abstractmethod
    def returned(self, out: Tensor) -> Any:
        """What the function returns if its output for each attention head is `out`."""

    def check_lse(self) -> None:
        """Check that the LSE is known.

        Raises:
            UnsupportedModelError: it is not.
        """

    @abstractmethod
    def compute_lse(self) -> Tensor:
        """The LSE by another way than the function's."""

    @property
    def lse(self) -> Tensor:
        if self._lse is None:
            self.check_lse()
            self._lse = self.compute_lse()
        return self._lse

    @property
    def lse_all_keys(self) -> Tensor:
        odd = [word for word in self.logits if not word.startswith("window")]
        if odd := [*odd, *self.is_odd_for_all_keys()]:
            raise UnsupportedModelError(
                f"the LSE over all keys is only for attention like in the published models, but "
                f"{type(self._module).__name__} has {', '.join(odd)} in its attention; use log_z2='attended'"
            )
        return ops.attention_lse(self.query, self.key, None, self.scale, False)

    def is_odd_for_all_keys(self) -> list[str]:
        return []

    def refuse_lse(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"the LSE of {type(self._module).__name__} can't be computed: {why}")


# What a flash function may be given, besides what changes nothing.
_SINKS = ("s_aux", "learnable_sink")
_FLASH = ("q", "k", "v", "dropout_p", "softmax_scale", "causal", "window_size", "softcap", *_SINKS)
_PACKED = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_CACHED = ("k_cache", "v_cache", "cache_seqlens")
_RETURNS_LSE = ("return_attn_probs", "return_softmax_lse", "return_lse")
_NOTHING = ("deterministic", "num_splits", "pack_gqa", "sm_margin", "rotary_interleaved", "min_seqlen_k")
_KNOWN = frozenset((*_FLASH, *_PACKED, *_CACHED, *_RETURNS_LSE, *_NOTHING))


class _Stacked:
    """Arguments of a function that gets query, key and value, or key and value, as one tensor, and what it gets else.

    Attributes:
        given: The arguments as of the function that gets them one by one.
    """

    def __init__(self, function: Callable[..., Any], given: dict[str, Any]) -> None:
        self._function, self.given = function, dict(given)
        self._name = next((name for name in ("qkv", "kv") if name in given), "")
        if self._name:
            self._whole: Tensor = self.given.pop(self._name)
            self._parts = self._whole.unbind(-3)
            self.given |= zip(self._name, self._parts, strict=True)
        self._shared = [name for name in ("cu_seqlens", "max_seqlen") if name in given]
        for name in self._shared:
            x = self.given.pop(name)
            self.given |= {f"{name}_q": x, f"{name}_k": x}

    def __call__(self, **given: Any) -> Any:
        """Call the function with other arguments."""
        if self._name:
            parts = [given.pop(name) for name in self._name]
            same = all(one is other for one, other in zip(parts, self._parts, strict=True))
            given[self._name] = self._whole if same else torch.stack(parts, -3)
        for name in self._shared:
            given[name] = given.pop(f"{name}_q")
            del given[f"{name}_k"]
        return self._function(**given)


class FlashCall(PackageCall):
    """A function of flash-attn: `flash_attn_func`, with the tokens of all samples in one row, or with its cache.

    Tokens in packed rows are one row, [1 h n d], if they are not those of the batch without padding.

    Args:
        tokens: b and t of the hidden states that the module got, if known.

    Raises:
        Odd: it has arguments that are not understood.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        tokens: tuple[int, int] | None,
    ) -> None:
        self._call = _Stacked(function, arguments(function, args, kwargs))
        given = self._call.given
        super().__init__(function, module, given)
        odd = [x for x in given if x not in _KNOWN and given[x] is not None]
        if odd := [x for x in odd if given[x] is not parameters(function).get(x)]:
            raise Odd(f"got {', '.join(odd)}, which is not understood")
        q: Tensor = given["q"]
        self._cached, self._is_packed = "k_cache" in given, given.get("cu_seqlens_q") is not None
        if self._is_packed and any(given.get(name) is None for name in _PACKED):
            raise Odd(f"got packed rows without all of {', '.join(_PACKED)}")
        if q.ndim != 4 - self._is_packed:
            raise Odd(f"got queries {list(q.shape)}, but {'[n h d]' if self._is_packed else '[b t h d]'} is needed")
        scale, softcap = given.get("softmax_scale"), given.get("softcap")
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        self._softcap = softcap or None
        self._sinks = next((given[name] for name in _SINKS if given.get(name) is not None), None)
        self._rows = 1
        if self._is_packed and tokens is not None and tokens[0] * tokens[1] == q.shape[0] == given["k"].shape[0]:
            self._rows = tokens[0]
        before, after = given.get("window_size") or (-1, -1)
        after = 0 if given.get("causal") else after
        self._window = None if before is None or before < 0 else before, None if after is None or after < 0 else after
        self.query = self._site(q)
        if not self._cached:
            self.key, self.value = self._site(given["k"]), self._site(given["v"])
            self._unedited = self.query, self.key, self.value

    def __getattr__(self, name: str) -> Any:
        if name not in ("key", "value"):
            raise AttributeError(name)
        self._read_cache()
        return vars(self)[name]

    def _site(self, x: Tensor) -> Tensor:
        return (x.unflatten(0, (self._rows, -1)) if self._is_packed else x).transpose(1, 2)

    def _argument(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return x.flatten(0, 1) if self._is_packed else x

    def _read_cache(self) -> None:
        """Do what the function does first: add the new keys and values to its cache, in place. Then read them there.

        Keys that a sample does not have are 0.
        """
        given, lengths, kept = self.given, self._lengths, []
        s, new = int(lengths.max()), given.get("k")
        keys = torch.arange(s, device=lengths.device) < lengths[:, None]
        for name, states in (("k_cache", new), ("v_cache", given.get("v"))):
            x: Tensor = given[name]
            if states is not None and self.attended is None:
                rows = torch.arange(states.shape[0], device=x.device)[:, None]
                columns = lengths[:, None] - states.shape[1] + torch.arange(states.shape[1], device=x.device)
                x[rows, columns] = states.to(x.dtype)
            kept.append(x[:, :s].masked_fill(~keys[..., None, None], 0.0).transpose(1, 2))
        if new is not None and self.attended is None:
            self.given = {**given, "k": None, "v": None, "cache_seqlens": lengths.to(torch.int32)}
        self.key, self.value = kept

    @cached_property
    def _lengths(self) -> Tensor:
        """How many keys each sample has in the cache, with the new ones."""
        cache, lengths, new = self.given["k_cache"], self.given.get("cache_seqlens"), self.given.get("k")
        if lengths is None:
            lengths = cache.shape[1]
        found = torch.as_tensor(lengths, device=cache.device).long().expand(cache.shape[0])
        return found if new is None else found + new.shape[1]

    def attend(self, reads_lse: bool) -> Tensor:
        edited = self._edited()
        given, known = self.given, parameters(self._function)
        ask = next((name for name in _RETURNS_LSE if name in known), None) if reads_lse else None
        asks = {} if ask is None or given.get(ask) or not self._lse_is_the_functions() else {ask: True}
        raw = self._call(**{**given, **edited, **asks})
        out = raw[0] if isinstance(raw, tuple) else raw
        if asks:
            self._lse = self._of_function(raw[1])
        # The fourth flash-attn returns a tuple in any case.
        self.attended = out if asks and "return_lse" not in asks else raw
        return self._site(out).transpose(1, 2)

    def _edited(self) -> dict[str, Tensor]:
        """The arguments that are edited."""
        sites = {"q": self.query}
        if not self._cached:
            before = q, k, v = self._unedited
            if self.query is q and self.key is k and self.value is v:
                return {}
            sites |= {"k": self.key, "v": self.value}
            return {
                name: self._argument(x) for (name, x), old in zip(sites.items(), before, strict=True) if x is not old
            }
        if "key" in vars(self):
            sites |= {"k_cache": self.key, "v_cache": self.value}
        else:
            self._lengths  # noqa: B018  # before the module adds to them
        return {name: self._argument(x) for name, x in sites.items()}

    def _lse_is_the_functions(self) -> bool:
        """Whether it can be taken from the function, which drops its gradient."""
        if self.given.get("dropout_p") or self._sinks is not None:
            return False
        return not (torch.is_grad_enabled() and (self.query.requires_grad or self.key.requires_grad))

    def _of_function(self, lse: Tensor) -> Tensor | None:
        """Its LSE as [b h t]. None if it has another layout, as those of older packages have for packed rows."""
        b, h, t, _ = self.query.shape
        if lse.shape != ((h, b * t) if self._is_packed else (b, h, t)):
            return None
        empty = lse == torch.inf
        if self._is_packed:  # after the last sequence there is anything
            empty = empty | (torch.arange(b * t, device=lse.device) >= self.given["cu_seqlens_q"][-1])
        lse = lse.masked_fill(empty, -torch.inf)
        return lse.unflatten(1, (b, t)).transpose(0, 1) if self._is_packed else lse

    def returned(self, out: Tensor) -> Any:
        out = self._argument(out.transpose(1, 2))
        return (out, *self.attended[1:]) if isinstance(self.attended, tuple) else out

    def check_lse(self) -> None:
        if flash_attention._use_top_left_mask and self.query.shape[2] != self.key.shape[2]:
            raise self.refuse_lse(
                "the flash-attn package is older than 2.1, which aligns causal masks differently; update it"
            )
        before, after = self._window
        if after not in (0, before) and not self._cached:
            raise self.refuse_lse(f"a window of {before} keys before and {after} after a token is not supported")
        if self._cached and torch.is_grad_enabled() and self.query.requires_grad:
            raise self.refuse_lse("flash_attn_with_kvcache gives no gradient; run the model in torch.no_grad()")

    def compute_lse(self) -> Tensor:
        before, after = self._window
        if self._cached:
            lse = ops.attention_lse(self.query, self.key, self.mask, self.scale, False, softcap=self._softcap)
        else:
            q, k = self.query.transpose(1, 2), self.key.transpose(1, 2)
            starts_q, starts_k, longest_q, longest_k = each_row(q.shape[0], q.shape[1], k.shape[1], q.device)
            if self._is_packed:
                starts_q, starts_k, longest_q, longest_k = (self.given[name] for name in _PACKED)
            sequences = Sequences(starts_q, starts_k, int(longest_q), int(longest_k), after == 0, before)
            lse = rows_lse(q, k, sequences, self.scale, self._softcap)
        return with_sinks(lse, self._sinks)

    @property
    def is_causal(self) -> bool:
        return self._is_plain and self._window[1] == 0

    @property
    def _is_regular(self) -> bool:
        """Whether each sample of packed rows is one sequence of t tokens."""
        starts, longest = self.given["cu_seqlens_q"], self.given["max_seqlen_q"]
        return len(starts) == self._rows + 1 and int(longest) == self.query.shape[2]

    @property
    def _is_plain(self) -> bool:
        """Whether all is said by whether it is causal."""
        if self._cached or self.query.shape[2] != self.key.shape[2] or self._window not in ((None, None), (None, 0)):
            return False
        return not self._is_packed or self._is_regular

    @property
    def mask(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self._is_plain:
            return None
        if self._is_packed and not self._is_regular:
            raise UnsupportedModelError(
                f"`at.mask` is not known here: {type(self._module).__name__} attends in packed rows"
            )
        device, (before, after) = self.query.device, self._window
        t, s = self.query.shape[2], self.key.shape[2]
        lengths = self._lengths[:, None] if self._cached else torch.full((1, 1), s, device=device)
        # Both are counted from the end: the last token stands at the last key.
        q, k = torch.arange(t, device=device) - t, torch.arange(s, device=device) - lengths
        ahead = k[:, None, :] - q[:, None]
        allowed = (k < 0)[:, None, :] & (ahead == ahead)
        allowed = allowed if after is None else allowed & (ahead <= after)
        allowed = allowed if before is None else allowed & (ahead >= -before)
        return allowed[:, None]

    @property
    def logits(self) -> tuple[str, ...]:
        words = () if self._softcap is None else (f"softcap {self._softcap:g}",)
        words = words if self._sinks is None else (*words, "sinks")
        return words if self._window[0] is None else (*words, f"window {self._window[0] + 1}")

    def is_odd_for_all_keys(self) -> list[str]:
        if self._is_packed and not self._is_regular:
            return ["packed rows"]
        return ["samples of several lengths"] if self._cached and len(set(self._lengths.tolist())) > 1 else []
