"""Tiny models of any model type: a slice through the families."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mimic_core import UnknownNameError, UnsupportedModelError
from tests.zoo.tiny import TinyModel, tiny

WITH_IMAGES = [
    "blip-2",  # needs an image; OPT
    "chameleon",  # images become tokens
    "florence2",  # encoder and decoder
    "fuyu",  # patches straight into the decoder
    "gemma3",  # sliding and full layers
    "idefics",  # needs an image; gated cross-attention
    "idefics2",
    "kosmos-2",  # needs an image; marks its place in a mask
    "llama4",  # chunked attention, dense and MoE
    "llava",
    "llava_next",  # tiles beside the image
    "mllama",  # cross-attention layers
    "qwen2_5_vl",  # rotary embeddings in three dimensions
    "vision-encoder-decoder",
]
TEXT_ONLY = ["bart", "bert", "deepseek_v3", "gpt2", "gpt_oss", "jamba", "llama", "mamba", "qwen2", "qwen3_next"]
SOME = ["idefics", "llava", "deepseek_v3", "gpt2"]


@cache
def built(model_type: str) -> TinyModel:
    return tiny(model_type)


@torch.no_grad()
def logits(made: TinyModel, inputs: dict[str, Tensor]) -> Tensor:
    return made.model(**inputs).logits


def text_of(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The ids whose positions the logits are of, and their mask."""
    prefix = "decoder_" if "decoder_input_ids" in inputs else ""
    return inputs[f"{prefix}input_ids"], inputs[f"{prefix}attention_mask"]


@pytest.mark.parametrize("model_type", WITH_IMAGES + TEXT_ONLY)
def test_it_is_built_small_and_runs(model_type: str) -> None:
    made = built(model_type)
    assert made.model.config.model_type == model_type
    assert not made.model.training
    assert not any(p.requires_grad or p.dtype != torch.float32 for p in made.model.parameters())
    assert sum(p.numel() for p in made.model.parameters()) < 500_000
    inputs = made.inputs(length=20)
    ids, mask = text_of(inputs)
    assert mask.all()
    assert ids.shape[1] == 20 or made.needs_images
    seen = logits(made, inputs)
    assert seen.shape[:2] == ids.shape
    assert seen.isfinite().all()
    assert seen.std() > 0.05 or model_type == "chameleon"  # which rules image tokens out by huge negative logits


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", WITH_IMAGES + TEXT_ONLY)
def test_the_second_sample_is_padded(model_type: str, side: str) -> None:
    made = built(model_type)
    inputs = made.inputs(images=made.has_images, padding=side)
    ids, mask = text_of(inputs)
    assert mask[0].all()
    pad = slice(None, 3) if side == "left" else slice(-3, None)
    assert (mask[1] == 0).sum() == 3
    assert not mask[1, pad].any()
    assert not ids[1, pad].any()
    assert logits(made, inputs)[mask.bool()].isfinite().all()


@pytest.mark.parametrize("model_type", ["bert", "gemma3", "gpt2", "llama", "llava", "qwen2_5_vl"])
def test_left_padding_is_right_padding_is_none(model_type: str) -> None:
    """For the real tokens: so the ids, masks and positions of the inputs belong together."""
    made = built(model_type)
    seen = {}
    for side in ("left", "right"):
        inputs = made.inputs(images=made.has_images, padding=side)
        seen[side] = logits(made, inputs)[inputs["attention_mask"].bool()]
    torch.testing.assert_close(seen["left"], seen["right"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["gemma3", "llama", "llava_next", "qwen2_5_vl", "vision-encoder-decoder"])
def test_it_generates(model_type: str) -> None:
    made = built(model_type)
    inputs = made.inputs(images=made.has_images)
    cached, full = (
        made.model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=cache)
        for cache in (True, False)
    )
    assert torch.equal(cached, full)
    assert cached[:, -4:].max() < made.ids.text.stop


