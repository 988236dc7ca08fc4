"""What was read of gates: the rows, what they are asked for, and the tables made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from ..records import Machine
from ..report import table
from .results import MODELS

# Columns of the rows, and what they are called in pictures.
WHO = {"before": "before training", "learned": "after training", "demonstrations": "real demonstrations"}
# How many layers make a line of the table.
TOGETHER = {"llava": 1, "smollm2": 5}
Key = tuple[str, str, int]


@dataclass(frozen=True)
class GateRow(Machine):
    """One number, three times: of MimIC before training, of MimIC as trained, and of real demonstrations.

    Attributes:
        what: "gate" (of an attention head at the last token of the prompt, from which the answer is predicted; mean
            over questions), "size" (length of a layer's shift over that of its attention output, at the same token;
            mean over questions), "token" (the gate at one token of one line; without `head`, the mean over all
            attention heads), "rule" (as "gate", mean over the questions about one digit and word) or "accuracy" (share
            of questions answered right; `before` is the unpatched model).
        questions: How many the mean is over.
        text: The token, or the digit, word and answer of a rule.
        image: Which of scikit-learn's digits the line is about.
    """

    what: str = ""
    world: str = ""
    task: str = ""
    seed: int | None = None
    steps: int | None = None
    shots: int | None = None
    questions: int | None = None
    layer: int | None = None
    head: int | None = None
    token: int | None = None
    text: str = ""
    image: int | None = None
    before: float | None = None
    learned: float | None = None
    demonstrations: float | None = None


def by_run(rows: Sequence[GateRow]) -> dict[Key, list[GateRow]]:
    """Rows by world, task and seed."""
    found: dict[Key, list[GateRow]] = {}
    for row in rows:
        found.setdefault((row.world, row.task, row.seed or 0), []).append(row)
    return found


def first_runs(rows: Sequence[GateRow]) -> list[list[GateRow]]:
    """The rows of each world's first run."""
    found: dict[str, list[GateRow]] = {}
    for (world, _, _), of in by_run(rows).items():
        found.setdefault(world, of)
    return list(found.values())


def grid(rows: Sequence[GateRow], who: str, what: str = "gate") -> Tensor:
    """Gates [layers, heads], or sizes [layers]."""
    of = [row for row in rows if row.what == what]
    values = torch.tensor([getattr(row, who) for row in of])
    return values if what == "size" else values.unflatten(0, (-1, 1 + max(row.head or 0 for row in of)))


def title(rows: Sequence[GateRow]) -> str:
    """The model and the task of a run."""
    first = rows[0]
    return f"{MODELS[first.world]}: {first.task}"


def agreement(one: Tensor, other: Tensor) -> float:
    """Pearson's correlation of the numbers of two tensors of one shape."""
    return torch.corrcoef(torch.stack([one.flatten(), other.flatten()]).double())[0, 1].item()


def tables(rows: Sequence[GateRow]) -> str:
    """What the page says in numbers: every run, how much two runs agree, and the layers of the runs that are drawn."""
    runs = by_run(rows)
    parts = [_runs(runs)]
    if pairs := _pairs(runs):
        parts.append(pairs)
    return "\n\n".join([*parts, *(_layers(of) for of in first_runs(rows))])


def _runs(runs: dict[Key, list[GateRow]]) -> str:
    head = ["model", "task", "seed", "right: zero-shot", "MimIC", "demonstrations"]
    head += ["mean share: before", "MimIC", "demonstrations", "r: MimIC, before", "r: MimIC, demonstrations"]
    lines = []
    for (world, task, seed), of in runs.items():
        (right,) = (row for row in of if row.what == "accuracy")
        gates = {who: grid(of, who) for who in WHO}
        found = [f"{100 * (getattr(right, who) or 0):.0f}%" for who in ("before", "learned", "demonstrations")]
        found += [f"{gates[who].mean():.2f}" for who in WHO]
        found += [f"{agreement(gates['learned'], gates[who]):.2f}" for who in ("before", "demonstrations")]
        lines.append([world, task, str(seed), *found])
    return table(head, lines, left=2)


def _pairs(runs: dict[Key, list[GateRow]]) -> str:
    lines = []
    for (one, of_one), (other, of_other) in combinations(runs.items(), 2):
        if one[0] == other[0]:
            names = [f"{task}, seed {seed}" for _, task, seed in (one, other)]
            found = [agreement(grid(of_one, who), grid(of_other, who)) for who in WHO]
            lines.append([one[0], *names, *(f"{r:.2f}" for r in found)])
    return table(["model", "one run", "another", *(f"r: {who}" for who in WHO.values())], lines, left=3)


def _layers(rows: Sequence[GateRow]) -> str:
    head = [title(rows), "mean share: before", "MimIC", "demonstrations", "length: MimIC", "demonstrations"]
    gates, sizes = ({who: grid(rows, who, what) for who in WHO} for what in ("gate", "size"))
    lines, step = [], TOGETHER[rows[0].world]
    for start in range(0, len(sizes["learned"]), step):
        part = slice(start, start + step)
        found = [gates[who][part].mean() for who in WHO]
        found += [sizes[who][part].mean() for who in ("learned", "demonstrations")]
        last = min(start + step, len(sizes["learned"])) - 1
        name = f"layer {start}" if last == start else f"layers {start} to {last}"
        lines.append([name, *(f"{value:.2f}" for value in found)])
    return table(head, lines)
