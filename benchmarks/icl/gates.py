"""`python -m benchmarks.icl.gates`: pictures of what a trained MimIC has learned, for docs/what-was-learned.md.

Trains MimIC as `python -m benchmarks.icl` does, on digits and on words, with fixed seeds. Then it reads the gate of
each attention head on held-out questions, before and after training, and the share of attention that real
demonstrations take in the same head. It writes docs/images/gates.csv, draws pictures of that file beside it, and puts
tables into the page.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mimic_core as mc
from mimic_core.demo.digits import FIRST_WORD, VOCABULARY, Line, images
from mimic_core.demo.prompts import Prompt
from mimic_core.demo.tasks import DemoError, Task

from .. import records
from ..errors import BenchmarkError
from ..report import with_results
from . import gate_figures, gate_reading, gate_report
from .fit import fit
from .gate_report import WHO, GateRow
from .setups import SETUPS
from .worlds import World, world

IMAGES = records.ROOT / "docs" / "images"
PAGE = records.ROOT / "docs" / "what-was-learned.md"
BEGIN, END = "<!-- results: begin, written by python -m benchmarks.icl.gates -->", "<!-- results: end -->"
CHOSEN = 12
PATCHES = ("top left", "top right", "bottom left", "bottom right")
Readings = dict[str, gate_reading.Reading]


class Run(NamedTuple):
    """A MimIC to be trained and looked at."""

    world: str
    task: str
    seed: int


# The first of each model is drawn; the others say how much depends on the seed and on the task.
RUNS = (
    Run("llava", "2-words", 0),
    Run("llava", "2-words", 1),
    Run("llava", "8-digits", 1),
    Run("smollm2", "past-tense", 0),
    Run("smollm2", "past-tense", 1),
    Run("smollm2", "capitals", 0),
)
RATES = {"llava": 0.2, "smollm2": 1e-2}
WORLDS = tuple(dict.fromkeys(run.world for run in RUNS))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; what can't be done ends in one sentence."""
    try:
        run(parse(arguments))
    except (BenchmarkError, DemoError, mc.MimicError) as error:
        sys.exit(f"benchmarks.icl.gates: {error}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.icl.gates", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps and questions, to see that it works")
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS), help="which models")
    parser.add_argument(
        "--shifts", type=Path, help="folder to keep trained stacks in; one that is there is not trained"
    )
    parser.add_argument("--report", action="store_true", help="only the pictures and tables of what was read")
    parser.add_argument("--out", type=Path, help="folder (default: docs/images, or a part with --quick)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Train and read, then draw."""
    whole = not options.quick and set(options.worlds) == set(WORLDS)
    folder: Path = options.out or (IMAGES if whole else Path("gates-part"))
    path = folder / "gates.csv"
    if not options.report:
        runs = [one for one in RUNS if one.world in options.worlds]
        if options.quick:
            runs = [next(one for one in runs if one.world == name) for name in options.worlds]
        torch.set_num_threads(1)
        rows: list[GateRow] = []
        for one in runs:
            rows += rows_of(one, options.quick, options.shifts)
            print(f"{one.world} {one.task} {one.seed} is read", file=sys.stderr, flush=True)
        records.write(path, records.stamped(rows, records.this_machine(torch.device("cpu"))), GateRow)
    if not path.is_file():
        raise BenchmarkError(f"there is nothing to report in {path}")
    found = records.read(path, GateRow)
    print(gate_report.tables(found))
    for drawn in gate_figures.draw(found, folder):
        print(drawn)
    if folder == IMAGES:
        PAGE.write_text(with_results(PAGE.read_text(), gate_report.tables(found), BEGIN, END))
        print(PAGE)


def rows_of(one: Run, quick: bool, keep: Path | None = None) -> list[GateRow]:
    """Train, if it hasn't been, and read."""
    setup = replace(SETUPS["smollm2"], steps=160, batch=1) if one.world == "smollm2" else SETUPS[one.world]
    place = world(one.world, setup, torch.float32)
    steps, questions = (setup.steps // 40, 4) if quick else (setup.steps, setup.held_out)
    task = place.task(one.task, setup.samples, one.seed, questions)
    before, learned = (stack(place, task, one, n, keep) for n in (0, steps))
    blank = {**one._asdict(), "steps": steps, "shots": place.shots, "questions": questions}

    alone, shown = (place.prompts(task, shots, one.seed) for shots in (0, place.shots))
    right = {"before": place.right(place.model, alone), "demonstrations": place.right(place.model, shown)}
    with mc.patch(place.model, learned):
        right["learned"] = place.right(place.model, alone)
    accuracy: dict[str, Any] = {who: sum(found) / len(found) for who, found in right.items()}
    rows = [GateRow(what="accuracy", **blank, **accuracy)]

    readings = [three(place, before, learned, *prompts) for prompts in zip(alone, shown, strict=True)]
    gate, size = ({who: ends(readings, alone, who, name) for who in WHO} for name in ("share", "size"))
    layers, heads = gate["learned"].shape[1:]
    for layer in range(layers):
        rows.append(GateRow(what="size", **blank, layer=layer, **_means(size, layer)))
        rows += [
            GateRow(what="gate", **blank, layer=layer, head=head, **_means(gate, layer, head)) for head in range(heads)
        ]
    rows += rule_rows(task, gate, blank)
    rows += token_rows(place, alone, readings, right["learned"], gate["learned"], blank)
    return rows


def rule_rows(task: Task[Any], gate: dict[str, Tensor], blank: dict[str, Any]) -> list[GateRow]:
    """Gates by what is asked, where a task has a rule with few cells: of the attention heads it matters most to."""
    if not isinstance(task.held_out[0], Line):
        return []
    cells: dict[str, list[int]] = {}
    for i, line in enumerate(task.held_out):
        digit, word, answer = images().digits[line.image].item(), VOCABULARY[line.word], VOCABULARY[line.answer]
        cells.setdefault(f"{digit} {word}: {answer}", []).append(i)
    by_cell = torch.stack([gate["learned"][cells[text]].mean(0) for text in sorted(cells)])
    rows = []
    for text in sorted(cells):
        of = {who: values[cells[text]] for who, values in gate.items()}
        for layer, head in strongest(by_cell.amax(0) - by_cell.amin(0), CHOSEN):
            rows.append(GateRow(what="rule", **blank, layer=layer, head=head, text=text, **_means(of, layer, head)))
    return rows


def token_rows(
    place: World,
    alone: Sequence[Prompt],
    readings: Sequence[Readings],
    right: Sequence[bool],
    gate: Tensor,
    blank: dict[str, Any],
) -> list[GateRow]:
    """Gates token by token, of the first question that MimIC answers right.

    Of the attention heads with the strongest gates where prompts end, then of those whose gates change most in a line.
    """
    example = next((i for i, well in enumerate(right) if well), 0)
    prompt, rows = alone[example], []
    image = prompt.images[0] if prompt.images else None
    open_at_end = strongest(gate.mean(0), CHOSEN // 2)
    line = readings[example]["learned"].share[:, :, 1:]
    change = line.amax(-1) - line.amin(-1)
    for at in open_at_end:
        change[at] = -1  # each head once
    chosen = [*open_at_end, *strongest(change, CHOSEN // 2)]
    for token, text in enumerate(tokens(place, prompt)):
        of = {who: found.share[None, :, :, token] for who, found in readings[example].items()}
        where = {**blank, "token": token, "text": text, "image": image}
        rows.append(GateRow(what="token", **where, **_means(of)))
        rows += [
            GateRow(what="token", **where, layer=layer, head=head, **_means(of, layer, head)) for layer, head in chosen
        ]
    return rows


def ends(readings: Sequence[Readings], prompts: Sequence[Prompt], who: str, name: str) -> Tensor:
    """What was read at each question's last token: [n l h] shares, or [n l] sizes."""
    at = [prompt.answer_at - 1 for prompt in prompts]
    return torch.stack([getattr(found[who], name)[..., end] for found, end in zip(readings, at, strict=True)])


def strongest(values: Tensor, count: int) -> list[tuple[int, int]]:
    """Layer and attention head of the largest of [l h], in the order of the layers."""
    order = values.flatten().argsort(descending=True, stable=True)[:count].tolist()
    return sorted(divmod(i, values.shape[1]) for i in order)


def _means(of: dict[str, Tensor], *place: int) -> dict[str, Any]:
    return {who: values[(slice(None), *place)].mean().item() for who, values in of.items()}


def three(place: World, before: mc.ShiftStack, learned: mc.ShiftStack, alone: Prompt, shown: Prompt) -> Readings:
    """A line as the untrained and the trained stack read it alone, and after demonstrations in the unpatched model."""
    inputs, with_demonstrations = (place.prompter.collate([prompt]).inputs for prompt in (alone, shown))
    return {
        "before": gate_reading.of_shifts(place.model, before, inputs),
        "learned": gate_reading.of_shifts(place.model, learned, inputs),
        "demonstrations": gate_reading.of_demonstrations(place.model, shown, with_demonstrations),
    }


def stack(place: World, task: Task[Any], one: Run, steps: int, keep: Path | None = None) -> mc.ShiftStack:
    """MimIC after so many steps; trained stacks are kept in a folder, if there is one."""
    folder = keep / "-".join(map(str, (*one, steps))) if keep and steps else None
    if folder and folder.is_dir():
        return mc.load_shifts(folder, place.model)
    shifts = fit(place, task, "mimic", one.seed, steps, RATES[one.world]).shifts
    assert shifts is not None
    if folder:
        mc.save_shifts(shifts, folder)
    return shifts


def tokens(place: World, prompt: Prompt) -> list[str]:
    """What stands at each token of a prompt without demonstrations, to be read."""
    if place.name == "smollm2":
        texts = [place.prompter.decode([token]) or "newline" for token in prompt.ids[1:]]
        return ["start", *texts]
    patches = iter(PATCHES)
    return ["start", *(VOCABULARY[token] if token >= FIRST_WORD else next(patches) for token in prompt.ids[1:])]


if __name__ == "__main__":
    main()
