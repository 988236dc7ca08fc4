"""Handles: order of removal, several stacks, states that are refused, plain functions at every site."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mimic_core as mc
from mimic_core.types import ATTENTION_SITES, SITES
from tests.support.cases import (
    ATTENTION,
    CASES,
    Case,
    fresh_model,
    logits_of,
    model_of,
    over_attention,
    over_cases,
    random_shifts,
    zero_vectors,
)
from tests.support.snapshot import snapshot

LLAMA = next(case for case in CASES if case.name == "llama")
EDITABLE = [site for site in SITES if site != "lse"]


@over_cases
@pytest.mark.parametrize("first_out", [0, 1])
def test_two_stacks_removed_in_either_order(case: Case, first_out: int) -> None:
    model, inputs = model_of(case), case.inputs()
    state, plain = snapshot(model), logits_of(model, inputs)
    stacks = [random_shifts(model, "mimic"), random_shifts(model, "mimic-and-mlp", scale=0.3)]
    alone = []
    for shifts in stacks:
        with mc.patch(model, shifts):
            alone.append(logits_of(model, inputs))
    handles = [mc.patch(model, shifts) for shifts in stacks]
    both = logits_of(model, inputs)
    assert all(not torch.allclose(both, x, atol=1e-3) for x in (plain, *alone))
    handles[first_out].remove()
    assert torch.equal(logits_of(model, inputs), alone[1 - first_out])
    handles[1 - first_out].remove()
    assert torch.equal(logits_of(model, inputs), plain)
    assert snapshot(model) == state


def test_two_stacks_add_up_to_one_with_both_shifts() -> None:
    """At a shared site each gate sees the same query and LSE, so two stacks are the sum of their shifts."""
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    first, second = random_shifts(model, "mimic"), random_shifts(model, "mimic", scale=0.2)

    def by_hand(value: Tensor, at: mc.At) -> Tensor:
        for stack in (first, second):
            head = stack[at.layer]
            value = mc.ops.gated_shift(value, at.query, at.lse, head.vector, head.gate_weight, head.gate_bias)
        return value

    with mc.hook(model, "attn_heads", by_hand):
        wanted = logits_of(model, inputs)
    with mc.patch(model, first), mc.patch(model, second):
        torch.testing.assert_close(logits_of(model, inputs), wanted)


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(4)), st.permutations(range(4)))
def test_any_order_of_patching_and_removing(order_in: list[int], order_out: list[int]) -> None:
    model, inputs = model_of(LLAMA), LLAMA.sample(1)
    state, plain = snapshot(model), logits_of(model, inputs)
    makers = [
        lambda: mc.patch(model, random_shifts(model, "mimic")),
        lambda: mc.patch(model, random_shifts(model, "live")),
        lambda: mc.hook(model, "value", lambda value, at: value * 0.5, layers=[1]),
        lambda: mc.patch(model, random_shifts(model, "mimic-shared", scale=0.1)),
    ]
    handles = {index: makers[index]() for index in order_in}
    seen = [logits_of(model, inputs)]
    for index in order_out:
        handles[index].remove()
        seen.append(logits_of(model, inputs))
    assert torch.equal(seen[-1], plain)
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))
    assert snapshot(model) == state


def test_states_that_are_refused() -> None:
    model = model_of(LLAMA)
    state, shifts = snapshot(model), random_shifts(model, "mimic")
    handle = mc.patch(model, shifts)
    patched = snapshot(model)
    with pytest.raises(mc.PatchStateError, match="already in this model"):
        mc.patch(model, shifts)
    assert snapshot(model) == patched
    handle.remove()
    with pytest.raises(mc.PatchStateError, match="this handle was removed"), handle:
        pass
    with pytest.raises(mc.PatchStateError, match="a ShiftStack is not called"):
        shifts(torch.zeros(1))
    assert snapshot(model) == state


def test_the_same_stack_in_two_models() -> None:
    models = [fresh_model(LLAMA), fresh_model(LLAMA)]
    shifts = random_shifts(models[0], "mimic")
    with mc.patch(models[0], shifts), mc.patch(models[1], shifts):
        a, b = (logits_of(model, LLAMA.inputs()) for model in models)
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("idefics", r"built for 3 decoder layers \(llama\), not 4 \(idefics\)"),
        ("qwen2", r"built for head_dim 24 in layer 0 \(llama\), not 8 \(qwen2\)"),
    ],
)
def test_a_stack_for_another_model_is_refused(other: str, message: str) -> None:
    model = model_of(next(case for case in CASES if case.name == other))
    state = snapshot(model)
    with pytest.raises(mc.ShapeError, match=message):
        mc.patch(model, random_shifts(model_of(LLAMA), "mimic"))
    assert snapshot(model) == state


def test_disabled_nests_and_survives_errors() -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    plain = logits_of(model, inputs)
    with mc.patch(model, random_shifts(model, "mimic")) as handle:
        shifted = logits_of(model, inputs)
        with contextlib.suppress(ZeroDivisionError), handle.disabled(), handle.disabled():
            assert torch.equal(logits_of(model, inputs), plain)
            raise ZeroDivisionError
        assert torch.equal(logits_of(model, inputs), shifted)


def test_disabled_runs_no_kernel_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("an op of the library ran")

    with mc.patch(model, random_shifts(model, "mimic")) as handle:
        for name in ("attention_lse", "attention_with_lse", "shifted_attention", "resolve_backend"):
            monkeypatch.setattr(mc.ops, name, never)
        for name in ("attention_with_lse", "shifted_attention"):
            monkeypatch.setattr(mc.ops.like_sdpa, name, never)
        with handle.disabled():
            logits_of(model, inputs)
        with pytest.raises(AssertionError, match="an op of the library ran"):
            logits_of(model, inputs)


@over_attention
@over_cases
@pytest.mark.parametrize("site", EDITABLE)
def test_every_site_can_be_edited(case: Case, attention: str, site: str) -> None:
    """The edit arrives: unchanged is bit-identical, one layer's change reaches the logits, and is told where it is."""
    model, inputs = model_of(case, attention), case.inputs()
    plain, seen = logits_of(model, inputs), []

    def same(value: Tensor, at: mc.At) -> Tensor:
        seen.append((at.layer, at.site, tuple(value.shape), at.module))
        return value

    with mc.hook(model, site, same):
        assert torch.equal(logits_of(model, inputs), plain)
    spec = mc.adapter_for(model).spec(model)
    b, t = inputs["input_ids"].shape
    layer = spec.layers[0]
    shape = {
        "query": (b, layer.heads, t, layer.head_dim),
        "key": (b, layer.kv_heads, t, layer.head_dim),
        "value": (b, layer.kv_heads, t, layer.value_dim),
        "attn_heads": (b, t, layer.heads, layer.value_dim),
        "mlp_hidden": (b, t, layer.mlp_width),
    }.get(site, (b, t, layer.hidden_size))
    assert [entry[:3] for entry in seen] == [(i, site, shape) for i in range(len(spec.layers))]
    with mc.hook(model, site, lambda value, at: value * 1.5, layers=[1]) as handle:
        assert not torch.allclose(logits_of(model, inputs), plain, atol=1e-4)
        handle.remove()
        assert torch.equal(logits_of(model, inputs), plain)


