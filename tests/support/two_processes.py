"""Checks of data parallel training. They need two processes, which run all of them.

Each process takes half of the rows. What is compared is the gradient of one process over all rows.
"""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from accelerate import Accelerator, init_empty_weights
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as read
from torch.distributed.checkpoint.state_dict_saver import save as write
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM

import mimic_core as mc
from tests.support.training import (
    RecordingTrainer,
    arguments,
    gradients_of,
    in_plain_torch,
    lightning_module,
    model_and_shifts,
    rows,
    samples,
)

CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def begin(folder: Path) -> tuple[()]:
    """What Trainer and accelerate look for, beside the group that is there."""
    os.environ |= {"FOLDER": str(folder)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return ()


def mine(ids: Tensor) -> Tensor:
    """The rows of this process."""
    return ids.chunk(2)[distributed.get_rank()]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits.square().mean()


IDS = rows(4)


def whole() -> list[Tensor]:
    """The gradients of one process over all rows."""
    model, shifts = model_and_shifts(torch.float64)
    with warnings.catch_warnings(), mc.patch(model, shifts):
        warnings.simplefilter("ignore")
        loss_of(model, IDS).backward()
    return gradients_of(shifts)


def assert_averaged(shifts: mc.ShiftStack, wanted: list[Tensor], times: int = 1) -> None:
    for found, exact in zip(gradients_of(shifts), wanted, strict=True):
        torch.testing.assert_close(found, times * exact, rtol=1e-9, atol=1e-14)
    shifts.zero_grad()


@check
def a_wrapped_stack() -> None:
    wanted = whole()
    for options in ({}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}):
        model, shifts = model_and_shifts(torch.float64)
        wrapped = DistributedDataParallel(shifts, **options)
        with warnings.catch_warnings(), mc.patch(model, wrapped) as handle:
            warnings.simplefilter("error")
            for _ in range(3):  # the first one is another for DistributedDataParallel
                with torch.no_grad():
                    loss_of(model, IDS)
                with handle.disabled():
                    loss_of(model, IDS)
                loss_of(model, mine(IDS)).backward()
                assert_averaged(shifts, wanted)
            with wrapped.no_sync():
                loss_of(model, mine(IDS)).backward()
            loss_of(model, mine(IDS)).backward()
            assert_averaged(shifts, wanted, times=2)
        with TemporaryDirectory() as folder:
            mc.save_shifts(wrapped, folder)
            assert mc.load_shifts(folder, model).layers == shifts.layers


