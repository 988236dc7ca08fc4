"""A decoder in which not every layer attends: where attention is missing there is no site."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mimic_core as mc
from tests.support.cases import CASES, HEADS, fresh_model, logits_of, random_shifts, zero_vectors
from tests.support.snapshot import snapshot

LLAMA = next(case for case in CASES if case.name == "llama")
OTHER_SITES = ("attn_out", "mlp_out", "layer_out", "layer_in", "mlp_hidden")
ATTENDS = [head for head, config in HEADS.items() if isinstance(config, mc.MimICConfig) and config.layers is None]


class Mixer(nn.Module):
    """In the place of attention, as linear attention is: it never asks for an attention function."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(32, 32)

    def forward(self, hidden_states: Tensor, **options: Any) -> tuple[Tensor, None]:
        return self.mix(hidden_states.cumsum(1)), None


class HybridAdapter(mc.PathAdapter):
    layers = "model.layers"

    def spec(self, model: nn.Module) -> mc.ModelSpec:
        found = super().spec(model)
        layers = [
            replace(layer, heads=0, kv_heads=0, head_dim=0, value_dim=0, sites=OTHER_SITES)
            if isinstance(self.module(model, layer.index, "attn_out"), Mixer)
            else layer
            for layer in found.layers
        ]
        return replace(found, layers=tuple(layers))


@pytest.fixture
def model() -> nn.Module:
    """Layers 0 and 2 attend, layer 1 mixes."""
    mc.register_adapter("hybrid")(HybridAdapter)
    return hybrid(mixing=[1])


def hybrid(mixing: list[int]) -> nn.Module:
    model = fresh_model(LLAMA)
    model.config.model_type = "hybrid"  # pyright: ignore[reportAttributeAccessIssue]
    for index in mixing:
        model.get_submodule(f"model.layers.{index}").self_attn = Mixer().requires_grad_(False)
    return model


@pytest.mark.parametrize("head", ATTENDS)
def test_layers_without_attention_get_no_head(head: str, model: nn.Module, tmp_path: Path) -> None:
    inputs = LLAMA.inputs()
    plain, state = logits_of(model, inputs), snapshot(model)
    shifts = random_shifts(model, head)
    assert shifts.layers == (0, 2)
    with mc.patch(model, shifts):
        shifted = logits_of(model, inputs)
    assert not torch.allclose(shifted, plain, atol=1e-3)
    mc.save_shifts(shifts, tmp_path)
    with mc.patch(model, mc.load_shifts(tmp_path, model)):
        assert torch.equal(logits_of(model, inputs), shifted)
    with mc.patch(model, zero_vectors(shifts)):
        assert torch.equal(logits_of(model, inputs), plain)
    assert snapshot(model) == state


@pytest.mark.parametrize("head", ["live", "live-layer-out", "live-attn-out"])
def test_sites_that_need_no_attention_are_in_every_layer(head: str, model: nn.Module) -> None:
    plain = logits_of(model, LLAMA.inputs())
    shifts = random_shifts(model, head)
    assert shifts.layers == (0, 1, 2)
    with mc.patch(model, shifts):
        assert not torch.allclose(logits_of(model, LLAMA.inputs()), plain, atol=1e-3)
    assert mc.build_shifts(model, "live", layers=(1,)).layers == (1,)


NO_ATTENTION = r"layer 1 \(model\.layers\.1\) doesn't have; it has attn_out, mlp_out, layer_out"


@pytest.mark.parametrize("options", [{}, {"shared": True}, {"gate": False}, {"mlp_vector": True}])
@pytest.mark.parametrize("layers", [(1,), (0, 1), (2, 1, 0)])
def test_asking_for_such_a_layer_is_refused(
    layers: tuple[int, ...], options: dict[str, bool], model: nn.Module
) -> None:
    assert mc.build_shifts(model, "mimic", layers=(2, 0), **options).layers == (0, 2)
    with pytest.raises(mc.UnsupportedModelError, match=rf"MimICHead edits attn_heads, which {NO_ATTENTION}"):
        mc.build_shifts(model, "mimic", layers=layers, **options)


def test_no_layer_left_is_refused(model: nn.Module) -> None:
    nowhere = hybrid(mixing=[0, 1, 2])
    with pytest.raises(mc.UnsupportedModelError, match="MimICHead edits attn_heads, which layer 0 "):
        mc.build_shifts(nowhere, "mimic")
    assert mc.build_shifts(nowhere, "live").layers == (0, 1, 2)


@pytest.mark.parametrize("site", ["query", "key", "value", "lse", "attn_heads"])
def test_captures_and_hooks_skip_it_too(site: str, model: nn.Module) -> None:
    inputs, seen = LLAMA.inputs(), []
    logits_of(model, inputs)
    state = snapshot(model)
    with (
        mc.capture(model, [site, "mlp_out"]) as captured,
        mc.hook(model, site, lambda value, at: seen.append(at.layer)),
    ):
        logits_of(model, inputs)
    assert list(captured[site]) == list(captured["mlp_out"]) == seen == [0, 2]
    with mc.capture(model, "mlp_out") as captured:
        logits_of(model, inputs)
    assert list(captured.states) == [0, 1, 2]
    message = rf"site '{site}' was asked for; layer 1 \(model\.layers\.1\) has attn_out, mlp_out, layer_out"
    with pytest.raises(mc.UnsupportedModelError, match=message):
        mc.hook(model, site, lambda value, at: None, layers=[0, 1])
    with pytest.raises(mc.UnsupportedModelError, match=message), mc.capture(model, site, layers=[1]):
        pass
    assert snapshot(model) == state


def test_shifts_for_a_model_that_attends_everywhere_do_not_fit(model: nn.Module, tmp_path: Path) -> None:
    llama = fresh_model(LLAMA)
    shifts = random_shifts(llama, "mimic")
    message = r"built for heads 4 in layer 1 \(llama\), not 0 \(hybrid\)"
    with pytest.raises(mc.ShapeError, match=message):
        mc.patch(model, shifts)
    mc.save_shifts(shifts, tmp_path)
    with pytest.raises(mc.CheckpointError, match=message.replace("built", "made")):
        mc.load_shifts(tmp_path, model)
