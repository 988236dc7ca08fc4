"""Patched models in the hands of others: LoRA, copies and pickles, another attention, threads, another wrap."""

from __future__ import annotations

import copy
import gc
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AttentionInterface

import mimic_core as mc
from tests.support.cases import CASES, Case, fresh_model, logits_of, over_cases, random_shifts, zero_vectors
from tests.support.snapshot import snapshot

LLAMA = next(case for case in CASES if case.name == "llama")
UNWRAPPED = AttentionInterface.get_interface
# Between them every way into a model: inside attention, fused or not, and a hook on a module's output.
over_some_heads = pytest.mark.parametrize("head", ["mimic-shared", "mimic-and-mlp"])


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """When a test's models are collected, transformers' interface is its own again."""
    before = AttentionInterface.get_interface
    yield
    gc.collect()
    assert AttentionInterface.get_interface is before


def add_lora(model: nn.Module) -> PeftModel:
    """LoRA that changes attention and MLP from the start."""
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    lora = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    assert isinstance(lora, PeftModel)
    return lora.eval()


def differ(a: Tensor, b: Tensor) -> bool:
    return not torch.allclose(a, b, atol=1e-3)


@over_some_heads
@over_cases
def test_lora_before_patching(case: Case, head: str) -> None:
    base, inputs = fresh_model(case), case.inputs()
    without, spec = logits_of(base, inputs), mc.adapter_for(base).spec(base)
    lora = add_lora(base)
    plain = logits_of(lora, inputs)
    assert differ(plain, without)
    state = snapshot(lora)
    assert mc.adapter_for(lora).spec(lora) == spec
    shifts = random_shifts(lora, head)
    assert shifts.spec == spec
    with mc.patch(lora, shifts) as handle:
        shifted = logits_of(lora, inputs)
        assert differ(shifted, plain)
        with handle.disabled(), lora.disable_adapter():
            assert torch.equal(logits_of(lora, inputs), without)
        shifted.square().mean().backward()
        adapters = {name: p for name, p in lora.named_parameters() if "lora_" in name}
        for name, p in shifts.named_parameters():
            assert p.grad is not None, name
            assert p.grad.abs().sum() > 0, name
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters.values())
        assert not {id(p) for p in lora.parameters()} & {id(p) for p in shifts.parameters()}
        assert len(list(shifts.parameters())) == len(list(random_shifts(lora, head).parameters()))
        zero_vectors(shifts)
        assert torch.equal(logits_of(lora, inputs), plain)
    assert torch.equal(logits_of(lora, inputs), plain)
    assert snapshot(lora) == state


@over_some_heads
@over_cases
def test_lora_after_patching_and_merged(case: Case, head: str) -> None:
    model, inputs = fresh_model(case), case.inputs()
    shifts = random_shifts(model, head)
    handle = mc.patch(model, shifts)
    only_shifted = logits_of(model, inputs)
    lora = add_lora(model)
    both = logits_of(lora, inputs)
    assert differ(both, only_shifted)
    with handle.disabled():
        only_lora = logits_of(lora, inputs)
    assert differ(both, only_lora)
    with lora.disable_adapter():
        assert torch.equal(logits_of(lora, inputs), only_shifted)

    merged = lora.merge_and_unload()  # pyright: ignore[reportCallIssue]
    assert merged is model
    assert not [name for name, _ in model.named_modules() if "lora" in name]
    torch.testing.assert_close(logits_of(model, inputs), both, atol=1e-4, rtol=1e-3)
    with handle.disabled():
        merged_alone = logits_of(model, inputs)
    zero_vectors(shifts)
    assert torch.equal(logits_of(model, inputs), merged_alone)
    handle.remove()
    assert torch.equal(logits_of(model, inputs), merged_alone)


def test_a_handle_made_on_lora_outlives_it() -> None:
    """Patched through the wrapper, removed when the wrapper is gone."""
    lora, inputs = add_lora(fresh_model(LLAMA)), LLAMA.inputs()
    handle = mc.patch(lora, random_shifts(lora, "mimic-and-mlp"))
    merged = lora.merge_and_unload()  # pyright: ignore[reportCallIssue]
    with handle.disabled():
        plain = logits_of(merged, inputs)
    assert differ(logits_of(merged, inputs), plain)
    handle.remove()
    assert torch.equal(logits_of(merged, inputs), plain)


