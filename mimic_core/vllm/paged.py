"""What heads read of a call of vLLM's attention: the query, and the LSE.

A kernel for CUDA returns the LSE if it is asked (`kernels.py`). That of the CPU can't: it is computed from the pages.
"""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendUnavailableError, PatchStateError
from ..ops import native
from ..types import AttentionView
from . import kernels

# The most logits that are in memory at once.
_LOGITS = 1 << 24
# How many tokens of a request are compared, and how far off an LSE may be, by 1 + its size. Rounding is far less.
_COMPARED = 64
_APART = 5e-3


class Attention:
    """One call of a layer's attention: its queries [n h d], the pages with its keys, and which belong to a request.

    Args:
        kept: What the kernels returned; None: they return nothing.
    """

    def __init__(self, impl: Any, query: Tensor, cache: Tensor, meta: Any, kept: kernels.Kept | None = None) -> None:
        self._impl = impl
        self._query = query
        self._cache = cache
        self._meta = meta
        self._kept = kept
        self._lse: Tensor | None = None

    @property
    def lse(self) -> Tensor:
        """[n h], in nats."""
        if self._lse is None:
            call = self._impl, self._query, self._cache, self._meta
            self._lse = lse(*call) if self._kept is None else _checked(kernels.joined(self._kept, self._query), *call)
        return self._lse

    def view(self, at_once: bool, at: Tensor | None) -> AttentionView:
        """What a head reads of the tokens `at`, or of all: as one sample, or each token as a sample of its own."""
        return _View(self, at_once, at)

    def gated_shift(self, value: Tensor, parameters: Sequence[Tensor], rows: Tensor, strengths: Tensor) -> bool:
        """Shift the heads' output [n h e] in place, if the ops in C++ can: return whether they did.

        Args:
            parameters: Vector, gate weight and gate bias of each row of a kind [rows h ...].
            rows, strengths: Of each token [n].
        """
        if self._kept is not None:
            return False
        ops = _ops(self._impl, value)
        _check(self._meta)
        call = _call(self._impl, self._query, self._cache, self._meta)
        return ops is not None and ops.paged_gated_shift(*call, value, *parameters, rows, strengths)

    def queries(self) -> Tensor:
        """[n h d]."""
        return self._query


class _View(AttentionView):
    def __init__(self, attention: Attention, at_once: bool, at: Tensor | None) -> None:
        self._attention = attention
        self._at_once = at_once
        self._at = slice(None) if at is None else at
        query = attention.queries()[self._at]
        self.query = query.transpose(0, 1)[None] if at_once else query[:, :, None]
        self.scale = attention._impl.scale

    @property
    def lse(self) -> Tensor:
        lse = self._attention.lse[self._at]
        return lse.T[None] if self._at_once else lse[:, :, None]

    @property
    def is_causal(self) -> bool:
        return True

    @property
    def lse_all_keys(self) -> Tensor:
        raise PatchStateError("vLLM has no keys of masked tokens: log_z2='all_keys' can't be served")

    @property
    def logits(self) -> tuple[str, ...]:
        raise PatchStateError("what the logits depend on is not known in vLLM")


def lse(impl: Any, query: Tensor, cache: Tensor, meta: Any) -> Tensor:
    """The LSE [n h] of the logits of a call of vLLM's CPU attention, in fp32."""
    _check(meta)
    ops = _ops(impl, query)
    found = None if ops is None else ops.paged_lse(*_call(impl, query, cache, meta))
    if found is not None:
        return found
    keys = keys_of(cache)
    starts, lengths = meta.query_start_loc.long(), meta.seq_lens.long()
    counts = starts[1:] - starts[:-1]
    result = torch.full(query.shape[:2], -torch.inf)
    # Requests that decode have one token each: they are one batch, of which each has its own pages.
    decoding = (counts == 1).nonzero()[:, 0]
    if len(decoding):
        at = starts[:-1][decoding]
        call = query[at][:, None], keys, meta.block_table[decoding], lengths[decoding]
        result[at] = _lse(impl, impl.sliding_window, *call)[:, 0]
    # The prompts of a step are few: their tokens are as many as those of all that decode.
    for row in (counts > 1).nonzero()[:, 0].tolist():
        one = slice(row, row + 1)
        at = slice(int(starts[row]), int(starts[row + 1]))
        call = query[at][None], keys, meta.block_table[one], lengths[one]
        result[at] = _lse(impl, impl.sliding_window, *call)[0]
    # A sink is one more logit of each attention head.
    return result if impl.sinks is None else torch.logaddexp(result, impl.sinks.float())


