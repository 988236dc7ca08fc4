"""Engines that run in two processes: each has half of the rows, with tensor parallelism half of the model."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import mimic_core as mc
from tests.support.training import lightning_module
from tests.support.two_processes import begin as begin_group
from tests.support.two_processes import mine, sharded

from .subject import IDS, alone, engine, learned, logits_of, quiet, run, same, subject


def begin(folder: Path) -> tuple[Path]:
    quiet()
    begin_group(folder)
    if distributed.get_rank() == 0:
        subject("live")[0].save_pretrained(folder / "model")
    distributed.barrier()
    return (folder,)


def halves(model: nn.Module, shifts: mc.ShiftStack, head: str, runs: nn.Module | None = None) -> None:
    """Logits are those of the own rows, gradients those of all."""
    wanted = alone(head)
    for _ in range(2):  # the first one is another for DistributedDataParallel
        found = run(runs or model, shifts, mine(IDS))
        found = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in found]
        same(found, [mine(wanted[0]), *wanted[1:]])


@engine("DistributedDataParallel of the stack", 2)
def ddp_of_the_stack(head: str) -> None:
    model, shifts = subject(head)
    with mc.patch(model, DistributedDataParallel(shifts)):
        halves(model, shifts, head)


@engine("DistributedDataParallel of a model that holds the stack", 2)
def ddp_of_both(head: str) -> None:
    model, shifts = subject(head)
    model.shifts = shifts
    with mc.patch(model, shifts):
        halves(model, shifts, head, runs=DistributedDataParallel(model))


@engine("DistributedDataParallel of a model with LoRA, without the stack", 2)
def ddp_without_the_stack(head: str) -> None:
    model, shifts = subject(head)
    lora: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).double()
    with mc.patch(model, shifts):
        halves(model, shifts, head, runs=DistributedDataParallel(lora))


@engine("accelerate, `prepare(shifts)`", 2)
def accelerated(head: str) -> None:
    model, shifts = subject(head)
    with mc.patch(model, Accelerator(cpu=True).prepare(shifts)):
        halves(model, shifts, head)


@engine("Lightning, `ddp`", 2)
def lightning(head: str) -> None:
    import_module("lightning")
    model, shifts = subject(head)
    with mc.patch(model, shifts):
        module = lightning_module(shifts, lambda ids: logits_of(model, ids).square().mean())
        module.fit(mine(IDS), processes=2)
    same(module.gradients[0], alone(head)[1:])


@engine("FSDP2 of the model, DistributedDataParallel of the stack", 2)
def fsdp_of_the_model(head: str) -> None:
    model, shifts = subject(head)
    sharded(model)
    assert all(hasattr(x, "device_mesh") for x in model.parameters())
    with mc.patch(model, DistributedDataParallel(shifts)):
        halves(model, shifts, head)


@engine("FSDP2 of a model that holds the stack", 2, cannot="fully_shard doesn't support scalar parameters")
def fsdp_of_both(head: str) -> None:
    model, shifts = subject(head)
    model.shifts = shifts
    sharded(model)
    assert all(hasattr(x, "device_mesh") for x in shifts.parameters())
    with mc.patch(model, shifts):
        halves(model, shifts, head)


@engine('tensor parallel, `tp_plan="auto"`', 2)
def tensor_parallel(head: str) -> None:
    model, shifts = subject(head)
    folder = Path(os.environ["FOLDER"]) / "model"
    split = type(model).from_pretrained(folder, tp_plan="auto", dtype=torch.float64)
    assert split.tp_size == 2
    same(learned(split.eval().requires_grad_(False), shifts), alone(head))
