"""MimIC: a learned vector for each attention head, with a weight from a learned gate and the LSE of attention."""

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
        layers: Indices of the decoder layers to shift; None means all of them.
        shared: One vector [h*e] and one gate for each layer, instead of one of each for each attention head. The LSE is
            then averaged over heads.
        gate: If False, there is only the vector, with weight 1.
        log_z2: The keys over which the gate's log Z2 sums. "attended" is the keys that attention attends to, as in the
            paper. "all_keys" also has masked and future keys, as in the published code. With "all_keys" the result
            depends on padding, and cached decoding differs from a full forward. Use it for checkpoints of that code
            and to reproduce its numbers.
        mlp_vector: Also learn a norm-preserving vector for the MLP output.
        vector_std: Standard deviation of the initial vectors.
        gate_std: Standard deviation of the initial gate weights. Not used with `shared`: that gate has the initial
            values of a linear layer, uniform in +-1/sqrt(width).
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
    also `mlp_vector` [c]. Zero vectors change nothing.

    Source: Jiang et al., CVPR 2025, arXiv:2504.08851.
    """

    site: Site = "attn_heads"
    config_class = MimICConfig
    takes_samples = True
    config: MimICConfig

    def __init__(self, config: MimICConfig, layer: LayerSpec) -> None:
        super().__init__(config, layer)
        h, d, e = layer.heads, layer.head_dim, layer.value_dim
        self.vector = nn.Parameter(
            torch.randn((h * e,) if config.shared else (h, e), dtype=torch.float32) * config.vector_std
        )
        if config.gate and config.shared:
            bound = max(1, h * d) ** -0.5  # h is 0 in a layer without attention: the stack still reads edits() there
            self.gate_weight = nn.Parameter(torch.empty(h * d, dtype=torch.float32).uniform_(-bound, bound))
            self.gate_bias = nn.Parameter(torch.empty((), dtype=torch.float32).uniform_(-bound, bound))
        elif config.gate:
            self.gate_weight = nn.Parameter(torch.randn(h, d, dtype=torch.float32) * config.gate_std)
            self.gate_bias = nn.Parameter(torch.zeros(h, dtype=torch.float32))
        if config.mlp_vector:
            self.mlp_vector = nn.Parameter(torch.randn(layer.hidden_size, dtype=torch.float32) * config.vector_std)
        self.needs_lse = config.gate and config.log_z2 == "attended"
        # A subclass with another formula would otherwise not be asked.
        self.is_gated_shift = self.needs_lse and not config.shared and type(self).forward is _FORWARD
        self.per_head = None if config.shared else ("vector", "gate_weight", "gate_bias")

    def forward(self, value: Float[Tensor, "b t h e"], at: At) -> Float[Tensor, "b t h e"]:
        vector = self._vector().to(value.device)
        if not self.config.gate:
            return (value + vector.unsqueeze(-3)).to(value.dtype)
        log_z2 = at.lse if self.config.log_z2 == "attended" else at.lse_all_keys
        if not self.config.shared:
            return ops.gated_shift(value, at.query, log_z2, *self.gated_shift(value))
        weight, bias = self.own("gate_weight").to(value.device), self.own("gate_bias").to(value.device)
        query = at.query.transpose(1, 2).flatten(2).to(log_z2.dtype)
        # Not a matrix product: autocast would compute that in bf16.
        log_z1 = (query * weight.unsqueeze(-2)).sum(-1) + bias.unsqueeze(-1)
        mu = ops.gate(log_z1, log_z2.mean(1))
        return (value + mu[..., None, None] * vector.unsqueeze(-3)).to(value.dtype)

    def gated_shift(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        vector, weight, bias = self.own("vector"), self.own("gate_weight"), self.own("gate_bias")
        if vector.device != query.device:
            vector, weight, bias = (x.to(query.device) for x in (vector, weight, bias))
        return vector, weight, bias

    def constant(self) -> dict[Site, Tensor] | None:
        return None if self.config.gate or self.config.mlp_vector else {self.site: self._vector()}

    def _vector(self) -> Tensor:
        vector = self.own("vector")
        # Not einops: with it, torch.compile made a new graph for the third sequence length.
        return vector.unflatten(-1, (self.layer.heads, -1)) if self.config.shared else vector

    def edits(self) -> dict[Site, Edit]:
        edits: dict[Site, Edit] = {self.site: self}
        if self.config.mlp_vector:
            edits["mlp_out"] = self.shift_mlp
        return edits

    def shift_mlp(self, value: Float[Tensor, "b t c"], at: At) -> Float[Tensor, "b t c"]:
        """Add the norm-preserving vector to the MLP output."""
        return ops.norm_preserving_add(value, self.own("mlp_vector").to(value.device), 1.0)


_FORWARD = MimICHead.forward
