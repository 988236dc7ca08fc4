"""Row kernels around an attention: gate and shift after one that ran elsewhere, and what its backward needs.

Sums over rows are written per program and added up by torch: the same order, so the same result, every time.
"""

from __future__ import annotations

from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

from ._triton_blocks import on, power_of_two, tiles
from ._triton_norm import norm_preserving_add
from ._triton_tiles import gate, load_rows, load_vector, row_sums, store_rows, store_vector

__all__ = ["add_to_dq_", "fold", "folded_gradients", "gated_shift_", "norm_preserving_add"]

_ROWS = 32
_WARPS = 4

# Capitals are what the compiler knows; the formatter would give each of the many arguments a line of its own.
# ruff: noqa: N803
# fmt: off


@triton.jit(do_not_specialize=["t"])
@no_type_check
def shift_kernel(
    out, q, lse, attends, mu, vector, weight, bias,
    out_b, out_t, out_h, q_b, q_h, q_t, lse_b, lse_h, lse_t, attends_b, attends_h, attends_t,
    heads, t,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_T: tl.constexpr, ATTENDS: tl.constexpr,
):
    """out += mu * vector in place; mu is [b h t], contiguous. ATTENDS: rows may be ruled out."""
    number = tl.cdiv(t, BLOCK_T)
    block = tl.program_id(0) % number
    row = tl.program_id(0) // number  # of [b h]
    n = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    far = (block * BLOCK_T).to(tl.int64)
    i = tl.arange(0, BLOCK_T)
    left = t - block * BLOCK_T
    q0, q1 = load_rows(q + n * q_b + h * q_h + far * q_t, q_t, i, left, D, D0, D1)
    w0, w1 = load_vector(weight + h * D, D, D0, D1)
    log_z2 = tl.load(lse + n * lse_b + h * lse_h + (far + i) * lse_t, mask=i < left, other=0.0).to(tl.float32)
    if ATTENDS:
        at = attends + n * attends_b + h * attends_h + (far + i) * attends_t
        log_z2 = tl.where(tl.load(at, mask=i < left, other=0) != 0, log_z2, float("-inf"))
    share = gate(row_sums(q0, q1, w0, w1, D1) + tl.load(bias + h), log_z2)
    tl.store(mu + row.to(tl.int64) * t + far + i, share, mask=i < left)
    out += n * out_b + h * out_h + far * out_t
    x0, x1 = load_rows(out, out_t, i, left, D, D0, D1)
    v0, v1 = load_vector(vector + h * D, D, D0, D1)
    x0 = x0.to(tl.float32) + share[:, None] * v0
    if D1 > 0:
        x1 = x1.to(tl.float32) + share[:, None] * v1
    store_rows(out, out_t, i, left, x0, x1, D, D0, D1)


@triton.jit(do_not_specialize=["t"])
@no_type_check
def fold_kernel(
    grad, out, q, mu, d_lse, vector, hat, delta, df, parts,
    grad_b, grad_t, grad_h, out_b, out_t, out_h, q_b, q_h, q_t, hat_b, hat_t, hat_h, d_lse_b, d_lse_h, d_lse_t,
    heads, t,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_T: tl.constexpr,
    SHIFT: tl.constexpr, HAT: tl.constexpr, DELTA: tl.constexpr, PARTS: tl.constexpr, D_LSE: tl.constexpr,
):
    """What the gate adds to the backward of an attention, for one block of rows of one head.

    With SHIFT, `out` is the shifted output and the LSE's gradient is -df, with df = mu (1 - mu) (grad . vector):

        hat = out - mu^2 vector                      what a flash backward is to take for its output
        delta = grad . hat                           the same, for a backward of ours
        parts = sum mu grad, sum df q, sum df        [programs of a head, heads, 2 D + 1]

    Without it delta = grad . out - d_lse. hat is [b t h D] in any order of memory; mu, delta and df are [b h t] and
    contiguous.
    """
    number = tl.cdiv(t, BLOCK_T)
    block = tl.program_id(0) % number
    row = tl.program_id(0) // number  # of [b h]
    n = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    far = (block * BLOCK_T).to(tl.int64)
    i = tl.arange(0, BLOCK_T)
    left = t - block * BLOCK_T
    at = row.to(tl.int64) * t + far + i
    g0, g1 = load_rows(grad + n * grad_b + h * grad_h + far * grad_t, grad_t, i, left, D, D0, D1)
    x0, x1 = load_rows(out + n * out_b + h * out_h + far * out_t, out_t, i, left, D, D0, D1)
    sent = row_sums(g0, g1, x0, x1, D1)
    if SHIFT:
        v0, v1 = load_vector(vector + h * D, D, D0, D1)
        share = tl.load(mu + at, mask=i < left, other=0.0)
        along = row_sums(g0, g1, v0, v1, D1)
        through_gate = share * (1 - share) * along
        sent -= share * share * along
        tl.store(df + at, through_gate, mask=i < left)
        if HAT:
            squared = (share * share)[:, None]
            x0 = x0.to(tl.float32) - squared * v0
            if D1 > 0:
                x1 = x1.to(tl.float32) - squared * v1
            store_rows(hat + n * hat_b + h * hat_h + far * hat_t, hat_t, i, left, x0, x1, D, D0, D1)
        if PARTS:
            parts += ((n * number + block) * heads + h) * (2 * D + 1)
            q0, q1 = load_rows(q + n * q_b + h * q_h + far * q_t, q_t, i, left, D, D0, D1)
            weighted = share[:, None]
            sent_back = through_gate[:, None]
            dv0 = tl.sum(g0.to(tl.float32) * weighted, 0)
            dv1 = tl.sum(g1.to(tl.float32) * weighted, 0)
            dw0 = tl.sum(q0.to(tl.float32) * sent_back, 0)
            dw1 = tl.sum(q1.to(tl.float32) * sent_back, 0)
            store_vector(parts, dv0, dv1, D, D0, D1)
            store_vector(parts + D, dw0, dw1, D, D0, D1)
            tl.store(parts + 2 * D, tl.sum(through_gate, 0))
    if D_LSE:
        sent -= tl.load(d_lse + n * d_lse_b + h * d_lse_h + (far + i) * d_lse_t, mask=i < left, other=0.0)
    if DELTA:
        tl.store(delta + at, sent, mask=i < left)


