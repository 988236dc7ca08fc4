"""What is of a patch, of one call, or of one thread: interrupts, threads, overlap, copies, optimizers."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.modeling_utils import AttentionInterface

import mimic_core as mc
from mimic_core import optimizers
from mimic_core.types import SITES
from tests.support.cases import (
    BY_NAME,
    Case,
    fresh_model,
    logits_of,
    over_cases,
    over_heads,
    random_shifts,
)

LLAMA = BY_NAME["llama"]


class Interrupt(BaseException):
    """As a KeyboardInterrupt, which pytest would take for its own."""


def in_thread(run: Callable[[], Any]) -> Any:
    """What a function returns or raises in a thread of its own."""
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(run())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=60)
    return found[0]


@pytest.mark.parametrize("raised", [Interrupt, ValueError])
def test_after_an_interrupt_a_missed_site_still_raises(raised: type[BaseException]) -> None:
    model, inputs = fresh_model(LLAMA), LLAMA.inputs()

    def fail(value: Tensor, at: mc.At) -> None:
        raise raised

    with mc.patch(model, random_shifts(model, "live")):
        with mc.hook(model, "layer_out", fail, layers=[1]), pytest.raises(raised):
            model(**inputs)
        del vars(model.model.layers[0].mlp)["forward"]  # its edit then never runs
        with pytest.raises(mc.PatchStateError, match="never reached mlp_out of layer 0"):
            model(**inputs)


@over_cases
@over_heads
def test_after_an_interrupt_all_is_as_before(case: Case, head: str) -> None:
    model, inputs = fresh_model(case), case.inputs()

    def fail(value: Tensor, at: mc.At) -> None:
        raise Interrupt

    with mc.patch(model, random_shifts(model, head)):
        wanted = logits_of(model, inputs)
        for site in ("layer_out", "attn_heads"):
            with mc.hook(model, site, fail, layers=[1]), pytest.raises(Interrupt):
                logits_of(model, inputs)
        assert torch.equal(logits_of(model, inputs), wanted)
        with mc.capture(model, "layer_out", layers=[0]) as seen:
            logits_of(model, inputs)
        assert set(seen.states) == {0}
        with mc.capture(model, "layer_out", layers=[0]) as seen, pytest.raises(Interrupt):
            with mc.hook(model, "attn_heads", fail, layers=[0]):
                logits_of(model, inputs)
        with pytest.raises(mc.PatchStateError, match="nothing was captured"):
            seen.states  # noqa: B018


def test_a_replaced_forward_has_the_signature_of_the_one_below() -> None:
    """transformers, its Trainer and accelerate look at it."""
    model = fresh_model(LLAMA)
    modules = [model.model, model.model.layers[0], model.model.layers[0].mlp, model.model.layers[0].self_attn]
    wanted = [inspect.signature(module.forward) for module in modules]
    with mc.hook(model, "mlp_out", lambda x, at: None), mc.hook(model, "layer_out", lambda x, at: None):
        assert [inspect.signature(module.forward) for module in modules] == wanted
        again = pickle.loads(pickle.dumps(fresh_model(LLAMA)))
    assert "forward" not in vars(again.model)


class Paused:
    """A forward of a model in a thread of its own, stopped at a layer until `go_on`."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor], layer: nn.Module) -> None:
        self.reached, self.may_go = threading.Event(), threading.Event()
        self.result: Any = None
        self._mine: int | None = None
        hook = layer.register_forward_pre_hook(self._wait)

        def run() -> None:
            self._mine = threading.get_ident()
            try:
                self.result = logits_of(model, inputs)
            except Exception as error:
                self.result = error
            hook.remove()

        self.thread = threading.Thread(target=run)
        self.thread.start()
        assert self.reached.wait(timeout=60)

    def _wait(self, module: nn.Module, args: Any) -> None:
        if threading.get_ident() == self._mine:
            self.reached.set()
            assert self.may_go.wait(timeout=60)

    def go_on(self) -> Any:
        self.may_go.set()
        self.thread.join(timeout=60)
        return self.result


@over_heads
def test_disabled_is_refused_while_another_thread_is_in_a_forward(head: str) -> None:
    model, inputs = fresh_model(LLAMA), LLAMA.inputs()
    with mc.patch(model, random_shifts(model, head)) as handle:
        wanted = logits_of(model, inputs)
        other = Paused(model, inputs, model.model.layers[1])
        with pytest.raises(mc.PatchStateError, match="another thread is in a forward"), handle.disabled():
            raise AssertionError("it was not refused")
        assert torch.equal(other.go_on(), wanted)
        with handle.disabled():
            plain = logits_of(model, inputs)
        assert not torch.equal(plain, wanted)


