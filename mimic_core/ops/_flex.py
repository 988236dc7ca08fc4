"""FlexAttention, whose LSE has a gradient on CUDA. It runs only when named, for comparisons."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ._checks import needs_grad
from ._masks import Mask, additive, causal_mask, rows_that_attend


def unavailable(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> str | None:
    """Why this backend cannot run the call. None means that it can."""
    if q.device.type not in ("cuda", "cpu"):
        return f"the tensors are on {q.device}"
    if q.device.type == "cpu" and needs_grad(q, k, v):
        return "flex_attention gives no gradients on a CPU"
    if mask is not None and mask.requires_grad:
        return "the mask requires a gradient"
    if 0 in (q.shape[0], q.shape[2], k.shape[2]):
        return "flex_attention does not take an empty batch or sequence"
    return None


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    attends = rows_that_attend(mask)
    block_mask = score_mod = None
    if is_causal and q.device.type == "cuda":
        block_mask = _causal_blocks(q.shape[2], k.shape[2], str(q.device))
    elif is_causal:
        mask = causal_mask(q.shape[2], k.shape[2], q.device)
    if mask is not None:
        score_mod = _adds(additive(mask, q.dtype))
    out, lse = _attention(q.device.type)(
        q, k, v, score_mod=score_mod, block_mask=block_mask, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
    )
    if attends is not None:
        lse = lse.masked_fill(~attends, -torch.inf)
    return out.transpose(1, 2), lse


def attention_lse(q: Tensor, k: Tensor, mask: Mask, scale: float, is_causal: bool) -> Tensor:
    return attention_with_lse(q, k, k.detach(), mask, scale, is_causal)[1]


def _adds(mask: Tensor) -> Callable[..., Tensor]:
    """The mask [b h t s], with axes that may be 1, as a function of the indices."""
    b, h, t, s = (min(n - 1, 1) for n in mask.shape)

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return score + mask[batch * b, head * h, row * t, key * s]

    return score_mod


@cache
def _causal_blocks(t: int, s: int, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, row, key: row >= key, None, None, t, s, device=device)


@cache
def _attention(device: str) -> Callable[..., tuple[Tensor, Tensor]]:
    from torch.nn.attention import flex_attention as flex

    # Uncompiled it makes the whole score matrix. This is slow, but only this form gives an LSE on a CPU.
    run: Callable[..., Any] = torch.compile(flex.flex_attention) if device == "cuda" else flex.flex_attention
    if "return_aux" not in signature(flex.flex_attention).parameters:  # before torch 2.9
        return lambda *args, **options: run(*args, **options, return_lse=True)
    request = flex.AuxRequest(lse=True)

    def attention(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        out, auxiliary = run(*args, **options, return_aux=request)
        return out, auxiliary.lse

    return attention
