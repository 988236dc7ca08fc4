"""What is measured: jobs, and the rows they leave in a CSV."""

from __future__ import annotations

from dataclasses import dataclass

from ..records import Machine


@dataclass(frozen=True)
class Job:
    """One method on one task, with one seed: the unit of work, and of going on after a stop.

    Attributes:
        world: "smolvlm", "smollm2", "llava" or "idefics2".
        samples: Training samples; demonstrations come from them too.
        steps: Of training; 0: nothing is trained.
        held_out: Held-out questions asked.
        also: What is measured besides accuracy without demonstrations: "distance" (of states to the teacher's), "shots"
            (with demonstrations added), "others" (the same questions in other forms), "steps" (accuracy in training).
        rate: In place of the middle one that was tried (`methods.MIDDLE`).
    """

    world: str
    task: str
    seed: int
    method: str
    samples: int
    steps: int
    held_out: int
    also: str = ""
    rate: float | None = None


@dataclass(frozen=True)
class Row(Machine):
    """One number. The columns of `Job` say of what.

    Attributes:
        what: "accuracy" (share of held-out questions answered right), the same with the name of another form after a
            comma, "distance" (L2, of the hidden states where the prompt ends, to those with demonstrations, mean over
            questions), "first token" and "token" (time over the unpatched model's without demonstrations), "training
            step" (time over LoRA's), "training memory" (bytes that a step holds at most).
        shots: Demonstrations in the prompt.
        after: Steps of training; empty: all.
        value: The number; `low` and `high` around it where it is a median.
        right: Of an accuracy: which questions were answered right (`stats.packed`). The oldest rows lack it.
        parameters: Learned, or taken from activations.
        bytes: Size on disk of what was learned or taken.
        seconds: Of training or taking, on one thread; empty where other work was on the machine.
        prompt_tokens: Mean length of a prompt.
    """

    what: str = ""
    world: str = ""
    task: str = ""
    seed: int | None = None
    method: str = ""
    samples: int | None = None
    steps: int | None = None
    held_out: int | None = None
    also: str = ""
    rate: float | None = None
    shots: int | None = None
    after: int | None = None
    layer: int | None = None
    value: float | None = None
    right: str = ""
    low: float | None = None
    high: float | None = None
    parameters: int | None = None
    bytes: int | None = None
    seconds: float | None = None
    prompt_tokens: float | None = None

    @property
    def job(self) -> Job:
        """The job it is of."""
        return Job(
            self.world,
            self.task,
            self.seed or 0,
            self.method,
            self.samples or 0,
            self.steps or 0,
            self.held_out or 0,
            self.also,
            self.rate,
        )


def accuracy_of(other: str = "") -> str:
    """What a row is of that has the accuracy of questions, or of questions that are asked otherwise."""
    return f"accuracy, {other}" if other else "accuracy"
