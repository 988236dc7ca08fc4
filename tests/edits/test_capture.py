"""Captures: the right values, only the chosen tokens, gradients, and what is refused."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

import mimic_core as mc
from mimic_core.types import SITES
from tests.support.cases import CASES, Case, fresh_model, logits_of, model_of, over_attention, over_cases, random_shifts
from tests.support.snapshot import snapshot

LLAMA = next(case for case in CASES if case.name == "llama")
TOKEN_AXIS = {"query": 2, "key": 2, "value": 2, "lse": 2}


@over_attention
@over_cases
def test_where_picks_the_tokens_of_every_site(case: Case, attention: str) -> None:
    model, inputs = model_of(case, attention), case.inputs()
    where = inputs["attention_mask"].bool() & (inputs["position_ids"] > 3)
    with mc.capture(model, list(SITES)) as whole, mc.capture(model, list(SITES), where=where) as chosen:
        logits_of(model, inputs)
    samples, positions = where.nonzero().T
    assert whole.samples is None
    assert torch.equal(chosen.samples, samples)
    for site in SITES:
        assert list(chosen[site]) == list(whole[site]) == list(range(len(whole[site])))
        for layer, full in whole[site].items():
            tokens_first = full.movedim(TOKEN_AXIS.get(site, 1), 1)
            wanted = torch.stack([tokens_first[b, t] for b, t in zip(samples, positions, strict=True)])
            assert torch.equal(chosen[site][layer], wanted)


@over_attention
@over_cases
def test_module_sites_are_what_plain_hooks_see(case: Case, attention: str) -> None:
    """Against torch's own forward hooks on modules named by hand."""
    model, inputs = model_of(case, attention), case.inputs()
    root = {"idefics": "model.layers", "idefics2": "model.text_model.layers", "llava": "model.language_model.layers"}
    layer = model.get_submodule(f"{root.get(case.name, 'model.layers')}.1")
    modules = {"attn_out": layer.self_attn, "mlp_out": layer.mlp, "layer_out": layer}
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module: nn.Module, args: object, output: object) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [modules[name].register_forward_hook(keep(name)) for name in modules]
    with mc.capture(model, list(modules), layers=[1]) as captured:
        logits_of(model, inputs)
    for hook in hooks:
        hook.remove()
    for name in modules:
        assert torch.equal(captured[name][1], seen[name])
    # The output projection of what is seen per attention head is the attention module's output.
    with mc.capture(model, "attn_heads", layers=[1]) as heads:
        logits_of(model, inputs)
    projected = layer.self_attn.o_proj(heads.states[1].flatten(2))
    torch.testing.assert_close(projected, seen["attn_out"])


def test_order_decides_whether_an_edit_is_seen() -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    with mc.capture(model, "mlp_out", layers=[0]) as before:
        with mc.hook(model, "mlp_out", lambda value, at: value * 2, layers=[0]):
            with mc.capture(model, "mlp_out", layers=[0]) as after:
                logits_of(model, inputs)
    assert torch.equal(after.states[0], before.states[0] * 2)


def test_gradient_flows_or_not() -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    shifts, where = random_shifts(model, "mimic"), inputs["attention_mask"].bool()
    with mc.patch(model, shifts):
        with mc.capture(model, "mlp_out", where=where) as with_grad:
            with mc.capture(model, "mlp_out", where=where, grad=False) as without:
                logits_of(model, inputs)
        assert not any(x.requires_grad for x in without.states.values())
        sum(x.sum() for x in with_grad.states.values()).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in shifts.parameters())
        with torch.no_grad(), mc.capture(model, "mlp_out") as teacher:
            logits_of(model, inputs)
        assert not any(x.requires_grad for x in teacher.states.values())


@pytest.mark.parametrize("length", [64, 512])
def test_memory_grows_with_the_chosen_tokens_alone(length: int) -> None:
    model = model_of(LLAMA)
    width = model.config.hidden_size

    def like_hidden_states() -> list[Tensor]:
        return [x for x in gc.get_objects() if isinstance(x, Tensor) and x.shape[-2:] == (length, width)]

    before = like_hidden_states()  # other tests' models may have weights of that shape
    ids = torch.randint(3, 120, (1, length))
    where = torch.zeros(1, length, dtype=torch.bool)
    where[:, -5:] = True
    with torch.no_grad(), mc.capture(model, "mlp_out", where=where) as seen:
        model(ids, use_cache=False)
    held = sum(x.untyped_storage().nbytes() for x in seen.states.values())
    assert held == 3 * 5 * 32 * 4
    # Nothing else of the model's hidden states is held by the capture.
    gc.collect()
    known = set(map(id, before))
    assert not [x for x in like_hidden_states() if id(x) not in known]


