"""Virtual keys and values (HiFICL): each attention head attends to learned pairs beside its context."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import ops
from ..errors import ShapeError
from ..ops._precision import full_precision
from ..types import At, LayerSpec, Site
from .base import HeadConfig, ShiftHead, register_head


@dataclass(frozen=True)
class VirtualKVConfig(HeadConfig):
    """Options of `VirtualKVHead`. HiFICL is `n=8, rank=8` (or 16 for harder tasks), with the other defaults.

    Attributes:
        layers: Indices of the decoder layers; None means all of them.
        n: The number of virtual keys and values of each attention head.
        rank: The keys of an attention head are a product [n rank] x [rank d], and so are its values. None: each number
            of them is learned.
        learn_weight: If False, the weight keeps its initial value and is not in `parameters()`.
        weight_init: Initial weight of the virtual context. With 0 a new stack changes nothing.
        key_std: Standard deviation of the initial keys.

    Raises:
        ShapeError: `n` or `rank` is below 1.
    """

    n: int = 8
    rank: int | None = None
    learn_weight: bool = False
    weight_init: float = 1.0
    key_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n < 1 or (self.rank is not None and self.rank < 1):
            raise ShapeError(f"n and rank should be 1 or more, or rank None; found n={self.n}, rank={self.rank}")


@register_head("virtual_kv")
class VirtualKVHead(ShiftHead):
    """out = (1 - a) * attention + a * sum_i softmax_i(k_i . q * scale) v_i, before the output projection.

    a = weight * sigmoid(logsumexp_i(k_i . q * scale) - LSE). With weight 1 (the default) this equals attention over a
    context that has the n virtual keys and values too. Weight 0 changes nothing. A token that attends to no key is not
    changed: it is padding.

    Keys are compared with the query that attention gets, after RoPE. Every token sees them, whatever the mask or the
    window. A softcap of the model's logits does not act on theirs.

    Parameters: `key` [h n d], `value` [h n e]; with a rank `key_left` [h n r], `key_right` [h r d], `value_left`
    [h n r], `value_right` [h r e]; `weight` [1] (a buffer if it is fixed). As in the paper, the values (`value_right`)
    are zero at first. A new stack then makes the output of attention smaller, by the weight of the keys.

    Source: HiFICL, CVPR 2026, arXiv:2603.12760; He et al., ICLR 2022, arXiv:2110.04366, for prefix tuning in this form.
    """

    site: Site = "attn_heads"
    config_class = VirtualKVConfig
    config: VirtualKVConfig
    needs_lse = True
    takes_samples = True
    per_head = ("key", "value", "key_left", "key_right", "value_left", "value_right")
    weight: Tensor

    def __init__(self, config: VirtualKVConfig, layer: LayerSpec) -> None:
        super().__init__(config, layer)
        h, n, r = layer.heads, config.n, config.rank
        key = torch.randn(h, n if r is None else r, layer.head_dim, dtype=torch.float32) * config.key_std
        value = torch.zeros(h, n if r is None else r, layer.value_dim, dtype=torch.float32)
        if r is None:
            self.key, self.value = nn.Parameter(key), nn.Parameter(value)
        else:
            self.key_left, self.value_left = (
                nn.Parameter(torch.randn(h, n, r, dtype=torch.float32) * r**-0.5) for _ in range(2)
            )
            self.key_right, self.value_right = nn.Parameter(key), nn.Parameter(value)
        # Not a scalar: `fully_shard` takes none, and torch.compile reads one of fp64 that is no parameter as a number.
        weight = torch.full((1,), config.weight_init, dtype=torch.float32)
        if config.learn_weight:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)

    def forward(self, value: Float[Tensor, "b t h e"], at: At) -> Float[Tensor, "b t h e"]:
        lse = at.lse  # in the dtype of the computation
        with full_precision(value):
            keys, values = self._pairs("key", lse), self._pairs("value", lse)
        return ops.virtual_context(value, at.query, lse, keys, values, self.own("weight").to(lse), at.scale)

    def _pairs(self, name: str, like: Tensor) -> Tensor:
        """The keys or values [*b h n _], in the dtype and on the device of `like`."""
        if self.config.rank is None:
            return self.own(name).to(like)
        return self.own(f"{name}_left").to(like) @ self.own(f"{name}_right").to(like)
