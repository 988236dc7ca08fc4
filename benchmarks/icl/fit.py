"""Train shift heads, LoRA, or both on one task, in a plain loop."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import mimic_core as mc
from mimic_core.demo.experiment import warm_cosine
from mimic_core.demo.prompts import Batch
from mimic_core.demo.tasks import Task

from .methods import TRAINED, Method, rate
from .worlds import World

# Demonstrations whose mean output is what I2CL begins with.
TAKEN_FROM = 32


def without_cache(inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments of a forward whose logits are not wanted."""
    return {**inputs, "use_cache": False, "logits_to_keep": 1}


@dataclass(frozen=True)
class Fitted:
    """What a method made of a model.

    Attributes:
        model: The world's model, or a copy of it with LoRA inside.
        shifts: The stack to patch it with.
        parameters: How many numbers were learned or taken.
        seconds: What that took.
    """

    model: Any
    shifts: mc.ShiftStack | None
    parameters: int
    seconds: float

    def bytes(self) -> int:
        """The size of its files, as the library that trained it saves them."""
        with TemporaryDirectory() as folder:
            if self.shifts is not None:
                mc.save_shifts(self.shifts, Path(folder, "shifts"))
            if hasattr(self.model, "peft_config"):
                self.model.save_pretrained(Path(folder, "lora"))
            return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())

    @contextmanager
    def applied(self) -> Iterator[Any]:
        """The model as the method leaves it."""
        with nullcontext() if self.shifts is None else mc.patch(self.model, self.shifts):
            yield self.model


class Samples:
    """Training samples as batches: with demonstrations drawn anew from the other samples, and without."""

    def __init__(self, world: World, task: Task[Any], seed: int, shots: int | None = None) -> None:
        self._world, self._task = world, task
        self._shots = min(shots or world.shots, len(task.train) - 1)
        self._draw = random.Random(seed)
        self._order: list[int] = []

    def __call__(self) -> tuple[Batch, Batch]:
        """The next batch; samples come round in a new order each time."""
        pool, size = self._task.train, self._world.setup.batch
        while len(self._order) < size:
            self._order += self._draw.sample(range(len(pool)), len(pool))
        chosen, self._order = self._order[:size], self._order[size:]
        others = [[j for j in range(len(pool)) if j != i] for i in chosen]
        shown = [[pool[j] for j in self._draw.sample(other, self._shots)] for other in others]
        write, collate = self._world.prompter, self._world.prompter.collate
        with_demonstrations = [write(pool[i], demos) for i, demos in zip(chosen, shown, strict=True)]
        return collate(with_demonstrations), collate([write(pool[i]) for i in chosen])


class Fitting:
    """The training of a method on a task's training samples; the world's model is left as it was.

    Attributes:
        model: The world's, or a copy of it with LoRA inside.
        shifts: The stack that is trained, if there is one.
        learned: All parameters that are trained.

    Args:
        steps: How many there will be.
        chosen: In place of the learning rate that was chosen for it; of MimIC + LoRA, that of MimIC.
    """

    def __init__(
        self, world: World, task: Task[Any], name: str, seed: int, steps: int, chosen: float | None = None
    ) -> None:
        method = TRAINED[name]
        own = chosen or rate(method.like or name, world.name)
        rates = (own, rate("lora", world.name) if method.head is not None else own)
        torch.manual_seed(seed)
        model = world.model
        if method.lora:
            options = LoraConfig(r=method.lora, lora_alpha=2 * method.lora, target_modules=world.lora)
            model = get_peft_model(copy.deepcopy(model), options)
        shifts = None if method.head is None else mc.build_shifts(model, method.head)
        groups = _groups(model, shifts, rates)
        self.model, self.shifts, self._method = model, shifts, method
        self.learned = [p for group in groups for p in group["params"]]
        self._optimizer = torch.optim.AdamW(groups, weight_decay=1e-3)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: warm_cosine(step, steps))
        self._samples = Samples(world, task, seed, method.shots)
        self._handle: mc.Handle | None = None
        if shifts is not None and next(iter(shifts)).taken:
            shown = [world.prompter(sample) for sample in task.train[:TAKEN_FROM]]
            mc.estimate(model, shifts, [without_cache(world.prompter.collate(shown, left=True).inputs)])

    @contextmanager
    def applied(self) -> Iterator[Any]:
        """The model with what is learned so far: `step` needs it."""
        with nullcontext() if self.shifts is None else mc.patch(self.model, self.shifts) as self._handle:
            yield self.model

    def step(self) -> None:
        """One step, inside `applied`."""
        _loss(self.model, self._handle, self._method, *self._samples()).backward()
        nn.utils.clip_grad_norm_(self.learned, 1.0)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()


