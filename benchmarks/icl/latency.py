"""What a method costs: time to the first token and per token; time and memory of a training step."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

import mimic_core as mc

from ..measure import Effort, interleaved, peak_memory
from .fit import Fitting, fit
from .methods import MAIN, TRAINED
from .plan import LEARNING
from .rows import Row
from .worlds import World, world

WHAT = ("first token", "token", "training step", "training memory")
TASKS = {"llava": "3-digits", "idefics2": "3-digits", "smollm2": "capitals", "smolvlm": "in-french"}
# Heads that act in one layer.
SINGLE = {"task-vector": "task_vector", "function-vector": "function_vector", "caa": "caa"}


@dataclass
class Contestant:
    """A model as a method leaves it, asked one question: `first` reads the prompt, `token` decodes one more."""

    model: Any
    inputs: dict[str, torch.Tensor]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    def first(self) -> Any:
        with torch.inference_mode():
            return self.model(**self.inputs, use_cache=True, logits_to_keep=1)

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Inside, `token` has a prompt behind it."""
        prompt = torch.ones_like(self.inputs["input_ids"], dtype=torch.bool)
        with self.around() as handle, handle.at(prompt=prompt) if isinstance(handle, mc.Handle) else nullcontext():
            out = self.first()
            self._cache, self._next = out.past_key_values, out.logits[:, -1:].argmax(-1)
            yield

    def token(self) -> Any:
        with torch.inference_mode():
            return self.model(input_ids=self._next, past_key_values=self._cache, use_cache=True)


def contestants(place: World) -> dict[str, Contestant]:
    """Every method, on the same question; what was learned doesn't matter to the time."""
    task = place.task(TASKS[place.name], max(place.shots, 16), 0, 8)
    draw = random.Random(0)

    def inputs(shots: int) -> dict[str, torch.Tensor]:
        prompt = place.prompter(task.held_out[0], draw.sample(task.train, shots)).question
        return place.prompter.collate([prompt]).inputs

    found = {"zero-shot": Contestant(place.model, inputs(0)), "icl": Contestant(place.model, inputs(place.shots))}
    middle = (len(mc.adapter_for(place.model).spec(place.model).layers) // 3,)
    stacks = {name: mc.build_shifts(place.model, head, layers=middle) for name, head in SINGLE.items()}
    stacks |= {name: mc.build_shifts(place.model, name) for name in ("mtv", "icv")}
    stacks |= {name: mc.build_shifts(place.model, head) for name in MAIN if (head := TRAINED[name].head) is not None}
    for name, shifts in stacks.items():
        found[name] = Contestant(place.model, inputs(0), partial(mc.patch, place.model, shifts))
    for name in ("lora", "mimic+lora"):
        fitted = fit(place, task, name, 0, steps=1)
        found[name] = Contestant(fitted.model, inputs(0), fitted.applied)
    return found


def rows(name: str, effort: Effort) -> list[Row]:
    """Rows of each method."""
    torch.set_num_threads(1)
    place = world(name)
    return [*_of_queries(place, effort), *of_training(place, effort)]


def of_training(place: World, effort: Effort) -> list[Row]:
    """Two rows a trained method: the time of a step, as a ratio within a round to LoRA's, and the memory it needs."""
    task = place.task(TASKS[place.name], place.setup.samples, 0, 8)
    runs = {method: Fitting(place, task, method, 0, steps=1000) for method in LEARNING}
    calls, around = {n: one.step for n, one in runs.items()}, {n: partial(_trained, one) for n, one in runs.items()}
    times, found = interleaved(calls, _clock, effort, around), []
    for method, run in runs.items():
        value, low, high = times.ratio(method, to="lora")
        of = Row(world=place.name, method=method)
        found.append(replace(of, what="training step", value=value, low=low, high=high))
        with _trained(run):
            found.append(replace(of, what="training memory", value=float(peak_memory(run.step, torch.device("cpu")))))
    return found


@contextmanager
def _trained(run: Fitting) -> Iterator[None]:
    """Inside, a step is not the first one after the model was patched, which takes longer."""
    with run.applied():
        run.step()
        yield


def _of_queries(place: World, effort: Effort) -> list[Row]:
    """Two rows a method: ratios within a round, to the unpatched model without demonstrations."""
    runs = contestants(place)
    calls = {
        "first token": ({n: c.first for n, c in runs.items()}, {n: c.around for n, c in runs.items()}),
        "token": ({n: c.token for n, c in runs.items()}, {n: c.decoding for n, c in runs.items()}),
    }
    found = []
    for what, (call, around) in calls.items():
        times = interleaved(call, _clock, effort, around)
        for method in runs:
            value, low, high = times.ratio(method, to="zero-shot")
            found.append(Row(what=what, world=place.name, method=method, value=value, low=low, high=high))
    return found


def _clock(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats
