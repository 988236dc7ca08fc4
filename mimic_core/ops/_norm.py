"""The norm-preserving add: one pass over memory on a CPU with the native kernels and on CUDA, else plain torch."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _native, _reference, _triton
from ._folded import needs_grad
from ._precision import full_precision


def norm_preserving_add(x: Tensor, vector: Tensor, scale: Tensor | float) -> Tensor:
    if x.device.type == "cuda" and _triton.INSTALLED and x.dtype != torch.float64 and x.numel():
        if not torch.compiler.is_compiling():
            from . import _triton_norm

            return _triton_norm.norm_preserving_add(x, vector, scale)
    elif (native := _native.kernels()) and native.takes_norm(x, vector):
        if needs_grad(*((x, vector, scale) if isinstance(scale, Tensor) else (x, vector))):
            return _Native.apply(x, vector, scale, native)  # pyright: ignore[reportReturnType]
        return native.norm_preserving_add_(x, vector, float(scale))
    with full_precision(x):
        return _reference.norm_preserving_add(x, vector, scale)


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, vector: Tensor, scale: Tensor | float, native: ModuleType) -> Tensor:
        ctx.is_tensor, ctx.native = isinstance(scale, Tensor), native
        ctx.save_for_backward(x, vector, *([scale] if ctx.is_tensor else []))
        ctx.number = float(scale)
        return native.norm_preserving_add_(x, vector, float(scale))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, vector, *scale = ctx.saved_tensors
        dx, d_vector, d_scale = ctx.native.norm_gradients(x, vector, ctx.number, grads[0])
        return dx, d_vector, d_scale.to(scale[0].dtype) if scale else None, None
