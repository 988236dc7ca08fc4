"""Tiny image-text models for vLLM, with what they need to read prompts with images."""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as tf
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from . import serving

_TEXT: dict[str, Any] = {**serving.TEXT, "hidden_size": 128, "initializer_range": 0.2}
_VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


class Made(NamedTuple):
    """A model and its processor.

    Attributes:
        mark: What stands for an image in a prompt.
        size: Width and height of an image.
    """

    model: Any
    processor: Any
    mark: str
    size: tuple[int, int]

    def image(self, seed: int) -> Image.Image:
        """Noise."""
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.randint(0, 256, (self.size[1], self.size[0], 3), generator=generator, dtype=torch.uint8)
        return Image.fromarray(numbers.numpy())


def _tokenizer(special: Sequence[str], **more: Any) -> tf.PreTrainedTokenizerFast:
    """Words w1, w2, ...; special tokens have the ids from 3 on."""
    first = ["<pad>", "<s>", "</s>", *special]
    ids = {x: i for i, x in enumerate([*first, *(f"w{i}" for i in range(len(first), 128))])}
    words = Tokenizer(WordLevel(ids, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    fixed: dict[str, Any] = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    if more:
        fixed["extra_special_tokens"] = more
    return tf.PreTrainedTokenizerFast(tokenizer_object=words, additional_special_tokens=list(special), **fixed)


# SigLIP and Qwen2. To vLLM, layer -1 means another thing: with the norm at the end.
_CHOSEN: dict[str, Any] = {"vision_feature_select_strategy": "full", "vision_feature_layer": -2}
_FULL: dict[str, Any] = {"vision_feature_select_strategy": "full", "image_token": "<image>"}
_GRID = [[32, 64], [64, 32], [64, 64]]


def _towers() -> dict[str, Any]:
    return {"vision_config": tf.SiglipVisionConfig(**_VISION), "text_config": tf.Qwen2Config(**_TEXT), **_CHOSEN}


def _llava() -> Made:
    config = tf.LlavaConfig(**_towers(), image_token_index=3)
    images = tf.SiglipImageProcessor(size={"height": 32, "width": 32})
    processor = tf.LlavaProcessor(images, _tokenizer(["<image>"]), patch_size=8, **_FULL, num_additional_image_tokens=0)
    return Made(tf.LlavaForConditionalGeneration(config), processor, "<image>", (32, 32))


def _llava_next() -> Made:
    config = tf.LlavaNextConfig(**_towers(), image_token_index=3, image_grid_pinpoints=_GRID)
    images = tf.LlavaNextImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=_GRID
    )
    processor = tf.LlavaNextProcessor(
        images, _tokenizer(["<image>"]), patch_size=8, **_FULL, num_additional_image_tokens=0
    )
    return Made(tf.LlavaNextForConditionalGeneration(config), processor, "<image>", (64, 64))


def _llava_onevision() -> Made:
    config = tf.LlavaOnevisionConfig(**_towers(), image_token_index=3, video_token_index=4, image_grid_pinpoints=_GRID)
    size = {"height": 32, "width": 32}
    images = tf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=_GRID)
    videos = tf.LlavaOnevisionVideoProcessor(size=size)
    processor = tf.LlavaOnevisionProcessor(
        images, _tokenizer(["<image>", "<video>"]), videos, num_image_tokens=16, video_token="<video>", **_FULL
    )
    return Made(tf.LlavaOnevisionForConditionalGeneration(config), processor, "<image>", (64, 64))


def _idefics3(kind: str = "Idefics3") -> Made:
    config = getattr(tf, f"{kind}Config")(
        vision_config=_VISION, text_config=tf.LlamaConfig(**_TEXT), scale_factor=2, image_token_id=3, pad_token_id=0
    )
    sizes = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    names = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"}
    names |= {"global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"}
    parts = [f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)]
    given = [getattr(tf, f"{kind}ImageProcessor")(**sizes), _tokenizer([*names.values(), *parts], **names)]
    if kind == "SmolVLM":
        sampling = {"fps": 1, "max_frames": 4, "video_size": {"longest_edge": 32}}
        given.append(tf.SmolVLMVideoProcessor(**sizes, num_frames=4, fps=1, video_sampling=sampling))
    processor = getattr(tf, f"{kind}Processor")(*given, image_seq_len=4)
    return Made(getattr(tf, f"{kind}ForConditionalGeneration")(config), processor, "<image>", (64, 32))


_QWEN_VISION: dict[str, Any] = {
    "hidden_size": 64,
    "num_heads": 2,
    "intermediate_size": 96,
    "out_hidden_size": 128,
    "spatial_merge_size": 2,
}


def _qwen_vl(kind: str, sections: list[int], rope: dict[str, Any], vision: dict[str, Any]) -> Made:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections, **rope}
    patches = {"patch_size": 8, "temporal_patch_size": 2}
    config = getattr(tf, f"{kind}Config")(
        text_config={**_TEXT, "rope_parameters": rope},
        vision_config={**_QWEN_VISION, **patches, **vision},
        image_token_id=3,
        video_token_id=4,
        vision_start_token_id=5,
        vision_end_token_id=6,
        tie_word_embeddings=False,
    )
    sizes = {**patches, "merge_size": 2, "size": {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}}
    tokens = _tokenizer(["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])
    videos = getattr(tf, "Qwen3VLVideoProcessor" if kind == "Qwen3VL" else "Qwen2VLVideoProcessor")
    processor = getattr(tf, f"{kind}Processor")(tf.Qwen2VLImageProcessor(**sizes), tokens, videos(**sizes))
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    return Made(getattr(tf, f"{kind}ForConditionalGeneration")(config), processor, mark, (64, 32))


MODELS: dict[str, Callable[[], Made]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "idefics3": _idefics3,
    "smolvlm": lambda: _idefics3("SmolVLM"),
    "qwen2_5_vl": lambda: _qwen_vl(
        "Qwen2_5_VL", [4, 6, 6], {}, {"depth": 2, "window_size": 32, "fullatt_block_indexes": [1]}
    ),
    "qwen3_vl": lambda: _qwen_vl(
        "Qwen3VL",
        [6, 5, 5],
        {"mrope_interleaved": True},
        {"depth": 3, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
    ),
}


def made_at(path: Path, name: str) -> Made:
    """A model with random weights and its processor, also saved at `path`."""
    torch.manual_seed(0)
    made = MODELS[name]()
    model = made.model.eval().requires_grad_(False)
    model.save_pretrained(path)
    if name.startswith("llava"):
        # vLLM reads the Hub's names of the vision tower.
        weights = load_file(path / "model.safetensors")
        old = r"vision_tower\.(?!vision_model)"
        long = {re.sub(old, "vision_tower.vision_model.", key): x for key, x in weights.items()}
        save_file(long, path / "model.safetensors", metadata={"format": "pt"})
    made.processor.save_pretrained(path)
    return made._replace(processor=tf.AutoProcessor.from_pretrained(path))  # vLLM's: others resize in another way
