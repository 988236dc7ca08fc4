"""The conformance kit: right adapters pass every law, and each law is broken once to see that it can fail."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import mimic_core as mc
import mimic_core.testing
from mimic_core.adapters import LlamaAdapter, LlavaAdapter
from mimic_core.adapters.base import ADAPTERS
from mimic_core.testing.state import Snapshot
from tests.support.cases import ATTENTION, BY_NAME, CASES, Case, fresh_model
from tests.support.conformance import LAWS, LLAMA, failed, report_of

check_adapter = mimic_core.testing.check_adapter
LLAVA = BY_NAME["llava"]
Break = pytest.MonkeyPatch
# The kit calls small functions by the ten thousand, so checking their annotations takes longer than the laws do.
pytestmark = pytest.mark.usefixtures("no_shape_checks", "functions_made_in_functions_unchecked")


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_law_holds(case: Case, attention: str) -> None:
    report = report_of(case, attention)
    report.raise_for_failures()
    assert [row.law for row in report.rows] == LAWS
    assert {row.verdict for row in report.rows} == {"passed"}
    assert report.attention == attention


test_llama_as_a_third_party_would = mimic_core.testing.pytest_cases(lambda: (fresh_model(LLAMA), LLAMA.inputs()))


def test_random_text_when_no_inputs_are_given() -> None:
    report = check_adapter(fresh_model(BY_NAME["mistral"]).train().requires_grad_(True))
    report.raise_for_failures()
    assert "logits [2, 12, 128]" in report["forward"].detail


def test_a_model_in_training_stays_in_training() -> None:
    model = fresh_model(LLAMA).train()
    model.requires_grad_(True)
    model.lm_head.weight.grad = grad = torch.ones_like(model.lm_head.weight)
    report_of(LLAMA, model=model).raise_for_failures()
    assert model.lm_head.weight.grad is grad
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_failures_are_raised() -> None:
    report = check_adapter(nn.Linear(2, 2))
    with pytest.raises(AssertionError, match=r"1 of 29 laws failed on Linear: none, none, float32 \(.*\):\nadapter"):
        report.raise_for_failures()
    assert "Linear does not run on 4 tokens of text alone" in report["adapter"].detail
    assert {row.verdict for row in report.rows[1:]} == {"not applicable"}


# Broken adapters.


def adapter(model_type: str, kind: type) -> None:
    """One in place of the library's own, until the test ends."""
    ADAPTERS._items[model_type] = kind


def test_a_wrong_path() -> None:
    class Lost(LlamaAdapter):
        layers = "model.blocks"

    adapter("llama", Lost)
    report = report_of(LLAMA)
    assert failed(report) == {"adapter"}
    assert "expects a module at 'model.blocks'" in report["adapter"].detail


def test_an_adapter_that_raises_anything() -> None:
    class Raises(LlamaAdapter):
        def spec(self, model: nn.Module) -> mc.ModelSpec:
            raise ZeroDivisionError("in spec")

    adapter("llama", Raises)
    report = report_of(LLAMA)
    assert failed(report) == {"adapter"}
    assert report["adapter"].detail == "ZeroDivisionError: in spec"


def test_two_layers_swapped() -> None:
    class Swapped(LlamaAdapter):
        def module(self, model: nn.Module, layer: int, site: Any) -> nn.Module:
            return super().module(model, {0: 1, 1: 0}.get(layer, layer), site)

    adapter("llama", Swapped)
    report = report_of(LLAMA)
    # Where an MLP is, only the adapter says; so those rows can't tell, and "own layer" does.
    oracle_knows_better = {"query", "key", "value", "attn_heads", "layer_out", "layer_in", "lse", "MimIC", "LIVE"}
    assert failed(report) == {"own layer"} | oracle_knows_better
    assert "model.layers.1.self_attn, not in model.layers.0" in report["own layer"].detail


def test_layers_in_another_order() -> None:
    class Reversed(LlamaAdapter):
        def spec(self, model: nn.Module) -> mc.ModelSpec:
            spec = super().spec(model)
            layers = (replace(layer, index=i) for i, layer in enumerate(reversed(spec.layers)))
            return replace(spec, layers=tuple(layers))

        def module(self, model: nn.Module, layer: int, site: Any) -> nn.Module:
            return super().module(model, 2 - layer, site)

    adapter("llama", Reversed)
    report = report_of(LLAMA)
    assert failed(report) == {"own layer"}
    assert "run in another order" in report["own layer"].detail


def test_the_mlp_of_another_layer() -> None:
    class Elsewhere(LlamaAdapter):
        def module(self, model: nn.Module, layer: int, site: Any) -> nn.Module:
            return super().module(model, (layer + 1) % 3 if site == "mlp_out" else layer, site)

    adapter("llama", Elsewhere)
    report = report_of(LLAMA)
    assert "own layer" in failed(report)
    assert "mlp_out of layer 0 is model.layers.1.mlp, not in model.layers.0" in report["own layer"].detail


def test_attention_named_as_mlp() -> None:
    class Same(LlamaAdapter):
        mlp = "self_attn"

    adapter("llama", Same)
    report = report_of(LLAMA)
    assert "own layer" in failed(report)
    assert "are both model.layers.0.self_attn" in report["own layer"].detail


def test_attention_heads_in_the_vision_tower() -> None:
    class Seeing(LlavaAdapter):
        def module(self, model: nn.Module, layer: int, site: Any) -> nn.Module:
            if site in ("query", "key", "value", "lse", "attn_heads"):
                tower = [m for m in model.model.vision_tower.modules() if hasattr(m, "k_proj")]
                return tower[layer % len(tower)]
            return super().module(model, layer, site)

    adapter("llava", Seeing)
    report = report_of(LLAVA)
    assert {"own layer", "coverage", "decoder only", "attn_heads", "MimIC"} <= failed(report)
    assert report["forward"].verdict == "passed"


