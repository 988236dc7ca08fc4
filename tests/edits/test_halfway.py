"""Edits that come, go or change during a forward: it runs with those it began with, or raises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import mimic_core as mc
from tests.support.cases import BY_NAME, fresh_model, logits_of, random_shifts
from tests.support.sequence_models import in_thread

LLAMA = BY_NAME["llama"]
NOWHERE = torch.zeros(2, 11, dtype=torch.bool)


def add(value: Tensor, at: mc.At) -> Tensor:
    return value + 1


@contextmanager
def hooked(model: Any) -> Iterator[None]:
    with mc.hook(model, "mlp_out", add):
        yield


def of_hook(use: Callable[[mc.Handle], Any]) -> Callable[[Any], Any]:
    return lambda model: use(mc.hook(model, "mlp_out", add))


def reader(model: Any) -> mc.Capture:
    return mc.capture(model, "query")


# What is done before the forward, before layer 1 and before layer 2, to the context that the function makes.
HALFWAY: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "removed": (of_hook(lambda handle: handle), ("enter", "leave")),
    "a capture closed": (reader, ("enter", "leave")),
    "put in": (hooked, ("", "enter")),
    "put in and removed": (hooked, ("", "enter", "leave")),
    "a capture opened": (reader, ("", "enter")),
    "switched off": (of_hook(lambda handle: handle.disabled()), ("", "enter")),
    "switched off and on": (of_hook(lambda handle: handle.disabled()), ("", "enter", "leave")),
    "switched on": (of_hook(lambda handle: handle.disabled()), ("enter", "leave")),
    "without its positions": (of_hook(lambda handle: handle.at(positions=NOWHERE)), ("enter", "leave")),
}


@pytest.mark.parametrize("inside", ["torch's hook", "an edit"])
@pytest.mark.parametrize("name", HALFWAY)
def test_a_change_for_some_layers_is_told(name: str, inside: str) -> None:
    model, inputs = fresh_model(LLAMA), LLAMA.inputs()
    plain = logits_of(model, inputs)
    make, calls = HALFWAY[name]
    context, stack, todo = make(model), ExitStack(), list(calls)

    def change(*args: Any) -> None:
        match todo.pop(0) if todo else "":
            case "enter":
                stack.enter_context(context)
            case "leave":
                stack.close()

    change()
    if inside == "an edit":
        handles = [mc.hook(model, "attn_out", change, layers=[1, 2])]
    else:
        handles = [layer.register_forward_pre_hook(change) for layer in model.model.layers[1:]]
    with pytest.raises(mc.PatchStateError, match="only some layers were edited"):
        logits_of(model, inputs)
    stack.close()
    for handle in (*handles, *mc.handles(model)):
        handle.remove()
    assert torch.equal(logits_of(model, inputs), plain)


def test_what_is_for_whole_forwards_is_exact_inside_another() -> None:
    """A hook runs the model: without a patch, at other positions, with another patch, and read by a capture."""
    model, inputs = fresh_model(LLAMA), LLAMA.inputs()
    plain, found = logits_of(model, inputs), {}
    handle = mc.patch(model, random_shifts(model, "live"))
    shifted = logits_of(model, inputs)
    with mc.hook(model, "mlp_out", add):
        both = logits_of(model, inputs)

    def run_inside(value: Tensor, at: mc.At) -> None:
        if found:
            return
        found["started"] = plain
        with handle.disabled():
            found["off"] = logits_of(model, inputs)
        with handle.at(positions=NOWHERE):
            found["nowhere"] = logits_of(model, inputs)
        with mc.hook(model, "mlp_out", add), mc.capture(model, "layer_out") as seen:
            found["both"] = logits_of(model, inputs)
        assert len(seen.states) == 3

    with mc.hook(model, "attn_out", run_inside, layers=[1]):
        assert torch.equal(logits_of(model, inputs), shifted)
    for name, wanted in {"off": plain, "nowhere": plain, "both": both}.items():
        assert torch.equal(found[name], wanted), name


def test_a_run_inside_is_not_taken_for_the_forward_around_it() -> None:
    """It reaches all sites. Then the edits are removed, and the rest of the forward around it has none."""
    model, inputs, ran = fresh_model(LLAMA), LLAMA.inputs(), list[int]()
    handle = mc.hook(model, "mlp_out", add)

    def run_inside(value: Tensor, at: mc.At) -> None:
        ran.append(at.layer)
        if len(ran) == 1:
            logits_of(model, inputs)
            handle.remove()

    with mc.hook(model, "attn_out", run_inside, layers=[1]):
        with pytest.raises(mc.PatchStateError, match="only some layers were edited"):
            logits_of(model, inputs)


def test_a_change_that_no_layer_misses_is_exact() -> None:
    """Positions and edits that come too late for the forward, edits that have run and go, other threads' captures."""
    model, inputs = fresh_model(LLAMA), LLAMA.inputs()
    todo: list[Callable[[], Any]] = []
    model.model.layers[1].register_forward_pre_hook(lambda *args: todo.pop()() if todo else None)
    handle = mc.hook(model, "mlp_out", add, layers=[0, 2])
    wanted = logits_of(model, inputs)
    at = handle.at(positions=NOWHERE)
    early = mc.hook(model, "attn_out", lambda value, at: None, layers=[0])
    captures = [mc.capture(model, "mlp_out") for _ in range(2)]
    in_thread(captures[0].__enter__)
    for change in (
        at.__enter__,
        lambda: in_thread(captures[1].__enter__) and None,
        lambda: [in_thread(lambda one=one: one.__exit__()) for one in captures] and None,
        early.remove,
        lambda: mc.hook(model, "mlp_out", add, layers=[0]) and None,
    ):
        todo.append(change)
        assert torch.equal(logits_of(model, inputs), wanted)
        assert not todo
        at.__exit__(None, None, None) if change == at.__enter__ else None
    assert not torch.equal(logits_of(model, inputs), wanted)


def test_labels_are_those_of_the_call_that_runs() -> None:
    """After an error nothing is left of them, a run inside has its own, and they are seen wherever they are given."""
    model, inputs = fresh_model(LLAMA), LLAMA.inputs()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    ran: list[int] = []

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    def run_inside(value: Tensor, at: mc.At) -> None:
        ran.append(at.layer)
        if len(ran) == 1:
            logits_of(model, inputs)
            ran.append(-1)

    for given in (model, model.model):
        with mc.hook(given, "mlp_out", add, layers=[2], positions="prompt_end") as handle:
            planted = model.lm_head.register_forward_pre_hook(fail)
            with handle.at(prompt=mask.bool()), pytest.raises(KeyboardInterrupt):
                model(**inputs, labels=ids)
            planted.remove()
            wanted = model.model(**inputs).last_hidden_state
            with mc.hook(model, "attn_out", run_inside, layers=[1]):
                with pytest.raises(mc.PatchStateError, match="was given labels"):
                    model(ids, mask, None, None, None, ids)
            assert ran == [1, 1, -1], "the run inside had none"
            assert torch.equal(model.model(**inputs).last_hidden_state, wanted)
            ran.clear()
