"""Layers that run several times in a forward, and attention that is called twice or has an encoder's keys too.

In older transformers, the first of these models is not there, and the second attends once.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mimic_core as mc
from tests.zoo.tiny import TinyModel, tiny

pytestmark = pytest.mark.usefixtures("no_shape_checks", "functions_made_in_functions_unchecked")


class LowLevel(mc.PathAdapter):
    layers = "model.L_module.layers"


class InOneForward(LowLevel):
    def decoder(self, model: Any) -> Any:
        return model.model


class Layers(mc.PathAdapter):
    layers = "model.layers"


class Merged(mc.PathAdapter):
    layers, config = "model.decoder.layers", "decoder"


def hrm() -> TinyModel:
    return tiny("hrm_text", task="causal-lm")


CASES: dict[str, tuple[type[mc.PathAdapter], str, str]] = {
    "diffllama": (Layers, "mimic", "attends 2 times in a forward; for one head for all of them: adapter="),
    "t5gemma2": (Merged, "mimic", "T5Gemma2MergedAttention attends to an encoder's states too"),
}


@pytest.mark.newest
@pytest.mark.parametrize("kind", CASES)
def test_it_is_refused_and_an_adapter_that_names_it_is_exact(kind: str) -> None:
    adapter, head, why = CASES[kind]
    case = tiny(kind)
    with pytest.raises(mc.UnsupportedModelError, match=why):
        mc.build_shifts(case.model, head)
    report = mc.testing.check_adapter(case.model, case.inputs(length=16), adapter=adapter)
    report.raise_for_failures()
    sites = ("query", "key", "value", "attn_heads", "lse", "attn_out", "mlp_out", "layer_out", "layer_in")
    laws = (*sites, "MimIC", "LIVE", "own layer", "shapes", "zero shift", "removal", "checkpointing")
    assert [report[law].verdict for law in laws] == ["passed"] * len(laws)


@pytest.mark.newest
@pytest.mark.parametrize(("kind", "layers"), [("hrm_text", 8), ("diffllama", 4)])
def test_one_head_for_all_passes_by_an_option(kind: str, layers: int) -> None:
    case = tiny(kind)
    adapter = mc.GenericAdapter(share_passes=True)
    report = mc.testing.check_adapter(case.model, case.inputs(length=16), adapter=adapter)
    report.raise_for_failures()
    assert report["MimIC"].verdict == report["LIVE"].verdict == "passed"
    assert len(mc.build_shifts(case.model, "mimic", adapter=adapter).layers) == layers


@pytest.mark.newest
def test_positions_of_layers_that_run_several_times() -> None:
    """They are those of the model's forward, in each pass. Where each pass counts as a forward, they are refused."""
    case = hrm()
    model, inputs = case.model, case.inputs(padding="left", length=10)
    shifts = mc.build_shifts(model, "task_vector", layers=(1,), adapter=InOneForward)
    vector = torch.randn(model.config.hidden_size)
    with torch.no_grad():
        next(iter(shifts)).vector.copy_(vector)
        next(iter(shifts)).weight.fill_(1.0)  # it replaces
    seen: list[Tensor] = []
    layer = model.get_submodule("model.L_module.layers.1")
    handle = layer.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad(), mc.patch(model, shifts):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    handle.remove()
    moved = [torch.isclose(x, vector, atol=1e-5).all(-1) for x in seen]
    assert [x.sum().item() for x in moved] == [2] * 6 + [0] * 12
    assert all(x[:, -1].all() for x in moved[:6])
    with torch.no_grad(), mc.patch(model, shifts, adapter=LowLevel), pytest.raises(mc.PatchStateError, match="prompt"):
        model(**inputs)
