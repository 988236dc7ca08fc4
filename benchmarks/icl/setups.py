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


# The decoder of SmolLM2 runs in bf16, which is two to three times as fast as fp32 where the CPU has such products.
DIGITS = Setup(samples=100, held_out=150, steps=400, batch=4, shots=(6, 12, 24), similar=(6, 24), added=(1, 4, 12, 24))
WORDS = Setup(samples=40, held_out=40, steps=80, batch=4, shots=(1, 4, 8), similar=(8,), added=(1, 8))
# With 100 samples, LIVE and LoRA answered 90 to 100% of a picture task: 40 leave something to tell apart.
PICTURES = Setup(samples=40, held_out=100, steps=80, batch=4, shots=(1, 4, 8), similar=(8,), added=(1, 8))
SETUPS = {"smolvlm": PICTURES, "smollm2": WORDS, "llava": DIGITS, "idefics2": DIGITS}
