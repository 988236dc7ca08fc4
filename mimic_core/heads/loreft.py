"""LoReFT: a layer's output is moved inside a learned subspace, at the first and last tokens of the prompt."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ShapeError
from ..ops._precision import full_precision, wide
from ..positions import Positions
from ..types import At, LayerSpec, Site
from .base import HeadConfig, ShiftHead, register_head


@dataclass(frozen=True)
class LoReFTConfig(HeadConfig):
    """Options of `LoReFTHead`.

    Attributes:
        layers: Indices of the decoder layers; None means all of them.
        positions: The tokens on which it acts: the first and the last 7 of the prompt, as in the paper's experiments
            with common sense. Where rows go on with an answer in training, say so with `Handle.at(prompt=mask)`.
        rank: The dimension of the subspace.

    Raises:
        ShapeError: `rank` is below 1.
    """

    positions: Positions = field(default=("first", 7, "last", 7), kw_only=True)
    rank: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ShapeError(f"rank should be 1 or more, found {self.rank}")


@register_head("loreft")
class LoReFTHead(ShiftHead):
    """h' = h + R^T (W h + b - R h), on the layer's output. The rows of R are orthonormal.

    Parameters: `rotation` [r c], `weight` (W) [r c], `bias` (b) [r]. R is `rotation` made orthonormal by Gram and
    Schmidt, row by row, in each forward, so it stays so however the numbers are trained, and `rotation` is what is
    saved. At first `rotation` is random and orthonormal, W is R, and b is zero, which changes nothing, up to rounding.
    The published code begins with a random W.

    Source: Wu et al., NeurIPS 2024, arXiv:2404.03592.
    """

    site: Site = "layer_out"
    config_class = LoReFTConfig
    config: LoReFTConfig
    needs_at = False
    takes_samples = True

    def __init__(self, config: LoReFTConfig, layer: LayerSpec) -> None:
        super().__init__(config, layer)
        if config.rank > layer.hidden_size:
            raise ShapeError(f"rank {config.rank} is more than the hidden size {layer.hidden_size}")
        self.rotation = nn.Parameter(orthonormal(torch.randn(config.rank, layer.hidden_size, dtype=torch.float32)))
        self.weight = nn.Parameter(orthonormal(self.rotation.detach()))
        self.bias = nn.Parameter(torch.zeros(config.rank, dtype=torch.float32))

    def forward(self, value: Float[Tensor, "b t c"], at: At | None) -> Float[Tensor, "b t c"]:
        with full_precision(value):
            h = wide(value)
            weight, bias = self.own("weight").to(h), self.own("bias").to(h)
            rows = orthonormal(self.own("rotation").to(h))
            return (h + (h @ (weight - rows).mT + bias.unsqueeze(-2)) @ rows).to(value.dtype)


def orthonormal(x: Float[Tensor, "*b r c"]) -> Float[Tensor, "*b r c"]:
    """The rows made orthonormal, each without its parts along those before it.

    Not torch.linalg.qr: its signs jump while the numbers move, and an exported program can't have it.
    """
    with full_precision(x):
        done = x[..., :0, :]
        for i in range(x.shape[-2]):
            row = x[..., i : i + 1, :]
            for _ in range(2):  # the second time takes away what rounding left
                row = functional.normalize(row - row @ done.mT @ done, dim=-1)
            done = torch.cat([done, row], dim=-2)
        return done
