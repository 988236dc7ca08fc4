"""What heads with one vector for the output of a module share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ShapeError
from ..types import At, LayerSpec, Site
from .base import Edit, HeadConfig, ShiftHead


@dataclass(frozen=True)
class ScaledConfig(HeadConfig):
    """Options of a head with a factor that is not trained.

    Raises:
        ShapeError: `scale` is no finite number.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        scale: object = self.scale
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise ShapeError(f"scale should be a finite number, found {scale!r}")


class VectorHead(ShiftHead):
    """out = value + vector. Parameter: `vector` [c], zero at first, which changes nothing."""

    needs_at = False
    takes_samples = True

    def __init__(self, config: HeadConfig, layer: LayerSpec) -> None:
        super().__init__(config, layer)
        self.vector = nn.Parameter(torch.zeros(layer.hidden_size, dtype=torch.float32))

    def forward(self, value: Float[Tensor, "b t c"], at: At | None) -> Float[Tensor, "b t c"]:
        return (value + beside(self.own("vector"), value)).to(value.dtype)


class TwoOutputsHead(ShiftHead):
    """A head that does the same at the output of attention and at that of the MLP, each with numbers of its own."""

    site: Site = "mlp_out"
    needs_at = False
    takes_samples = True

    def edits(self) -> Mapping[Site, Edit]:
        return {"attn_out": self.shift_attention, "mlp_out": self}

    def forward(self, value: Float[Tensor, "b t c"], at: At | None) -> Float[Tensor, "b t c"]:
        return self.shifted(value, "mlp")

    def shift_attention(self, value: Float[Tensor, "b t c"], at: At | None) -> Float[Tensor, "b t c"]:
        """The edit of the attention output."""
        return self.shifted(value, "attn")

    def shifted(self, value: Tensor, place: str) -> Tensor:
        """The edited value, with the numbers whose names begin with `place`."""
        raise NotImplementedError


def beside(vector: Tensor, value: Tensor) -> Tensor:
    """A vector [c] as it is added to `value` [b t c]: [1 c], or [b 1 c] with one for each sample."""
    return vector.to(value.device).unsqueeze(-2)
