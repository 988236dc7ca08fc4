"""Multimodal task vectors: attention heads' outputs at the prompt's end are replaced by their means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..positions import Positions
from ..types import At, LayerSpec, Site
from .base import HeadConfig, ShiftHead, Taken, register_head


@dataclass(frozen=True)
class MTVConfig(HeadConfig):
    """Options of `MTVHead`.

    Attributes:
        layers: Indices of the decoder layers; None means all of them.
        positions: The tokens on which it acts. In the published method, the last one of the prompt.
    """

    positions: Positions = field(default="prompt_end", kw_only=True)


@register_head("mtv")
class MTVHead(ShiftHead):
    """out = (1 - weight) * attention + weight * vector, of each attention head at the last token of each prompt.

    Parameters: `vector` [h e], `weight` [h]; both are zero at first. Weight 0 changes nothing, weight 1 replaces.
    `mimic_core.estimate` takes the vectors, the mean of each attention head's output over prompts with demonstrations,
    and sets all weights to 1. `mimic_core.choose_heads` then chooses which stay at 1.

    Source: Huang et al., NeurIPS 2024, arXiv:2406.15334.
    """

    site: Site = "attn_heads"
    config_class = MTVConfig
    needs_at = False
    takes_samples = True
    per_head = ("vector", "weight")
    taken = (Taken("vector", "attn_heads"),)

    def __init__(self, config: HeadConfig, layer: LayerSpec) -> None:
        super().__init__(config, layer)
        self.vector = nn.Parameter(torch.zeros(layer.heads, layer.value_dim, dtype=torch.float32))
        self.weight = nn.Parameter(torch.zeros(layer.heads, dtype=torch.float32))

    def take(self, values: Mapping[str, Tensor]) -> None:
        super().take(values)
        self.weight.fill_(1)

    def forward(self, value: Float[Tensor, "b t h e"], at: At | None) -> Float[Tensor, "b t h e"]:
        vector, weight = (
            self.own(name).to(value.device).unsqueeze(-3 + n) for n, name in enumerate(("vector", "weight"))
        )
        weight = weight.unsqueeze(-1)
        return ((1 - weight) * value + weight * vector).to(value.dtype)