@triton.jit(do_not_specialize=["t"])
@no_type_check
def add_kernel(
    dq, df, weight, dq_b, dq_h, dq_t, heads, t,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """dq += df * weight in place; df is [b h t], contiguous."""
    number = tl.cdiv(t, BLOCK_T)
    block = tl.program_id(0) % number
    row = tl.program_id(0) // number  # of [b h]
    h = (row % heads).to(tl.int64)
    far = (block * BLOCK_T).to(tl.int64)
    i = tl.arange(0, BLOCK_T)
    left = t - block * BLOCK_T
    dq += (row // heads).to(tl.int64) * dq_b + h * dq_h + far * dq_t
    x0, x1 = load_rows(dq, dq_t, i, left, D, D0, D1)
    w0, w1 = load_vector(weight + h * D, D, D0, D1)
    sent = tl.load(df + row.to(tl.int64) * t + far + i, mask=i < left, other=0.0)[:, None]
    x0 = x0.to(tl.float32) + sent * w0
    if D1 > 0:
        x1 = x1.to(tl.float32) + sent * w1
    store_rows(dq, dq_t, i, left, x0, x1, D, D0, D1)


class Folded(NamedTuple):
    """What `fold` gives; None where it wasn't asked for."""

    hat: Float[Tensor, "b t h d"] | None
    delta: Float[Tensor, "b h t"] | None
    df: Float[Tensor, "b h t"] | None
    sums: Float[Tensor, "h columns"] | None  # vector, weight and bias side by side

    def of(self, vector: torch.dtype, weight: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of vector, weight and bias, in the dtypes these have."""
        assert self.sums is not None
        d = self.sums.shape[-1] // 2
        return self.sums[:, :d].to(vector), self.sums[:, d : 2 * d].to(weight), self.sums[:, 2 * d].to(weight)


def row_blocks(q: Tensor) -> tuple[int, int]:
    """Rows a program takes, and how many programs that makes over [b h t]."""
    b, h, t, _ = q.shape
    rows = min(_ROWS, power_of_two(t))
    return rows, b * h * -(-t // rows)


def last_axis_contiguous(x: Tensor) -> Tensor:
    # An axis of one element may have any stride.
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def parameters(*tensors: Tensor) -> list[Tensor]:
    """As the kernels read them."""
    return [x.float().contiguous() for x in tensors]


def fold(
    grad: Float[Tensor, "b t h d"],
    out: Float[Tensor, "b t h d"],
    q: Float[Tensor, "b h t d"],
    mu: Float[Tensor, "b h t"] | None = None,
    vector: Float[Tensor, "h d"] | None = None,
    d_lse: Float[Tensor, "b h t"] | None = None,
    hat: bool = False,
    delta: bool = False,
    sums: bool = False,
) -> Folded:
    """`fold_kernel` over a whole call; with `mu` and `vector` of a shift, or without both."""
    b, h, t, d = q.shape
    grad, out, q = (last_axis_contiguous(x) for x in (grad, out, q))
    shift = mu is not None and vector is not None
    rows, programs = row_blocks(q)
    fp32 = {"dtype": torch.float32, "device": q.device}
    # In the memory order of `out`: an attention's backward may count on it.
    made_hat = torch.empty_like(out) if hat else None
    made_delta = torch.empty((b, h, t), **fp32) if delta else None
    df = torch.empty((b, h, t), **fp32) if shift else None
    parts = torch.empty((programs // h, h, 2 * d + 1), **fp32) if sums else None

    def or_any(x: Tensor | None) -> Tensor:
        return q if x is None else x  # a kernel takes a pointer even where it follows none

    launch: Any = fold_kernel[(programs,)]
    launch(
        grad, out, q, or_any(mu), or_any(d_lse), or_any(vector), or_any(made_hat), or_any(made_delta),
        or_any(df), or_any(parts),
        *grad.stride()[:3], *out.stride()[:3], *q.stride()[:3],
        *(made_hat.stride()[:3] if made_hat is not None else (0, 0, 0)),
        *(d_lse.stride() if d_lse is not None else (0, 0, 0)),
        h, t, *tiles(d), rows, shift, hat, delta, sums, d_lse is not None,
        num_warps=_WARPS,
    )
    return Folded(made_hat, made_delta, df, None if parts is None else parts.sum(0))


def gated_shift_(
    out: Float[Tensor, "b t h d"],
    q: Float[Tensor, "b h t d"],
    lse: Float[Tensor, "b h t"],
    attends: Bool[Tensor, ...] | None,
    vector: Float[Tensor, "h d"],
    gate_weight: Float[Tensor, "h d"],
    gate_bias: Float[Tensor, " h"],
) -> Float[Tensor, "b h t"]:
    """Shift `out` in place and return mu, in fp32; mu is 0 where lse is -inf or `attends` is False.

    `attends` broadcasts to lse. No autograd: see `folded_gradients`.
    """
    b, h, t, d = q.shape
    q = last_axis_contiguous(q)
    vector, gate_weight, gate_bias = parameters(vector, gate_weight, gate_bias)
    rows, programs = row_blocks(q)
    mu = torch.empty((b, h, t), dtype=torch.float32, device=q.device)
    ruled = lse if attends is None else attends.expand(b, h, t).view(torch.uint8)
    shifted = last_axis_contiguous(out)
    with on(q.device):
        launch: Any = shift_kernel[(programs,)]
        launch(
            shifted, q, lse, ruled, mu, vector, gate_weight, gate_bias,
            *shifted.stride()[:3], *q.stride()[:3], *lse.stride(), *ruled.stride(),
            h, t, *tiles(d), rows, attends is not None,
            num_warps=_WARPS,
        )
    if shifted is not out:
        out.copy_(shifted)
    return mu


def folded_gradients(
    grad: Float[Tensor, "b t h d"],
    shifted: Float[Tensor, "b t h d"],
    q: Float[Tensor, "b h t d"],
    mu: Float[Tensor, "b h t"],
    vector: Float[Tensor, "h d"],
    gate_weight: Float[Tensor, "h d"],
    attention: bool = True,
) -> tuple[
    Float[Tensor, "b t h d"] | None,
    Float[Tensor, "b h t"],
    Float[Tensor, "h d"],
    Float[Tensor, "h d"],
    Float[Tensor, " h"],
]:
    """(out_hat, df, d_vector, d_weight, d_bias) of a shifted attention.

    out_hat = shifted - mu^2 vector, None unless `attention`, is what a flash backward is to take for its output: the
    gradient through the LSE is in its delta then. What is missing from dq afterwards is `add_to_dq_`.
    """
    (wide_vector,) = parameters(vector)
    with on(q.device):
        folded = fold(grad, shifted, q, mu.contiguous(), wide_vector, hat=attention, sums=True)
    d_vector, d_weight, d_bias = folded.of(vector.dtype, gate_weight.dtype)
    assert folded.df is not None
    return folded.hat, folded.df, d_vector, d_weight, d_bias


def add_to_dq_(
    dq: Float[Tensor, "b h t d"], df: Float[Tensor, "b h t"], gate_weight: Float[Tensor, "h d"]
) -> Float[Tensor, "b h t d"]:
    """dq += df * gate_weight, in place: the gradient that reaches the query through the gate."""
    _, h, t, d = dq.shape
    sum_ = last_axis_contiguous(dq)
    (gate_weight,) = parameters(gate_weight)
    rows, programs = row_blocks(dq)
    with on(dq.device):
        launch: Any = add_kernel[(programs,)]
        launch(
            sum_, df.contiguous(), gate_weight, *sum_.stride()[:3], h, t, *tiles(d), rows, num_warps=_WARPS
        )
    if sum_ is not dq:
        dq.copy_(sum_)
    return dq