def pickled(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def over_copies(test: Any) -> Any:
    copies = pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
    return pytest.mark.usefixtures("nothing_left")(copies(test))


@over_copies
@pytest.mark.parametrize(
    ("case", "head"),
    [
        pytest.param(case, head, marks=() if i % 2 == j else pytest.mark.exhaustive)
        for i, case in enumerate(CASES)
        for j, head in enumerate(("live", "mimic-and-mlp"))
    ],
    ids=str,
)
def test_a_copy_stays_patched_by_shifts_of_its_own(case: Case, head: str, copied: Callable[[Any], Any]) -> None:
    model, inputs = fresh_model(case), case.inputs()
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    if copied is pickled and any("<locals>" in hook.__qualname__ for hook in hooks):
        pytest.skip("transformers gives this vision tower hooks that can't be pickled, patched or not")
    plain = logits_of(model, inputs)
    shifts = random_shifts(model, head)
    handle = mc.patch(model, shifts)
    twin = copied(model)
    shifted = logits_of(model, inputs)
    assert differ(shifted, plain)
    assert torch.equal(logits_of(twin, inputs), shifted)
    zero_vectors(shifts)
    assert torch.equal(logits_of(model, inputs), plain)
    assert torch.equal(logits_of(twin, inputs), shifted)
    handle.remove()
    assert torch.equal(logits_of(model, inputs), plain)
    assert torch.equal(logits_of(twin, inputs), shifted), "the interface is wrapped while the copy lives"
    assert list(twin.state_dict()) == list(model.state_dict())

    # It can be patched on top, and is as shifted as before when that is gone.
    with mc.patch(twin, random_shifts(twin, head, scale=0.2)):
        assert differ(logits_of(twin, inputs), shifted)
    assert torch.equal(logits_of(twin, inputs), shifted)


@over_copies
@pytest.mark.parametrize("head", ["mimic", "live"])
def test_the_original_outlives_its_copy(head: str, copied: Callable[[Any], Any]) -> None:
    model, inputs = fresh_model(LLAMA), LLAMA.inputs()
    with mc.patch(model, random_shifts(model, head)):
        shifted = logits_of(model, inputs)
        twin = copied(model)
        logits_of(twin, inputs)
        del twin
        gc.collect()
        assert torch.equal(logits_of(model, inputs), shifted)


@over_copies
@over_some_heads
def test_a_handle_copied_with_its_model_undoes_the_copy(head: str, copied: Callable[[Any], Any]) -> None:
    model, inputs = fresh_model(LLAMA), LLAMA.inputs()
    plain = logits_of(model, inputs)
    handle = mc.patch(model, random_shifts(model, head))
    shifted = logits_of(model, inputs)
    twin, twin_handle = copied((model, handle))
    twin_handle.remove()
    assert not twin_handle.installed
    assert handle.installed
    assert torch.equal(logits_of(twin, inputs), plain)
    assert torch.equal(logits_of(model, inputs), shifted)
    handle.remove()
    assert snapshot(twin) == snapshot(model)


@over_copies
def test_a_copy_made_inside_disabled_is_patched(copied: Callable[[Any], Any]) -> None:
    model, inputs = fresh_model(LLAMA), LLAMA.inputs()
    plain = logits_of(model, inputs)
    with mc.patch(model, random_shifts(model, "mimic")) as handle:
        with handle.disabled():
            twin = copied(model)
            assert torch.equal(logits_of(model, inputs), plain)
        assert differ(logits_of(model, inputs), plain)
    assert differ(logits_of(twin, inputs), plain)
    with mc.handles(twin)[0].disabled():
        assert torch.equal(logits_of(twin, inputs), plain)


@pytest.mark.usefixtures("nothing_left")
def test_the_interface_is_restored_with_the_last_patch() -> None:
    models = [fresh_model(LLAMA), fresh_model(LLAMA)]
    first, second = (mc.patch(model, random_shifts(model, "mimic")) for model in models)
    third = mc.hook(models[0], "query", lambda value, at: None)
    for handle in (first, third):
        assert AttentionInterface.get_interface is not UNWRAPPED
        handle.remove()
    assert AttentionInterface.get_interface is not UNWRAPPED
    second.remove()
    assert AttentionInterface.get_interface is UNWRAPPED


@over_copies
def test_the_interface_is_restored_when_the_last_copy_is_collected(copied: Callable[[Any], Any]) -> None:
    model = fresh_model(LLAMA)
    with mc.patch(model, random_shifts(model, "mimic")):
        twins = [copied(model), copied(model)]
    while twins:
        assert AttentionInterface.get_interface is not UNWRAPPED
        twins.pop()
        gc.collect()
    assert AttentionInterface.get_interface is UNWRAPPED


def test_a_patched_model_that_is_dropped_takes_its_wrap_along() -> None:
    model = fresh_model(LLAMA)
    handle = mc.patch(model, random_shifts(model, "mimic"))
    del model, handle
    gc.collect()
    assert AttentionInterface.get_interface is UNWRAPPED


def test_sites_outside_attention_need_no_wrap() -> None:
    model = fresh_model(LLAMA)
    with mc.patch(model, random_shifts(model, "live")):
        assert AttentionInterface.get_interface is UNWRAPPED


@pytest.mark.parametrize("removed_first", ["ours", "theirs"])
def test_another_wrap_put_over_ours(removed_first: str) -> None:
    """Another library may wrap the interface while a patch is alive, and keep its wrap longer than we do."""
    model, inputs, calls = fresh_model(LLAMA), LLAMA.inputs(), []
    plain = logits_of(model, inputs)
    shifts = random_shifts(model, "mimic")
    handle = mc.patch(model, shifts)
    shifted, below = logits_of(model, inputs), AttentionInterface.get_interface

    def theirs(self: AttentionInterface, *args: Any) -> Any:
        calls.append(args[0])
        return below(self, *args)

    AttentionInterface.get_interface = theirs
    try:
        assert torch.equal(logits_of(model, inputs), shifted)
        assert calls
        if removed_first == "ours":
            handle.remove()
            assert AttentionInterface.get_interface is theirs
            assert torch.equal(logits_of(model, inputs), plain)
            with mc.patch(model, shifts):
                assert torch.equal(logits_of(model, inputs), shifted)
                # Once each: a gate applied twice would be another result.
                seen: list[int] = []
                with mc.hook(model, "attn_heads", lambda value, at: seen.append(at.layer)):
                    logits_of(model, inputs)
                assert seen == [0, 1, 2]
            assert torch.equal(logits_of(model, inputs), plain)
        AttentionInterface.get_interface = below
        if removed_first == "theirs":
            assert torch.equal(logits_of(model, inputs), shifted)
        handle.remove()
        assert torch.equal(logits_of(model, inputs), plain)
        with mc.patch(model, shifts):
            assert torch.equal(logits_of(model, inputs), shifted)
        assert torch.equal(logits_of(model, inputs), plain)
    finally:
        handle.remove()
        AttentionInterface.get_interface = UNWRAPPED


@over_some_heads
@over_cases
def test_attention_can_be_changed_while_patched(case: Case, head: str) -> None:
    inputs = case.inputs()
    model, eager = fresh_model(case), fresh_model(case, "eager")
    plain = logits_of(model, inputs)
    with mc.patch(eager, random_shifts(eager, head)):
        wanted = logits_of(eager, inputs)
    shifts = random_shifts(model, head)
    handle = mc.patch(model, shifts)
    shifted = logits_of(model, inputs)
    model.set_attn_implementation("eager")  # pyright: ignore[reportCallIssue]
    assert torch.equal(logits_of(model, inputs), wanted)
    zero_vectors(shifts)
    assert torch.equal(logits_of(model, inputs), logits_of(eager, inputs))
    model.set_attn_implementation("sdpa")  # pyright: ignore[reportCallIssue]
    assert torch.equal(logits_of(model, inputs), plain)
    shifts.load_state_dict(random_shifts(model, head).state_dict())
    assert torch.equal(logits_of(model, inputs), shifted)
    handle.remove()
    assert torch.equal(logits_of(model, inputs), plain)


@over_cases
def test_threads_share_a_patched_model(case: Case) -> None:
    """4 threads of 10 forwards, each with inputs of its own, all started at once."""
    if case.name == "llava" and find_spec("transformers.utils.output_capturing") is None:
        pytest.skip("up to this version transformers' Llava swaps its own forwards during one, patched or not")
    model, start = fresh_model(case), threading.Barrier(4)
    inputs = [case.inputs("right"), case.inputs("left"), case.sample(0), case.sample(1)]

    def run(index: int) -> list[Tensor]:
        start.wait(timeout=30)
        return [logits_of(model, inputs[index]) for _ in range(10)]

    with mc.patch(model, random_shifts(model, "mimic-and-mlp")), ThreadPoolExecutor(4) as pool:
        wanted = [logits_of(model, x) for x in inputs]
        found = list(pool.map(run, range(4)))
    for logits, serial in zip(found, wanted, strict=True):
        assert all(torch.equal(x, serial) for x in logits)
