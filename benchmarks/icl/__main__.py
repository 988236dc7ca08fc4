"""`python -m benchmarks.icl`: measure every method on every task, then write the tables and pictures of docs/results.

Finished jobs are kept. If a run was stopped, the next run continues it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

import mimic_core as mc
from mimic_core.demo.tasks import DemoError

from .. import records
from ..errors import BenchmarkError
from ..measure import FULL, QUICK
from . import latency, plan, report
from .rows import Row
from .running import measure, planned
from .setups import SETUPS

RESULTS = records.ROOT / "docs" / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. An error ends the program with its message."""
    options = parse(arguments)
    try:
        run(options)
    except (BenchmarkError, DemoError, mc.MimicError) as error:
        sys.exit(f"benchmarks.icl: {error}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.icl", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small part of every measurement, to try the command")
    parser.add_argument("--worlds", nargs="+", choices=SETUPS, default=list(SETUPS), help="which models (default: all)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="number of processes of one thread each (default: all cores)"
    )
    parser.add_argument("--fresh", action="store_true", help="ignore the results of earlier runs")
    parser.add_argument(
        "--times", action="store_true", help="measure only the times of a query; nothing else may run on the machine"
    )
    parser.add_argument("--report", action="store_true", help="measure nothing; only write the tables and pictures")
    parser.add_argument(
        "--out", type=Path, help="output folder (default: docs/results; icl-part with --quick or some of the models)"
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Run the missing jobs of the plan, then write the report."""
    whole = not options.quick and set(options.worlds) == set(SETUPS)
    # Results of only some jobs must not overwrite the complete results.
    folder = options.out or (RESULTS if whole else Path("icl-part"))
    path = folder / "icl.csv"
    rows = records.read(path, Row) if path.is_file() and not options.fresh else []
    jobs = [job for job in (plan.quick() if options.quick else plan.full()) if job.world in options.worlds]
    if options.times:
        rows = time_queries(options.worlds, rows, path, quick=options.quick)
    elif not options.report:
        rows = measure(jobs, rows, path, options.jobs)
    if whole:
        rows = planned(rows, jobs)
    if rows:
        # The file rounds. A report of what it holds is the same, to the byte, as one made from it later.
        records.write(path, rows, Row)
        rows = records.read(path, Row)
    else:
        raise BenchmarkError(f"there is nothing to report in {path}; run without --report to measure first")
    print(report.text(rows, jobs))
    for written in report.write(rows, folder, into_readme=folder == RESULTS, jobs=jobs):
        print(written)


def time_queries(worlds: Sequence[str], rows: list[Row], path: Path, quick: bool) -> list[Row]:
    """Measure times anew, one model after another, without other jobs on the machine."""
    machine = records.this_machine(torch.device("cpu"))
    for name in tqdm(worlds, desc="time of a query", unit="model", file=sys.stderr):
        rows = [row for row in rows if row.world != name or row.what not in latency.WHAT]
        rows += records.stamped(latency.rows(name, QUICK if quick else FULL), machine)
        records.write(path, rows, Row)
    return rows


if __name__ == "__main__":
    main()
