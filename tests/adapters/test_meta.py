"""Models whose weights are not in memory yet: accelerate's empty weights, which are dispatched later."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from torch import nn

import mimic_core as mc
from mimic_core.types import ModelSpec
from tests.support.cases import BY_NAME, HEADS, fresh_model, logits_of, random_shifts
from tests.zoo.tiny import tiny


def spec_of(model: nn.Module) -> ModelSpec:
    return mc.adapter_for(model).spec(model)


@pytest.mark.newest  # with torch 2.6, transformers' rotary embedding does not run on meta tensors
@pytest.mark.parametrize("model_type", ["opt", "gpt_neox", "gemma3", "qwen2_5_vl", "mixtral", "phi3"])
def test_sites_are_found_without_weights(model_type: str) -> None:
    real = tiny(model_type).model
    empty = copy.deepcopy(real).to("meta")
    assert spec_of(empty) == spec_of(real)
    shifts = mc.build_shifts(empty, "live")
    assert {p.device.type for p in shifts.parameters()} == {"cpu"}


@pytest.mark.parametrize("head", ["mimic", "live"])
@pytest.mark.parametrize("place", ["idefics", "idefics2", "qwen2", "qwen2, a layer on disk"])
def test_a_patch_before_the_weights_come(place: str, head: str, tmp_path: Path) -> None:
    case = BY_NAME[place.partition(",")[0]]
    real, inputs = fresh_model(case), case.inputs()
    real.save_pretrained(tmp_path / "model")
    with init_empty_weights(include_buffers=False):
        model = type(real)(real.config).eval().requires_grad_(False)
    shifts = random_shifts(real, head)
    built = mc.build_shifts(model, HEADS[head])
    built.load_state_dict(shifts.state_dict())
    handle = mc.patch(model, built)
    devices: dict[str, int | str] = {"": "cpu"}
    if "disk" in place:
        parts = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"]
        devices = {**dict.fromkeys(parts, "cpu"), **{f"model.layers.{i}": "cpu" for i in range(2)}}
        devices["model.layers.2"] = "disk"
    load_checkpoint_and_dispatch(model, tmp_path / "model", devices, offload_folder=tmp_path / "offload")
    with mc.patch(real, shifts):
        wanted = logits_of(real, inputs)
    assert torch.equal(logits_of(model, inputs), wanted)
    handle.remove()
    assert torch.equal(logits_of(model, inputs), logits_of(real, inputs))
    with mc.patch(model, built):
        assert torch.equal(logits_of(model, inputs), wanted)