@check
def when_the_wrapper_is_told() -> None:
    model, shifts = model_and_shifts(torch.float64)
    wrapped = DistributedDataParallel(shifts)
    told = []
    wrapped.register_forward_pre_hook(lambda *_: told.append(1))

    def again(value: Tensor, at: mc.At) -> None:
        if not nested:
            nested.append(1)
            loss_of(model, IDS)

    with mc.patch(model, wrapped) as handle:
        with torch.no_grad():
            loss_of(model, IDS)
        with handle.disabled():
            loss_of(model, IDS)
        assert told == []
        nested: list[int] = []
        with mc.hook(model, "layer_out", again, layers=[0]):
            loss_of(model, IDS)
        assert (nested, told) == ([1], [1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                loss_of(twin, IDS)
        assert told == [1]
        with pytest.raises(mc.PatchStateError, match="a ShiftStack is not called"):
            wrapped()
        shifts[0].vector.requires_grad_(False)
        with pytest.raises(mc.PatchStateError, match="frozen or unfrozen after the patch"):
            loss_of(model, IDS)


@check
def gradient_checkpointing() -> None:
    wanted = whole()
    for reentrant in (False, True):
        model, shifts = model_and_shifts(torch.float64)
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        with mc.patch(model, DistributedDataParallel(shifts)):
            for _ in range(2):
                loss_of(model, mine(IDS)).backward()
                assert_averaged(shifts, wanted)


@check
def with_accelerate() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, shifts = model_and_shifts(torch.float64)
    prepared = accelerator.prepare(shifts)
    with mc.patch(model, prepared):
        for step in range(4):
            with accelerator.accumulate(prepared):
                accelerator.backward(loss_of(model, mine(IDS)))
            if step % 2:
                assert_averaged(shifts, whole())


@check
def in_the_model_of_another_wrapper() -> None:
    model, shifts = model_and_shifts(torch.float64)
    model.model.norm.weight.requires_grad_(True)
    outer = DistributedDataParallel(model)
    with mc.patch(model, shifts), pytest.raises(mc.PatchStateError, match="does not hold the shifts"):
        loss_of(outer, mine(IDS))
    with mc.patch(model, DistributedDataParallel(shifts)):
        for _ in range(2):
            loss_of(outer, mine(IDS)).backward()
            assert_averaged(shifts, whole())


@check
def held_by_what_is_wrapped() -> None:
    model, shifts = model_and_shifts(torch.float64)
    model.shifts = shifts
    outer = DistributedDataParallel(model)
    with warnings.catch_warnings(), mc.patch(model, shifts):
        warnings.simplefilter("error")
        for _ in range(2):
            loss_of(outer, mine(IDS)).backward()
            assert_averaged(shifts, whole())


@check
def no_wrapper_is_told_once() -> None:
    model, shifts = model_and_shifts(torch.float64)
    for expected in ([UserWarning], []):
        with warnings.catch_warnings(record=True) as told, mc.patch(model, shifts):
            warnings.simplefilter("always")
            loss_of(model, mine(IDS))
        assert [one.category for one in told] == expected
        assert all("nothing is seen to average" in str(one.message) for one in told)


def sharded(model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)


SHARDED_RUNS = not torch.__version__.startswith("2.6.")  # torch 2.6 runs a sharded model on a GPU alone


@check
def in_a_sharded_model() -> None:
    model, shifts = model_and_shifts(torch.float64)
    sharded(model)
    with mc.patch(model, DistributedDataParallel(shifts)):
        for _ in range(2 if SHARDED_RUNS else 0):
            loss_of(model, mine(IDS)).backward()
            assert_averaged(shifts, whole())
    other = copy.deepcopy(shifts)
    fully_shard(shifts, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(mc.PatchStateError, match="a stack's forward is never called: put fully_shard around a module"):
        mc.patch(model, shifts)
    for name, x in other.heads.named_parameters():
        owner, _, last = name.rpartition(".")
        x = distribute_tensor(x.detach(), init_device_mesh("cpu", (2,)), [Replicate()])
        setattr(other.heads.get_submodule(owner), last, nn.Parameter(x))
    model, _ = model_and_shifts(torch.float64)
    with mc.patch(model, other):
        for gradients in (torch.enable_grad(), torch.no_grad()):
            with gradients, pytest.raises(mc.PatchStateError, match="sharded while the model runs: put fully_shard"):
                loss_of(model, IDS)


@check
def in_a_sharded_model_that_one_process_reads() -> None:
    folder = Path(os.environ["FOLDER"]) / "model"
    first = distributed.get_rank() == 0
    if first:
        model_and_shifts(torch.float64)[0].save_pretrained(folder)
    distributed.barrier()
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float64)
    model.eval().requires_grad_(False)
    weights = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).state_dict() if first else {}
    sharded(model)
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    shifts = mc.build_shifts(model, "mimic").double()
    shifts.load_state_dict(model_and_shifts(torch.float64)[1].state_dict())
    with mc.patch(model, DistributedDataParallel(shifts)):
        if SHARDED_RUNS:
            loss_of(model, mine(IDS)).backward()
            assert_averaged(shifts, whole())


@check
def held_by_a_sharded_model() -> None:
    """Its parameters are sharded too. Files are whole, whoever writes or reads them."""
    model, shifts = model_and_shifts(torch.float64)
    model.shifts = shifts
    before = copy.deepcopy(shifts.state_dict())
    sharded(model)
    optimizer = torch.optim.SGD(shifts.parameters(), lr=0.1)
    with warnings.catch_warnings(), mc.patch(model, shifts):
        warnings.simplefilter("error")
        for _ in range(2 if SHARDED_RUNS else 0):
            with torch.no_grad():
                loss_of(model, IDS)
            loss_of(model, mine(IDS)).backward()
            for x, exact in zip(shifts.parameters(), whole(), strict=True):
                torch.testing.assert_close(x.grad.full_tensor(), exact, rtol=1e-9, atol=1e-14)
            shifts.zero_grad()
        if SHARDED_RUNS:
            loss_of(model, mine(IDS)).backward()
            optimizer.step()
    now = get_model_state_dict(shifts, options=StateDictOptions(full_state_dict=True))
    for (name, x), gradient in zip(before.items(), whole(), strict=True):
        torch.testing.assert_close(now[name], x - 0.1 * gradient if SHARDED_RUNS else x, rtol=1e-9, atol=1e-14)
    plain, empty = model_and_shifts(torch.float64)
    folder = Path(os.environ["FOLDER"])
    mc.save_shifts(shifts, folder / f"{distributed.get_rank()}")
    loaded = mc.load_shifts(folder / f"{distributed.get_rank()}", plain)
    torch.testing.assert_close(loaded.state_dict(), now, rtol=0, atol=0)
    with pytest.raises(mc.PatchStateError, match="each process would push"):
        shifts.push_to_hub("user/name")
    if not SHARDED_RUNS:  # nor can its processes read and write alone
        return
    write({"shifts": shifts.state_dict()}, checkpoint_id=folder / "sharded")
    read({"shifts": empty.state_dict()}, checkpoint_id=folder / "sharded", no_dist=True)  # by one process
    torch.testing.assert_close(empty.state_dict(), now, rtol=0, atol=0)
    if distributed.get_rank() == 0:
        write({"shifts": before}, checkpoint_id=folder / "whole", no_dist=True)
    distributed.barrier()
    read({"shifts": shifts.state_dict()}, checkpoint_id=folder / "whole")
    now = get_model_state_dict(shifts, options=StateDictOptions(full_state_dict=True))
    torch.testing.assert_close(now, before, rtol=0, atol=0)


@check
def what_is_refused() -> None:
    model, shifts = model_and_shifts()
    with pytest.raises(mc.PatchStateError, match="static_graph"):
        mc.patch(model, DistributedDataParallel(shifts, static_graph=True))
    compiled = torch.compile(model, backend="eager")
    with (
        mc.patch(model, DistributedDataParallel(shifts)),
        pytest.raises(mc.PatchStateError, match="does not call the Distributed"),
    ):
        loss_of(compiled, mine(IDS))


@check
def with_lightning() -> None:
    if find_spec("lightning") is None:
        return
    model, shifts = model_and_shifts(torch.float64)
    before = copy.deepcopy(shifts.state_dict())
    if distributed.get_rank() == 1:  # its wrapper gives all processes the numbers of the first
        shifts[0].vector.data.zero_()
    with warnings.catch_warnings(), mc.patch(model, shifts):
        warnings.filterwarnings("error", message="nothing is seen to average")
        module = lightning_module(shifts, lambda ids: loss_of(model, ids))
        module.fit(mine(IDS), processes=2)
    for found, exact in zip(module.gradients[0], whole(), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-14)
    assert len(module.gradients) == 2
    both: list[Any] = [None, None]
    distributed.all_gather_object(both, shifts.state_dict())
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=0)
    assert all(not torch.equal(x, before[name]) for name, x in shifts.state_dict().items())
    assert all(name.startswith("shifts.") for name in module.state_dict())


@check
def with_the_trainer() -> None:
    model, shifts = model_and_shifts()
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        args = arguments(folder, gradient_accumulation_steps=2)
        trainer = RecordingTrainer(model=model, shifts=shifts, args=args, train_dataset=samples(16))
        trainer.train()
    both: list[Any] = [None, None]
    distributed.all_gather_object(both, trainer.steps[:-1])
    steps = [
        [(torch.cat([one[0], other[0]]), one[1]) for one, other in zip(*pair, strict=True)]
        for pair in zip(*both, strict=True)
    ]
    assert not torch.equal(*(batches[0][0][0] for batches in both))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gradients, alone = in_plain_torch(steps)
    for found, exact in zip(trainer.gradients, gradients, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(shifts.state_dict(), alone.state_dict(), rtol=1e-3, atol=1e-4)
