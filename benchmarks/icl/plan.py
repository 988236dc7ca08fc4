"""The plan: which jobs there are, and what counts as different. It was written before the run.

- Seeds from 0 are the result. Learning rates were chosen on seed 100 (`trials.py`), four trials for each method.
- Each method has the same loop, training samples, batches and number of steps (`setups.py`, `fit.py`).
- Two methods differ if the 95% interval of their difference leaves out zero: paired bootstrap over seeds and questions
  (`stats.py`), with 4,000 resamples. It is not corrected for the number of comparisons. Every method is compared with
  MimIC, task by task and over all tasks of a model.
- The mean rank is over the tasks of a model, by the mean accuracy over seeds, among the methods without demonstrations.
- A mean over tasks or seeds is shown only if all of its jobs have run.
- Times are not measured here: `--times` does that, on a machine without other work.

A part of a run should be worth something: the jobs of one seed come before those of the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mimic_core.demo.digits import RULES

from .methods import ABLATIONS, MAIN, PROMPTED, TAKEN, TRAINED, other_rate
from .pictures import PICTURE_TASKS
from .rows import Job
from .setups import SETUPS
from .words import WORD_TASKS

SEEDS = {"smolvlm": 3, "smollm2": 5, "llava": 3, "idefics2": 3}
# Methods are compared with this one.
REFERENCE = "mimic"
# Variations are tried where there is something to tell apart. With SmolLM2, these are of what the teacher is shown.
VARIED = {"llava": ("8-digits", "2-words"), "smolvlm": ("next-number",), "smollm2": ("past-tense",)}
SHOWN = ("mimic-1", "mimic-16")
# In MimIC's loss, the last layer counts most. This one is tried on all tasks.
VARIATION = "mimic-teacher"
# Whose training is looked at: what it costs, and how far it is after some steps.
LEARNING = (*MAIN, VARIATION)
# Accuracy against the number of training samples: of these methods, on these tasks.
CURVE = ("live", "lora", "mimic")
CURVES = {("smolvlm", "in-french"), ("smolvlm", "made-up"), ("llava", "8-digits")}
CURVE_SAMPLES = (5, 10, 20, 50, 100, 200)
# Where the same questions are also asked otherwise, and where accuracy is looked at during training.
OTHERS = {("smolvlm", "in-french"), ("smolvlm", "next-number"), ("smollm2", "past-tense"), ("smollm2", "capitals")}
LOOKED_AT = {("smolvlm", "next-number"), ("smollm2", "past-tense"), ("llava", "8-digits")}
# Whose hidden states are compared with those of demonstrations in SmolLM2, and on which task.
DISTANCES, DISTANCE_TASK = ("zero-shot", "live", "lora", "mimic", "hyper-icl", "virtual-kv-4"), "past-tense"


def _job(world: str, task: str, seed: int, method: str, samples: int = 0, quick: bool = False) -> Job:
    setup = SETUPS[world]
    steps = setup.steps // (4 if quick else 1) if method in TRAINED else 0
    held_out = setup.held_out // (3 if quick else 1)
    also = "" if samples else _also(world, task, method)
    if quick:
        also = "others" if "others" in also.split() else ""
    return Job(world, task, seed, method, samples or setup.samples, steps, held_out, also, other_rate(method, world))


def _also(world: str, task: str, method: str) -> str:
    """What is looked at beside accuracy."""
    of_llava = ("zero-shot", "task-vector", "function-vector", *CURVE, "mimic+lora")
    is_asked = {
        "distance": method in (of_llava if world == "llava" else DISTANCES if task == DISTANCE_TASK else ()),
        "shots": world == "llava" and method in ("live", "mimic"),
        "others": (world, task) in OTHERS and method in ("zero-shot", "icl", *TAKEN, *LEARNING),
        "steps": (world, task) in LOOKED_AT and method in LEARNING,
    }
    return " ".join(what for what, is_so in is_asked.items() if is_so)


def tasks(world: str) -> Sequence[str]:
    """The tasks of a world."""
    return tuple({"smolvlm": PICTURE_TASKS, "smollm2": WORD_TASKS}.get(world, RULES))


def _of(world: str, seed: int) -> Iterator[Job]:
    few = tuple(name for name in (*PROMPTED, "task-vector", "function-vector", *CURVE) if name != "best-of")
    methods = few if world == "idefics2" else (*PROMPTED, *TAKEN, *MAIN)
    for task in tasks(world):
        yield from (_job(world, task, seed, method) for method in methods)
        if world != "idefics2":
            yield _job(world, task, seed, VARIATION)
        if world == "llava":
            yield _job(world, task, seed, "mimic+lora")
        varied = ABLATIONS if world == "llava" else SHOWN
        if task in VARIED.get(world, ()):
            yield from (_job(world, task, seed, one) for one in varied if one != VARIATION)


def _curves(seed: int) -> Iterator[Job]:
    for world, task in sorted(CURVES):
        for samples in CURVE_SAMPLES:
            if samples != SETUPS[world].samples:
                asked = (*CURVE, "icl") if samples >= min(SETUPS[world].shots) else CURVE
                yield from (_job(world, task, seed, method, samples) for method in asked)


def full() -> list[Job]:
    """Everything the report shows."""
    jobs: list[Job] = []
    for seed in range(max(SEEDS.values())):
        for world, seeds in SEEDS.items():
            if seed < seeds:
                jobs += _of(world, seed)
        if seed < SEEDS["smolvlm"]:
            jobs += _curves(seed)
    return jobs


def quick() -> list[Job]:
    """A little of each kind, to see that it works."""
    jobs = [_job("smollm2", "past-tense", 0, method, quick=True) for method in ("zero-shot", "icl", "mimic")]
    jobs += [_job("smolvlm", "compare", 0, method, quick=True) for method in ("zero-shot", "icl", "mimic", "mtv")]
    jobs += [_job("smolvlm", "compare", 0, "function-vector", quick=True)]
    jobs += [_job("llava", "2-groups", 0, method, quick=True) for method in (*PROMPTED, *TAKEN, *MAIN)]
    jobs += [_job("llava", "3-digits", 0, method, quick=True) for method in ("zero-shot", "icl", "live", "mimic")]
    jobs += [_job("idefics2", "3-digits", 0, method, quick=True) for method in ("zero-shot", "icl", "mimic")]
    return jobs
