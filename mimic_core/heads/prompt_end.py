"""Task and function vectors: one vector where the prompt ends, taken from activations instead of trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..types import At, LayerSpec, Site
from .base import HeadConfig, ShiftHead, register_head


class _PromptEndHead(ShiftHead):
    """A vector for the last token of a prompt, on the layer's output."""

    site: Site = "layer_out"
    needs_prompt_end = True

    def __init__(self, config: HeadConfig, layer: LayerSpec) -> None:
        super().__init__(config, layer)
        self.vector = nn.Parameter(torch.zeros(layer.hidden_size, dtype=torch.float32))

    def forward(self, value: Float[Tensor, "b t c"], at: At) -> Float[Tensor, "b t c"]:
        return torch.where(at.prompt_end[..., None], self._shifted(value).to(value.dtype), value)

    def _shifted(self, value: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        """The state that `value` becomes there."""
        raise NotImplementedError


@dataclass(frozen=True)
class TaskVectorConfig(HeadConfig):
    """Options of `TaskVectorHead`.

    Attributes:
        layers: Indices of the decoder layers; the method uses one, chosen on held-back samples. None is all of them,
            for trying each: a head acts only if its `weight` is not zero.
    """


@register_head("task_vector")
class TaskVectorHead(_PromptEndHead):
    """At the last token of a prompt: h' = (1 - weight) * h + weight * vector, on the layer's output.

    Parameters: `vector` [c], `weight` []; both start at zero. Weight 0 shifts nothing. Weight 1 replaces the state,
    which is the published method: `vector` is the mean of that state over prompts with demonstrations and a dummy
    query. Tokens decoded after the prompt are left alone.

    Source: Hendel et al., Findings of EMNLP 2023, arXiv:2310.15916.
    """

    config_class = TaskVectorConfig

    def __init__(self, config: HeadConfig, layer: LayerSpec) -> None:
        super().__init__(config, layer)
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float32))

    def _shifted(self, value: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        weight = self.weight.to(value.device)
        return (1 - weight) * value + weight * self.vector.to(value.device)


@dataclass(frozen=True)
class FunctionVectorConfig(HeadConfig):
    """Options of `FunctionVectorHead`.

    Attributes:
        layers: Indices of the decoder layers; the method uses one, about a third of the way up. None is all of them.
    """


@register_head("function_vector")
class FunctionVectorHead(_PromptEndHead):
    """At the last token of a prompt: h' = h + vector, on the layer's output.

    Parameters: `vector` [c], zero at first, which shifts nothing. In the published method it is the sum, over the few
    attention heads that carry the task, of what their mean output with demonstrations adds to the residual stream.
    Tokens decoded after the prompt are left alone.

    Source: Todd et al., ICLR 2024, arXiv:2310.15213.
    """

    config_class = FunctionVectorConfig

    def _shifted(self, value: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        return value + self.vector.to(value.device)
