"""Do a job: fit or take, then measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

import mimic_core as mc
from mimic_core.demo.prompts import Prompt
from mimic_core.demo.tasks import Task

from .fit import Fitted, fit
from .methods import PROMPTED, TAKEN
from .rows import Job, Row, accuracy_of
from .stats import packed
from .vectors import best_demonstrations, take
from .worlds import CHUNK, World, last_token, world

# How often accuracy is looked at during training.
LOOKS = 8


def do(job: Job) -> list[Row]:
    """The job's rows."""
    torch.set_num_threads(1)
    place = world(job.world)
    task = place.task(job.task, job.samples, job.seed, job.held_out)
    blank = Row(**asdict(job))

    def accuracy(model: Any, prompts: Sequence[Prompt], shots: int, other: str = "", **more: Any) -> Row:
        right = place.right(model, prompts, other)
        length = sum(prompt.answer_at for prompt in prompts) / len(prompts)
        found = {"value": sum(right) / len(right), "right": packed(right), "prompt_tokens": length, **more}
        return replace(blank, what=accuracy_of(other), shots=shots, **found)

    def asked_otherwise(model: Any, shots: int) -> list[Row]:
        others = place.others if "others" in job.also else ()
        return [accuracy(model, place.prompts(task, shots, job.seed, other=one), shots, one) for one in others]

    if job.method in PROMPTED:
        counts = {
            "zero-shot": (0,),
            "icl": place.setup.shots,
            "best-of": (place.shots,),
            "retrieval": place.setup.similar,
        }[job.method]
        counts = [count for count in counts if count <= job.samples]
        rows = []
        for count in counts:
            if job.method == "best-of":
                shown = best_demonstrations(place, task, count, job.seed)
                prompts = [place.prompter(sample, shown) for sample in task.held_out]
            else:
                prompts = place.prompts(task, count, job.seed, similar=job.method == "retrieval")
            rows.append(accuracy(place.model, prompts, count))
        rows += asked_otherwise(place.model, max(counts))
        if "distance" in job.also:
            rows += _distances(place, task, job, blank, Fitted(place.model, None, 0, 0.0))
        return rows
    rows = []
    plain = place.prompts(task, 0, job.seed)

    def watch(step: int, model: Any) -> None:
        if step < job.steps and step % max(1, job.steps // LOOKS) == 0:
            rows.append(accuracy(model, plain, 0, after=step))

    if job.method in TAKEN:
        fitted = take(place, task, job.method, job.seed, job.rate)
    else:
        fitted = fit(place, task, job.method, job.seed, job.steps, job.rate, watch if "steps" in job.also else None)
    cost: dict[str, Any] = {"parameters": fitted.parameters, "bytes": fitted.bytes()}
    with fitted.applied() as model:
        rows.append(accuracy(model, plain, 0, **cost))
        rows += asked_otherwise(model, 0)
        if "shots" in job.also:
            for count in place.setup.added:
                rows.append(accuracy(model, place.prompts(task, count, job.seed), count))
    if "distance" in job.also:
        rows += _distances(place, task, job, blank, fitted)
    return rows


@torch.no_grad()
def _states(place: World, model: Any, task: Task[Any], seed: int, shots: int) -> dict[int, Tensor]:
    """Hidden states at the end of questions with so many demonstrations, layer by layer."""
    prompts = place.prompts(task, shots, seed)[:CHUNK]
    inputs = place.prompter.collate([prompt.question for prompt in prompts], left=True).inputs
    with mc.capture(model, "layer_out", where=last_token(inputs)) as seen:
        model(**inputs, use_cache=False, logits_to_keep=1)
    return dict(seen.states)


@cache
def _in_context(world_name: str, task_name: str, samples: int, seed: int, held_out: int) -> dict[int, Tensor]:
    """What every method's states are compared with: seven seconds in SmolLM2, the same for all of them."""
    place = world(world_name)
    task = place.task(task_name, samples, seed, held_out)
    return _states(place, place.model, task, seed, min(place.shots, len(task.train)))


def _distances(place: World, task: Task[Any], job: Job, blank: Row, fitted: Fitted) -> list[Row]:
    """How far from the in-context states those without demonstrations are, layer by layer."""
    wanted = _in_context(job.world, job.task, job.samples, job.seed, job.held_out)
    with fitted.applied() as model:
        found = _states(place, model, task, job.seed, 0)
    return [
        replace(
            blank, what="distance", shots=0, layer=layer, value=(found[layer] - wanted[layer]).norm(dim=1).mean().item()
        )
        for layer in wanted
    ]
