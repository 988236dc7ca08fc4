"""M2IV: a learned vector at the output of attention and one at that of the MLP, in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..types import LayerSpec, Site
from .base import HeadConfig, register_head
from .vector import TwoOutputsHead, beside


@dataclass(frozen=True)
class M2IVConfig(HeadConfig):
    """Options of `M2IVHead`: those of every head."""


@register_head("m2iv")
class M2IVHead(TwoOutputsHead):
    """out = attention output + attn_vector, and MLP output + mlp_vector. `mimic_core.merge` can put it into the model.

    Parameters: `attn_vector` [c], `mlp_vector` [c], zero at first, which changes nothing. In the paper they are trained
    by distillation from prompts with demonstrations.

    Source: Li et al., COLM 2025, arXiv:2504.04633.
    """

    config_class = M2IVConfig

    def __init__(self, config: HeadConfig, layer: LayerSpec) -> None:
        super().__init__(config, layer)
        self.attn_vector = nn.Parameter(torch.zeros(layer.hidden_size, dtype=torch.float32))
        self.mlp_vector = nn.Parameter(torch.zeros(layer.hidden_size, dtype=torch.float32))

    def shifted(self, value: Tensor, place: str) -> Tensor:
        return (value + beside(self.own(f"{place}_vector"), value)).to(value.dtype)

    def constant(self) -> Mapping[Site, Tensor]:
        return {"attn_out": self.own("attn_vector"), "mlp_out": self.own("mlp_vector")}