@over_attention
@over_cases
def test_what_a_hook_is_told_explains_the_attention(case: Case, attention: str) -> None:
    """Attention recomputed in fp64 from `at` alone is the attention the model made."""
    model, inputs = model_of(case, attention), case.inputs("left")
    real = inputs["attention_mask"].bool()

    def check(value: Tensor, at: mc.At) -> None:
        q, k, v = at.query.double(), at.key.double(), at.value.double()
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        logits = torch.einsum("bhtd,bhsd->bhts", q, k) * at.scale
        if at.is_causal:
            logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), -torch.inf)
        elif at.mask is not None:
            mask = at.mask
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.double()
        wanted = (logits.softmax(-1) @ v).transpose(1, 2)
        torch.testing.assert_close(value[real].double(), wanted[real], atol=1e-5, rtol=0)
        lse = logits.logsumexp(-1).transpose(1, 2)
        torch.testing.assert_close(at.lse.transpose(1, 2)[real].double(), lse[real], atol=1e-5, rtol=0)
        assert (at.lse.transpose(1, 2)[~real] == -torch.inf).all()

    with mc.hook(model, "attn_heads", check):
        logits_of(model, inputs)


@over_attention
def test_the_lse_follows_edits_of_query_and_key(attention: str) -> None:
    """Asked for early, before an edit changes what it is made of, it is not kept."""
    model, inputs, seen = model_of(LLAMA, attention), LLAMA.inputs(), []

    def read_and_double(value: Tensor, at: mc.At) -> Tensor:
        seen.append(at.lse)
        return value * 2

    with mc.hook(model, "query", lambda value, at: value * 2, [0]), mc.capture(model, "lse", layers=[0]) as wanted:
        logits_of(model, inputs)
    with mc.hook(model, "query", read_and_double, [0]), mc.capture(model, "lse", layers=[0]) as found:
        logits_of(model, inputs)
    torch.testing.assert_close(found.states[0], wanted.states[0])
    assert not torch.allclose(seen[0], found.states[0])


