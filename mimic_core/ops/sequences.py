"""The LSE of attention over concatenated sequences of different lengths, the input format of flash kernels."""

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

_WIDEST = 256  # the largest head_dim of torch's flash kernel


class Sequences(NamedTuple):
    """Which tokens attend to which.

    Attributes:
        starts_q: The index of the first query of each sequence, and the end of the last sequence: [n+1], int32.
        starts_k: The same for the keys.
        longest_q: The largest number of queries in a sequence.
        longest_k: The largest number of keys in a sequence.
        is_causal: A query does not attend to later keys. The last query of a sequence is at its last key.
        window: How many keys before its own a query attends to, and also after it if `is_causal` is False; None: all.
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
    """Log-sum-exp of the attention logits in nats, in fp32 (fp64 for fp64). Differentiable in q and k.

    It is -inf for a query without keys and for queries after the last sequence.

    In half precision on CUDA, torch's flash kernel computes it. Elsewhere, and with a softcap, it is computed in
    chunks, one sequence after another.
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
    """The LSE of torch's flash kernel, and the gradient through it, which the kernel ignores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, sequences: Sequences, scale: float) -> Tensor:
        sequences = sequences._replace(starts_q=sequences.starts_q.int(), starts_k=sequences.starts_k.int())
        # A kernel needs values. The keys are used, and the output is not.
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
        # d lse / d logits is the softmax. An attention backward gives it if all values are the first unit vector and
        # `out` is zero, so that delta is zero.
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
    """The LSE as [h t]. Before torch 2.7 the kernel returns [n h longest_q]."""
    if lse.ndim == 3:
        lengths = sequences.starts_q.diff()
        at = torch.arange(lse.shape[2], device=lse.device) < lengths[:, None]
        lse = lse.transpose(0, 1)[:, at]
    missing = t - lse.shape[1]
    lse = lse if missing <= 0 else torch.nn.functional.pad(lse, (0, missing), value=-torch.inf)
    # The kernel returns +inf for a row without keys, and uninitialised numbers after the last sequence.
    of_none = torch.arange(t, device=lse.device) >= sequences.starts_q[-1]
    return lse.masked_fill((lse == torch.inf) | of_none, -torch.inf)
