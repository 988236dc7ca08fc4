"""Do a job: fit or take, then measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

import mimic_core as mc
from mimic_core.demo.prompts import Prompt

from .fit import Fitted, fit
from .methods import PROMPTED, TAKEN, TRAINED
from .rows import Job, Row
from .vectors import take
from .worlds import CHUNK, World, last_token, world


def do(job: Job) -> list[Row]:
    """The job's rows."""
    torch.set_num_threads(1)
    place = world(job.world)
    task = place.task(job.task, job.samples, job.seed, job.held_out)
    blank = Row(**asdict(job))

    def accuracy(model: Any, prompts: Sequence[Prompt], shots: int, **more: Any) -> Row:
        right = place.right(model, prompts)
        length = sum(prompt.answer_at for prompt in prompts) / len(prompts)
        return replace(blank, what="accuracy", shots=shots, value=sum(right) / len(right), prompt_tokens=length, **more)

    if job.method in PROMPTED:
        counts = {"zero-shot": (0,), "icl": place.setup.shots, "retrieval": place.setup.similar}[job.method]
        counts = [count for count in counts if count <= job.samples]
        rows = []
        for count in counts:
            prompts = place.prompts(task, count, job.seed, similar=job.method == "retrieval")
            rows.append(accuracy(place.model, prompts, count))
        if "distance" in job.also:
            rows += _distances(place, task, job.seed, blank, Fitted(place.model, None, 0, 0.0))
        return rows
    if job.method in TAKEN:
        fitted = take(place, task, job.method, job.seed)
    else:
        fitted = fit(place, task, TRAINED[job.method], job.seed, job.steps)
    cost = {"parameters": fitted.parameters, "seconds": fitted.seconds}
    rows = []
    with fitted.applied() as model:
        rows.append(accuracy(model, place.prompts(task, 0, job.seed), 0, **cost))
        if "shots" in job.also:
            for count in place.setup.added:
                rows.append(accuracy(model, place.prompts(task, count, job.seed), count))
    if "distance" in job.also:
        rows += _distances(place, task, job.seed, blank, fitted)
    return rows


@torch.no_grad()
def _distances(place: World, task: Any, seed: int, blank: Row, fitted: Fitted) -> list[Row]:
    """How far from the in-context states those without demonstrations are, layer by layer."""

    def states(model: Any, shots: int) -> dict[int, Tensor]:
        prompts = place.prompts(task, shots, seed)[:CHUNK]
        inputs = place.prompter.collate([prompt.question for prompt in prompts], left=True).inputs
        with mc.capture(model, "layer_out", where=last_token(inputs)) as seen:
            model(**inputs, use_cache=False, logits_to_keep=1)
        return dict(seen.states)

    shots = min(place.shots, len(task.train))
    wanted = states(place.model, shots)
    with fitted.applied() as model:
        found = states(model, 0)
    return [
        replace(
            blank, what="distance", shots=0, layer=layer, value=(found[layer] - wanted[layer]).norm(dim=1).mean().item()
        )
        for layer in wanted
    ]
