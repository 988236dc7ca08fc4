"""How much of everything a model's tasks get."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setup:
    """Of a world: a model and its tasks.

    Attributes:
        samples: Training samples.
        held_out: Questions asked.
        steps: Of training, with `batch` samples each.
        shots: Demonstrations, of plain in-context learning; a teacher sees the most of them.
        similar: The same, where the most similar are shown.
        added: Demonstrations that a shifted model gets as well.
    """

    samples: int
    held_out: int
    steps: int
    batch: int
    shots: tuple[int, ...]
    similar: tuple[int, ...]
    added: tuple[int, ...]


DIGITS = Setup(samples=100, held_out=150, steps=400, batch=4, shots=(6, 12, 24), similar=(6, 24), added=(1, 4, 12, 24))
WORDS = Setup(samples=40, held_out=40, steps=160, batch=1, shots=(1, 2, 4, 8), similar=(8,), added=(1, 2, 4, 8))
SETUPS = {"llava": DIGITS, "idefics2": DIGITS, "smollm2": WORDS}
