"""Attention masks: None, bool (True = attend) or additive, broadcastable to [b h t s]."""

from __future__ import annotations

from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Mask: TypeAlias = Bool[Tensor, "..."] | Float[Tensor, "..."] | None


def normalised(mask: Mask, dtype: torch.dtype) -> Mask:
    """The mask as every backend takes it: [b h t s], each axis whole or 1, an additive one in q's dtype.

    The CPU kernel makes garbage of another dtype; and what is lowest in q's is forbidden in every backend.
    """
    if mask is None:
        return None
    mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
    return mask if mask.dtype == torch.bool else mask.to(dtype)


def additive(mask: Tensor, dtype: torch.dtype) -> Float[Tensor, ...]:
    """A bool mask as numbers to add: 0 or -inf."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def causal_mask(t: int, s: int, device: torch.device) -> Bool[Tensor, "1 1 t s"]:
    """Query i attends to keys 0..i: aligned at the upper left, as torch's `is_causal` is."""
    return torch.ones(1, 1, t, s, dtype=torch.bool, device=device).tril()


def rows_that_attend(mask: Mask) -> Bool[Tensor, "#b #h #t"] | None:
    """Which rows may see at least one key; None: all of them (no mask, or causal).

    A forbidden key is False, -inf or the dtype's lowest number. Reductions only: no second mask is made.
    """
    if mask is None:
        return None
    return mask.any(-1) if mask.dtype == torch.bool else mask.amax(-1) > torch.finfo(mask.dtype).min
