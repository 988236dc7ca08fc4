"""What precision the maths is done in, whatever surrounds it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in the dtype the maths is done in: fp64 stays, everything else becomes fp32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def full_precision(like: Tensor) -> AbstractContextManager[object]:
    """Inside, autocast does not turn fp32 products into bf16 ones: it would leave an LSE two digits."""
    kind = like.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)