def _ops(impl: Any, query: Tensor) -> Any:
    """The ops in C++, which know neither softcaps nor sinks."""
    return None if impl.logits_soft_cap or impl.sinks is not None else native.ops_for(query)


def _check(meta: Any) -> None:
    if meta.causal is not True or getattr(meta, "dynamic_causal", None) is not None:
        raise PatchStateError("attention that is not causal has no LSE here: this model can't have gated heads")


def _call(impl: Any, query: Tensor, cache: Tensor, meta: Any) -> tuple[Any, ...]:
    """What the ops in C++ want to know of a call."""
    requests = (meta.block_table, meta.query_start_loc, meta.seq_lens)
    # A layer has the same cache in each step: to make the view costs as much as to call the ops.
    known = impl.__dict__.get("mimic_core_keys")
    if known is None or known[0] is not cache:
        known = impl.__dict__["mimic_core_keys"] = cache, keys_of(cache)
    return query, known[1], *requests, impl.scale, max(0, impl.sliding_window)


def _lse(impl: Any, window: int, query: Tensor, keys: Tensor, pages: Tensor, lengths: Tensor) -> Tensor:
    """The LSE [r t h] without sinks, of requests whose last t tokens are the queries [r t h d].

    A window below 1 is none.
    """
    softcap = impl.logits_soft_cap
    r, t, h, d = query.shape
    longest, (g, size) = int(lengths.max()), (keys.shape[1], keys.shape[3])
    used = -(-longest // size)
    found = keys[pages[:, :used].long()].float()  # [r pages g d size]
    found = found.permute(0, 2, 3, 1, 4).reshape(r, g, d, used * size)[..., :longest]
    parts = []
    step = max(1, _LOGITS // (r * h * longest))
    for first in range(0, t, step):
        part = query[:, first : first + step].float() * impl.scale
        rows = part.shape[1]
        grouped = part.view(r, rows, g, h // g, d).permute(0, 2, 3, 1, 4).reshape(r, g, -1, d)
        logits = (grouped @ found).view(r, h, rows, longest)
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        place = (lengths[:, None] - t + torch.arange(first, first + rows, device=query.device))[:, None, :, None]
        key = torch.arange(longest, device=query.device)
        seen = key <= place
        if window > 0:
            seen = seen & (key > place - window)
        parts.append(logits.masked_fill(~seen, -torch.inf).logsumexp(-1).transpose(1, 2))
    return torch.cat(parts, 1)


def _checked(found: Tensor, impl: Any, query: Tensor, cache: Tensor, meta: Any) -> Tensor:
    """The LSE [n h] that a kernel for CUDA returned. In steps of a new size it is compared with that of the keys.

    Raises:
        BackendUnavailableError: it is another one.
    """
    _check(meta)
    requests = getattr(meta, kernels.COMMON, meta)
    # Another kernel may run for prompts, for more requests, or for longer ones.
    n = len(requests.query_start_loc) - 1
    kind = len(query) > n, n.bit_length(), int(requests.max_seq_len).bit_length()
    seen = vars(impl).setdefault("mimic_core_seen", set())
    if kind in seen:
        return found
    keys = cache[..., : query.shape[-1]].transpose(2, 3)  # [pages g d size]
    pages = meta.block_table if requests is meta else requests.block_table_tensor
    starts = requests.query_start_loc.tolist()
    for row in {0, n - 1}:  # FlashInfer has those that decode first, and the prompts last
        one = slice(row, row + 1)
        at = slice(max(starts[row], starts[row + 1] - _COMPARED), starts[row + 1])
        call = query[at][None], keys, pages[one], requests.seq_lens[one].long()
        wanted = _lse(impl, impl.sliding_window[0] + 1, *call)[0]
        # A stack that overflows gives no finite LSE to its own tokens, and ends nothing.
        wrong = wanted.isfinite() & ~torch.isclose(found[at], wanted, rtol=_APART, atol=_APART)
        if wrong.any():
            apart = float((found[at] - wanted)[wrong].abs().max())
            raise BackendUnavailableError(
                f"the LSE of {type(impl).__name__} is not that of its keys: it is {apart:.2g} off. Serve heads without "
                f"a gate, such as LIVE, and report this with the kind of GPU"
            )
    seen.add(kind)
    return found


def keys_of(cache: Tensor) -> Tensor:
    """The keys [pages g d size] in a layer's cache [pages g size 2*d]: in each page they are stored transposed."""
    pages, g, size, both = cache.shape
    keys = cache.view(pages, g, size * 2, both // 2)[:, :, :size]
    return keys.as_strided(
        (pages, g, both // 2, size), (keys.stride(0), keys.stride(1), size, 1), keys.storage_offset()
    )


def check(attn: Any, name: str) -> None:
    """Check that the LSE of a layer can be computed: by what its attention does, and by writing keys and reading them.

    Raises:
        BackendUnavailableError: it can't.
    """
    from vllm.utils.torch_utils import is_quantized_kv_cache
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    impl = attn.impl
    is_cpu = type(impl) is CPUAttentionBackendImpl
    refused = None if is_cpu else kernels.ask(impl)
    problems = {
        f"the attention backend {attn.attn_backend.get_name()}, {refused}": refused is not None,
        f"attention of the kind {type(attn).__name__}": type(attn).__name__ != "Attention",
        f"attention of the kind {attn.attn_type!r}": attn.attn_type != "decoder",
        f"keys in {attn.kv_cache_dtype} (pass kv_cache_dtype='auto')": is_quantized_kv_cache(attn.kv_cache_dtype),
        "a softcap of the logits": not is_cpu and bool(getattr(impl, "logits_soft_cap", 0)),
        "alibi": getattr(impl, "alibi_slopes", None) is not None,
        "attention sinks": not is_cpu and getattr(impl, "sinks", None) is not None,
        "keys shared with another layer": attn.kv_sharing_target_layer_name is not None,
        "attention that is not causal for images": attn.use_mm_prefix,
    }
    found = [problem for problem, is_so in problems.items() if is_so]
    if is_cpu and not found and not _is_stored_as_read(attn):
        found = [f"keys as the instruction set {attn.isa!r} stores them: pass dtype='float32'"]
    if found:
        raise BackendUnavailableError(
            f"{name}: this head needs the LSE of attention, which can't be had exactly with {', '.join(found)}; serve "
            f"heads without a gate, such as LIVE or MimIC with gate=False, or another model"
        )


def _is_stored_as_read(attn: Any) -> bool:
    """Whether `keys_of` gives the keys that the CPU's kernel wrote."""
    from vllm import _custom_ops as ops

    _, g, size, both = attn.kv_cache.shape
    scratch = torch.zeros(2, g, size, both, dtype=attn.kv_cache.dtype)
    key = torch.randn(size + 3, g, both // 2).to(scratch.dtype)
    parts = scratch.view(2, g, size * 2, both // 2).chunk(2, dim=2)
    slots = torch.arange(len(key))
    ops.cpu_attn_reshape_and_cache(key, key, *parts, slots, attn.isa, 1.0, 1.0, "auto")
    read = keys_of(scratch).permute(0, 3, 1, 2).reshape(2 * size, g, both // 2)[: len(key)]
    return torch.equal(read, key)
