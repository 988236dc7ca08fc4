"""Checks of the ops' arguments, with one error that shows the whole call, and checks for autograd."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import ShapeError


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, is_causal: bool
) -> float:
    """Check one attention call and return its scale."""
    problem = _attention_problem(q, k, v, mask, is_causal)
    if problem:
        given = ", ".join(
            f"{name} {list(x.shape)} {x.dtype} {x.device}" for name, x in zip("qkv", (q, k, v), strict=True)
        )
        masked = "no mask" if mask is None else f"mask {list(mask.shape)} {mask.dtype} {mask.device}"
        raise ShapeError(f"{problem}; expected q [b h t d], k [b g s d], v [b g s e]; given {given}, {masked}")
    if scale is None:
        return q.shape[-1] ** -0.5
    if not 0 < abs(scale) < math.inf:
        # Kernels scale masked logits, and 0 * -inf is NaN.
        raise ValueError(f"scale should be finite and not 0, found {scale}")
    return scale


def _attention_problem(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> str | None:
    if any(x.ndim != 4 for x in (q, k, v)):
        return "q, k and v must have four axes each"
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3]:
        return "q, k and v differ in the batch size, or k and v in heads or length"
    if q.shape[-1] != k.shape[-1]:
        return "q and k heads differ in width"
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        return f"{q.shape[1]} attention heads are not a multiple of {k.shape[1]} key/value heads"
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        return "q, k and v must have the same floating-point dtype"
    if not q.device == k.device == v.device or (mask is not None and mask.device != q.device):
        return "the tensors are on different devices"
    if mask is None:
        return None
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return "a mask must be bool (True = attend) or floating point (added to the logits)"
    if is_causal:
        return "give a mask or is_causal, not both"
    if not _broadcasts(mask.shape, (*q.shape[:3], k.shape[2])):
        return "the mask does not broadcast to [b h t s]"
    return None


def check_shift(
    query: Tensor,
    out_shape: Sequence[int],
    vector: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    lse: Tensor | None = None,
) -> None:
    """Check the parameters of a shift against the attention call. With an LSE, each sample may have its own."""
    tensors = {"query": query, "vector": vector, "gate_weight": gate_weight, "gate_bias": gate_bias}
    if lse is not None:
        tensors["lse"] = lse
    problem = None
    if query.ndim != 4 or len(out_shape) != 4:
        problem = "the query and the attention output must have four axes each"
    else:
        b, h, t, d = query.shape
        own = (b,) if lse is not None and vector.ndim == 3 else ()
        expected = {"vector": (*own, h, out_shape[-1]), "gate_weight": (*own, h, d), "gate_bias": (*own, h)}
        expected["lse"] = (b, h, t)
        if tuple(out_shape[:3]) != (b, t, h):
            problem = f"the attention output is {list(out_shape)}, but for this query it must be [{b} {t} {h} e]"
        for name, x in tensors.items():
            if name in expected and tuple(x.shape) != expected[name]:
                problem = problem or f"{name} should be {list(expected[name])}"
        if any(x.device != query.device for x in tensors.values()):
            problem = "the tensors are on different devices"
    if problem:
        given = ", ".join(f"{name} {list(x.shape)} {x.dtype} {x.device}" for name, x in tensors.items())
        raise ShapeError(f"{problem}; given attention output {list(out_shape)}, {given}")


def needs_grad(*tensors: Tensor) -> bool:
    """Whether autograd records a function of these tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def is_transformed(*tensors: Tensor) -> bool:
    """Whether torch.func or forward-mode differentiation has wrapped any of these. A kernel would ignore that."""
    if torch.compiler.is_compiling():
        return False
    of_func = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore[reportAttributeAccessIssue]
    return any(of_func(x) or forward_ad.unpack_dual(x).tangent is not None for x in tensors)


Backward = Callable[..., tuple[Tensor | None, ...]]


def once_differentiable(backward: Backward) -> Backward:
    """Decorator for the backward of an autograd.Function. A second derivative then raises an error.

    With torch's decorator of this name, gradients have no history if only saved tensors require a gradient. A second
    derivative is then silently zero.
    """

    @wraps(backward)
    def once(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = backward(ctx, *grads)
        of = (*grads, *ctx.saved_tensors) if torch.is_grad_enabled() else ()
        if not any(x is not None and x.requires_grad for x in of):
            return found
        message = b'mimic_core\'s kernels have no second derivatives; backend="reference" of mimic_core.ops has them'
        error = torch._C._functions.DelayedError(message, len(found))  # pyright: ignore[reportAttributeAccessIssue]
        return error(*(None if x is None else x.detach().requires_grad_() for x in found))

    return once


def _broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    return len(shape) <= len(target) and all(
        n in (1, m) for n, m in zip(reversed(shape), reversed(target), strict=False)
    )
