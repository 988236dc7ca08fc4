"""Task Vector, Function Vector, MTV, ICV and CAA: taken from the model's own activations, put into shift heads."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import mimic_core as mc
from mimic_core.demo.prompts import Prompt
from mimic_core.demo.tasks import Task

from .fit import Fitted, without_cache
from .methods import MIDDLE, rate
from .worlds import World, last_token

# Prompts to average over, prompts to see an effect on, training samples to choose the layer with, pairs of ICV.
MEAN_OVER, EFFECT_ON, CHOOSE_ON, PAIRS = 16, 4, 24, 32
# Attention heads whose effect is measured, the likeliest by the gradient, and how many of them make the vector.
CANDIDATES, HEADS = 20, 10
# Of MTV's choice of attention heads: steps, choices in each, and samples that a choice is judged by.
CHOICES = {"steps": 15, "samples": 4}
JUDGED_BY = 16
DEMONSTRATION_CHOICES = 8

State = Callable[[Tensor, mc.At], Tensor | None]


class Asked:
    """Training samples as questions, ready to run; `targets` are the first tokens of their answers."""

    def __init__(self, world: World, prompts: Sequence[Prompt]) -> None:
        self._model = world.model
        self.inputs = world.prompter.collate([prompt.question for prompt in prompts], left=True).inputs
        self.targets = torch.tensor([prompt.ids[prompt.answer_at] for prompt in prompts])

    def _logits(self) -> Tensor:
        return self._model(**self.inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float()

    def log_likelihood(self) -> Tensor:
        """Of the first answer tokens, [b], in nats."""
        return self._of_targets(self._logits())

    def _of_targets(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(1, self.targets[:, None])[:, 0]

    @torch.no_grad()
    def score(self) -> tuple[float, float]:
        """How many answers begin right; between equals, the likelihood decides."""
        logits = self._logits()
        right = (logits.argmax(-1) == self.targets).sum().item()
        return right, self._of_targets(logits).mean().item()


class Taker:
    """Takes vectors from a world's model on one task."""

    def __init__(self, world: World, task: Task[Any], seed: int) -> None:
        self._world, self._task = world, task
        self._model, self._draw = world.model, random.Random(seed)
        self._alone = Asked(world, [world.prompter(sample) for sample in task.train[:CHOOSE_ON]])

    def _shown(self, count: int, shuffled: bool = False) -> Asked:
        """Questions with demonstrations, whose answers may be shuffled among them."""
        return self._pairs(count, shuffled)[0]

    def _pairs(self, count: int, shuffled: bool = False) -> tuple[Asked, Asked]:
        """Questions with demonstrations, and the same questions without."""
        prompts, alone = [], []
        for _ in range(count):
            question, *shown = self._draw.sample(
                self._task.train, min(self._world.shots, len(self._task.train) - 1) + 1
            )
            if shuffled:
                answers = self._draw.sample([sample[-1] for sample in shown], len(shown))
                shown = [_answered(sample, answer) for sample, answer in zip(shown, answers, strict=True)]
            prompts.append(self._world.prompter(question, shown))
            alone.append(self._world.prompter(question))
        return Asked(self._world, prompts), Asked(self._world, alone)

    def _taken(self, head: str) -> mc.ShiftStack:
        """Means at the end of a prompt."""
        shifts = mc.build_shifts(self._model, head)
        mc.estimate(self._model, shifts, [without_cache(self._shown(MEAN_OVER).inputs)])
        return shifts

    def _means(self) -> dict[int, Tensor]:
        """The mean output of each attention head at the end of a prompt."""
        return {head.layer.index: head.get_parameter("vector").detach() for head in self._taken("mtv")}

    def task_vector(self) -> mc.ShiftStack:
        """The mean state at the end of a prompt, at the layer where it answers training questions best."""
        return self._best("task_vector", {head.layer.index: head.state_dict() for head in self._taken("task_vector")})

    def mtv(self, rate: float) -> mc.ShiftStack:
        """Mean outputs of attention heads at the end of a prompt, in the heads where they raise the likelihood."""
        shifts = self._taken("mtv")
        asked = Asked(self._world, [self._world.prompter(sample) for sample in self._task.train[:JUDGED_BY]])
        generator = torch.Generator().manual_seed(self._draw.randrange(2**31))
        with mc.patch(self._model, shifts):
            mc.choose_heads(shifts, lambda: -asked.log_likelihood().mean(), rate=rate, generator=generator, **CHOICES)
        return shifts

    def icv(self, scale: float) -> mc.ShiftStack:
        """The first principal component of what is different after the answer of a training sample."""
        shifts = mc.build_shifts(self._model, "icv", scale=scale)
        prompts = [self._world.prompter(sample) for sample in self._task.train[:PAIRS]]
        collate = self._world.prompter.collate
        before, after = (collate(p, left=True).inputs for p in ([prompt.question for prompt in prompts], prompts))
        mc.estimate(self._model, shifts, [(without_cache(before), without_cache(after))])
        return shifts

    def caa(self, scale: float) -> mc.ShiftStack:
        """What demonstrations add at the end of a question, at the layer where it answers training questions best.

        In the paper, the two texts differ in a behaviour. Here it is to answer as shown.
        """
        options = {"scale": scale, "positions": "prompt_end"}
        shifts = mc.build_shifts(self._model, "caa", **options)
        shown, alone = self._pairs(MEAN_OVER)
        mc.estimate(self._model, shifts, [(without_cache(alone.inputs), without_cache(shown.inputs))])
        return self._best("caa", {head.layer.index: head.state_dict() for head in shifts}, **options)

    def function_vector(self) -> mc.ShiftStack:
        """What the attention heads that carry the task add to the residual stream, at the layer where it works best."""
        means = self._means()
        chosen = self._heads(means)
        vector = self._written(means, chosen) - self._written(means, [])
        return self._best("function_vector", {layer: {"vector": vector} for layer in means})

    def _best(self, head: str, values: dict[int, dict[str, Any]], **options: Any) -> mc.ShiftStack:
        def stack(layer: int) -> mc.ShiftStack:
            shifts = mc.build_shifts(self._model, head, layers=(layer,), **options)
            with torch.no_grad():
                for name, value in values[layer].items():
                    shifts[layer].get_parameter(name).copy_(torch.as_tensor(value))
            return shifts

        def score(layer: int) -> tuple[float, float]:
            with mc.patch(self._model, stack(layer)):
                return self._alone.score()

        return stack(max(values, key=score))

    def _heads(self, means: dict[int, Tensor]) -> list[tuple[int, int]]:
        """The attention heads whose mean output, put into prompts with shuffled answers, helps most.

        The linear estimate of that effect chooses whom it is measured for.
        """
        asked = self._shown(EFFECT_ON, shuffled=True)
        estimate = self._estimates(asked, means)
        order = sorted(estimate, key=lambda place: -estimate[place])[:CANDIDATES]
        effects = {}
        for layer, head in order:
            with torch.no_grad(), mc.hook(self._model, "attn_heads", _one_head(means[layer], head), layers=[layer]):
                effects[layer, head] = asked.log_likelihood().exp().mean().item()
        most = min(HEADS, len(estimate) // 4)
        return sorted(effects, key=lambda place: -effects[place])[:most]

    def _estimates(self, asked: Asked, means: dict[int, Tensor]) -> dict[tuple[int, int], float]:
        seen: dict[int, tuple[Tensor, Tensor]] = {}

        def watch(value: Tensor, at: mc.At) -> Tensor:
            move = torch.zeros_like(value, requires_grad=True)
            seen[at.layer] = value.detach()[:, -1], move
            return value + move

        with mc.hook(self._model, "attn_heads", watch):
            asked.log_likelihood().exp().mean().backward()
        found = {}
        for layer, (value, move) in seen.items():
            assert move.grad is not None
            effect = ((means[layer] - value) * move.grad[:, -1]).sum((0, 2))
            found |= {(layer, head): x for head, x in enumerate(effect.tolist())}
        return found

    @torch.no_grad()
    def _written(self, means: dict[int, Tensor], chosen: Sequence[tuple[int, int]]) -> Tensor:
        """What attention writes to the residual stream, over all layers, when only the chosen heads have an output."""

        def only(value: Tensor, at: mc.At) -> Tensor:
            value = torch.zeros_like(value)
            for layer, head in chosen:
                if layer == at.layer:
                    value[:, -1, head] = means[layer][head]
            return value

        # One prompt, whatever it says: nothing of it is left. It may have several pictures.
        inputs = Asked(self._world, [self._world.prompter(self._task.train[0])]).inputs
        with mc.hook(self._model, "attn_heads", only), mc.capture(self._model, "attn_out", last_token(inputs)) as seen:
            self._model(**inputs, use_cache=False, logits_to_keep=1)
        return torch.stack([states[0] for states in seen.states.values()]).sum(0)


def _one_head(mean: Tensor, head: int) -> State:
    def put(value: Tensor, at: mc.At) -> Tensor:
        value = value.clone()
        value[:, -1, head] = mean[head]
        return value

    return put


def _answered(sample: Any, answer: Any) -> Any:
    return (sample[0], answer) if type(sample) is tuple else sample._replace(answer=answer)


def best_demonstrations(world: World, task: Task[Any], shots: int, seed: int) -> list[Any]:
    """Of some random choices of demonstrations, the one with which the other training samples are answered best."""
    draw, found = random.Random(seed), []
    for _ in range(DEMONSTRATION_CHOICES):
        chosen = set(draw.sample(range(len(task.train)), min(shots, len(task.train) - 1)))
        shown = [task.train[i] for i in chosen]
        others = [sample for i, sample in enumerate(task.train) if i not in chosen][:JUDGED_BY]
        found.append((Asked(world, [world.prompter(sample, shown) for sample in others]).score(), shown))
    return max(found, key=lambda one: one[0])[1]


def take(world: World, task: Task[Any], method: str, seed: int, chosen: float | None = None) -> Fitted:
    """What is taken from the activations of a task's samples, and what it took.

    Args:
        chosen: In place of what was chosen for the method.
    """
    start = time.perf_counter()
    make = getattr(Taker(world, task, seed), method.replace("-", "_"))
    shifts = make(chosen or rate(method, world.name)) if method in MIDDLE else make()
    size = sum(head.get_parameter("vector").numel() for head in shifts)
    return Fitted(world.model, shifts, size, time.perf_counter() - start)
