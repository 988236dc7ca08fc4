"""The model families that come with an adapter of their own: a line of paths each.

Some could be found by the generic adapter too; these are known without running the model.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..types import ModelSpec
from .base import PathAdapter, register_adapter


@register_adapter("idefics")
class IdeficsAdapter(PathAdapter):
    """Idefics (Laurençon et al., 2023). Its gated cross-attention sits beside the decoder layers and is no site."""

    layers = "model.layers"


@register_adapter("idefics2")
class Idefics2Adapter(PathAdapter):
    """Idefics2 (Laurençon et al., 2024): Mistral text decoder."""

    layers = "model.text_model.layers"


@register_adapter("llava")
class LlavaAdapter(PathAdapter):
    """Llava classes, LLaVA-NeXT-Interleave (Qwen2 text decoder) among them."""

    layers = "model.language_model.layers"


@register_adapter("llama", "mistral", "qwen2")
class LlamaAdapter(PathAdapter):
    """Text decoders laid out as Llama's."""

    layers = "model.layers"


@register_adapter("blt")
class BltAdapter(PathAdapter):
    """Byte Latent Transformer (Pagnoni et al., 2024): the transformer over patches, not those over bytes around it."""

    layers = "model.global_transformer.layers"
    config = "global_config"


@register_adapter("pi0")
class PI0Adapter(PathAdapter):
    """PI0 (Black et al., 2024): the language model, not the action expert that reads its cache."""

    layers = "model.vlm.language_model.layers"
    config = "vlm_config.text_config"

    def spec(self, model: nn.Module) -> ModelSpec:
        spec = super().spec(model)
        unread = "nothing reads this layer but the action expert, and that its cached keys and values"
        last = replace(spec.layers[-1], sites=(), missing=unread)
        return replace(spec, layers=(*spec.layers[:-1], last))