def test_edits_run_in_the_order_they_were_installed() -> None:
    model, inputs, calls = model_of(LLAMA), LLAMA.inputs(), []

    def named(name: str):
        return lambda value, at: calls.append((name, at.site))

    with mc.hook(model, "attn_heads", named("a"), [0]), mc.hook(model, "query", named("b"), [0]):
        with mc.hook(model, "attn_heads", named("c"), [0]), mc.hook(model, "attn_heads", named("d"), [0]):
            logits_of(model, inputs)
    assert calls == [("b", "query"), ("a", "attn_heads"), ("c", "attn_heads"), ("d", "attn_heads")]


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda x: x[:, :1], r"must return the shape, dtype and device it was given: \[2, 11, 32\] torch.float32 cpu"),
        (lambda x: x.half(), "found .* torch.float16"),
        (lambda x: x.to("meta"), "found .* meta"),
        (lambda x: 3, "returned a int, not a tensor"),
    ],
)
def test_a_wrong_edit_is_refused(returned: object, message: str, attention: str, no_shape_checks: None) -> None:
    model, inputs = model_of(LLAMA, attention), LLAMA.inputs()
    plain = logits_of(model, inputs)
    with mc.hook(model, "mlp_out", lambda value, at: returned(value)):
        with pytest.raises(mc.ShapeError, match=message):
            logits_of(model, inputs)
    assert torch.equal(logits_of(model, inputs), plain)


def test_hook_asks_that_are_refused(no_shape_checks: None) -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    state = snapshot(model)
    with pytest.raises(
        mc.UnknownNameError, match="no site is called 'residual'; the sites of a decoder layer are: query"
    ):
        mc.hook(model, "residual", lambda value, at: value)
    with pytest.raises(mc.UnsupportedModelError, match="layer 9 was asked for; .* has decoder layers 0 to 2"):
        mc.hook(model, "mlp_out", lambda value, at: value, layers=[0, 9])
    assert snapshot(model) == state
    with (
        mc.hook(model, "lse", lambda value, at: value + 1),
        pytest.raises(mc.PatchStateError, match="read, not edited"),
    ):
        logits_of(model, inputs)
    for site in set(SITES) - set(ATTENTION_SITES):
        with mc.hook(model, site, lambda value, at: at.lse), pytest.raises(mc.PatchStateError, match="outside the att"):
            logits_of(model, inputs)
    assert snapshot(model) == state


def test_dropout_in_training_still_goes_through_the_models_own_attention() -> None:
    model, inputs = fresh_model(LLAMA), LLAMA.inputs()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    torch.manual_seed(1)
    before = logits_of(model, inputs)
    with mc.patch(model, zero_vectors(random_shifts(model, "mimic"))):
        torch.manual_seed(1)
        assert torch.equal(logits_of(model, inputs), before)
