"""CPU: torch's flash kernel, which gives the LSE with the output, and one folded backward.

The aten op drops the gradient of its LSE without a word, so autograd is done here. With G the gradient of the
shifted output, f = query . weight + bias and mu = sigmoid(f - lse):

    df = mu (1 - mu) (G . vector)          d lse = -df

A flash backward uses its `out` argument only for delta = rowsum(G * out), and delta must become
rowsum(G * out) - d lse = G . (out + mu (1 - mu) vector). So the kernel is handed
out + mu (1 - mu) vector = shifted - mu^2 vector, and the gradient through the LSE costs nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.torch_version import TorchVersion

from ._masks import Mask, causal_mask, rows_that_attend
from ._precision import full_precision, wide
from ._reference import gate, gate_logit, gated_shift

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Given fewer key/value heads than query heads, the kernel of torch 2.6 reads past their end; 2.13's is right.
_GROUPED_HEADS = TorchVersion(torch.__version__) >= "2.13"


def unavailable(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> str | None:
    """Why this backend can't run the call; None: it can."""
    if q.device.type != "cpu":
        return f"the tensors are on {q.device}"
    if v.shape[-1] != q.shape[-1]:
        return f"the kernel wants values as wide as queries, found {v.shape[-1]} and {q.shape[-1]}"
    if mask is not None and mask.requires_grad:
        return "the mask requires a gradient and the kernel passes none to it"
    if 0 in (q.shape[0], q.shape[2], k.shape[2]):
        return "the kernel does not take an empty batch or sequence"
    return None


class _Prepared(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Float[Tensor, ...] | None
    is_causal: bool
    attends: Bool[Tensor, "#b #h #t"] | None


def _prepare(q: Tensor, k: Tensor, v: Tensor, mask: Mask, is_causal: bool) -> _Prepared:
    """Steer clear of what the kernel gets wrong silently."""
    attends = rows_that_attend(mask)
    t, s = q.shape[2], k.shape[2]
    if is_causal and t < s:
        k, v = k[:, :, :t], v[:, :, :t]
    elif is_causal and t > s:
        mask, is_causal = causal_mask(t, s, q.device), False
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -torch.inf)
        # torch 2.6 takes the last axis for contiguous.
        mask = mask.expand(*mask.shape[:-1], s)
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    if not _GROUPED_HEADS and k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    # A last axis that is not contiguous gives a wrong output beside a right LSE.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return _Prepared(q, k, v, mask, is_causal, attends)


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    p = _prepare(q, k, v, mask, is_causal)
    if _needs_grad(q, k, v):
        out, lse = _AttentionWithLSE.apply(p.q, p.k, p.v, p.mask, scale, p.is_causal)  # pyright: ignore[reportGeneralTypeIssues]
    else:
        out, lse = _flash(p.q, p.k, p.v, 0.0, p.is_causal, attn_mask=p.mask, scale=scale)
    if p.attends is not None:
        lse = lse.masked_fill(~p.attends, -torch.inf)
    return out.transpose(1, 2), lse


def attention_lse(q: Tensor, k: Tensor, mask: Mask, scale: float, is_causal: bool) -> Tensor:
    # The kernel wants values: the keys are at hand, and what comes out of them is thrown away.
    return attention_with_lse(q, k, k.detach(), mask, scale, is_causal)[1]


def shifted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    vector: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    mask: Mask,
    scale: float,
    is_causal: bool,
) -> Tensor:
    if not _needs_grad(q, k, v, vector, gate_weight, gate_bias):
        out, lse = attention_with_lse(q, k, v, mask, scale, is_causal)
        return gated_shift(out, q, lse, vector, gate_weight, gate_bias)
    p = _prepare(q, k, v, mask, is_causal)
    return _ShiftedAttention.apply(  # pyright: ignore[reportReturnType]
        p.q, p.k, p.v, vector, gate_weight, gate_bias, p.mask, p.attends, scale, p.is_causal
    )


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


class _AttentionWithLSE(torch.autograd.Function):
    """Attention and LSE, differentiable in both."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Any:
        out, lse = _flash(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)
        ctx.save_for_backward(q, k, v, out, lse, mask)
        ctx.scale, ctx.is_causal = scale, is_causal
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_out, grad_lse = grads
        q, k, v, out, lse, mask = ctx.saved_tensors
        options = {"attn_mask": mask, "scale": ctx.scale}
        dq = dk = dv = None
        if grad_out is not None:
            dq, dk, dv = _flash_backward(grad_out, q, k, v, out, lse, 0.0, ctx.is_causal, **options)
        if grad_lse is not None:
            # d lse / d logits is the softmax: what flows back from an attention whose values are all the first
            # unit vector and whose `out`, so delta, is taken as zero.
            unit = torch.zeros_like(v)
            unit[..., 0] = 1.0
            through = torch.zeros_like(out)
            through[..., 0] = grad_lse
            dq2, dk2, _ = _flash_backward(
                through, q, k, unit, torch.zeros_like(out), lse, 0.0, ctx.is_causal, **options
            )
            dq, dk = (dq2, dk2) if dq is None or dk is None else (dq + dq2, dk + dk2)
        return dq, dk, dv, None, None, None


class _ShiftedAttention(torch.autograd.Function):
    """Attention, gate and shift with the folded backward of this file's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        vector: Tensor,
        gate_weight: Tensor,
        gate_bias: Tensor,
        mask: Tensor | None,
        attends: Tensor | None,
        scale: float,
        is_causal: bool,
    ) -> Tensor:
        out, lse = _flash(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)
        seen = lse if attends is None else lse.masked_fill(~attends, -torch.inf)
        mu = gate(gate_logit(q, gate_weight, gate_bias), seen)
        shifted = (wide(out).transpose(1, 2) + mu.transpose(1, 2)[..., None] * vector.to(mu.dtype)).to(out.dtype)
        ctx.save_for_backward(q, k, v, shifted, lse, mu, vector, gate_weight, mask)
        ctx.scale, ctx.is_causal = scale, is_causal
        return shifted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        with full_precision(grads[0]):
            return _ShiftedAttention._backward(ctx, grads[0])

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, shifted, lse, mu, vector, gate_weight, mask = ctx.saved_tensors
        grad = grad.transpose(1, 2)  # b h t d from here on
        wide_grad = wide(grad)
        wide_vector, wide_weight = vector.to(mu.dtype), gate_weight.to(mu.dtype)
        df = mu * (1 - mu) * (wide_grad @ wide_vector[:, :, None]).squeeze(-1)
        dq = dk = dv = None
        if any(ctx.needs_input_grad[:3]):
            out = (wide(shifted).transpose(1, 2) - (mu * mu)[..., None] * wide_vector[:, None]).to(q.dtype)
            dq, dk, dv = _flash_backward(grad, q, k, v, out, lse, 0.0, ctx.is_causal, attn_mask=mask, scale=ctx.scale)
            dq = dq + (df[..., None] * wide_weight[:, None]).to(dq.dtype)
        d_vector = torch.einsum("bht,bhtd->hd", mu, wide_grad).to(vector.dtype)
        d_weight = torch.einsum("bht,bhtd->hd", df, wide(q)).to(gate_weight.dtype)
        d_bias = df.sum((0, 2)).to(gate_weight.dtype)
        return dq, dk, dv, d_vector, d_weight, d_bias, None, None, None, None
