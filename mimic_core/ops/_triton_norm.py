"""(x + a v) |x| / |x + a v| in one pass over each row, and its backward."""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._folded import needs_grad
from ._triton_blocks import on, power_of_two, processors
from ._triton_tiles import rounded


# Capitals are what the compiler knows; the formatter would give each of the many arguments a line of its own.
# ruff: noqa: N803
# fmt: off
@triton.jit
@no_type_check
def _moved(x, vector, scale, row, row_stride, cols, C: tl.constexpr, TENSOR: tl.constexpr):
    """One row, the vector, the factor, the sum and both squared lengths, in fp32. TENSOR: the factor is in memory."""
    wide = tl.load(x + row * row_stride + cols, mask=cols < C, other=0.0).to(tl.float32)
    v = tl.load(vector + cols, mask=cols < C, other=0.0).to(tl.float32)
    a = tl.load(scale).to(tl.float32) if TENSOR else scale
    moved = wide + a * v
    return wide, v, a, moved, tl.sum(wide * wide, 0), tl.sum(moved * moved, 0)


@triton.jit
@no_type_check
def norm_kernel(
    x, vector, scale, out, row_stride,
    C: tl.constexpr, BLOCK_C: tl.constexpr, TENSOR: tl.constexpr,
):
    """One row; out is [rows C], contiguous."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    _, _, _, moved, before, after = _moved(x, vector, scale, row, row_stride, cols, C, TENSOR)
    # A sum of exactly zero has no direction to keep: it stays zero. Rounded correctly, as a plain / is not on a GPU: a
    # vector of zero must give 1.
    ratio = tl.div_rn(tl.sqrt_rn(before), tl.sqrt_rn(tl.where(after > 0, after, 1.0)))
    tl.store(out + row * C + cols, rounded(moved * ratio, out.dtype.element_ty), mask=cols < C)


@triton.jit(do_not_specialize=["rows"])
@no_type_check
def norm_backward_kernel(
    x, vector, scale, grad, dx, parts, row_stride, grad_stride, rows,
    C: tl.constexpr, BLOCK_C: tl.constexpr, TENSOR: tl.constexpr, SUMS: tl.constexpr,
):
    """Every n-th row, n the number of programs: dx [rows C], and parts [n C + 1], the sums for vector and factor.

    With m the sum, r = |x| / |m| and c = grad . m:  dm = r (grad - m c / |m|^2),  dx = dm + x c / (|x| |m|).
    """
    cols = tl.arange(0, BLOCK_C)
    at = tl.program_id(0).to(tl.int64)
    d_vector = tl.zeros([BLOCK_C], tl.float32)
    d_scale = tl.zeros([BLOCK_C], tl.float32)
    for _ in range(tl.program_id(0), rows, tl.num_programs(0)):
        wide, v, a, moved, before, after = _moved(x, vector, scale, at, row_stride, cols, C, TENSOR)
        g = tl.load(grad + at * grad_stride + cols, mask=cols < C, other=0.0).to(tl.float32)
        # 1 / |m|, and 0 for a sum of zero: nothing flows back through what stays zero. The same for x.
        of_moved = tl.where(after > 0, tl.div_rn(1.0, tl.sqrt_rn(tl.where(after > 0, after, 1.0))), 0.0)
        of_x = tl.where(before > 0, tl.div_rn(1.0, tl.sqrt_rn(tl.where(before > 0, before, 1.0))), 0.0)
        unit = moved * of_moved
        along = tl.sum(g * unit, 0)
        dm = tl.sqrt_rn(before) * of_moved * (g - unit * along)
        sent = dm + wide * (along * of_x)
        tl.store(dx + at * C + cols, rounded(sent, dx.dtype.element_ty), mask=cols < C)
        if SUMS:
            d_vector += a * dm
            d_scale += v * dm
        at += tl.num_programs(0)
    if SUMS:
        parts += tl.program_id(0) * (C + 1)
        tl.store(parts + cols, d_vector, mask=cols < C)
        tl.store(parts + C, tl.sum(d_scale, 0))


def norm_preserving_add(
    x: Float[Tensor, "... c"], vector: Float[Tensor, " c"], scale: Float[Tensor, ""] | float
) -> Float[Tensor, "... c"]:
    """(x + scale * vector) * |x| / |x + scale * vector|, in x's dtype; a sum of exactly zero stays zero.

    Maths in fp32. Differentiable in every argument.
    """
    tensors = [y for y in (x, vector, scale) if isinstance(y, Tensor)]
    if needs_grad(*tensors):
        return _NormPreservingAdd.apply(x, vector, scale)  # pyright: ignore[reportReturnType]
    return _forward(x, vector, scale)


def _rows_of(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def _factor(scale: Tensor | float) -> tuple[Tensor | float, bool]:
    # An int would be another type in the kernel.
    return (scale, True) if isinstance(scale, Tensor) else (float(scale), False)


def _warps(width: int) -> int:
    return min(16, max(1, power_of_two(width) // 512))


def _forward(x: Tensor, vector: Tensor, scale: Tensor | float) -> Tensor:
    rows, width = _rows_of(x), x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    factor, is_tensor = _factor(scale)
    with on(x.device):
        launch: Any = norm_kernel[(rows.shape[0],)]
        launch(
            rows, vector.contiguous(), factor, out, rows.stride(0), width, power_of_two(width), is_tensor,
            num_warps=_warps(width),
        )
    return out


class _NormPreservingAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, vector: Tensor, scale: Tensor | float) -> Tensor:
        ctx.is_tensor = isinstance(scale, Tensor)
        ctx.save_for_backward(x, vector, *([scale] if ctx.is_tensor else []))
        ctx.factor = None if ctx.is_tensor else scale
        return _forward(x, vector, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, vector, *saved = ctx.saved_tensors
        rows, grad, width = _rows_of(x), _rows_of(grads[0]), x.shape[-1]
        factor, is_tensor = _factor(saved[0] if saved else ctx.factor)
        sums = any(ctx.needs_input_grad[1:])
        # A fixed number, so that sums come out the same on every call.
        programs = max(1, min(rows.shape[0], 2 * processors(x.device)))
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        parts = torch.empty((programs, width + 1), dtype=torch.float32, device=x.device) if sums else rows
        with on(x.device):
            launch: Any = norm_backward_kernel[(programs,)]
            launch(
                rows, vector.contiguous(), factor, grad, dx, parts, rows.stride(0), grad.stride(0), rows.shape[0],
                width, power_of_two(width), is_tensor, sums,
                num_warps=_warps(width),
            )
        if not sums:
            return dx, None, None
        total = parts.sum(0)
        d_scale = total[width].to(saved[0].dtype) if saved else None
        return dx, total[:width].to(vector.dtype), d_scale
