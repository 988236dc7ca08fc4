"""Hyper-ICL: attention logits gain a low-rank bilinear term, which is an edit of the query."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ShapeError
from ..ops._precision import full_precision, wide
from ..types import At, LayerSpec, Site
from .base import HeadConfig, ShiftHead, register_head


@dataclass(frozen=True)
class HyperICLConfig(HeadConfig):
    """Options of `HyperICLHead`.

    Attributes:
        layers: Indices of the decoder layers; None means all of them.
        rank: The rank of the term. The paper saw little gain above 4.

    Raises:
        ShapeError: `rank` is below 1.
    """

    rank: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ShapeError(f"rank should be 1 or more, found {self.rank}")


@register_head("hyper_icl")
class HyperICLHead(ShiftHead):
    """The logits q . k * scale of each attention head gain g(q) * (q U_q) . (k U_k) / sqrt(rank).

    g(q) = sigmoid(norm(q) . gate_weight + gate_bias), with the layer norm of q over its width, without parameters of
    its own. The term is linear in k, so no logits are touched. The query becomes

        q' = q + g(q) * (q U_q) U_k^T / (sqrt(rank) * scale)

    The query is that of site `query`, and k that of site `key`: as attention multiplies them, after RoPE and q and k
    norm. All that attention does with its logits (mask, softcap) and an LSE that other heads read include the term.

    Parameters: `u_q` [h d r], `u_k` [h d r], `gate_weight` [h d], `gate_bias` [h]. `u_k` and the gate's are zero at
    first, `u_q` is random: a new stack changes nothing, and so does any with a zero `u_k`. The paper says nothing of
    initial values.

    Source: Alipour Talemi et al., ICML 2026, arXiv:2606.04434, equations 5 to 9.
    """

    site: Site = "query"
    config_class = HyperICLConfig
    config: HyperICLConfig
    takes_samples = True
    per_head = ("u_q", "u_k", "gate_weight", "gate_bias")

    def __init__(self, config: HyperICLConfig, layer: LayerSpec) -> None:
        super().__init__(config, layer)
        h, d, r = layer.heads, layer.head_dim, config.rank
        self.u_q = nn.Parameter(torch.randn(h, d, r, dtype=torch.float32) * max(1, d) ** -0.5)
        self.u_k = nn.Parameter(torch.zeros(h, d, r, dtype=torch.float32))
        self.gate_weight = nn.Parameter(torch.zeros(h, d, dtype=torch.float32))
        self.gate_bias = nn.Parameter(torch.zeros(h, dtype=torch.float32))

    def forward(self, value: Float[Tensor, "b h t d"], at: At) -> Float[Tensor, "b h t d"]:
        with full_precision(value):
            query = wide(value)
            u_q, u_k, weight, bias = (self.own(name).to(query) for name in ("u_q", "u_k", "gate_weight", "gate_bias"))
            normed = functional.layer_norm(query, query.shape[-1:])
            gate = (normed @ weight.unsqueeze(-1) + bias[..., None, None]).sigmoid()
            factor = 1 / (self.config.rank**0.5 * at.scale)
            return (query + gate * factor * (query @ u_q) @ u_k.mT).to(value.dtype)
