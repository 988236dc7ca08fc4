"""Contrastive activation addition: the mean difference of pairs of texts is added to the layer's output."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ..types import At, Site
from .base import Taken, register_head
from .vector import ScaledConfig, VectorHead, beside


@dataclass(frozen=True)
class CAAConfig(ScaledConfig):
    """Options of `CAAHead`.

    Attributes:
        layers: Indices of the decoder layers. The method uses one, chosen on held-out samples. None means all of them.
        positions: The tokens on which it acts. The paper adds to all tokens after the prompt: "generated".
        scale: The factor on the direction; negative turns it round. It is not trained.

    Raises:
        ShapeError: `scale` is no finite number.
    """


@register_head("caa")
class CAAHead(VectorHead):
    """h' = h + scale * vector, on the layer's output.

    Parameter: `vector` [c], zero at first, which changes nothing. `mimic_core.estimate` takes it from pairs (negative,
    positive): the mean of the layer's output at the last token of the positive text minus that of the negative one.

    Source: Panickssery et al., ACL 2024, arXiv:2312.06681.
    """

    site: Site = "layer_out"
    config_class = CAAConfig
    config: CAAConfig
    taken = (Taken("vector", "layer_out", pairs=True),)

    def forward(self, value: Float[Tensor, "b t c"], at: At | None) -> Float[Tensor, "b t c"]:
        return (value + self.config.scale * beside(self.own("vector"), value)).to(value.dtype)
