"""LIVE: a learned vector is added to the hidden states of a layer, which keep their norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import ops
from ..errors import UnknownNameError
from ..types import At, LayerSpec
from .base import HeadConfig, ShiftHead, register_head


@dataclass(frozen=True)
class LIVEConfig(HeadConfig):
    """Options of `LIVEHead`. The defaults are those of the comparison in the MimIC paper.

    Attributes:
        layers: Indices of the decoder layers to shift; None means all of them.
        site: "mlp_out" (default), "layer_out" (the choice of the LIVE paper for Idefics) or "attn_out".
        learn_scale: If False, the scale keeps its initial value and is not in `parameters()`.
        sigmoid: The factor is sigmoid(scale) instead of scale.
        scale_init: Initial scale, before the sigmoid if there is one.
        vector_std: Standard deviation of the initial vectors.
    """

    site: Literal["mlp_out", "layer_out", "attn_out"] = "mlp_out"
    learn_scale: bool = True
    sigmoid: bool = False
    scale_init: float = 0.1
    vector_std: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.site not in ("mlp_out", "layer_out", "attn_out"):
            raise UnknownNameError(f"LIVE can shift 'mlp_out', 'layer_out' or 'attn_out', not {self.site!r}")


@register_head("live")
class LIVEHead(ShiftHead):
    """h' = (h + a * vector) * |h| / |h + a * vector|, with a = scale or sigmoid(scale).

    Parameters: `vector` [c], `scale` [] (a buffer if it is fixed). A zero vector changes nothing.

    Source: Peng et al., NeurIPS 2024, arXiv:2406.13185.
    """

    config_class = LIVEConfig
    config: LIVEConfig
    needs_at = False
    takes_samples = True
    scale: Tensor

    def __init__(self, config: LIVEConfig, layer: LayerSpec) -> None:
        super().__init__(config, layer)
        self.site = config.site
        self.vector = nn.Parameter(torch.randn(layer.hidden_size, dtype=torch.float32) * config.vector_std)
        scale = torch.tensor(config.scale_init, dtype=torch.float32)
        if config.learn_scale:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)

    def forward(self, value: Float[Tensor, "b t c"], at: At | None) -> Float[Tensor, "b t c"]:
        vector, scale = self.own("vector"), self.own("scale")
        if vector.device != value.device:
            vector, scale = vector.to(value.device), scale.to(value.device)
        return ops.norm_preserving_add(value, vector, scale.sigmoid() if self.config.sigmoid else scale)

    def addition(self) -> Mapping[str, Tensor | None] | None:
        as_written = getattr(self.forward, "__func__", None) is _FORWARD  # a subclass may do something else
        return self._parameters if as_written and self.config.learn_scale and not self.config.sigmoid else None


_FORWARD = LIVEHead.forward
