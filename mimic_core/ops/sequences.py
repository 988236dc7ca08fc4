"""The LSE of attention over sequences of several lengths, laid one after another: how flash kernels take a batch."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from ._checks import once_differentiable
from ._lse import Band, attention_lse
from ._precision import full_precision

_WIDEST = 256  # what torch's flash kernel takes


class Sequences(NamedTuple):
    """Which tokens attend to which.

    Attributes:
        starts_q: Where the queries of each sequence start among all, and, at last, where they end: [n+1], int32.
        starts_k: The same of its keys.
        longest_q: Most queries of a sequence.
        longest_k: Most keys.
        is_causal: A query sees no later key; the last query of a sequence is as late as its last key.
        window: A query sees so many keys before its own, and as many after it where `is_causal` is False; None: all.
    """

    starts_q: Int[Tensor, " n"]
    starts_k: Int[Tensor, " n"]
    longest_q: int
    longest_k: int
    is_causal: bool
    window: int | None = None


def sequences_lse(
    q: Float[Tensor, "t h d"],
    k: Float[Tensor, "s g d"],
    sequences: Sequences,
    scale: float,
    softcap: float | None = None,
) -> Float[Tensor, "h t"]:
    """Log-sum-exp of the attention logits, in nats: fp32 (fp64 for fp64), -inf where a query sees no key.

    Also for queries after the last sequence.

    By torch's flash kernel for such sequences on CUDA, in half precision; elsewhere, and with a softcap, in chunks, one
    sequence after another. Differentiable in q and k.
    """
    half = q.dtype in (torch.float16, torch.bfloat16)
    if q.is_cuda and half and softcap is None and q.shape[-1] <= _WIDEST and q.shape[-1] % 8 == 0:
        return _FlashLSE.apply(q, k, sequences, scale)  # pyright: ignore[reportReturnType]
    parts = []
    ends_q, ends_k = sequences.starts_q.tolist(), sequences.starts_k.tolist()
    with full_precision(q):
        for (t0, t1), (s0, s1) in zip(pairwise(ends_q), pairwise(ends_k), strict=True):
            later = 0 if sequences.is_causal else sequences.window
            band = Band(s1 - s0 - (t1 - t0), sequences.window, later)
            of_q, of_k = (rearrange(x, "t h d -> 1 h t d") for x in (q[t0:t1], k[s0:s1]))
            parts.append(attention_lse(of_q, of_k, None, scale, False, softcap, band)[0])
    return torch.nn.functional.pad(torch.cat(parts, dim=1), (0, q.shape[0] - ends_q[-1]), value=-torch.inf)


class _FlashLSE(torch.autograd.Function):
    """The LSE torch's flash kernel has at hand, and the gradient through it that the kernel drops."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, sequences: Sequences, scale: float) -> Tensor:
        sequences = sequences._replace(starts_q=sequences.starts_q.int(), starts_k=sequences.starts_k.int())
        # A kernel wants values: the keys are at hand, and what comes out of them is thrown away.
        out, lse, seed, offset, _ = torch.ops.aten._flash_attention_forward(
            q, k, k, *sequences[:4], 0.0, sequences.is_causal, False, scale=scale, **_window(sequences)
        )
        ctx.save_for_backward(q, k, lse, seed, offset, sequences.starts_q, sequences.starts_k)
        ctx.sequences, ctx.scale = sequences, scale
        return _by_head(lse, sequences, out.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, lse, seed, offset, *_ = ctx.saved_tensors
        sequences: Sequences = ctx.sequences
        # d lse / d logits is the softmax: what flows back from an attention whose values are all the first unit vector
        # and whose `out`, so delta, is taken as zero.
        unit, through = torch.zeros_like(k), torch.zeros_like(q)
        unit[..., 0] = 1.0
        through[..., 0] = rearrange(grads[0], "h t -> t h")
        dq, dk, _ = torch.ops.aten._flash_attention_backward(
            through, q, k, unit, torch.zeros_like(q), lse, *sequences[:4], 0.0, sequences.is_causal, seed, offset,
            scale=ctx.scale, **_window(sequences),
        )  # fmt: skip
        return dq, dk, None, None


def _window(sequences: Sequences) -> dict[str, int]:
    if sequences.window is None:
        return {}
    return {
        "window_size_left": sequences.window,
        "window_size_right": 0 if sequences.is_causal else sequences.window,
    }


def _by_head(lse: Tensor, sequences: Sequences, t: int) -> Tensor:
    """[h t]: before torch 2.7 it comes as [n h longest_q]."""
    if lse.ndim == 3:
        lengths = sequences.starts_q.diff()
        at = torch.arange(lse.shape[2], device=lse.device) < lengths[:, None]
        lse = lse.transpose(0, 1)[:, at]
    missing = t - lse.shape[1]
    lse = lse if missing <= 0 else torch.nn.functional.pad(lse, (0, missing), value=-torch.inf)
    # A row without keys comes as +inf, one of no sequence as whatever was there.
    of_none = torch.arange(t, device=lse.device) >= sequences.starts_q[-1]
    return lse.masked_fill((lse == torch.inf) | of_none, -torch.inf)
