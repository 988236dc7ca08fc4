"""Attention masks: None, bool (True = attend) or additive, broadcastable to [b h t s]."""

from __future__ import annotations

from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Mask: TypeAlias = Bool[Tensor, "..."] | Float[Tensor, "..."] | None


def normalised(mask: Mask, dtype: torch.dtype) -> Mask:
    """The mask in the form of the backends: [b h t s], each axis full or 1, and an additive mask in q's dtype.

    The CPU kernel gives wrong results with another dtype. And the lowest number of q's dtype then masks a key in every
    backend.
    """
    if mask is None:
        return None
    mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
    return mask if mask.dtype == torch.bool else mask.to(dtype)


def additive(mask: Tensor, dtype: torch.dtype) -> Float[Tensor, ...]:
    """An additive mask: 0 or -inf for a bool mask."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def causal_mask(t: int, s: int, device: torch.device) -> Bool[Tensor, "1 1 t s"]:
    """Query i attends to keys 0..i: aligned at the upper left, like `is_causal` in torch."""
    return torch.ones(1, 1, t, s, dtype=torch.bool, device=device).tril()


def rows_that_attend(mask: Mask) -> Bool[Tensor, "#b #h #t"] | None:
    """Which rows attend to at least one key. None means all of them (no mask, or causal).

    A masked key is False, -inf or the lowest number of the dtype. This uses only reductions, without a second mask.
    """
    if mask is None:
        return None
    return mask.any(-1) if mask.dtype == torch.bool else mask.amax(-1) > torch.finfo(mask.dtype).min
