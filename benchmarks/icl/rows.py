"""What is measured: jobs, and the rows they leave in a CSV."""

from __future__ import annotations

from dataclasses import dataclass

from ..records import Machine


@dataclass(frozen=True)
class Job:
    """One method on one task, with one seed: the unit of work, and of going on after a stop.

    Attributes:
        world: "llava", "idefics2" or "smollm2".
        samples: Training samples; demonstrations come from them too.
        steps: Of training; 0: nothing is trained.
        held_out: Held-out questions asked.
        also: What is measured besides accuracy without demonstrations: "distance" (of states to the teacher's), "shots"
            (with demonstrations added).
    """

    world: str
    task: str
    seed: int
    method: str
    samples: int
    steps: int
    held_out: int
    also: str = ""


@dataclass(frozen=True)
class Row(Machine):
    """One number. The columns of `Job` say of what.

    Attributes:
        what: "accuracy" (share of held-out questions answered right), "distance" (L2, of the hidden states where the
            prompt ends, to those with demonstrations, mean over questions), "first token" and "token" (time over the
            unpatched model's without demonstrations).
        shots: Demonstrations in the prompt.
        value: The number; `low` and `high` around it where it is a median.
        parameters: Learned, or taken from activations.
        seconds: Of training or taking, on one thread.
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
    shots: int | None = None
    layer: int | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    parameters: int | None = None
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
        )
