"""Tasks for small vision-language models: handwritten digits with made-up names.

A line is an image, a word and an answer. The rule of a task gives the answer for each word and digit. The model can
learn the rule only from demonstrations.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from einops import rearrange
from sklearn.datasets import load_digits
from torch import Tensor, nn

from .prompts import Batch, Prompt, collate
from .tasks import DemoError, Task

PAD, BOS, EOS, IMAGE = range(4)
# "is" asks for the digit alone; with "left" and "right" the same digit has two answers.
WORDS = ("is", "left", "right")
# The usual names of the digits, then ten more names.
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", *"ABCDEFGHIJ")
VOCABULARY = ("<pad>", "<bos>", "<eos>", "<image>", *WORDS, *NAMES)
FIRST_WORD = VOCABULARY.index(WORDS[0])
FIRST_NAME = VOCABULARY.index(NAMES[0])
HELD_OUT_IMAGES = 500


class Line(NamedTuple):
    """The index of an image, and the tokens of the word and the answer that follow it."""

    image: int
    word: int
    answer: int


@dataclass(frozen=True)
class Images:
    """The digits of scikit-learn: 1,797 scans of 8 x 8 pixels from 43 writers.

    Attributes:
        pixels: [n 1 8 8], from -1 (paper) to 1 (ink).
        digits: [n], the digit in each image.
        train, held_out: Indices of a fixed random split. No model was trained on `held_out`.
    """

    pixels: Tensor
    digits: Tensor
    train: list[int]
    held_out: list[int]


@cache
def images() -> Images:
    """The images and their split."""
    data: Any = load_digits()
    pixels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    order = list(range(len(pixels)))
    random.Random(0).shuffle(order)
    return Images(pixels, torch.tensor(data.target), order[HELD_OUT_IMAGES:], order[:HELD_OUT_IMAGES])


Rule = dict[tuple[str, int], str]
"""The answer for each word and digit of a task."""


def naming(digits: int, draw: random.Random) -> Rule:
    """A rule that gives each of `digits` random digits its own name."""
    return dict(zip((("is", d) for d in draw.sample(range(10), digits)), draw.sample(NAMES, digits), strict=True))


def grouping(digits: int, draw: random.Random) -> Rule:
    """A rule that gives one of two names to each of `digits` random digits, half of them each."""
    chosen, two = draw.sample(range(10), digits), draw.sample(NAMES, 2)
    return {("is", digit): two[i % 2] for i, digit in enumerate(chosen)}


def sides(digits: int, draw: random.Random) -> Rule:
    """A rule in which the name of a digit also depends on the word, for `digits` random digits."""
    chosen, names = draw.sample(range(10), digits), draw.sample(NAMES, 2 * digits)
    return {(word, d): names[2 * i + k] for i, d in enumerate(chosen) for k, word in enumerate(WORDS[1:])}


RULES = {
    "3-digits": lambda draw: naming(3, draw),
    "8-digits": lambda draw: naming(8, draw),
    "2-groups": lambda draw: grouping(6, draw),
    "2-words": lambda draw: sides(4, draw),
}


def digit_task(name: str, samples: int, seed: int, held_out: int | None = None) -> Task[Line]:
    """A task of the kind `name`. Its rule, images and words are drawn with `seed`.

    Raises:
        DemoError: there are fewer images than samples.
    """
    draw = random.Random(f"{name} {seed}")
    rule, known = RULES[name](draw), images()
    by_digit = {digit: [word for word, d in rule if d == digit] for _, digit in rule}

    def lines(indices: Sequence[int]) -> list[Line]:
        shown = [(i, int(known.digits[i])) for i in draw.sample(indices, len(indices))]
        words = [(i, digit, draw.choice(by_digit[digit])) for i, digit in shown if digit in by_digit]
        return [Line(i, VOCABULARY.index(word), VOCABULARY.index(rule[word, digit])) for i, digit, word in words]

    train = lines(known.train)
    if samples > len(train):
        raise DemoError(
            f"{samples} training samples were asked for; {name} has {len(train)} images to train on; choose fewer"
        )
    return Task(name, train[:samples], lines(known.held_out)[:held_out])


class DigitPrompter:
    """Turns lines into tokens and images for a model of `models.load_digit_model`."""

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        self._many_per_sample = config.model_type == "idefics2"  # pixels [b n 1 8 8], not [b*n 1 8 8]
        self.image_tokens: int = (
            config.perceiver_config.resampler_n_latents if self._many_per_sample else config.image_seq_length
        )
        self._device = next(model.parameters()).device

    def __call__(self, line: Line, demonstrations: Iterable[Line] = ()) -> Prompt:
        """The prompt of one line."""
        lines = [*demonstrations, line]
        ids = [BOS]
        for shown in lines:
            ids += [IMAGE] * self.image_tokens + [shown.word, shown.answer]
        return Prompt(
            ids,
            query_at=len(ids) - self.image_tokens - 2,
            answer_at=len(ids) - 1,
            images=tuple(shown.image for shown in lines),
        )

    def collate(self, prompts: Sequence[Prompt], left: bool = False) -> Batch:
        """A batch of prompts with the same number of demonstrations."""
        batch = collate(prompts, self._device, left)
        pixels = torch.stack([images().pixels[list(prompt.images)] for prompt in prompts]).to(self._device)
        batch.inputs["pixel_values"] = pixels if self._many_per_sample else rearrange(pixels, "b n ... -> (b n) ...")
        return batch

    def decode(self, ids: Sequence[int]) -> str:
        """The answer at the beginning of the tokens, as text."""
        return VOCABULARY[ids[0]]