def test_a_forward_of_another_thread_is_refused_while_disabled() -> None:
    model, inputs = fresh_model(LLAMA), LLAMA.inputs()
    plain = logits_of(model, inputs)
    with mc.patch(model, random_shifts(model, "mimic")) as handle:
        wanted = logits_of(model, inputs)

        def disabled() -> Tensor:
            with handle.disabled():
                return logits_of(model, inputs)

        with handle.disabled():
            assert "another thread is inside `handle.disabled()`" in str(in_thread(lambda: logits_of(model, inputs)))
            assert torch.equal(in_thread(disabled), plain)
            assert torch.equal(logits_of(model, inputs), plain)
        assert torch.equal(in_thread(lambda: logits_of(model, inputs)), wanted)


def test_threads_that_disable_at_random_get_their_model_or_an_error() -> None:
    """Teacher and student at once: no logits are of neither model."""
    model, inputs = fresh_model(LLAMA), LLAMA.inputs()
    plain = logits_of(model, inputs)
    found: dict[str, list[Tensor]] = {"plain": [], "shifted": []}
    refused: list[mc.PatchStateError] = []
    start = threading.Barrier(2)
    with mc.patch(model, random_shifts(model, "mimic-and-mlp")) as handle:
        wanted = logits_of(model, inputs)

        def run(kind: str) -> None:
            start.wait(timeout=60)
            until = time.monotonic() + 60
            while len(found[kind]) < 20 and time.monotonic() < until:
                try:
                    with handle.disabled() if kind == "plain" else nullcontext():
                        found[kind].append(logits_of(model, inputs))
                except mc.PatchStateError as error:
                    refused.append(error)
                time.sleep(0.002)

        threads = [threading.Thread(target=run, args=(kind,)) for kind in found]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
    assert refused
    for kind, right in (("plain", plain), ("shifted", wanted)):
        assert len(found[kind]) == 20
        assert all(torch.equal(x, right) for x in found[kind])


def test_a_patch_removed_by_another_thread_in_the_middle_of_a_forward_is_told() -> None:
    model, inputs = fresh_model(LLAMA), LLAMA.inputs()
    plain = logits_of(model, inputs)
    handle = mc.patch(model, random_shifts(model, "live"))
    other = Paused(model, inputs, model.model.layers[1])
    handle.remove()
    result = other.go_on()
    assert isinstance(result, mc.PatchStateError)
    assert "only some layers were edited" in str(result)
    assert torch.equal(logits_of(model, inputs), plain)


def test_a_capture_is_of_the_thread_that_opened_it() -> None:
    model, inputs = fresh_model(LLAMA), LLAMA.inputs()
    wanted = logits_of(model, inputs)
    with mc.capture(model, "layer_out") as seen:
        first = logits_of(model, inputs)
        assert all(torch.equal(in_thread(lambda: logits_of(model, inputs)), wanted) for _ in range(3))
    assert torch.equal(first, wanted)
    assert set(seen.states) == {0, 1, 2}
    with mc.capture(model, "layer_out") as seen:
        in_thread(lambda: logits_of(model, inputs))
    with pytest.raises(mc.PatchStateError, match="in the same thread"):
        seen.states  # noqa: B018


@over_cases
@over_heads
def test_a_stack_goes_once_into_a_model_whichever_part_was_named(case: Case, head: str) -> None:
    model, inputs = fresh_model(case), case.inputs()
    shifts = random_shifts(model, head)
    parts = [model, getattr(model, model.base_model_prefix)]
    for first, second in (parts, parts[::-1]):
        with mc.patch(first, shifts):
            wanted = logits_of(model, inputs)
            with pytest.raises(mc.PatchStateError, match="already in this model"):
                mc.patch(second, shifts)
            assert torch.equal(logits_of(model, inputs), wanted)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@over_cases
def test_a_copy_is_unpatched_by_its_handles(case: Case, how: Callable[[nn.Module], nn.Module]) -> None:
    plain_interface = AttentionInterface.get_interface
    model, inputs = fresh_model(case), case.inputs()
    try:
        how(model)
    except AttributeError:  # transformers' recorders in the vision tower, which an earlier forward put there
        pytest.skip("the unpatched model can't be pickled")
    with mc.patch(model, random_shifts(model, "mimic")), mc.patch(model, random_shifts(model, "live")):
        copied = how(model)
        shifted = logits_of(model, inputs)
        assert len(mc.handles(model)) == 2
    assert mc.handles(model) == []
    plain = logits_of(model, inputs)
    assert torch.equal(logits_of(copied, inputs), shifted)
    for handle in mc.handles(copied):
        assert handle.installed
        handle.remove()
    assert mc.handles(copied) == []
    assert torch.equal(logits_of(copied, inputs), plain)
    assert AttentionInterface.get_interface is plain_interface
    left, before = (
        [name for module in one.modules() for name in vars(module) if name == "forward" or "mimic" in name]
        for one in (copied, model)
    )
    assert left == before
    assert not [name for name in left if "mimic" in name]


