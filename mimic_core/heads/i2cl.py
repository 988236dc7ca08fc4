"""I2CL: the outputs of attention and of the MLP are mixed with their means over demonstrations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..types import LayerSpec
from .base import HeadConfig, Taken, register_head
from .vector import TwoOutputsHead, beside


@dataclass(frozen=True)
class I2CLConfig(HeadConfig):
    """Options of `I2CLHead`: those of every head."""


@register_head("i2cl")
class I2CLHead(TwoOutputsHead):
    """out = scales[0] * value + scales[1] * vector, at the output of attention and at that of the MLP.

    Parameters: `attn_scales` [2], `mlp_scales` [2], at first (1, 0.1), trained with the loss of the answers. Buffers:
    `attn_vector` [c], `mlp_vector` [c], zero at first, so a new head changes nothing. `mimic_core.estimate` takes them
    from demonstrations: the mean of each output at the last token.

    Source: Li et al., ICLR 2025, arXiv:2405.14660.
    """

    config_class = I2CLConfig
    taken = (Taken("attn_vector", "attn_out"), Taken("mlp_vector", "mlp_out"))

    def __init__(self, config: HeadConfig, layer: LayerSpec) -> None:
        super().__init__(config, layer)
        for place in ("attn", "mlp"):
            self.register_buffer(f"{place}_vector", torch.zeros(layer.hidden_size, dtype=torch.float32))
            self.register_parameter(f"{place}_scales", nn.Parameter(torch.tensor([1.0, 0.1], dtype=torch.float32)))

    def shifted(self, value: Tensor, place: str) -> Tensor:
        of_value, of_vector = self.own(f"{place}_scales").to(value.device)[..., None, None].unbind(-3)
        vector = beside(self.own(f"{place}_vector"), value)
        return (of_value * value + of_vector * vector).to(value.dtype)
