"""Task vectors and function vectors: one vector at the end of the prompt, computed from activations, not trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..positions import Positions
from ..types import At, LayerSpec, Site
from .base import HeadConfig, Taken, register_head
from .vector import VectorHead, beside


@dataclass(frozen=True)
class TaskVectorConfig(HeadConfig):
    """Options of `TaskVectorHead`.

    Attributes:
        layers: Indices of the decoder layers. The method uses one, chosen on held-out samples. None means all of them,
            which allows trying each layer: a head acts only if its `weight` is not zero.
        positions: The tokens on which it acts. In the published method, the last one of the prompt.
    """

    positions: Positions = field(default="prompt_end", kw_only=True)


@register_head("task_vector")
class TaskVectorHead(VectorHead):
    """h' = (1 - weight) * h + weight * vector, on the layer's output at the last token of each prompt.

    Parameters: `vector` [c], `weight` []; both are zero at first. Weight 0 changes nothing. Weight 1 replaces the
    state; this is the published method, where `vector` is the mean of this state over prompts with demonstrations and
    a dummy query: `mimic_core.estimate` takes it. Tokens that are decoded after the prompt are not changed.

    Source: Hendel et al., Findings of EMNLP 2023, arXiv:2310.15916.
    """

    site: Site = "layer_out"
    config_class = TaskVectorConfig
    taken = (Taken("vector", "layer_out"),)

    def __init__(self, config: HeadConfig, layer: LayerSpec) -> None:
        super().__init__(config, layer)
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float32))

    def take(self, values: Mapping[str, Tensor]) -> None:
        super().take(values)
        self.weight.fill_(1)

    def forward(self, value: Float[Tensor, "b t c"], at: At | None) -> Float[Tensor, "b t c"]:
        weight = self.own("weight").to(value.device)[..., None, None]
        return ((1 - weight) * value + weight * beside(self.own("vector"), value)).to(value.dtype)


@dataclass(frozen=True)
class FunctionVectorConfig(HeadConfig):
    """Options of `FunctionVectorHead`.

    Attributes:
        layers: Indices of the decoder layers. The method uses one, at about a third of the depth. None means all.
        positions: The tokens on which it acts. In the published method, the last one of the prompt.
    """

    positions: Positions = field(default="prompt_end", kw_only=True)


@register_head("function_vector")
class FunctionVectorHead(VectorHead):
    """h' = h + vector, on the layer's output at the last token of each prompt.

    Parameters: `vector` [c], zero at first, which changes nothing. In the published method it is a sum over a few
    attention heads that matter for the task: each adds its mean output in prompts with demonstrations, projected into
    the residual stream. Tokens that are decoded after the prompt are not changed.

    Source: Todd et al., ICLR 2024, arXiv:2310.15213.
    """

    site: Site = "layer_out"
    config_class = FunctionVectorConfig
