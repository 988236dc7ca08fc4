"""Attention by a kernel that returns its LSE, differentiable also in the LSE, and the shift with one backward for both.

All aten attention functions ignore the gradient of the LSE, so the autograd functions are here. With G the gradient of
the shifted output, f = query . weight + bias and mu = sigmoid(f - lse):

    df = mu (1 - mu) (G . vector)          d lse = -df

A flash backward uses its `out` argument only for delta = rowsum(G * out). Here delta must be
rowsum(G * out) - d lse = G . (out + mu (1 - mu) vector). So the `out` argument is
out + mu (1 - mu) vector = shifted - mu^2 vector, and the gradient through the LSE costs no time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .._checks import needs_grad, once_differentiable
from .._masks import Mask, causal_mask
from .._precision import full_precision
from . import epilogue


class Prepared(NamedTuple):
    """The arguments of a call, changed where the kernel would silently give wrong results."""

    q: Float[Tensor, "b h t d"]
    k: Float[Tensor, "b g s d"]
    v: Float[Tensor, "b g s d"]
    mask: Float[Tensor, "#b #h #t s"] | None
    scale: float
    is_causal: bool
    attends: Bool[Tensor, "#b #h #t"] | None


def at_the_upper_left(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, is_causal: bool
) -> tuple[Tensor, Tensor, Mask, bool]:
    """Keys, values, mask and is_causal, so that the call is causal at the upper left also with unequal lengths."""
    t, s = q.shape[2], k.shape[2]
    if is_causal and t < s:
        return k[:, :, :t], v[:, :, :t], mask, True
    if is_causal and t > s:
        return k, v, causal_mask(t, s, q.device), False
    return k, v, mask, is_causal


Saved = tuple[Any, ...]
"""What a kernel's forward saves for its backward besides out and LSE: tensors, numbers, None."""


@runtime_checkable
class Kernel(Protocol):
    """An attention kernel and its backward. `out` is [b h t d] in any memory order. The kernel ignores `attends`."""

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, is_causal: bool) -> Prepared: ...

    def forward(self, p: Prepared) -> tuple[Tensor, Tensor, Saved]: ...

    def backward(
        self, grad: Tensor, p: Prepared, out: Tensor, lse: Tensor, saved: Saved
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class Ops(NamedTuple):
    """The three ops of a backend."""

    attention_with_lse: Callable[..., tuple[Tensor, Tensor]]
    attention_lse: Callable[..., Tensor]
    shifted_attention: Callable[..., Tensor]


def ops_of(kernel: Kernel) -> Ops:
    class AttentionWithLSE(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool
        ) -> Any:
            p = Prepared(q, k, v, mask, scale, is_causal, None)
            out, lse, saved = kernel.forward(p)
            _save(ctx, p, (out, lse), saved)
            ctx.set_materialize_grads(False)
            return out, lse

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
            grad_out, grad_lse = grads
            p, (out, lse), saved = _saved(ctx, 2)
            dq = dk = dv = None
            if grad_out is not None:
                dq, dk, dv = kernel.backward(grad_out, p, out, lse, saved)
            if grad_lse is not None:
                # d lse / d logits is the softmax. The kernel's backward gives it if all values are the first unit
                # vector and `out` is zero, so that delta is zero.
                unit = torch.zeros_like(p.v)
                unit[..., 0] = 1.0
                through = torch.zeros_like(out)
                through[..., 0] = grad_lse
                dq2, dk2, _ = kernel.backward(through, p._replace(v=unit), torch.zeros_like(out), lse, saved)
                dq, dk = (dq2, dk2) if dq is None or dk is None else (dq + dq2, dk + dk2)
            return dq, dk, dv, None, None, None

    class ShiftedAttention(torch.autograd.Function):
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
            p = Prepared(q, k, v, mask, scale, is_causal, attends)
            out, lse, saved = kernel.forward(p)
            out = out.transpose(1, 2)
            mu = epilogue.gated_shift_(out, q, lse, attends, vector, gate_weight, gate_bias)
            _save(ctx, p, (out, lse, mu, vector, gate_weight), saved)
            return out

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
            with full_precision(grads[0]):
                return ShiftedAttention._backward(ctx, grads[0])

        @staticmethod
        def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            p, (shifted, lse, mu, vector, weight), saved = _saved(ctx, 5)
            into_attention = any(ctx.needs_input_grad[:3])
            out, df, d_vector, d_weight, d_bias = epilogue.folded_gradients(
                grad, shifted, p.q, mu, vector, weight, into_attention
            )
            dq = dk = dv = None
            if out is not None:
                dq, dk, dv = kernel.backward(grad.transpose(1, 2), p, out.transpose(1, 2), lse, saved)
                if ctx.needs_input_grad[0]:
                    epilogue.add_to_dq_(dq, df, weight)
            return dq, dk, dv, d_vector, d_weight, d_bias, None, None, None, None

    def attention_with_lse(
        q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, is_causal: bool
    ) -> tuple[Tensor, Tensor]:
        p = kernel.prepare(q, k, v, mask, scale, is_causal)
        if needs_grad(q, k, v):
            out, lse = AttentionWithLSE.apply(p.q, p.k, p.v, p.mask, scale, p.is_causal)  # pyright: ignore[reportGeneralTypeIssues]
        else:
            out, lse, _ = kernel.forward(p)
        if p.attends is not None:
            lse = lse.masked_fill(~p.attends, -torch.inf)
        return out.transpose(1, 2), lse

    def attention_lse(q: Tensor, k: Tensor, mask: Mask, scale: float, is_causal: bool) -> Tensor:
        # A kernel needs values. The keys are used, and the output is not.
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
        p = kernel.prepare(q, k, v, mask, scale, is_causal)
        if needs_grad(q, k, v, vector, gate_weight, gate_bias):
            return ShiftedAttention.apply(  # pyright: ignore[reportReturnType]
                p.q, p.k, p.v, vector, gate_weight, gate_bias, p.mask, p.attends, scale, p.is_causal
            )
        out, lse, _ = kernel.forward(p)
        out = out.transpose(1, 2)
        epilogue.gated_shift_(out, p.q, lse, p.attends, vector, gate_weight, gate_bias)
        return out

    return Ops(attention_with_lse, attention_lse, shifted_attention)


def _save(ctx: Any, p: Prepared, tensors: tuple[Tensor, ...], saved: Saved) -> None:
    """Save tensors with autograd, and numbers in `ctx`. The backward does not need `attends`."""
    of_kernel = (x for x in saved if isinstance(x, Tensor))
    ctx.save_for_backward(p.q, p.k, p.v, p.mask, *tensors, *of_kernel)
    ctx.options = p.scale, p.is_causal
    ctx.numbers = tuple(None if isinstance(x, Tensor) else (x,) for x in saved)


def _saved(ctx: Any, n: int) -> tuple[Prepared, tuple[Any, ...], Saved]:
    """What `_save` saved; `n` is the number of its `tensors`."""
    q, k, v, mask, *rest = ctx.saved_tensors
    of_kernel = iter(rest[n:])
    saved = tuple(next(of_kernel) if x is None else x[0] for x in ctx.numbers)
    scale, is_causal = ctx.options
    return Prepared(q, k, v, mask, scale, is_causal, None), tuple(rest[:n]), saved
