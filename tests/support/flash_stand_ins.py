"""Stand-ins for the functions of the flash-attn packages, with their signatures, in plain torch."""

from __future__ import annotations

import inspect
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


def _attention(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None = None, **options: Any) -> Tensor:
    scores = logits_of(q, k, **options)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux[:, None, None].expand(*scores.shape[:2], 1).to(scores.dtype)], -1)
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)[..., : k.shape[0]]
    values = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    return torch.einsum("hts,shd->thd", weights, values)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, deterministic: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor:  # fmt: skip
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert max_seqlen_q >= max(b - a for a, b in pairwise(starts_q))
    assert (starts_q[-1], starts_k[-1]) == (q.shape[0], k.shape[0])
    options = {"scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap, "s_aux": s_aux}
    parts = [
        _attention(q[a:b], k[c:d], v[c:d], **options)
        for (a, b), (c, d) in zip(pairwise(starts_q), pairwise(starts_k), strict=True)
    ]
    return torch.cat(parts)


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, deterministic: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor:  # fmt: skip
    options = {"scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap, "s_aux": s_aux}
    return torch.stack([_attention(*x, **options) for x in zip(q, k, v, strict=True)])


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
