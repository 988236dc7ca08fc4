"""Where and how the tests of the Triton kernels run them."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from mimic_core.ops import _triton
from mimic_core.ops._checks import check_attention
from mimic_core.ops._masks import normalised

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


def interpreter_fault() -> str | None:
    """Triton 3.2's interpreter takes arrays of one element for numbers, which numpy 2.4 no longer lets it do."""
    x = torch.ones(1, 1, 2, 16)
    try:
        _triton.attention_with_lse(x, x, x, None, 1.0, False)
    except Exception as error:
        if "only 0-dimensional arrays" in str(error):
            return f"this version of Triton's interpreter fails with this numpy: {error}"
        raise
    return None


FAULT = interpreter_fault() if INTERPRETED else None
# A kernel runs here where it is interpreted, or where there is a GPU.
on_kernels = pytest.mark.skipif(FAULT is not None, reason=str(FAULT)) if INTERPRETED else pytest.mark.gpu


class Backend:
    """The backend as `mimic_core.ops` calls it, from tensors on the CPU and back to it."""

    @staticmethod
    def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        (q, k, v), rest = arguments((q, k, v), **options)
        out, lse = _triton.attention_with_lse(q, k, v, *rest)
        assert (out.dtype, lse.dtype) == (q.dtype, torch.float32)
        return out.cpu(), lse.cpu()

    @staticmethod
    def attention_lse(q: Tensor, k: Tensor, **options: Any) -> Tensor:
        (q, k, _), rest = arguments((q, k, k), **options)
        return _triton.attention_lse(q, k, *rest).cpu()

    @staticmethod
    def shifted_attention(q: Tensor, k: Tensor, v: Tensor, *parameters: Tensor, **options: Any) -> Tensor:
        (q, k, v, *on_device), rest = arguments((q, k, v, *parameters), **options)
        out = _triton.shifted_attention(q, k, v, *on_device, *rest)
        assert out.dtype == q.dtype
        return out.cpu()


def arguments(
    tensors: tuple[Tensor, ...], mask: Tensor | None = None, scale: float | None = None, is_causal: bool = False
) -> tuple[list[Tensor], tuple[Tensor | None, float, bool]]:
    q, k, v = tensors[:3]
    scale = check_attention(q, k, v, mask, scale, is_causal)
    moved = [x.to(DEVICE) for x in tensors]
    mask = None if mask is None else normalised(mask.to(DEVICE), q.dtype)
    assert _triton.unavailable(*moved[:3], mask) is None
    return moved, (mask, scale, is_causal)
