"""Adapters for some model families. They are paths, so the model does not have to run."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..types import ModelSpec
from .base import PathAdapter, register_adapter


@register_adapter("idefics")
class IdeficsAdapter(PathAdapter):
    """Idefics (Laurençon et al., 2023). Its gated cross-attention is not in the decoder layers and is not a site."""

    layers = "model.layers"


@register_adapter("idefics2")
class Idefics2Adapter(PathAdapter):
    """Idefics2 (Laurençon et al., 2024): Mistral text decoder."""

    layers = "model.text_model.layers"


@register_adapter("llava")
class LlavaAdapter(PathAdapter):
    """Llava classes, also LLaVA-NeXT-Interleave (Qwen2 text decoder)."""

    layers = "model.language_model.layers"


@register_adapter("llama", "mistral", "qwen2")
class LlamaAdapter(PathAdapter):
    """Text decoders with the module paths of Llama."""

    layers = "model.layers"


@register_adapter("blt")
class BltAdapter(PathAdapter):
    """Byte Latent Transformer (Pagnoni et al., 2024): the transformer over patches, not those over bytes."""

    layers = "model.global_transformer.layers"
    config = "global_config"


@register_adapter("pi0")
class PI0Adapter(PathAdapter):
    """PI0 (Black et al., 2024): the language model, not the action expert that reads its cache."""

    layers = "model.vlm.language_model.layers"
    config = "vlm_config.text_config"

    def spec(self, model: nn.Module) -> ModelSpec:
        spec = super().spec(model)
        unread = "only the action expert reads this layer, and only its cached keys and values"
        last = replace(spec.layers[-1], sites=(), missing=unread)
        return replace(spec, layers=(*spec.layers[:-1], last))