def test_a_layer_left_out() -> None:
    class Short(LlamaAdapter):
        def spec(self, model: nn.Module) -> mc.ModelSpec:
            spec = super().spec(model)
            return replace(spec, layers=spec.layers[:2])

    adapter("llama", Short)
    report = report_of(LLAMA)
    assert failed(report) == {"coverage"}
    assert "model.layers.2.self_attn attends inside the decoder but is not in the spec" in report["coverage"].detail


def test_a_wrong_size() -> None:
    class Ungrouped(LlamaAdapter):
        def spec(self, model: nn.Module) -> mc.ModelSpec:
            spec = super().spec(model)
            return replace(spec, layers=tuple(replace(layer, kv_heads=layer.heads) for layer in spec.layers))

    adapter("llama", Ungrouped)
    report = report_of(LLAMA)
    assert failed(report) == {"shapes"}
    assert report["shapes"].detail == "key of layer 0 is [2, 2, 11, 24], the spec says [* 4 * 24]"


def test_output_sites_alone_are_enough() -> None:
    class Outputs(LlamaAdapter):
        sites = ("attn_out", "mlp_out", "layer_out")

        def spec(self, model: nn.Module) -> mc.ModelSpec:
            spec = super().spec(model)
            return replace(spec, layers=tuple(replace(layer, missing="for a test") for layer in spec.layers))

    adapter("llama", Outputs)
    report = report_of(LLAMA)
    report.raise_for_failures()
    skipped = {row.law for row in report.rows if row.verdict == "not applicable"}
    assert skipped == {"query", "key", "value", "attn_heads", "lse", "MimIC", "layer_in", "mlp_hidden"}
    assert report["lse"].detail == "no layer has it: for a test"


# Broken models.


def test_inputs_the_model_does_not_take() -> None:
    report = check_adapter(fresh_model(LLAMA), {"pictures": torch.zeros(1)})
    assert failed(report) == {"forward"}
    assert {row.verdict for row in report.rows[2:]} == {"not applicable"}


def test_a_model_that_is_never_the_same_twice() -> None:
    model = fresh_model(LLAMA)
    bias, noise = model.model.norm, iter(torch.rand(1000))
    hook = bias.register_forward_hook(lambda m, args, out: out * next(noise))
    report = report_of(LLAMA, model=model)
    hook.remove()
    assert failed(report) == {"forward"}
    assert "may be random" in report["forward"].detail


def test_a_model_that_writes_into_its_inputs() -> None:
    """As XGLM of transformers 5.1 does: each forward on the same `position_ids` would have others."""
    model, inputs = fresh_model(LLAMA), LLAMA.inputs()

    def count_on(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        kwargs["position_ids"] += 2

    model.model.rotary_emb.register_forward_pre_hook(count_on, with_kwargs=True)
    report = check_adapter(model, inputs)
    report.raise_for_failures()
    # Newer transformers' generate counts on from the positions that the model has written to.
    assert {row.law for row in report.rows if row.verdict != "passed"} <= {"cached decoding"}
    assert torch.equal(inputs["position_ids"], LLAMA.inputs()["position_ids"])


def test_an_lse_that_is_refused() -> None:
    from transformers.models.llama import modeling_llama

    AttentionInterface.register("of_another", modeling_llama.eager_attention_forward)
    AttentionMaskInterface.register("of_another", eager_mask)
    try:
        report = report_of(LLAMA, "of_another")
    finally:
        AttentionInterface._global_mapping.pop("of_another")
        AttentionMaskInterface._global_mapping.pop("of_another")
    report.raise_for_failures()
    assert [row.law for row in report.rows if row.verdict == "not applicable"] == ["lse"]
    assert report["lse"].detail.startswith("refused: the LSE of LlamaAttention can't be computed")
    assert "MimIC without gate" in report["MimIC"].detail


def test_an_lse_of_logits_that_were_not_used(monkeypatch: Break) -> None:
    from transformers.models.llama import modeling_llama

    attend = modeling_llama.eager_attention_forward

    def colder(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return attend(module, query * 2, *args, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", colder)
    report = report_of(LLAMA, "eager")
    assert failed(report) == {"lse"}
    assert "is not the softmax of scaled, masked logits" in report["lse"].detail
    assert report["MimIC"].verdict == "not applicable"


def test_another_patched_model_may_be_collected_meanwhile() -> None:
    unwrapped = AttentionInterface.get_interface
    gc.disable()
    try:
        mc.patch(other := fresh_model(LLAMA), mc.build_shifts(other, "mimic"))
        del other
        before = Snapshot(fresh_model(LLAMA))
        assert AttentionInterface.get_interface is not unwrapped
        gc.collect()
        assert AttentionInterface.get_interface is unwrapped
        assert before.differences() == []
        before.restore()
        assert AttentionInterface.get_interface is unwrapped
    finally:
        gc.enable()


def test_report() -> None:
    report = report_of(LLAMA)  # after much else was broken above: nothing of it stays
    report.raise_for_failures()
    lines = str(report).splitlines()
    assert len(lines) == len(LAWS) + 2
    assert lines[0].startswith("llama: LlamaAdapter, sdpa, float32 (torch ")
    assert len({line.index("passed") for line in lines[1:-1]}) == 1
    assert lines[-1].startswith(f"{len(LAWS)} passed; ")
    data = json.loads(report.to_json())
    assert data["ok"] is True
    assert [row["law"] for row in data["rows"]] == LAWS
    assert all(row["says"].endswith(".") for row in data["rows"])
    with pytest.raises(KeyError, match="no law is called 'gravity'; the laws are: adapter, forward"):
        report["gravity"]
