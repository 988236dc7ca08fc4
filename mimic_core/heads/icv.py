"""In-context vectors: a direction taken from pairs of texts is added to the MLP output, which keeps its norm."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from .. import ops
from ..types import At, Site
from .base import Taken, register_head
from .vector import ScaledConfig, VectorHead


@dataclass(frozen=True)
class ICVConfig(ScaledConfig):
    """Options of `ICVHead`.

    Attributes:
        layers: Indices of the decoder layers; None means all of them, as published.
        scale: The factor on the direction, 0.1 in the paper. It is not trained.

    Raises:
        ShapeError: `scale` is no finite number.
    """

    scale: float = 0.1


@register_head("icv")
class ICVHead(VectorHead):
    """h' = (h + scale * vector) * |h| / |h + scale * vector|, at the MLP output.

    Parameter: `vector` [c], zero at first, which changes nothing. `mimic_core.estimate` takes it from pairs (x, y): the
    states of the last token of y minus those of x, of all layers of the stack as one vector, have a first principal
    component, of length 1. Each layer gets its part.

    Source: Liu et al., ICML 2024, arXiv:2311.06668.
    """

    site: Site = "mlp_out"
    config_class = ICVConfig
    config: ICVConfig
    taken = (Taken("vector", "layer_out", "component", pairs=True),)

    def forward(self, value: Float[Tensor, "b t c"], at: At | None) -> Float[Tensor, "b t c"]:
        return ops.norm_preserving_add(value, self.own("vector").to(value.device), self.config.scale)
