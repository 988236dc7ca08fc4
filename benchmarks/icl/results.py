"""The rows of a comparison, to be asked for numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from statistics import mean, stdev

from .methods import LABELS
from .plan import REFERENCE
from .rows import Job, Row
from .setups import SETUPS
from .stats import Answers, Difference, difference, ranks, unpacked

MODELS = {
    "smolvlm": "Pictures, SmolLM2-135M-Instruct with eyes",
    "llava": "Digits, Llava (SigLIP and Qwen2)",
    "idefics2": "Digits, Idefics2",
    "smollm2": "Words, SmolLM2-135M-Instruct",
}


class Results:
    """Rows, to be asked for numbers.

    A gap is what demonstrations add: accuracy with the most of them, drawn at random, less accuracy without.

    Args:
        jobs: All that were planned. Without them, what has rows counts as all.
    """

    def __init__(self, rows: Iterable[Row], jobs: Iterable[Job] = ()) -> None:
        self.rows = list(rows)
        self.worlds = [name for name in MODELS if any(row.world == name for row in self.rows)]
        self._cells: dict[tuple[str, ...], dict[int, Row]] = {}
        self._planned: dict[tuple[str, ...], set[int]] = {}
        self._steps: dict[tuple[str, ...], dict[int, dict[int, float]]] = {}
        for row in self.rows:
            if row.after is not None:
                steps = self._steps.setdefault((row.world, row.task, row.method), {})
                steps.setdefault(row.seed or 0, {})[row.after] = row.value or 0.0
            elif row.layer is None and row.task:
                key = (row.world, row.task, row.method, str(row.shots or 0), str(row.samples), row.what)
                self._cells.setdefault(key, {})[row.seed or 0] = row
                self._planned.setdefault((*key[:3], key[4]), set()).add(row.seed or 0)
        self.jobs = set(jobs)
        for job in self.jobs:
            self._planned.setdefault((job.world, job.task, job.method, str(job.samples)), set()).add(job.seed)

    def tasks(self, world: str) -> list[str]:
        """Those that have rows or were planned, in the order of the rows, then by name."""
        seen = dict.fromkeys(row.task for row in self.rows if row.world == world and row.task)
        return [*seen, *sorted({job.task for job in self.jobs if job.world == world} - set(seen))]

    def most_shots(self, world: str) -> int:
        found = [row.shots or 0 for row in self.rows if row.world == world and row.method == "icl"]
        return max(found, default=0)

    def of(
        self, world: str, task: str, method: str, shots: int = 0, samples: int | None = None, what: str = "accuracy"
    ) -> dict[int, Row]:
        """By seed."""
        samples = samples or SETUPS[world].samples
        return dict(self._cells.get((world, task, method, str(shots), str(samples), what), {}))

    def planned(self, world: str, task: str, method: str, samples: int | None = None) -> int:
        """How many seeds there are to be."""
        return len(self._planned.get((world, task, method, str(samples or SETUPS[world].samples)), ()))

    def whole(self, world: str, method: str, shots: int = 0, tasks: Sequence[str] = ()) -> bool:
        """Whether every seed of every planned task has been measured; a task that the method isn't asked has none."""
        asked = [task for task in tasks or self.tasks(world) if self.planned(world, task, method)]
        return bool(asked) and all(
            len(self.of(world, task, method, shots)) == self.planned(world, task, method) for task in asked
        )

    def cell(
        self, world: str, task: str, method: str, shots: int = 0, samples: int | None = None, what: str = "accuracy"
    ) -> str:
        """Mean and spread over seeds, and how many of them there are, if some are missing. Bold: differs."""
        found = self.accuracies(world, task, method, shots, samples, what)
        wanted = self.planned(world, task, method, samples)
        if not found:
            return "-"
        differs = None if method == REFERENCE else self.difference(world, method, [task], shots, samples, what)
        text = spread(found) if differs is None or not differs.counts else f"**{spread(found)}**"
        return text if len(found) == wanted else f"{text} ({len(found)} of {wanted})"

    def difference(
        self,
        world: str,
        method: str,
        tasks: Sequence[str],
        shots: int = 0,
        samples: int | None = None,
        what: str = "accuracy",
    ) -> Difference | None:
        """To the reference, on the same questions; None if a seed or a question's answer is missing."""
        sides: tuple[list[Answers], list[Answers]] = ([], [])
        for task in tasks:
            for side, (name, count) in zip(sides, ((method, shots), (REFERENCE, 0)), strict=True):
                found = self.of(world, task, name, count, samples, what)
                if not found or len(found) < self.planned(world, task, name, samples):
                    return None
                if not all(row.right for row in found.values()):
                    return None
                side.append({seed: unpacked(row.right) for seed, row in found.items()})
            if sides[0][-1].keys() != sides[1][-1].keys():
                return None
        return difference(*sides)

    def ranks(self, world: str, methods: Sequence[str]) -> dict[str, float]:
        """The mean rank over tasks of the methods that were planned; empty if a part of one of them is missing."""
        tasks = self.tasks(world)
        there = [m for m in methods if any(self.planned(world, task, m) for task in tasks)]
        if not there or not all(self.whole(world, m) and all(self.planned(world, t, m) for t in tasks) for m in there):
            return {}
        of_task = [ranks([mean(self.accuracies(world, task, method)) for method in there]) for task in tasks]
        return {method: mean(one[i] for one in of_task) for i, method in enumerate(there)}

    def steps_to(self, world: str, task: str, method: str, share: float = 0.95) -> list[int | None]:
        """By seed: the first step that was looked at with this share of the demonstrations' accuracy; None: never."""
        full, last = self.of(world, task, "icl", self.most_shots(world)), self.of(world, task, method)
        found = []
        for seed, looks in self._steps.get((world, task, method), {}).items():
            if seed in full and seed in last:
                at = {**looks, last[seed].steps or 0: last[seed].value or 0.0}
                wanted = share * (full[seed].value or 0.0)
                found.append(min((step for step, value in at.items() if value >= wanted), default=None))
        return found

    def missing(self) -> dict[str, tuple[int, int]]:
        """By model: how many jobs have no rows yet, and how many there are."""
        done = {row.job for row in self.rows}
        worlds = sorted({job.world for job in self.jobs})
        of = {world: [job for job in self.jobs if job.world == world] for world in worlds}
        return {world: (len([job for job in jobs if job not in done]), len(jobs)) for world, jobs in of.items()}

    def accuracies(
        self, world: str, task: str, method: str, shots: int = 0, samples: int | None = None, what: str = "accuracy"
    ) -> list[float]:
        return [row.value or 0.0 for row in self.of(world, task, method, shots, samples, what).values()]

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
        """Mean over tasks, and the spread of that mean over seeds; a dash if a part is missing."""
        tasks = tasks or self.tasks(world)
        if not all(self.whole(world, *one, tasks) for one in ((method, shots), ("icl", self.most_shots(world)))):
            return "-"
        by_task = [self.shares(world, task, method, shots) for task in tasks]
        by_task = [shares for shares in by_task if shares]
        if not by_task:
            return "-"
        seeds = min(map(len, by_task))
        return spread([mean(shares[i] for shares in by_task) for i in range(seeds)])

    def lines(self, world: str, methods: Sequence[str]) -> Iterator[tuple[str, str, int]]:
        """(label, method, shots) of the lines that have rows."""
        for method in methods:
            setup = SETUPS[world]
            shown = {"icl": setup.shots, "retrieval": setup.similar, "best-of": (max(setup.shots),)}
            for shots in shown.get(method, (0,)):
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
        found = self.number(world, method, what)
        return "-" if found is None else f"{found:.2f}"

    def number(self, world: str, method: str, what: str) -> float | None:
        """Of a row that is of no task: a time, or memory."""
        return next((r.value for r in self.rows if (r.world, r.method, r.what) == (world, method, what)), None)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation, in percent."""
    middle = f"{mean(values) * 100:.0f}"
    return f"{middle} ± {stdev(values) * 100:.0f}" if len(values) > 1 else middle