def test_padding_side_and_batch_are_known() -> None:
    model = model_of(LLAMA)
    captured = {}
    for padding in ("right", "left"):
        inputs = LLAMA.inputs(padding)
        where = inputs["attention_mask"].bool() & (inputs["input_ids"] != 1)
        with mc.capture(model, "mlp_out", where=where) as captured[padding]:
            logits_of(model, inputs)
    assert torch.equal(captured["right"].samples, captured["left"].samples)
    assert mc.losses.layer_mse(captured["right"], captured["left"]).item() < 1e-9


def test_inside_generate_a_hook_reads_every_step() -> None:
    model, lengths = model_of(LLAMA), []
    with mc.hook(model, "key", lambda value, at: lengths.append(value.shape[2]), layers=[0]):
        model.generate(LLAMA.sample(0)["input_ids"], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert lengths == [11, 12, 13]


class LayersAlone(mc.PathAdapter):
    layers, sites = "model.layers", ("layer_out",)


def test_a_site_that_no_layer_has_is_refused() -> None:
    model = fresh_model(LLAMA)
    said = r"query and layer_out was asked for, which no layer of \w+ has; layer 0 \(model.layers.0\) has layer_out"
    with pytest.raises(mc.UnsupportedModelError, match=said):
        mc.capture(model, ["layer_out", "query"], adapter=LayersAlone)
    with pytest.raises(mc.UnsupportedModelError, match="query was asked for, which no layer"):
        mc.hook(model, "query", lambda value, at: None)


def test_what_is_refused(no_shape_checks: None) -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    state = snapshot(model)
    with pytest.raises(mc.UnknownNameError, match="no site is called 'mlp'"):
        mc.capture(model, "mlp")
    with pytest.raises(mc.UnknownNameError, match="distinct sites"):
        mc.capture(model, [])
    with pytest.raises(mc.ShapeError, match=r"bool mask \[b t\].*\[2, 11\] torch.int64"):
        mc.capture(model, "mlp_out", where=inputs["attention_mask"])
    with pytest.raises(mc.UnsupportedModelError, match="layer 3 was asked for"), mc.capture(model, "lse", layers=[3]):
        pass
    with mc.capture(model, "mlp_out", where=torch.ones(2, 10, dtype=torch.bool)):
        with pytest.raises(
            mc.ShapeError, match=r"where is \[b t\] = \[2, 10\], site 'mlp_out' of layer 0 holds \[2, 11\]"
        ):
            logits_of(model, inputs)
    with mc.capture(model, ["mlp_out", "lse"]) as seen:
        with pytest.raises(mc.PatchStateError, match="nothing was captured at 'lse'"):
            seen["lse"]
        logits_of(model, inputs)
        with pytest.raises(mc.PatchStateError, match="one capture is for one forward"):
            logits_of(model, inputs)
    with pytest.raises(mc.UnknownNameError, match="this capture holds mlp_out, lse, not 'query'"):
        seen["query"]
    with pytest.raises(mc.PatchStateError, match="this capture holds mlp_out, lse; choose one"):
        _ = seen.states
    with pytest.raises(mc.PatchStateError, match="a capture can be entered only once"), seen:
        pass
    assert snapshot(model) == state


def test_a_capture_cut_off_from_its_gradient_is_refused() -> None:
    model, inputs = fresh_model(LLAMA), LLAMA.inputs()
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with mc.patch(model, random_shifts(model, "mimic")), mc.capture(model, "mlp_out"):
        with pytest.raises(mc.PatchStateError, match="with reentrant gradient checkpointing"):
            logits_of(model, inputs)


def test_a_value_in_every_layer_or_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = fresh_model(LLAMA), LLAMA.inputs()
    layer = model.model.layers[1]
    monkeypatch.setattr(layer.self_attn, "forward", lambda hidden_states, *a, **k: (hidden_states, None))
    with mc.capture(model, "query"), pytest.raises(mc.PatchStateError, match="never reached query of layer 1"):
        logits_of(model, inputs)
