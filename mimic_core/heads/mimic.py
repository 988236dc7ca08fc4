"""MimIC: per attention head, a learned vector weighed by a learned gate against the attention's own LSE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import ops
from ..errors import UnknownNameError
from ..types import At, LayerSpec, Site
from .base import Edit, HeadConfig, ShiftHead, register_head


@dataclass(frozen=True)
class MimICConfig(HeadConfig):
    """Options of `MimICHead`. The defaults are the paper's method.

    Attributes:
        layers: Indices of the decoder layers to shift; None is all of them.
        shared: One vector of all heads' width and one gate per layer instead of one of each per attention head; the
            LSE is then averaged over heads.
        gate: False leaves the vector alone, with weight 1.
        log_z2: Which keys the gate's log Z2 sums over: those attention attends to ("attended", as the paper's
            formula), or "all_keys", masked and future ones too, as the published code. The latter depends on padding
            and makes cached decoding differ from a full forward; it is for checkpoints and numbers of that code.
        mlp_vector: Also a norm-preserving vector on the MLP output.
        vector_std: Standard deviation of the initial vectors.
        gate_std: Standard deviation of the initial gate weights. With `shared` the gate starts as a
            linear layer does, uniform in +-1/sqrt(width), and this is not used.
    """

    shared: bool = False
    gate: bool = True
    log_z2: Literal["attended", "all_keys"] = "attended"
    mlp_vector: bool = False
    vector_std: float = 0.001
    gate_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.log_z2 not in ("attended", "all_keys"):
            raise UnknownNameError(f"log_z2 should be 'attended' or 'all_keys', found {self.log_z2!r}")


@register_head("mimic")
class MimICHead(ShiftHead):
    """out = attention + sigmoid(query . gate_weight + gate_bias - log Z2) * vector, before the output projection.

    Parameters: `vector` [h e], `gate_weight` [h d], `gate_bias` [h]; with `shared` [h*e], [h*d], []; with `mlp_vector`
    also `mlp_vector` [c]. Zero vectors shift nothing.

    Source: Jiang et al., CVPR 2025, arXiv:2504.08851.
    """

    site: Site = "attn_heads"
    config_class = MimICConfig
    config: MimICConfig

    def __init__(self, config: MimICConfig, layer: LayerSpec) -> None:
        super().__init__(config, layer)
        h, d, e = layer.heads, layer.head_dim, layer.value_dim
        self.vector = nn.Parameter(
            torch.randn((h * e,) if config.shared else (h, e), dtype=torch.float32) * config.vector_std
        )
        if config.gate and config.shared:
            bound = max(1, h * d) ** -0.5  # a layer without attention heads is still asked what it would edit
            self.gate_weight = nn.Parameter(torch.empty(h * d, dtype=torch.float32).uniform_(-bound, bound))
            self.gate_bias = nn.Parameter(torch.empty((), dtype=torch.float32).uniform_(-bound, bound))
        elif config.gate:
            self.gate_weight = nn.Parameter(torch.randn(h, d, dtype=torch.float32) * config.gate_std)
            self.gate_bias = nn.Parameter(torch.zeros(h, dtype=torch.float32))
        if config.mlp_vector:
            self.mlp_vector = nn.Parameter(torch.randn(layer.hidden_size, dtype=torch.float32) * config.vector_std)
        self.needs_lse = config.gate and config.log_z2 == "attended"
        self.is_gated_shift = self.needs_lse and not config.shared

    def forward(self, value: Float[Tensor, "b t h e"], at: At) -> Float[Tensor, "b t h e"]:
        vector = self.vector.to(value.device)
        if self.config.shared:
            # Not einops: with it torch.compile made another graph for a third length.
            vector = vector.unflatten(0, (self.layer.heads, -1))
        if not self.config.gate:
            return (value + vector).to(value.dtype)
        log_z2 = at.lse if self.config.log_z2 == "attended" else at.lse_all_keys
        if not self.config.shared:
            return ops.gated_shift(value, at.query, log_z2, *self.gated_shift(value))
        weight, bias = self.gate_weight.to(value.device), self.gate_bias.to(value.device)
        query = at.query.transpose(1, 2).flatten(2).to(log_z2.dtype)
        # Not a matrix product, which autocast would take in bf16.
        log_z1 = (query * weight).sum(-1) + bias
        mu = ops.gate(log_z1, log_z2.mean(1))
        return (value + mu[..., None, None] * vector).to(value.dtype)

    def gated_shift(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        vector, weight, bias = self.own("vector"), self.own("gate_weight"), self.own("gate_bias")
        if vector.device != query.device:
            vector, weight, bias = (x.to(query.device) for x in (vector, weight, bias))
        return vector, weight, bias

    def edits(self) -> dict[Site, Edit]:
        edits: dict[Site, Edit] = {self.site: self}
        if self.config.mlp_vector:
            edits["mlp_out"] = self.shift_mlp
        return edits

    def shift_mlp(self, value: Float[Tensor, "b t c"], at: At) -> Float[Tensor, "b t c"]:
        """The norm-preserving vector on the MLP output."""
        return ops.norm_preserving_add(value, self.own("mlp_vector").to(value.device), 1.0)
