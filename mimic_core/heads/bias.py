"""Plain vectors at the output of attention or of the MLP: the smallest method that is trained, as a baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..types import Site
from .base import HeadConfig, register_head
from .vector import VectorHead


class _BiasHead(VectorHead):
    def constant(self) -> Mapping[Site, Tensor]:
        return {self.site: self.own("vector")}


@dataclass(frozen=True)
class AttnBiasConfig(HeadConfig):
    """Options of `AttnBiasHead`: those of every head."""


@register_head("attn_bias")
class AttnBiasHead(_BiasHead):
    """out = attention output + vector, for every token. `mimic_core.merge` can put it into the model.

    Parameter: `vector` [c], zero at first, which changes nothing.

    Source: after BitFit (Ben Zaken et al., ACL 2022, arXiv:2106.10199), which trains the biases that a model has.
    """

    site: Site = "attn_out"
    config_class = AttnBiasConfig


@dataclass(frozen=True)
class MlpBiasConfig(HeadConfig):
    """Options of `MlpBiasHead`: those of every head."""


@register_head("mlp_bias")
class MlpBiasHead(_BiasHead):
    """out = MLP output + vector, for every token. `mimic_core.merge` can put it into the model.

    Parameter: `vector` [c], zero at first, which changes nothing.

    Source: as `AttnBiasHead`.
    """

    site: Site = "mlp_out"
    config_class = MlpBiasConfig
