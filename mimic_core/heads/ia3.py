"""(IA)^3: keys, values and the hidden values of the MLP are scaled by learned numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..types import At, LayerSpec, Site
from .base import Edit, HeadConfig, ShiftHead, register_head
from .vector import beside


@dataclass(frozen=True)
class IA3Config(HeadConfig):
    """Options of `IA3Head`: those of every head. It acts on all tokens: keys and values are those of the cache too."""


@register_head("ia3")
class IA3Head(ShiftHead):
    """key * key_scale, value * value_scale and mlp_hidden * mlp_scale, number by number.

    The key is that of site `key`: after RoPE, as attention multiplies it. PEFT scales before RoPE; its numbers are the
    same method with other values. Layers with experts lack `mlp_hidden`, so they get no head.

    Parameters: `key_scale` [g d], `value_scale` [g e], `mlp_scale` [f], one at first, which changes nothing.

    Source: Liu et al., NeurIPS 2022, arXiv:2205.05638.
    """

    site: Site = "mlp_hidden"
    config_class = IA3Config
    needs_at = False
    takes_samples = True

    def __init__(self, config: HeadConfig, layer: LayerSpec) -> None:
        super().__init__(config, layer)
        self.key_scale = nn.Parameter(torch.ones(layer.kv_heads, layer.head_dim, dtype=torch.float32))
        self.value_scale = nn.Parameter(torch.ones(layer.kv_heads, layer.value_dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(layer.mlp_width, dtype=torch.float32))

    def edits(self) -> Mapping[Site, Edit]:
        return {"key": self.scale_key, "value": self.scale_value, "mlp_hidden": self}

    def forward(self, value: Tensor, at: At | None) -> Tensor:
        return self._scaled(value, "mlp_scale")

    def scale_key(self, value: Tensor, at: At | None) -> Tensor:
        """The edit of the keys [b g s d]."""
        return self._scaled(value, "key_scale")

    def scale_value(self, value: Tensor, at: At | None) -> Tensor:
        """The edit of the values [b g s e]."""
        return self._scaled(value, "value_scale")

    def _scaled(self, value: Tensor, name: str) -> Tensor:
        return (value * beside(self.own(name), value)).to(value.dtype)
