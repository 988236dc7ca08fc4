"""A tiny Llava (SigLIP and Qwen2) for vLLM, with what it needs to read prompts with images."""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false

from __future__ import annotations

import re
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

SIZE = 32


def llava_at(path: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A model with random weights and its processor, also saved at `path`."""
    torch.manual_seed(0)
    text = Qwen2Config(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    vision = SiglipVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE, patch_size=8
    )
    # To vLLM, layer -1 means another thing: with the norm at the end.
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=3,
        vision_feature_select_strategy="full",
        vision_feature_layer=-2,
    )
    model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    model.save_pretrained(path)
    # vLLM reads the Hub's names of the vision tower.
    weights = load_file(path / "model.safetensors")
    long = {
        re.sub(r"vision_tower\.(?!vision_model)", "vision_tower.vision_model.", key): x for key, x in weights.items()
    }
    save_file(long, path / "model.safetensors", metadata={"format": "pt"})
    names = {"<pad>": 0, "<s>": 1, "</s>": 2, "<image>": 3, **{f"w{i}": i for i in range(4, 128)}}
    words = Tokenizer(WordLevel(names, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    processor = LlavaProcessor(
        SiglipImageProcessor(size={"height": SIZE, "width": SIZE}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="full",
        image_token="<image>",
        num_additional_image_tokens=0,
    )
    processor.save_pretrained(path)
    return model, processor


def image(seed: int) -> Image.Image:
    """Noise, in the size of the model: the two sides resize in other ways."""
    numbers = torch.randint(0, 256, (SIZE, SIZE, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(numbers.numpy())
