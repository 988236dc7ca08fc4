"""What counts as different: paired bootstrap over seeds and questions, and mean ranks over tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES, LEVEL = 4000, 0.95
Answers = Mapping[int, Sequence[bool]]
"""Which questions were answered right, in order, by seed."""


@dataclass(frozen=True)
class Difference:
    """The mean difference of accuracy of two methods, and an interval around it."""

    mean: float
    low: float
    high: float

    @property
    def counts(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def difference(ones: Sequence[Answers], others: Sequence[Answers], resamples: int = RESAMPLES) -> Difference:
    """The accuracy of one method minus that of another, the mean over tasks, seeds and questions, task by task.

    In each resample, each task's seeds are drawn with replacement, and for each of them its questions. Both methods get
    the same draw, because they were asked the same questions with the same training samples.

    Raises:
        ValueError: the two have other tasks, seeds or numbers of questions.
    """
    if len(ones) != len(others) or not ones:
        raise ValueError(f"a difference needs the same tasks, found {len(ones)} and {len(others)}")
    generator = torch.Generator().manual_seed(0)
    means, drawn = [], []
    for one, other in zip(ones, others, strict=True):
        table = _table(one, other)
        means.append(table.mean())
        drawn.append(_resampled(table, resamples, generator))
    sorted_means = torch.stack(drawn).mean(0).sort().values
    cut = round((1 - LEVEL) / 2 * resamples)
    low, high = sorted_means[cut].item(), sorted_means[resamples - 1 - cut].item()
    return Difference(torch.stack(means).mean().item(), low, high)


def _table(one: Answers, other: Answers) -> Tensor:
    """One minus other, [seeds questions]."""
    if one.keys() != other.keys() or not one:
        raise ValueError(f"a difference needs the same seeds, found {sorted(one)} and {sorted(other)}")
    counts = {len(side[seed]) for side in (one, other) for seed in side}
    if len(counts) != 1:
        raise ValueError(f"a difference needs the same number of questions everywhere, found {sorted(counts)}")
    ours, theirs = (torch.tensor([list(side[seed]) for seed in sorted(one)]).double() for side in (one, other))
    return ours - theirs


def _resampled(table: Tensor, resamples: int, generator: torch.Generator) -> Tensor:
    """Means of resamples of [seeds questions]."""
    seeds, questions = table.shape
    chosen = torch.randint(seeds, (resamples, seeds), generator=generator)
    asked = torch.randint(questions, (resamples, seeds, questions), generator=generator)
    return table[chosen].gather(2, asked).mean((1, 2))


def ranks(accuracies: Sequence[float]) -> list[float]:
    """The rank of each, 1 for the highest; equals share the mean of their ranks."""
    return [sum(x > own for x in accuracies) + (sum(x == own for x in accuracies) + 1) / 2 for own in accuracies]


def packed(right: Sequence[bool]) -> str:
    """Answers as a short text: hexadecimal digits of four questions each, and how many questions there are."""
    bits = "".join("01"[one] for one in right)
    return f"{len(bits)}:{int('1' + bits, 2):x}"


def unpacked(text: str) -> list[bool]:
    """The answers in a text that `packed` made."""
    count, _, digits = text.partition(":")
    bits = f"{int(digits, 16):b}"[1:]
    if len(bits) != int(count):
        raise ValueError(f"{text!r} should hold {count} answers, found {len(bits)}")
    return [bit == "1" for bit in bits]
