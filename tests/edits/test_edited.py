"""A module's output is edited in its `forward`: before all who read it, and whoever else replaces that forward."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

import mimic_core as mc
from mimic_core.types import ATTENTION_SITES, INPUT_SITES, SITES
from tests.support.cases import CASES, Case, fresh_model, logits_of, over_cases, random_shifts
from tests.support.snapshot import snapshot

LLAMA = next(case for case in CASES if case.name == "llama")
OUTPUTS = [site for site in SITES if site not in (*ATTENTION_SITES, *INPUT_SITES)]


def shift_by_one(x: Tensor, at: mc.At) -> Tensor:
    return x + 1


@over_cases
@pytest.mark.parametrize("site", OUTPUTS)
def test_hooks_of_others_see_the_edited_output_whoever_came_first(case: Case, site: Any) -> None:
    model, inputs = fresh_model(case), case.inputs()
    adapter = mc.adapter_for(model)
    module = adapter.module(model, 1, site)
    seen: list[Tensor] = []

    def read(module: nn.Module, args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).clone())

    module.register_forward_hook(read)
    logits_of(model, inputs)
    with mc.hook(model, site, shift_by_one, layers=[1]):
        module.register_forward_hook(read)
        logits_of(model, inputs)
    before, first, second = (x.flatten() for x in seen)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, before + 1)


@over_cases
def test_output_hidden_states_do_not_depend_on_a_call_before_the_patch(case: Case) -> None:
    """transformers puts its recorders into a model at the first such call, and leaves some of them there."""
    inputs = case.inputs() | {"output_hidden_states": True}
    found = []
    for called in (False, True):
        model = fresh_model(case)
        if called:
            model(**inputs)
        with mc.hook(model, "layer_out", shift_by_one), torch.no_grad():
            found.append(model(**inputs).hidden_states)
    assert len(found[0]) > 1
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_forward_that_is_called_by_name_is_edited() -> None:
    model = fresh_model(LLAMA)
    mlp, x = model.model.layers[0].mlp, torch.randn(2, 3, model.config.hidden_size)
    plain = mlp.forward(x)
    with mc.hook(model, "mlp_out", shift_by_one):
        torch.testing.assert_close(mlp.forward(x), plain + 1)
    assert "forward" not in vars(mlp)


def hooked_by_accelerate(model: Any) -> Callable[[], None]:
    for layer in model.model.layers:
        for module in (layer, layer.mlp, layer.self_attn):
            add_hook_to_module(module, AlignDevicesHook(io_same_device=True))

    def undo() -> None:
        for module in model.modules():
            remove_hook_from_module(module)

    return undo


def replaced(model: Any) -> Callable[[], None]:
    """As packages of faster kernels do."""
    for layer in model.model.layers:
        layer.mlp.forward = lambda x, below=layer.mlp.forward: below(x)

    def undo() -> None:
        for layer in model.model.layers:
            (layer.mlp.forward,) = layer.mlp.forward.__defaults__

    return undo


@pytest.mark.parametrize("head", ["live", "mimic", "mimic-and-mlp"])
@pytest.mark.parametrize("of_others", [hooked_by_accelerate, replaced])
def test_forwards_replaced_by_others_in_every_order(of_others: Any, head: str) -> None:
    """Stack, other, second stack, in every order of coming; the first to come, and each other one, goes first."""
    for order, first_out in itertools.product(itertools.permutations(range(3)), range(3)):
        model, twin, inputs = fresh_model(LLAMA), fresh_model(LLAMA), LLAMA.inputs()
        stacks = [random_shifts(model, head), random_shifts(model, "live")]
        undo: dict[int, Callable[[], None]] = {}
        for what in order:
            undo[what] = of_others(model) if what == 2 else mc.patch(model, stacks[what]).remove
        on = {what: mc.patch(twin, stacks[what]) for what in order if what != 2}  # lengths kept: the order counts
        torch.testing.assert_close(logits_of(model, inputs), logits_of(twin, inputs))
        if first_out == 2 and order[-1] != 2:
            continue  # others who put back what they found put edits out of the way: the test below
        undo.pop(first_out)()
        if first_out < 2:
            on[first_out].remove()
        torch.testing.assert_close(logits_of(model, inputs), logits_of(twin, inputs))


@pytest.mark.parametrize("site", INPUT_SITES)
def test_edits_of_an_input_run_in_the_order_of_their_coming(site: Any) -> None:
    """Whoever replaced the forward in between. Edits that are out of the way are missed, and the first argument may
    come by name."""
    model, inputs = fresh_model(LLAMA), LLAMA.inputs()
    plain = logits_of(model, inputs)
    module = mc.adapter_for(model).module(model, 1, site)
    got: list[Tensor] = []
    module.register_forward_pre_hook(lambda m, args: got.append(args[0]))
    edits = [lambda x, at: x * 2, shift_by_one, lambda x, at: x * 0.5]
    logits_of(model, inputs)
    with mc.hook(model, site, lambda x, at: (x * 2 + 1) * 0.5, layers=[1]):
        wanted = logits_of(model, inputs)
        by_name = next(iter([*inspect.signature(type(module).forward).parameters][1:]))
        below = module.forward
        module.forward = lambda x, *args, **kwargs: below(*args, **{by_name: x}, **kwargs)
        assert torch.equal(logits_of(model, inputs), wanted)
        module.forward = below
    for at in range(4):
        handles = []
        for n, edit in enumerate([*edits, None]):
            if n == at:
                forward = module.forward
                module.forward = lambda *args, below=forward, **kwargs: below(*args, **kwargs)
            if edit is not None:
                handles.append(mc.hook(model, site, edit, layers=[1]))
        with mc.capture(model, site, layers=[1]) as seen:
            torch.testing.assert_close(logits_of(model, inputs), wanted)
        torch.testing.assert_close(seen.states[1], (got[0] * 2 + 1) * 0.5)
        del module.forward
        with pytest.raises(mc.PatchStateError, match=f"never reached {site} of layer 1"):
            logits_of(model, inputs)
        for handle in handles:
            handle.remove()
    assert torch.equal(logits_of(model, inputs), plain)


@pytest.mark.parametrize("head", ["live", "mimic-and-mlp"])
def test_edits_put_out_of_the_way_are_missed(head: str) -> None:
    model, inputs = fresh_model(LLAMA), LLAMA.inputs()
    plain = logits_of(model, inputs)
    undo = hooked_by_accelerate(model)
    shifts = random_shifts(model, head)
    handle = mc.patch(model, shifts)
    shifted = logits_of(model, inputs)
    undo()
    with pytest.raises(mc.PatchStateError, match="something has replaced the forward of these modules since"):
        logits_of(model, inputs)
    handle.remove()
    assert torch.equal(logits_of(model, inputs), plain)
    with mc.patch(model, shifts):
        assert torch.equal(logits_of(model, inputs), shifted)
    assert torch.equal(logits_of(model, inputs), plain)


def test_a_copy_of_a_covered_edit() -> None:
    """Patched, then wrapped by others, then copied: the copy's edits are its own."""
    model, inputs = fresh_model(LLAMA), LLAMA.inputs()
    shifts = random_shifts(model, "live")
    handle = mc.patch(model, shifts)
    hooked_by_accelerate(model)
    shifted = logits_of(model, inputs)
    twin = copy.deepcopy(model)
    handle.remove()
    assert not torch.equal(logits_of(model, inputs), shifted)
    assert torch.equal(logits_of(twin, inputs), shifted)


def test_nothing_is_left_after_patches_that_cross() -> None:
    model = fresh_model(LLAMA)
    state = snapshot(model)
    for out in itertools.permutations(range(3)):
        handles = [
            mc.patch(model, random_shifts(model, "mimic")),
            mc.hook(model, "attn_out", shift_by_one),
            mc.hook(model, "attn_heads", shift_by_one),
        ]
        for i in out:
            handles[i].remove()
        assert snapshot(model) == state
