"""What precision the maths is done in, whatever surrounds it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in the dtype the maths is done in: fp64 stays, everything else becomes fp32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def has_bf16_instructions() -> bool:
    """Whether this processor is fast in bf16: without, torch's CPU kernel takes 4 to 12 times as long in it."""
    asked = (getattr(torch.cpu, name, bool) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask() for ask in asked)


def full_precision(like: Tensor) -> AbstractContextManager[object]:
    """Inside, autocast does not turn fp32 products into bf16 ones: it would leave an LSE two digits."""
    kind = like.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)
