"""Tasks for SmolLM2 with eyes: one or two handwritten digits, and an answer in words that a rule gives."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from mimic_core.demo.digits import images
from mimic_core.demo.prompts import Batch, Prompt, Prompter
from mimic_core.demo.tasks import DemoError, Task

from .smolvlm import IMAGE

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
FRENCH = ("zéro", "un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf")
MADE_UP = ("dax", "blick", "wug", "fep", "toma", "gorp", "zup", "lirp", "mib", "kard")


class Scene(NamedTuple):
    """The indices of one or two images, and the answer."""

    images: tuple[int, ...]
    answer: str


Rule = Callable[[Sequence[int]], str | None]
"""The answer for the digits that are shown; None where a task does not ask for them."""


def _made_up(draw: random.Random) -> Rule:
    names = draw.sample(MADE_UP, 10)
    return lambda d: names[d[0]]


def _position(draw: random.Random) -> Rule:
    wanted = draw.randrange(10)
    return lambda d: None if (d[0] == wanted) == (d[1] == wanted) else ("first" if d[0] == wanted else "second")


# By name: the number of pictures in a question, and the rule, which may be drawn.
PICTURE_TASKS: dict[str, tuple[int, Callable[[random.Random], Rule]]] = {
    "in-french": (1, lambda draw: lambda d: FRENCH[d[0]]),
    "next-number": (1, lambda draw: lambda d: NUMBERS[d[0] + 1]),
    "parity": (1, lambda draw: lambda d: ("even", "odd")[d[0] % 2]),
    "size": (1, lambda draw: lambda d: None if d[0] == 5 else ("smaller" if d[0] < 5 else "larger")),
    "made-up": (1, _made_up),
    "compare": (2, lambda draw: lambda d: None if d[0] == d[1] else ("first" if d[0] > d[1] else "second")),
    "count-even": (2, lambda draw: lambda d: NUMBERS[sum(x % 2 == 0 for x in d)]),
    "position": (2, _position),
}


def picture_task(name: str, samples: int, seed: int, held_out: int | None = None) -> Task[Scene]:
    """A task of `PICTURE_TASKS`. Its rule and images are drawn with `seed`; no held-out image is a training image.

    Raises:
        DemoError: there are fewer images than samples.
    """
    draw = random.Random(f"{name} {seed}")
    count, make = PICTURE_TASKS[name]
    rule, known = make(draw), images()

    def scenes(indices: Sequence[int], most: int) -> list[Scene]:
        found: list[Scene] = []
        for _ in range(20 if count > 1 else 1):
            order = draw.sample(indices, len(indices))
            for start in range(0, len(order) - count + 1, count):
                chosen = tuple(order[start : start + count])
                answer = rule([int(known.digits[i]) for i in chosen])
                if answer is not None:
                    found.append(Scene(chosen, answer))
            if len(found) >= most:
                return found[:most]
        return found

    train = scenes(known.train, samples)
    if len(train) < samples:
        raise DemoError(f"{samples} training samples were asked for; {name} has {len(train)}; choose fewer")
    return Task(name, train, scenes(known.held_out, len(known.held_out) if held_out is None else held_out))


class PicturePrompter(Prompter):
    """Writes a scene as its images, a colon, the answer and a newline, after demonstrations of the same form.

    Args:
        mark: What stands after the images, in place of the colon.
        noise: The standard deviation of what is added to the pixels of held-out images, which go from -1 to 1.
    """

    def __init__(self, tokenizer: Any, device: torch.device, mark: str = ":", noise: float = 0.0) -> None:
        super().__init__(tokenizer, device, mark)
        known = images()
        held_out = torch.zeros(len(known.pixels), 1, 1, 1)
        held_out[known.held_out] = noise
        drawn = torch.randn(known.pixels.shape, generator=torch.Generator().manual_seed(0))
        self._pixels = (known.pixels + held_out * drawn).to(device, torch.bfloat16)

    def __call__(self, scene: Any, demonstrations: Iterable[Any] = ()) -> Prompt:
        """The prompt of one scene."""
        shown = list(demonstrations)
        return replace(super().__call__(scene, shown), images=tuple(i for one in (*shown, scene) for i in one.images))

    def collate(self, prompts: Sequence[Prompt], left: bool = False) -> Batch:
        """A batch of prompts. Pad on the left for generation."""
        batch = super().collate(prompts, left)
        batch.inputs["pixel_values"] = self._pixels[[i for prompt in prompts for i in prompt.images]]
        return batch

    def _line(self, pair: Any) -> tuple[list[int], int]:
        tokens, answer = super()._line(("", pair.answer))
        return [IMAGE] * len(pair.images) + tokens, answer + len(pair.images)
