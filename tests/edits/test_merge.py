"""A stack that was merged into a model's biases: the outputs of the patched model, also in plain transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

import mimic_core as mc
from mimic_core.types import At, Site
from tests.support.cases import BY_NAME, HEADS, TEXT, VISION, fresh_model, random_shifts

IDS = torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(2))
MASK = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
_GEMMA = TEXT | {"head_dim": 8, "sliding_window": 16}


def llava() -> LlavaForConditionalGeneration:
    vision = {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION}
    text = {"model_type": "llama", **TEXT}
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=127, vision_feature_layer=-1)
    )


MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT, head_dim=24)),
    "llama-with-biases": lambda: LlamaForCausalLM(LlamaConfig(**TEXT, attention_bias=True)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**TEXT | {"ffn_dim": 48, "word_embed_proj_dim": 32})),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**TEXT, n_inner=48, n_positions=64)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_GEMMA)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_GEMMA)),
    "llava": llava,
}


def made(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    torch.manual_seed(4)
    model = MODELS[name]()
    with torch.no_grad():
        for key, x in model.named_parameters():
            if key.endswith("bias"):
                x.normal_()
    return model.to(dtype).eval().requires_grad_(False)


@torch.no_grad()
def outputs_of(model: Any) -> list[Tensor]:
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    tokens = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    longer = torch.nn.functional.pad(MASK, (0, 5), value=1)
    return [model(**inputs).logits[MASK.bool()], tokens, model(input_ids=tokens, attention_mask=longer).logits[:, 9:]]


def state_of(model: Any) -> dict[str, Any]:
    found = {name: x.clone() for name, x in model.state_dict().items() if not x.is_meta}
    hooks = [len(m._forward_hooks) for m in model.modules()]
    return {"config": str(model.config), "hooks": hooks, "patches": len(mc.handles(model)), **found}


def assert_unchanged(model: Any, before: dict[str, Any]) -> None:
    after = state_of(model)
    assert list(after) == list(before)
    for name, x in before.items():
        assert torch.equal(x, after[name]) if isinstance(x, Tensor) else x == after[name], name


MERGEABLE = ("mimic-vector-only", "mimic-shared-vector-only", "attn-bias", "mlp-bias", "m2iv")
# Gemma computes some things in fp32 in every model.
IN_FP64 = [(name, "mimic-vector-only", torch.float64, 1e-11) for name in MODELS if "gemma" not in name]
IN_FP64 += [(n, head, torch.float64, 1e-11) for n in ("llama", "opt", "gpt2") for head in ("attn-bias", "m2iv")]


@pytest.mark.parametrize(
    ("name", "head", "dtype", "atol"),
    [*IN_FP64, *((name, "mimic-shared-vector-only", torch.float32, 2e-4) for name in ("gemma2", "gemma3", "llama"))],
)
def test_a_merged_model(name: str, head: str, dtype: torch.dtype, atol: float, tmp_path: Path) -> None:
    model = made(name, dtype)
    shifts = random_shifts(model, head)
    bare = outputs_of(model)
    with mc.patch(model, shifts, strength=0.7):
        wanted = outputs_of(model)
    assert (wanted[0] - bare[0]).abs().max() > 0.05
    mc.merge(model, shifts, strength=0.7)
    assert not mc.handles(model)
    assert not any(x.requires_grad for x in model.parameters())
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), "no name is missing or left over"
    for merged in (model, loaded.eval()):
        for found, want in zip(outputs_of(merged), wanted, strict=True):
            torch.testing.assert_close(found, want, atol=atol, rtol=0)
    mc.merge(loaded, shifts, strength=-0.7)
    torch.testing.assert_close(outputs_of(loaded)[0], bare[0], atol=atol, rtol=0)


def test_some_layers_and_a_bias_that_is_there() -> None:
    model = made("llama")
    shifts = mc.build_shifts(model, "mimic", gate=False, layers=(1,), vector_std=1.0)
    with mc.patch(model, shifts):
        wanted = outputs_of(model)
    with torch.inference_mode():
        mc.merge(model, shifts)
    assert not any(x.is_inference() for x in model.parameters())
    for found, want in zip(outputs_of(model), wanted, strict=True):
        torch.testing.assert_close(found, want, atol=1e-11, rtol=0)
    assert model.config.attention_bias
    zero = [name for name, x in model.named_parameters() if name.endswith("bias") and not x.any()]
    assert len(zero) == 3 * 4 - 1, "the option makes all of these, so a file has all of them"
    kept = dict(model.named_parameters())
    mc.merge(model, shifts)
    assert all(x is kept[name] for name, x in model.named_parameters()), "biases that are there change in place"


def test_the_bias_is_rounded_once() -> None:
    model = made("opt", torch.bfloat16)
    shifts = random_shifts(model, "mimic-vector-only")
    layer = model.model.decoder.layers[1].self_attn.out_proj
    wanted = layer.bias.double() + layer.weight.double() @ shifts[1].vector.detach().double().flatten()
    mc.merge(model, shifts)
    assert torch.equal(layer.bias, wanted.bfloat16())


class Doubled(mc.ShiftHead):
    """Says that it adds a vector, but does more."""

    site: Site = "attn_heads"

    def __init__(self, config: mc.HeadConfig, layer: mc.LayerSpec) -> None:
        super().__init__(config, layer)
        self.vector = nn.Parameter(torch.ones(layer.heads, layer.value_dim))

    def forward(self, value: Tensor, at: At) -> Tensor:
        return value * 2 + self.vector

    def constant(self) -> dict[Site, Tensor]:
        return {self.site: self.vector}


@pytest.mark.parametrize("head", [*(h for h in HEADS if h not in MERGEABLE), "doubled"])
def test_heads_that_are_refused(head: str) -> None:
    model = made("opt")
    if head == "doubled":
        mc.register_head("doubled")(Doubled)
    shifts = mc.build_shifts(model, "doubled" if head == "doubled" else HEADS[head])
    before = state_of(model)
    said = "something else than to add" if head == "doubled" else "does more than add one vector"
    with pytest.raises(mc.UnsupportedModelError, match=said):
        mc.merge(model, shifts)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["idefics", "idefics2", "llava", "mistral", "qwen2"])
def test_a_class_without_this_bias_is_refused(name: str) -> None:
    model = fresh_model(BY_NAME[name])
    before = state_of(model)
    said = "does not run on 4 tokens" if name == "idefics" else r"makes no bias there .* would lose it .*save_shifts"
    with pytest.raises(mc.UnsupportedModelError, match=said):
        mc.merge(model, random_shifts(model, "mimic-vector-only"))
    assert_unchanged(model, before)


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def quantised(model: Any) -> None:
    projection = model.model.layers[2].self_attn.o_proj
    projection.weight = nn.Parameter(projection.weight.to(torch.float8_e4m3fn), requires_grad=False)
    projection.forward = lambda x: nn.functional.linear(x, projection.weight.to(x.dtype))


def shared(model: Any) -> None:
    model.model.layers[2].self_attn.o_proj = model.model.layers[1].self_attn.o_proj


def tied(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.o_proj.bias = model.model.layers[0].self_attn.q_proj.bias


def read_beside(model: Any) -> None:
    """Something else reads the attention heads too."""
    layer = model.model.layers[1]
    seen: list[Tensor] = []
    layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    layer.mlp.register_forward_hook(lambda module, args, out: out + seen.pop().mean())


def run_twice(model: Any) -> None:
    layer = model.model.layers[1]
    layer.mlp.register_forward_hook(lambda module, args, out: out + layer.self_attn.o_proj(out))


def lora(model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


def split(model: Any) -> None:
    model.model.layers[1].self_attn.o_proj.to("meta")


REFUSED = {
    quantised: r"layers.2.self_attn.o_proj has a Parameter of torch.float8_e4m3fn, which is quantised",
    shared: "layers.1.self_attn.o_proj shares its bias with model.layers.2",
    tied: "layers.0.self_attn.o_proj shares its bias with model.layers.0.self_attn.q_proj, .*layers.2.self_attn.o_proj",
    read_beside: "read beside the output projection",
    run_twice: "layers.1.self_attn.o_proj runs 2 times in a forward",
    lora: "adapters of PEFT",
    split: "not in memory",
    lambda m: m.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *x: x[2] * 2): "a hook or a replaced",
    lambda m: m.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, x: x[0] * 2): "it is no module",
    lambda m: setattr(m.model.layers[1].self_attn, "o_proj", nn.Sequential(Scaled(), nn.Linear(32, 32).double())): (
        "it is Scaled, Sequential"
    ),
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_models_that_are_refused(change: Any) -> None:
    model = made("llama-with-biases")
    change(model)
    shifts = mc.build_shifts(made("llama-with-biases"), HEADS["mimic-vector-only"])
    before = state_of(model)
    with pytest.raises(mc.UnsupportedModelError, match=REFUSED[change]):
        mc.merge(model, shifts)
    assert_unchanged(model, before)


def clipped(model: Any) -> None:
    """Not seen in the model's own numbers, which are small."""
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: type(mlp).forward(mlp, x).clamp(-20, 20)


