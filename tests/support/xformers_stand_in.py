"""A stand-in for `xformers.ops`, with its signatures, in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .flash_stand_ins import opaque


class LowerTriangularMask:
    """The first query stands at the first key."""

    def allowed(self, t: int, s: int) -> Tensor:
        return torch.ones(t, s, dtype=torch.bool).tril()

    def materialize(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Tensor:
        return torch.zeros(shape, dtype=dtype).masked_fill(~self.allowed(*shape[-2:]), -torch.inf).to(device)


class LowerTriangularFromBottomRightMask(LowerTriangularMask):
    """The last query stands at the last key."""

    def allowed(self, t: int, s: int) -> Tensor:
        return torch.ones(t, s, dtype=torch.bool).tril(s - t)


class BlockDiagonalCausalMask(LowerTriangularMask):
    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def allowed(self, t: int, s: int) -> Tensor:
        assert t == s == sum(self.lengths)
        return torch.block_diag(*(torch.ones(n, n).tril() for n in self.lengths)).bool()


@opaque
def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: float | None = None, *,
    op: Any = None, output_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    scores = torch.einsum("bthd,bshd->bhts", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if isinstance(attn_bias, Tensor):
        scores = scores + attn_bias
    elif attn_bias is not None:
        scores = scores.masked_fill(~attn_bias.allowed(*scores.shape[-2:]), -torch.inf)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), value)