@pytest.mark.parametrize("head", ["mimic", "live"])
def test_a_copy_made_while_the_patch_is_off_is_patched(head: str) -> None:
    model, inputs = fresh_model(LLAMA), LLAMA.inputs()
    with mc.patch(model, random_shifts(model, head)) as handle:
        shifted = logits_of(model, inputs)
        with handle.disabled():
            copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for model in (copied, loaded):
        assert torch.equal(logits_of(model, inputs), shifted)
        with mc.handles(model)[0].disabled():
            assert not torch.equal(logits_of(model, inputs), shifted)
        assert torch.equal(logits_of(model, inputs), shifted)


def test_handles_are_those_of_every_kind_in_order() -> None:
    model, inputs = fresh_model(LLAMA), LLAMA.inputs()
    plain = logits_of(model, inputs)
    mc.hook(model, "query", lambda x, at: x * 2)
    mc.patch(model, random_shifts(model, "live"))
    mc.hook(model, "layer_out", lambda x, at: x + 1)
    with mc.capture(model, SITES) as seen:
        assert len(mc.handles(model)) == 4
        logits_of(model, inputs)
    assert seen["query"]
    for handle in mc.handles(model):
        handle.remove()
    assert torch.equal(logits_of(model, inputs), plain)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, path: mc.patch(model, nn.Linear(2, 2)),
        lambda model, path: mc.patch(model, "mimic"),
        lambda model, path: mc.patch(model, mc.build_shifts(model)[0]),
        lambda model, path: mc.save_shifts(model, path / "shifts"),
        lambda model, path: mc.hook(model, "mlp_out", None),
        lambda model, path: mc.build_shifts(model, 3),
        lambda model, path: mc.build_shifts(model, mc.MimICConfig),
    ],
)
def test_what_is_no_stack_head_or_function_is_refused(call: Any, tmp_path: Any, no_shape_checks: None) -> None:
    model = fresh_model(LLAMA)
    with pytest.raises(mc.WrongTypeError, match="is needed, found"):
        call(model, tmp_path)
    assert mc.handles(model) == []
    assert not list(tmp_path.iterdir())


# Who trains the shifts.


def trainer_of(model: nn.Module, folder: Any) -> Trainer:
    ids = LLAMA.inputs()["input_ids"]
    data = [{"input_ids": row, "labels": row} for row in ids]
    options = TrainingArguments(
        str(folder), max_steps=2, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, logging_steps=1
    )
    return Trainer(model, options, train_dataset=data)


def test_a_trainer_of_the_patched_model_says_that_it_trains_nothing(tmp_path: Any) -> None:
    model = fresh_model(LLAMA).requires_grad_(False)
    shifts = random_shifts(model, "mimic")
    before = copy.deepcopy(shifts.state_dict())
    with mc.patch(model, shifts), pytest.raises(mc.PatchStateError, match="no optimizer has .*ShiftTrainer"):
        trainer_of(model, tmp_path).train()
    assert all(torch.equal(x, before[name]) for name, x in shifts.state_dict().items())


# It looks at parameters alone, whosever they are; each case looks through all objects of the process.
@pytest.mark.parametrize("head", ["mimic-shared", "live", "task-vector"])
def test_an_optimizer_without_the_shifts_is_told_from_one_with_them(head: str) -> None:
    model, inputs = fresh_model(LLAMA).requires_grad_(False), LLAMA.inputs()
    shifts = random_shifts(model, head)
    free = nn.Parameter(torch.ones(3))
    lonely = torch.optim.SGD([free], lr=0.1)
    with mc.patch(model, shifts):
        model(**inputs).logits.float().square().mean().backward()
        lonely_first = pytest.raises(mc.PatchStateError, match="nothing to train")
        with lonely_first:
            lonely.step()
        of_shifts = torch.optim.SGD(shifts.parameters(), lr=0.1)
        lonely.step()  # another optimizer has them
        of_shifts.step()
    del of_shifts
    gc.collect()
    with mc.patch(model, shifts):
        free.grad = torch.ones(3)
        with pytest.warns(UserWarning, match="no optimizer has their parameters"):
            lonely.step()
    assert optimizers._hook is None
    assert not optimizers._asked


def test_frozen_shifts_need_no_optimizer() -> None:
    model, inputs = fresh_model(LLAMA).requires_grad_(True), LLAMA.inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with mc.patch(model, random_shifts(model, "mimic").requires_grad_(False)):
        model(**inputs).logits.square().mean().backward()
        optimizer.step()
    assert optimizers._hook is None


def test_data_parallel_copies_are_refused() -> None:
    model, inputs = fresh_model(LLAMA), LLAMA.inputs()
    with mc.patch(model, random_shifts(model, "live")):
        replica = model._replicate_for_data_parallel()
        with pytest.raises(mc.PatchStateError, match="DistributedDataParallel"):
            replica(**inputs)
