"""Which jobs there are. Seeds from 0 are the result; settings were chosen on seeds from 100."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mimic_core.demo.digits import RULES

from .methods import ABLATIONS, MAIN, PROMPTED, TAKEN, TRAINED
from .rows import Job
from .setups import DIGITS, SETUPS

WORD_TASKS = ("capitals", "past-tense", "plural", "upper-case")
# Variations are tried where there is something to tell apart.
VARIED = ("8-digits", "2-words")
# Accuracy against the number of training samples: of these methods, on this task.
CURVE, CURVE_TASK, CURVE_SAMPLES = ("live", "lora", "mimic"), "8-digits", (25, 200)


def _jobs(world: str, tasks: Sequence[str], methods: Sequence[str], seeds: Sequence[int], quick: bool) -> Iterator[Job]:
    setup = SETUPS[world]
    for seed in seeds:
        for task in tasks:
            for method in methods:
                steps = setup.steps // (4 if quick else 1) if method in TRAINED else 0
                held_out = setup.held_out // (3 if quick else 1)
                yield Job(world, task, seed, method, setup.samples, steps, held_out, _also(world, method))


def _also(world: str, method: str) -> str:
    """What is looked at beside accuracy."""
    if world == "idefics2" or method in ("icl", "retrieval", *ABLATIONS):
        return ""
    return "distance shots" if method in ("live", "mimic") and world == "llava" else "distance"


def full() -> list[Job]:
    """Everything the report shows."""
    seeds, asked = range(3), (*PROMPTED, *TAKEN)
    # Words take half of all the time: a third seed would not fit into an hour. They come first, as the last jobs
    # should be short: while one is left, the other cores wait.
    jobs = [*_jobs("smollm2", WORD_TASKS, (*asked, "live", "lora", "mimic"), (0, 1), quick=False)]
    jobs += _jobs("llava", tuple(RULES), (*asked, *MAIN), seeds, quick=False)
    jobs += _jobs("llava", VARIED, ABLATIONS, seeds, quick=False)
    jobs += _jobs("idefics2", tuple(RULES), (*asked, "live", "lora", "mimic"), seeds, quick=False)
    for samples in CURVE_SAMPLES:
        for seed in seeds:
            for method in (*CURVE, "retrieval", "icl"):
                steps = DIGITS.steps if method in TRAINED else 0
                jobs.append(Job("llava", CURVE_TASK, seed, method, samples, steps, DIGITS.held_out))
    return jobs


def quick() -> list[Job]:
    """A little of each kind, to see that it works, the longest first."""
    jobs = [*_jobs("smollm2", ("past-tense",), ("mimic", "icl", "zero-shot"), (0,), quick=True)]
    jobs += _jobs("llava", ("3-digits", "2-groups"), (*PROMPTED, *TAKEN, "live", "lora", "mimic"), (0,), quick=True)
    jobs += _jobs("idefics2", ("3-digits",), ("zero-shot", "icl", "live", "mimic"), (0,), quick=True)
    return jobs
