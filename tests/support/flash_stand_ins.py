"""Stand-ins for the functions of the flash-attn packages, with their signatures, in plain torch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as flash


def allowed(t: int, s: int, causal: bool, window: tuple[int, int]) -> Tensor:
    """Which keys a query sees: the last query stands with the last key, window ends count, -1 is no end."""
    ahead = torch.arange(s) - torch.arange(t)[:, None] - (s - t)
    seen = torch.ones(t, s, dtype=torch.bool)
    if causal:
        seen &= ahead <= 0
    if window[0] >= 0:
        seen &= ahead >= -window[0]
    if window[1] >= 0:
        seen &= ahead <= window[1]
    return seen


def logits_of(
    q: Tensor, k: Tensor, scale: float | None, causal: bool, window: tuple[int, int], softcap: float
) -> Tensor:
    """[h t s] of one sequence: q [t h d], k [s g d]."""
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("thd,shd->hts", q, keys) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~allowed(q.shape[0], k.shape[0], causal, window), -torch.inf)


def _attention(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """The output [t h d] and the LSE [h t], without a gradient and +inf in a row without keys."""
    scores = logits_of(q, k, **options)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    lse = (
        scores.detach()
        .to(torch.promote_types(q.dtype, torch.float32))
        .logsumexp(-1)
        .masked_fill(empty[..., 0], torch.inf)
    )
    if s_aux is not None:
        scores = torch.cat([scores, s_aux[:, None, None].expand(*scores.shape[:2], 1).to(scores.dtype)], -1)
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)[..., : k.shape[0]]
    values = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    return torch.einsum("hts,shd->thd", weights, values), lse


def opaque(function: Callable[..., Any]) -> Any:
    """The same function, of which a mode of torch sees nothing, as of a kernel."""

    @functools.wraps(function)
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return kernel


@opaque
def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: Tensor | None = None,
    s_aux: Tensor | None = None,
) -> Any:  # fmt: skip
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert max_seqlen_q >= max(b - a for a, b in pairwise(starts_q))
    assert (starts_q[-1], starts_k[-1]) == (q.shape[0], k.shape[0])
    options = {"scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap, "s_aux": s_aux}
    parts = [
        _attention(q[a:b], k[c:d], v[c:d], **options)
        for (a, b), (c, d) in zip(pairwise(starts_q), pairwise(starts_k), strict=True)
    ]
    out = torch.cat([part[0] for part in parts])
    return (out, torch.cat([part[1] for part in parts], 1), None) if return_attn_probs else out


@opaque
def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False, s_aux: Tensor | None = None,
) -> Any:  # fmt: skip
    options = {"scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap, "s_aux": s_aux}
    parts = [_attention(*x, **options) for x in zip(q, k, v, strict=True)]
    out = torch.stack([part[0] for part in parts])
    return (out, torch.stack([part[1] for part in parts]), None) if return_attn_probs else out


@opaque
@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None, cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None, cache_leftpad: Tensor | None = None, block_table: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0, rotary_interleaved: bool = True, alibi_slopes: Tensor | None = None, num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:  # fmt: skip
    held = k_cache.shape[1] if cache_seqlens is None else cache_seqlens
    options = {"scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap}
    parts = []
    for row, start in enumerate(torch.as_tensor(held).expand(len(q)).tolist()):
        end = start
        if k is not None and v is not None:
            end = start + k.shape[1]
            k_cache[row, start:end], v_cache[row, start:end] = k[row], v[row]
        parts.append(_attention(q[row], k_cache[row, :end], v_cache[row, :end], **options))
    out = torch.stack([part[0] for part in parts])
    return (out, torch.stack([part[1] for part in parts])) if return_softmax_lse else out


@opaque
def flash_attn_qkvpacked_func(
    qkv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_func(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], *options)


@opaque
def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], *options)


@opaque
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False, return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    rows = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_varlen_func(qkv[:, 0], qkv[:, 1], qkv[:, 2], *rows, *options)


@opaque
def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    rows = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_varlen_func(q, kv[:, 0], kv[:, 1], *rows, *options)


@opaque
def fourth_flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, qv: Tensor | None = None, gather_kv_indices: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None), learnable_sink: Tensor | None = None,
    softcap: float = 0.0, num_splits: int = 1, pack_gqa: bool | None = None, deterministic: bool = False,
    score_mod: Any = None, return_lse: bool = False,
) -> Any:  # fmt: skip
    """`flash_attn_func` of flash_attn.cute, 4.0.0b36: it returns a tuple in any case."""
    window = tuple(-1 if end is None else end for end in window_size)
    more = {"window_size": window, "softcap": softcap, "s_aux": learnable_sink, "return_attn_probs": True}
    out, lse, _ = flash_attn_func(q, k, v, 0.0, softmax_scale, causal, **more)
    return out, lse if return_lse else None


def without(function: Any, *names: str) -> Any:
    """The same function of a package that does not know these arguments."""

    def older(*args: Any, **kwargs: Any) -> Any:
        assert not set(names) & set(kwargs)
        return function(*args, **kwargs)

    signature = inspect.signature(function)
    kept = [p for name, p in signature.parameters.items() if name not in names]
    older.__signature__ = signature.replace(parameters=kept)  # pyright: ignore[reportFunctionMemberAccess]
    return older


def install(monkeypatch: pytest.MonkeyPatch, *unknown: str) -> None:
    """Let transformers find these where it looks for a package, without the arguments that are `unknown` to it."""
    functions = [without(f, *unknown) for f in (flash_attn_func, flash_attn_varlen_func)]
    wanted = 4 if "with_kvcache" not in inspect.getsource(flash._lazy_imports) else 5
    found = (*functions, *([None] if wanted == 5 else []), flash._pad_input, flash._unpad_input)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *args, **kwargs: found)
    for name in [name for name in vars(flash) if name.startswith(("_flash_", "_pad_fn", "_unpad_fn", "_process_"))]:
        if not inspect.isfunction(getattr(flash, name)):
            monkeypatch.setattr(flash, name, getattr(flash, name))
    monkeypatch.setattr(flash, "_loaded_implementation", None)
