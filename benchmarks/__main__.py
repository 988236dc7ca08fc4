"""`python -m benchmarks`: measure speed and memory, write a CSV file, draw pictures, and update the docs."""

from __future__ import annotations

import argparse
import gc
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import torch
from tqdm import tqdm

import mimic_core as mc

from . import bench_heads, bench_host, bench_patch, bench_shift, bench_stacks, plots, records, report
from .bench_shift import Task
from .errors import BenchmarkError
from .records import Machine, Row

BENCHES = {
    "host": bench_host.tasks,
    "shift": bench_shift.tasks,
    "heads": bench_heads.tasks,
    "patch": bench_patch.tasks,
    "stacks": bench_stacks.tasks,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. If a contestant was refused, the program ends with a message and status 1."""
    options = parse(arguments)
    # transformers 5.24 has renamed this argument, but 5.1 has only the old name.
    warnings.filterwarnings("ignore", message="`past_key_values` is deprecated", category=FutureWarning)
    try:
        refused = run(options)
    except (BenchmarkError, mc.MimicError) as error:
        sys.exit(f"benchmarks: {error}")
    if refused:
        sys.exit("\n".join(f"benchmarks: {error}" for error in refused))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a few cases and rounds, to try the command")
    parser.add_argument(
        "--only",
        choices=list(BENCHES),
        help="host: tiny tensors; shift: attention; heads: all heads; patch: whole models; stacks: many in one batch",
    )
    parser.add_argument("--cases", default="*", help="only cases with names of this shell pattern, such as 'd64-*'")
    parser.add_argument(
        "--out", type=Path, help="folder for the CSV and the pictures (default: benchmarks/results and docs/images)"
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> list[BenchmarkError]:
    """Measure, write and print the results. Return the errors of refused contestants."""
    device = torch.device(options.device)
    machine = records.this_machine(device)
    benches = [options.only] if options.only else list(BENCHES)
    tasks = [(name, task) for name in benches for task in BENCHES[name](device, options.quick)]
    tasks = [(name, task) for name, task in tasks if fnmatch(task.name, options.cases)]
    if not tasks:
        raise BenchmarkError(f"no case matches {options.cases!r}; without --cases all cases run")
    # Results of only some cases must not overwrite the complete results.
    whole = not options.quick and options.cases == "*"
    folder = options.out or records.RESULTS
    path = folder / f"{'' if whole else 'part-'}{records.file_name(device)}"
    rows = [row for row in records.read(path) if row.bench not in benches] if path.is_file() else []
    refused: list[BenchmarkError] = []
    gc.freeze()  # imported objects are never garbage, and checking them takes longer than some measurements
    try:
        with tqdm(tasks, unit="case", file=sys.stderr) as bar:
            for _, task in bar:
                bar.set_description(task.name)
                rows += measured(task, machine, refused)
                records.write(path, rows)  # after each case, so that a stopped run keeps its rows
    finally:
        gc.unfreeze()
    print(report.everything(rows))
    print(f"\n{report.targets(rows)}")
    print(f"\n{len(rows)} rows are in {path}.")
    into_docs = whole and options.out is None
    for picture in plots.draw(rows, plots.IMAGES if into_docs else folder, path.stem):
        print(picture)
    if into_docs:
        print(report.update())
    return refused


def measured(task: Task, machine: Machine, refused: list[BenchmarkError]) -> list[Row]:
    """The rows of a task, measured with its number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(task.threads or before)
    try:
        return records.stamped(task.run(refused), replace(machine, threads=torch.get_num_threads()))
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    main()