def fit(
    world: World,
    task: Task[Any],
    name: str,
    seed: int,
    steps: int,
    chosen: float | None = None,
    watch: Callable[[int, Any], None] | None = None,
) -> Fitted:
    """Train a method; `Fitting` says how.

    Args:
        watch: Called after each step with its number, from 1 on, and the model as it is then.
    """
    start = time.perf_counter()
    fitting = Fitting(world, task, name, seed, steps, chosen)
    with fitting.applied() as model:
        for number in range(1, steps + 1):
            fitting.step()
            if watch is not None:
                watch(number, model)
    parameters = sum(p.numel() for p in fitting.learned)
    return Fitted(model, fitting.shifts, parameters, time.perf_counter() - start)


def _groups(model: nn.Module, shifts: mc.ShiftStack | None, rates: tuple[float, float]) -> list[dict[str, Any]]:
    rate, lora_rate = rates
    groups: list[dict[str, Any]] = []
    if shifts is not None:
        named = list(shifts.named_parameters())
        # LIVE's scales learn twice as fast as its vectors, as published.
        scales = [p for name, p in named if name.rpartition(".")[2] == "scale"]
        others = [p for name, p in named if name.rpartition(".")[2] != "scale"]
        groups += [{"params": others, "lr": rate}, {"params": scales, "lr": 2 * rate}]
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    return [group for group in [*groups, {"params": adapters, "lr": lora_rate}] if group["params"]]


@contextmanager
def _teaching(model: Any, handle: mc.Handle | None) -> Iterator[None]:
    """The model as it was: without shifts and without LoRA."""
    with (
        torch.no_grad(),
        nullcontext() if handle is None else handle.disabled(),
        model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext(),
    ):
        yield


def _student(model: Any, handle: mc.Handle | None, method: Method, alone: Batch) -> Tensor:
    """The logits without demonstrations. Heads that act on a part of the prompt are told where it ends."""
    tells = handle is not None and method.head is not None and method.head.positions != "all"
    prompt = alone.inputs["attention_mask"].bool() & ~alone.answer_tokens
    with handle.at(prompt=prompt) if handle is not None and tells else nullcontext():
        return model(**alone.inputs, use_cache=False).logits


def _loss(model: Any, handle: mc.Handle | None, method: Method, shown: Batch, alone: Batch) -> Tensor:
    def lm(logits: Tensor) -> Tensor:
        return mc.losses.lm(logits, alone.inputs["input_ids"], alone.answer_tokens)

    if method.loss == "lm":
        return mc.losses.recipe("lm")(lm=lm(_student(model, handle, method, alone)))
    if method.loss == "kl":
        with _teaching(model, handle):
            teacher = model(**shown.inputs, use_cache=False).logits
        student = _student(model, handle, method, alone)
        kl = mc.losses.logits_kl(student, teacher, alone.before_answer, shown.before_answer)
        return mc.losses.recipe("live")(kl=kl, lm=lm(student))
    with _teaching(model, handle), mc.capture(model, method.site, where=shown.context_tokens) as teacher_states:
        model(**without_cache(shown.inputs))
    with mc.capture(model, method.site, where=alone.context_tokens) as student_states:
        logits = _student(model, handle, method, alone)
    if method.loss == "lorentz":
        align = mc.losses.layer_lorentz(student_states, teacher_states)
    else:
        align = mc.losses.layer_mse(student_states, teacher_states, weights=method.weights)
    # Half the likelihood, in MimIC and in Hyper-ICL.
    return mc.losses.recipe("mimic")(align=align, lm=lm(logits))