def output_read_beside(model: Any) -> None:
    layer = model.model.layers[1]
    layer.mlp.down_proj.register_forward_hook(lambda module, args, out: seen.append(out))
    layer.register_forward_hook(lambda module, args, out: out + seen.pop().mean())
    seen: list[Tensor] = []


def output_scaled(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    mlp.down_proj = nn.Sequential(mlp.down_proj, Scaled())


REFUSED_AT_AN_OUTPUT = {
    clipped: "model.layers.1.mlp does something to the output of model.layers.1.mlp.down_proj",
    output_read_beside: "last linear layer before the site",
    output_scaled: "in layer 1, what gives the output of model.layers.1.mlp as it is should be one .* it is no module",
    lambda m: m.model.layers[1].mlp.down_proj.register_forward_hook(lambda *x: x[2] * 2): "a hook or a replaced",
}


@pytest.mark.parametrize("change", REFUSED_AT_AN_OUTPUT, ids=lambda change: change.__name__)
def test_models_that_are_refused_at_an_output(change: Any) -> None:
    model = made("llama")
    change(model)
    before = state_of(model)
    with pytest.raises(mc.UnsupportedModelError, match=REFUSED_AT_AN_OUTPUT[change]):
        mc.merge(model, random_shifts(made("llama"), "mlp-bias"))
    assert_unchanged(model, before)


@pytest.mark.usefixtures("no_shape_checks")
def test_states_and_arguments_that_are_refused() -> None:
    model = made("opt")
    shifts = random_shifts(model, "mimic-vector-only")
    before = state_of(model)
    with mc.patch(model, shifts), pytest.raises(mc.PatchStateError, match="remove its handle, merge, and patch again"):
        mc.merge(model, shifts)
    with pytest.raises(mc.UnsupportedModelError, match="the strength is trained"):
        mc.merge(model, shifts, torch.tensor(0.5, requires_grad=True))
    with pytest.raises(mc.WrongTypeError, match="a ShiftStack is needed, found StackSet"):
        mc.merge(model, mc.StackSet({"a": shifts}))  # pyright: ignore[reportArgumentType]
    with pytest.raises(mc.UnsupportedModelError, match="give the model itself"):
        mc.merge(torch.compile(model), shifts)  # pyright: ignore[reportArgumentType]
    with pytest.raises(mc.ShapeError, match="these shifts do not fit"):
        mc.merge(made("llama"), shifts)
    placed = mc.build_shifts(model, mc.MimICConfig(gate=False, positions="prompt"))
    with pytest.raises(mc.UnsupportedModelError, match="does more than add one vector .* of every token"):
        mc.merge(model, placed)
    assert_unchanged(model, before)
    patched = copy.deepcopy(model)
    with mc.patch(patched, random_shifts(patched, "live")), mc.patch(patched, shifts):
        wanted = outputs_of(patched)
    mc.merge(model, shifts)
    with mc.patch(model, random_shifts(model, "live")):
        torch.testing.assert_close(outputs_of(model)[0], wanted[0], atol=1e-11, rtol=0)
