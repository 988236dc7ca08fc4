"""The base of heads with one vector for each layer that is added to the output of a module."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..types import At, LayerSpec
from .base import HeadConfig, ShiftHead


class VectorHead(ShiftHead):
    """out = value + vector. Parameter: `vector` [c], zero at first, which changes nothing."""

    needs_at = False
    takes_samples = True

    def __init__(self, config: HeadConfig, layer: LayerSpec) -> None:
        super().__init__(config, layer)
        self.vector = nn.Parameter(torch.zeros(layer.hidden_size, dtype=torch.float32))

    def forward(self, value: Float[Tensor, "b t c"], at: At | None) -> Float[Tensor, "b t c"]:
        return (value + self.row("vector", value)).to(value.dtype)

    def row(self, name: str, value: Tensor) -> Tensor:
        """A vector of this head as it is added to `value` [b t c]: [1 c], or [b 1 c] with one for each sample."""
        return self.own(name).to(value.device).unsqueeze(-2)
