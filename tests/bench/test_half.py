"""bf16 models where the processor has no products of bf16."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.icl import half


def decoder() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).bfloat16()
    return model.eval().requires_grad_(False)


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_as_exact_as_its_dtype(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and gradient, next to fp64 products of the same numbers."""
    monkeypatch.setattr(half, "has_products", lambda: False)
    torch.manual_seed(0)
    plain = nn.Linear(300, 70, bias=bias).bfloat16().requires_grad_(False)
    layer = half.widen(nn.Sequential(copy.deepcopy(plain)))
    x = torch.randn(5, 300).bfloat16().requires_grad_()
    out = layer(x)
    (gradient,) = torch.autograd.grad(out.float().square().sum(), x)
    y = x.detach().double().requires_grad_()
    wanted = plain.double()(y)
    (exact,) = torch.autograd.grad(wanted.square().sum(), y)
    assert out.dtype == gradient.dtype == torch.bfloat16
    assert torch.equal(out, wanted.float().bfloat16()) or relative(out, wanted) < 2**-9
    assert relative(gradient, exact) < 2**-7
    assert layer.state_dict().keys() == nn.Sequential(plain).state_dict().keys()


def test_a_model_and_lora_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = decoder(), torch.arange(24).view(2, 12)
    wanted = copy.deepcopy(model).double()(ids).logits
    exact = relative(model(ids).logits, wanted)
    monkeypatch.setattr(half, "has_products", lambda: False)
    half.widen(model)
    assert relative(model(ids).logits, wanted) < 1.5 * exact
    options = LoraConfig(r=4, target_modules=r".*self_attn\.(q_proj|v_proj)", init_lora_weights=False)
    lora = get_peft_model(copy.deepcopy(model), options)
    lora(input_ids=ids).logits.sum().backward()
    assert all(p.grad is not None for name, p in lora.named_parameters() if "lora_" in name)
    assert not torch.equal(lora(input_ids=ids).logits, model(ids).logits)


def test_nothing_is_changed_where_there_are_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half, "has_products", lambda: True)
    assert {type(m) for m in half.widen(decoder()).modules()} == {type(m) for m in decoder().modules()}
