"""The precision of the computation."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in the dtype of the computation: fp64 stays, everything else becomes fp32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def has_bf16_instructions() -> bool:
    """Whether the processor has bf16 instructions. Without them, torch's CPU kernel is 4 to 12 times slower in bf16."""
    asked = (getattr(torch.cpu, name, bool) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask() for ask in asked)


def full_precision(like: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off. It would compute fp32 products in bf16, and the LSE would have only two digits."""
    kind = like.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)
