"""The rows of a comparison, to be asked for numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from statistics import mean, stdev

from .methods import LABELS
from .rows import Row
from .setups import SETUPS

MODELS = {
    "llava": "Digits, Llava (SigLIP and Qwen2)",
    "idefics2": "Digits, Idefics2",
    "smollm2": "Words, SmolLM2-135M-Instruct",
}


class Results:
    """Rows, to be asked for numbers.

    A gap is what demonstrations add: accuracy with the most of them, drawn at random, less accuracy without.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)
        self.worlds = [name for name in MODELS if any(row.world == name for row in self.rows)]

    def tasks(self, world: str) -> list[str]:
        """In the order they were planned in."""
        return list(dict.fromkeys(row.task for row in self.rows if row.world == world and row.task))

    def most_shots(self, world: str) -> int:
        found = [row.shots or 0 for row in self.rows if row.world == world and row.method == "icl"]
        return max(found, default=0)

    def of(
        self, world: str, task: str, method: str, shots: int = 0, samples: int | None = None, what: str = "accuracy"
    ) -> dict[int, Row]:
        """By seed."""
        samples = samples or SETUPS[world].samples
        wanted = (world, task, method, shots, samples, what)
        return {
            row.seed or 0: row
            for row in self.rows
            if (row.world, row.task, row.method, row.shots, row.samples, row.what) == wanted and row.layer is None
        }

    def accuracies(self, world: str, task: str, method: str, shots: int = 0, samples: int | None = None) -> list[float]:
        return [row.value or 0.0 for row in self.of(world, task, method, shots, samples).values()]

    def shares(self, world: str, task: str, method: str, shots: int = 0) -> list[float]:
        """Of the gap, seed by seed; seeds whose gap is under a tenth have none."""
        base = self.of(world, task, "zero-shot")
        full = self.of(world, task, "icl", self.most_shots(world))
        found = []
        for seed, row in self.of(world, task, method, shots).items():
            if seed in base and seed in full:
                low, high = base[seed].value or 0.0, full[seed].value or 0.0
                if high - low >= 0.1:
                    found.append(((row.value or 0.0) - low) / (high - low))
        return found

    def mean_share(self, world: str, method: str, shots: int = 0, tasks: Sequence[str] = ()) -> str:
        """Mean over tasks, and the spread of that mean over seeds."""
        by_task = [self.shares(world, task, method, shots) for task in tasks or self.tasks(world)]
        by_task = [shares for shares in by_task if shares]
        if not by_task:
            return "-"
        seeds = min(map(len, by_task))
        return spread([mean(shares[i] for shares in by_task) for i in range(seeds)])

    def lines(self, world: str, methods: Sequence[str]) -> Iterator[tuple[str, str, int]]:
        """(label, method, shots) of the lines that have rows."""
        for method in methods:
            setup = SETUPS[world]
            for shots in {"icl": setup.shots, "retrieval": setup.similar}.get(method, (0,)):
                if any(self.accuracies(world, task, method, shots) for task in self.tasks(world)):
                    name = LABELS[method] if shots != 1 else LABELS[method].replace("demonstrations", "demonstration")
                    yield (f"{shots} {name}" if shots else name), method, shots

    def one(self, world: str, method: str, name: str, shots: int = 0) -> float | None:
        """Mean of a column over tasks and seeds."""
        rows = [row for task in self.tasks(world) for row in self.of(world, task, method, shots).values()]
        values = [value for row in rows if (value := getattr(row, name)) is not None]
        return mean(values) if values else None

    def time(self, world: str, method: str, what: str) -> str:
        """Median over the unpatched model's without demonstrations."""
        found = [row for row in self.rows if (row.world, row.method, row.what) == (world, method, what)]
        return f"{found[0].value or 0:.2f}" if found else "-"


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation, in percent."""
    middle = f"{mean(values) * 100:.0f}"
    return f"{middle} ± {stdev(values) * 100:.0f}" if len(values) > 1 else middle
