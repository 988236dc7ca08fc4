"""`python -m benchmarks.icl.trials`: try four learning rates of each method, with seed 100, which is in no table.

Writes docs/results/trials.csv, and prints what was best: `methods.CHOSEN`. Finished trials are kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from .. import records
from .methods import FACTORS, MIDDLE, TRAINED
from .rows import Job, Row
from .running import measure
from .setups import SETUPS

FILE = records.ROOT / "docs" / "results" / "trials.csv"
# By kind of model: the digit models, SmolLM2. On these tasks demonstrations help, so a teacher has something to teach:
# with `made-up`, a first round found a rate for MimIC that reached 0% on others.
TASKS = ((("llava", "8-digits"),), (("smolvlm", "next-number"),))
SEED = 100


def jobs(kind: int) -> list[Job]:
    """The trials with a kind of model: the same number for each method."""
    found = []
    for world, task in TASKS[kind]:
        setup = SETUPS[world]
        found += [
            Job(
                world,
                task,
                SEED,
                method,
                setup.samples,
                setup.steps if method in TRAINED else 0,
                setup.held_out,
                rate=middles[kind] * factor,
            )
            for method, middles in MIDDLE.items()
            for factor in FACTORS
        ]
    return found


def chosen(rows: Iterable[Row]) -> dict[str, tuple[float, float]]:
    """The factor with the highest mean accuracy over its tasks; between equals the middle one, then the lower."""
    value = {row.job: row.value or 0.0 for row in rows if row.what == "accuracy"}
    found: dict[str, list[float]] = {method: [] for method in MIDDLE}
    for kind in (0, 1):
        if not all(job in value for job in jobs(kind)):
            # Not tried yet: the middle one.
            for method in MIDDLE:
                found[method].append(1.0)
            continue
        for method in MIDDLE:
            tried = dict.fromkeys(FACTORS, 0.0)
            for job in jobs(kind):
                if job.method == method:
                    factor = (job.rate or 0.0) / MIDDLE[method][kind]
                    tried[min(FACTORS, key=lambda one, to=factor: abs(one - to))] += value[job]
            found[method].append(max(sorted(tried, key=lambda factor: abs(factor - 1.1)), key=lambda one: tried[one]))
    rounded = {method: (round(digits, 3), round(words, 3)) for method, (digits, words) in found.items()}
    return {method: factors for method, factors in rounded.items() if factors != (1.0, 1.0)}


def main() -> None:
    """Run the missing trials, and say what was best."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.icl.trials", description=__doc__)
    parser.add_argument("--jobs", type=int, default=1, help="number of processes of one thread each (default: 1)")
    rows = records.read(FILE, Row) if FILE.is_file() else []
    rows = measure([*jobs(1), *jobs(0)], rows, FILE, parser.parse_args().jobs)
    print(f"CHOSEN = {chosen(rows)}")


if __name__ == "__main__":
    main()