@pytest.mark.parametrize("model_type", WITH_IMAGES)
def test_an_image_changes_the_logits(model_type: str) -> None:
    made = built(model_type)
    assert made.has_images
    inputs = made.inputs(images=True)
    name = next(name for name in inputs if name in ("pixel_values", "image_patches"))
    other = inputs | {name: inputs[name].flip(0) + 1.0}
    assert (logits(made, inputs) - logits(made, other)).abs().max() > 1e-2


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mamba"])
def test_a_text_model_takes_no_images(model_type: str) -> None:
    made = built(model_type)
    assert not made.has_images
    with pytest.raises(UnsupportedModelError, match=f"{model_type} takes no images"):
        made.inputs(images=True)


@pytest.mark.parametrize("model_type", SOME)
def test_a_seed_is_a_model_and_its_inputs(model_type: str) -> None:
    before = torch.random.get_rng_state()
    first, again, other = tiny(model_type), tiny(model_type), tiny(model_type, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = first.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in again.model.state_dict().items())
    assert any(not torch.equal(weights[name], value) for name, value in other.model.state_dict().items())
    for call in ({}, {"images": first.has_images, "padding": "left", "length": 15}):
        inputs = [made.inputs(**call) for made in (first, first, again)]
        assert all(torch.equal(inputs[0][name], x[name]) for x in inputs[1:] for name in x)
    assert not torch.equal(first.inputs()["input_ids"], other.inputs()["input_ids"])


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gemma3", "idefics", "llava", "mllama", "qwen3_next"])
def test_every_layer_has_a_say(model_type: str) -> None:
    """Gates are open and no branch is closed: each weight of the decoder moves the logits."""
    made = tiny(model_type)
    made.model.requires_grad_(True)
    seen = made.model(**made.inputs(images=made.has_images, length=20)).logits
    (seen * torch.randn_like(seen)).sum().backward()
    layers = made.model.get_decoder().layers
    assert len(layers) >= 4
    untouched = {name for name, p in layers.named_parameters() if p.grad is None or not p.grad.any()}
    assert not untouched


def attention_modules(model: nn.Module) -> int:
    return sum("Attention" in type(module).__name__ for module in model.modules())


def test_a_family_has_each_of_its_kinds_of_layers() -> None:
    kinds = built("gemma3").model.config.text_config.layer_types
    assert kinds == ["sliding_attention", "full_attention"] * 2
    assert built("qwen3_next").model.config.layer_types == ["linear_attention", "full_attention"] * 2
    assert attention_modules(built("qwen3_next").model) == 2
    assert {layer.mlp.__class__.__name__ for layer in built("deepseek_v3").model.model.layers} == {
        "DeepseekV3MLP",
        "DeepseekV3MoE",
    }
    windows = built("qwen2").model.config
    assert windows.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    assert windows.sliding_window < 12


def test_text_is_away_from_special_tokens() -> None:
    made = built("chameleon")
    special = set(made.model.config.vocabulary_map.values()) | {0, 1, 2}
    assert not special & set(made.inputs(length=64)["input_ids"].flatten().tolist())
    with_image = made.inputs(images=True)["input_ids"]
    assert (with_image == made.model.config.image_token_id).sum(1).tolist() == [16, 16]


def test_a_type_of_both_tasks_is_the_image_models_unless_asked() -> None:
    assert built("llama4").task == "image-text-to-text"
    text = tiny("llama4", task="causal-lm")
    assert text.task == "causal-lm"
    assert not text.has_images


def test_unknown_names() -> None:
    with pytest.raises(UnknownNameError, match="has no model type 'no_such_model' with"):
        tiny("no_such_model")
    with pytest.raises(UnknownNameError, match="'llava' for causal-lm"):
        tiny("llava", task="causal-lm")


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def needs_more(self: LlamaForCausalLM, config: LlamaConfig) -> None:
        raise ImportError("no package of that name")

    monkeypatch.setattr(LlamaForCausalLM, "__init__", needs_more)
    with pytest.raises(UnsupportedModelError, match="llama can't be built here: no package of that name"):
        tiny("llama")
