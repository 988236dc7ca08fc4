"""What the ops ask of their arguments, said in one error that states the whole call."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

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
        # Kernels scale what is masked already, and 0 * -inf is NaN.
        raise ValueError(f"scale should be finite and not 0, found {scale}")
    return scale


def _attention_problem(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> str | None:
    if any(x.ndim != 4 for x in (q, k, v)):
        return "q, k and v need four axes each"
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3]:
        return "q, k and v disagree on the batch, or k and v on heads or length"
    if q.shape[-1] != k.shape[-1]:
        return "q and k heads differ in width"
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        return f"{q.shape[1]} attention heads are no multiple of {k.shape[1]} key/value heads"
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        return "q, k and v need one floating-point dtype"
    if not q.device == k.device == v.device or (mask is not None and mask.device != q.device):
        return "the tensors are on different devices"
    if mask is None:
        return None
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return "a mask is bool (True = attend) or floating point (added to the logits)"
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
    """Check the shift's parameters against the attention call they join."""
    tensors = {"query": query, "vector": vector, "gate_weight": gate_weight, "gate_bias": gate_bias}
    if lse is not None:
        tensors["lse"] = lse
    problem = None
    if query.ndim != 4 or len(out_shape) != 4:
        problem = "the query and the attention output need four axes each"
    else:
        b, h, t, d = query.shape
        expected = {"vector": (h, out_shape[-1]), "gate_weight": (h, d), "gate_bias": (h,), "lse": (b, h, t)}
        if tuple(out_shape[:3]) != (b, t, h):
            problem = f"the attention output is {list(out_shape)}, the query wants [{b} {t} {h} e]"
        for name, x in tensors.items():
            if name in expected and tuple(x.shape) != expected[name]:
                problem = f"{name} should be {list(expected[name])}"
        if any(x.device != query.device for x in tensors.values()):
            problem = "the tensors are on different devices"
    if problem:
        given = ", ".join(f"{name} {list(x.shape)} {x.dtype} {x.device}" for name, x in tensors.items())
        raise ShapeError(f"{problem}; given attention output {list(out_shape)}, {given}")


def _broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    return len(shape) <= len(target) and all(
        n in (1, m) for n, m in zip(reversed(shape), reversed(target), strict=False)
    )
