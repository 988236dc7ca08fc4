"""Readers keep what was there: what the model writes later does not reach a captured or kept tensor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import FalconConfig, FalconForCausalLM, StaticCache

import mimic_core as mc
from mimic_core.types import ATTENTION_SITES, SITES, At
from tests.support.cases import BY_NAME, Case, fresh_model, logits_of, over_cases


def falcon() -> nn.Module:
    """Its layers add the attention's output to the MLP's in place."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    return FalconForCausalLM(FalconConfig(**sizes, parallel_attn=True)).eval().requires_grad_(False)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "falcon": falcon,
    **{name: partial(fresh_model, BY_NAME[name]) for name in ("llama", "mistral", "llava")},
}
over_models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def sites_of(model: nn.Module) -> list[str]:
    layers = mc.adapter_for(model).spec(model).layers
    return [site for site in SITES if all(site in layer.sites for layer in layers)]


def steps(model: nn.Module) -> Tensor:
    """A prompt, two tokens after it, and a reset static cache: all logits."""
    ids = torch.randint(3, 120, (2, 6), generator=torch.Generator().manual_seed(1))
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=16)
    logits = [model(ids, past_key_values=cache).logits]
    for i in range(2):
        logits.append(model(ids[:, i : i + 1], past_key_values=cache).logits)
    cache.reset()
    return torch.cat(logits, dim=1)


class Kept:
    """What a function was given: the tensors themselves, and copies made at once."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def keep(self, *tensors: Tensor) -> None:
        self.pairs += [(x, x.detach().clone()) for x in tensors]

    def check(self) -> None:
        assert self.pairs
        for kept, at_once in self.pairs:
            assert torch.equal(kept, at_once)


def value_itself(kept: Kept, value: Tensor, at: At) -> None:
    kept.keep(value)


def value_returned(kept: Kept, value: Tensor, at: At) -> Tensor | None:
    kept.keep(value)
    return None if at.site == "lse" else value


def views(kept: Kept, value: Tensor, at: At) -> Tensor | None:
    kept.keep(value.detach()[:, 1:], value[..., :1])
    return None if at.site == "lse" else value.view_as(value)


def inputs_of_attention(kept: Kept, value: Tensor, at: At) -> None:
    kept.keep(value)
    if at.site in ATTENTION_SITES:
        kept.keep(at.query, at.key, at.value)


@over_models
@pytest.mark.parametrize("keep", [value_itself, value_returned, views, inputs_of_attention])
def test_a_hook_may_keep_what_it_is_given(make: Callable[[], nn.Module], keep: Callable[..., Tensor | None]) -> None:
    model = make()
    with torch.no_grad():
        plain = steps(model)
        kept = [Kept() for _ in sites_of(model)]
        handles = [mc.hook(model, site, partial(keep, k)) for site, k in zip(sites_of(model), kept, strict=True)]
        assert torch.equal(steps(model), plain)
    for handle, k in zip(handles, kept, strict=True):
        handle.remove()
        k.check()


@over_models
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_capture_is_what_was_there(make: Callable[[], nn.Module], mode: Callable[[], torch.no_grad]) -> None:
    model, ids = make(), torch.randint(3, 120, (2, 6))
    sites = sites_of(model)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=16)
    model.get_input_embeddings().requires_grad_()
    with mode():
        model(ids, past_key_values=cache)
        cache.reset()
        with mc.capture(model, sites) as seen, mc.capture(model, sites) as again:
            at_once: dict[tuple[str, int], Tensor] = {}

            def copied(value: Tensor, at: At) -> None:
                at_once[at.site, at.layer] = value.detach().clone()

            handles = [mc.hook(model, site, copied) for site in sites]
            model(ids, past_key_values=cache)
            for handle in handles:
                handle.remove()
        model(ids[:, :2], past_key_values=cache)
    assert at_once
    for (site, layer), x in at_once.items():
        assert torch.equal(seen[site][layer], x)
        assert torch.equal(again[site][layer], x)


@over_cases
def test_a_captured_tensor_is_on_the_way_to_the_loss(case: Case) -> None:
    """The gradient of a loss with respect to what was captured, against that of zeros added there."""
    model, inputs = fresh_model(case), case.inputs()
    model.get_input_embeddings().requires_grad_()
    for site in sites_of(model):
        if site == "lse":
            continue
        with mc.capture(model, site, layers=[1]) as seen:
            logits = logits_of(model, inputs)
        (found,) = torch.autograd.grad(logits.square().sum(), seen.states[1])
        zeros = torch.zeros_like(seen.states[1], requires_grad=True)
        with mc.hook(model, site, lambda value, at, zeros=zeros: value + zeros, layers=[1]):
            (wanted,) = torch.autograd.grad(logits_of(model, inputs).square().sum(), zeros)
        torch.testing.assert_close(found, wanted)
        assert found.abs().sum() > 0


@over_models
def test_an_edit_in_place_is_an_edit(make: Callable[[], nn.Module]) -> None:
    model, ids = make(), torch.randint(3, 120, (2, 6))
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        for site in sites_of(model):
            if site == "lse":
                continue
            with mc.hook(model, site, lambda value, at: value * 1.5):
                wanted = model(ids, use_cache=False).logits

            def in_place(value: Tensor, at: At) -> None:
                value.mul_(1.5)

            with mc.hook(model, site, in_place):
                assert torch.equal(model(ids, use_cache=False).logits, wanted)
            assert not torch.equal(wanted, plain)
            assert torch.equal(model(ids, use_cache=False).logits, plain)
