"""Log-sum-exp of attention logits, for an attention that does not return it.

Forward and backward work on chunks of queries, so there is never a whole [t s] tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from ._checks import once_differentiable
from ._masks import Mask, rows_that_attend
from ._precision import full_precision, wide

# Number of scores in a chunk: 4 Mi is 16 MiB in fp32. Larger chunks were not faster on a CPU.
_CHUNK_ELEMENTS = 1 << 22


class Band(NamedTuple):
    """Query i is at key i + offset. It attends to `before` keys before this one and `after` after it; None: all."""

    offset: int
    before: int | None
    after: int | None


_EVERYWHERE, _CAUSAL = Band(0, None, None), Band(0, None, 0)


def attention_lse(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g s d"],
    mask: Mask,
    scale: float,
    is_causal: bool,
    softcap: float | None = None,
    band: Band | None = None,
) -> Float[Tensor, "b h t"]:
    """`_reference.attention_lse` with the memory of one chunk. Differentiable in q and k, not in the mask.

    `band` is used instead of `is_causal`.
    """
    if is_causal:
        k = k[:, :, : q.shape[2]]
    band = band or (_CAUSAL if is_causal else _EVERYWHERE)
    lse: Tensor = _ChunkedLSE.apply(q, k, mask, scale, band, softcap)  # pyright: ignore[reportAssignmentType]
    attends = rows_that_attend(mask)
    return lse if attends is None else lse.masked_fill(~attends, -torch.inf)


def _chunks(q: Tensor, k: Tensor) -> list[slice]:
    b, h, t, _ = q.shape
    step = max(1, _CHUNK_ELEMENTS // max(1, b * h * k.shape[2]))
    return [slice(start, min(start + step, t)) for start in range(0, max(1, t), step)]


def _scores(q: Tensor, k: Tensor, mask: Mask, scale: float, band: Band, softcap: float | None, rows: slice) -> Tensor:
    """Masked logits of some rows, with heads grouped by their key head: [b g r t s]."""
    grouped = _by_key_head(q[:, :, rows], k)
    scores = wide(grouped) @ wide(k)[:, :, None].mT * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if band != _EVERYWHERE:
        places = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + band.offset
        ahead = torch.arange(k.shape[2], device=q.device) - places
        if band.after is not None:
            scores = scores.masked_fill_(ahead > band.after, -torch.inf)
        if band.before is not None:
            scores = scores.masked_fill_(ahead < -band.before, -torch.inf)
    if mask is None:
        return scores
    part = mask if mask.shape[2] == 1 else mask[:, :, rows]
    part = part[:, :, None] if part.shape[1] == 1 else _by_key_head(part, k)
    return scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part


def _by_key_head(x: Tensor, k: Tensor) -> Tensor:
    return rearrange(x, "b (g n) ... -> b g n ...", g=k.shape[1])


class _ChunkedLSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, mask: Mask, scale: float, band: Band, softcap: float | None) -> Tensor:
        parts = [_scores(q, k, mask, scale, band, softcap, rows).logsumexp(-1) for rows in _chunks(q, k)]
        lse = rearrange(torch.cat(parts, dim=3), "b g n t -> b (g n) t")
        ctx.save_for_backward(q, k, lse, mask)
        ctx.options = scale, band, softcap
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        with full_precision(grads[0]):
            return _ChunkedLSE._backward(ctx, grads[0])

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, lse, mask = ctx.saved_tensors
        dq = torch.empty(q.shape, dtype=lse.dtype, device=q.device)
        dk = torch.zeros(k.shape, dtype=lse.dtype, device=q.device)
        scale, band, softcap = ctx.options
        for rows in _chunks(q, k):
            scores = _scores(q, k, mask, scale, band, softcap, rows)
            # d lse / d logits is the softmax. A row with only -inf has gradient 0.
            row_lse = rearrange(lse[:, :, rows], "b (g n) t -> b g n t 1", g=k.shape[1])
            weights = torch.exp(scores - row_lse.masked_fill(row_lse == -torch.inf, 0.0))
            weights = weights * (rearrange(grad[:, :, rows], "b (g n) t -> b g n t 1", g=k.shape[1]) * scale)
            if softcap is not None:
                # Compute the tanh again. The mask is not needed: where a weight is not zero, a key is not masked.
                capped = _scores(q, k, None, scale, _EVERYWHERE, softcap, rows) / softcap
                weights = weights * (1 - capped * capped)
            dq[:, :, rows] = rearrange(weights @ wide(k)[:, :, None], "b g n t d -> b (g n) t d")
            dk += reduce(weights.mT @ wide(_by_key_head(q[:, :, rows], k)), "b g n s d -> b g s d", "sum")
        return dq.to(q.dtype), dk.to(k.dtype), None, None, None, None
