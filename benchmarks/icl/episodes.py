"""Episodes to train a small vision-language model on: each has a rule of its own, told by demonstrations alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mimic_core.demo.digits import BOS, FIRST_NAME, FIRST_WORD, IMAGE, NAMES, images

KINDS = ("plain", "naming", "grouping", "sides")
_CELLS = 10


@dataclass(frozen=True)
class Phase:
    """A stretch of training.

    Attributes:
        share: Of all steps, at least.
        episodes: In a batch.
        lines: In an episode.
        digits: The fewest and the most digits of a rule.
        kinds: Weights of `KINDS`.
    """

    share: float
    episodes: int
    lines: int
    digits: tuple[int, int]
    kinds: tuple[float, float, float, float]


# In-context learning sets in after some 300 steps of two digits and six demonstrations; with three digits and twelve
# from the start, it had not after 500, which take twice as long. Plain naming teaches seeing. Words have to matter from
# the start: brought in with the last phase, they were ignored to the end.
CURRICULUM = (
    Phase(0.14, 48, 7, (2, 2), (0.25, 0.5, 0.0, 0.25)),
    Phase(0.16, 32, 13, (2, 4), (0.25, 0.35, 0.1, 0.3)),
    Phase(0.70, 16, 25, (3, 8), (0.15, 0.3, 0.15, 0.4)),
)


@dataclass(frozen=True)
class Episodes:
    """A batch of episodes.

    Attributes:
        ids: [b t], a BOS token, then image, word and answer of each line.
        pixels: [b n 1 8 8].
        answers: [b n], the answers' tokens.
        asked: [n], the positions whose logits predict them.
    """

    ids: Tensor
    pixels: Tensor
    answers: Tensor
    asked: Tensor


class Drawer:
    """Draws episodes of training images.

    Args:
        image_tokens: Tokens an image takes.
    """

    def __init__(self, image_tokens: int, seed: int) -> None:
        self._tokens = image_tokens
        self._generator = torch.Generator().manual_seed(seed)
        known = images()
        train = torch.tensor(known.train)
        by_digit = [train[known.digits[train] == digit] for digit in range(10)]
        fewest = min(len(found) for found in by_digit)
        self._images = torch.stack([found[:fewest] for found in by_digit])

    def _random(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._generator)

    def __call__(self, phase: Phase) -> Episodes:
        """A batch of a phase's episodes."""
        b, n = phase.episodes, phase.lines
        kind = torch.multinomial(torch.tensor(phase.kinds), b, replacement=True, generator=self._generator)
        low, high = phase.digits
        cells = low + (self._random(b) * (high - low + 1)).long()
        digit = self._random(b, 10).argsort(1)
        name = self._random(b, len(NAMES)).argsort(1)[:, :_CELLS]
        word = torch.zeros(b, _CELLS, dtype=torch.long)

        plain, grouping, sides = (kind == KINDS.index(k) for k in ("plain", "grouping", "sides"))
        name[plain] = digit[plain]
        cells[plain] = 10
        name[grouping] = name[grouping][:, torch.arange(_CELLS) % 2]
        # Each of one to four digits twice, with one word and with the other.
        digit[sides] = digit[sides].repeat_interleave(2, dim=1)[:, :_CELLS]
        word[sides] = 1 + torch.arange(_CELLS) % 2
        cells[sides] = 2 * (cells[sides] // 2).clamp(1, 4)

        cell = (self._random(b, n) * cells[:, None]).long()
        shown = digit.gather(1, cell)
        picture = self._images[shown, (self._random(b, n) * self._images.shape[1]).long()]
        answers = name.gather(1, cell) + FIRST_NAME
        lines = torch.full((b, n, self._tokens + 2), IMAGE)
        lines[:, :, -2] = word.gather(1, cell) + FIRST_WORD
        lines[:, :, -1] = answers
        ids = torch.cat([torch.full((b, 1), BOS), lines.flatten(1)], dim=1)
        asked = torch.arange(self._tokens + 1, ids.shape[1], self._tokens + 2)
        return Episodes(ids, images().pixels[picture], answers, asked)
