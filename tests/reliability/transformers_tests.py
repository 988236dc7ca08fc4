"""`python -m tests.reliability.transformers_tests`: transformers' own tests of its models, with shift heads in them.

Each test runs without the library first. A test that passes then, and that runs the model, must pass with a stack put
on every model at its first forward, or be refused by an error of the library. Writes the counts to
docs/reliability.jsonl, and the table of docs/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.report import table, with_results

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
ROWS = PAGE.with_suffix(".jsonl")
COMMAND = "python -m tests.reliability.transformers_tests"
BEGIN, END = f"<!-- transformers: begin, written by {COMMAND} -->", "<!-- transformers: end -->"
TYPES = (
    "idefics",
    "idefics2",
    "llava_next",
    "llava",
    "qwen2_5_vl",
    "paligemma",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma3_text",
    "phi3",
    "gpt_neox",
    "opt",
    "mixtral",
)
Row = Mapping[str, Any]


def check(model_type: str, source: Path, kinds: Sequence[str]) -> list[Row]:
    """Run the tests of one model type: first without the library, then with each kind."""
    import torch
    import transformers

    from tests.support.transformers_suite import KINDS, Suite, refused

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    suite = Suite(model_type, source)
    began, sound, counts = time.perf_counter(), [], {"skipped": 0, "failed": 0, "without a forward": 0}
    for name in suite.names:
        outcome, models = suite.run(name, None)
        if outcome.raised is not None:
            counts["failed"] += 1
        elif not models:
            counts["skipped" if outcome.was_skipped else "without a forward"] += 1
        else:
            sound.append(name)
    head = {"type": model_type, "class": suite.model_class.__name__, "versions": versions}
    rows: list[Row] = [{**head, "kind": "none", **counts, "passed": len(sound), "seconds": _since(began)}]
    for kind in kinds:
        began, models_patched = time.perf_counter(), 0
        told: dict[str, dict[str, str]] = {"failed": {}, "refused": {}}
        for name in sound:
            outcome, models = suite.run(name, KINDS[kind])
            models_patched += models
            if outcome.raised is not None:
                verdict = "refused" if refused(outcome.raised) else "failed"
                told[verdict][name] = f"{type(outcome.raised).__name__}: {outcome.raised}"[:140]
        passed = len(sound) - sum(map(len, told.values()))
        rows.append(
            {**head, "kind": kind, "passed": passed, **told, "models": models_patched, "seconds": _since(began)}
        )
    return rows


def _since(began: float) -> float:
    return round(time.perf_counter() - began, 1)


def page(rows: Iterable[Row]) -> str:
    """The table: how many of the tests that pass without the library pass with it."""
    by_type: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_type.setdefault(row["type"], {})[row["kind"]] = row
    kinds = [kind for kind in next(iter(by_type.values())) if kind != "none"]
    lines = [
        [f"`{name}`", found["none"]["passed"], *(_cell(found[kind]) for kind in kinds)]
        for name, found in by_type.items()
    ]
    # What is said once stands once, with the tests and types that it is said of.
    said: dict[tuple[str, str], dict[str, set[str]]] = {}
    for name, found in by_type.items():
        for kind in kinds:
            for verdict in ("refused", "failed"):
                for test, words in found[kind][verdict].items():
                    of = said.setdefault(
                        (verdict, words.splitlines()[0]), {"kinds": set(), "types": set(), "tests": set()}
                    )
                    for which, one in (("kinds", kind), ("types", name), ("tests", test)):
                        of[which].add(one)
    told = [
        f"- {verdict}: {words}\n    - {', '.join(sorted(of['kinds']))}; types {_listed(of['types'])}; tests "
        f"{_listed(of['tests'])}"
        for (verdict, words), of in sorted(said.items())
    ]
    versions = sorted({row["versions"] for found in by_type.values() for row in found.values()})
    text = [[str(cell) for cell in line] for line in lines]
    parts = [f"Measured with {' and '.join(versions)}.", table(["type", "without", *kinds], text)]
    return "\n\n".join([*parts, *(["\n".join(told)] if told else [])])


def _listed(names: set[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _cell(row: Row) -> str:
    refused, failed = len(row["refused"]), len(row["failed"])
    return (
        f"{row['passed']}" + (f", {refused} refused" if refused else "") + (f", **{failed} failed**" if failed else "")
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the types, keep their rows, write the page. Return the number of failures of kinds that change no bit."""
    from tests.support.transformers_suite import EXACT, KINDS, fetch

    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("types", nargs="*", default=TYPES, help="model types (default: the 15 of the page)")
    kinds = list(KINDS)
    parser.add_argument("--kinds", nargs="+", default=kinds, choices=kinds, metavar="KIND", help=", ".join(kinds))
    parser.add_argument("--source", type=Path, help="unpacked source distribution of transformers (default: fetch it)")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "transformers", help="where it is fetched to")
    parser.add_argument(
        "--no-page", action="store_true", help="print the rows and write nothing, as with some kinds alone"
    )
    options = parser.parse_args(arguments)
    writes = not options.no_page and options.kinds == kinds
    source = options.source or fetch(options.cache)
    os.environ["HF_HUB_OFFLINE"] = "1"
    kept = [json.loads(line) for line in ROWS.read_text().splitlines()] if writes and ROWS.is_file() else []
    failures = 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for model_type in options.types:
            rows = pool.submit(check, model_type, source, options.kinds).result()
            for row in rows:
                print(json.dumps(row), flush=True)
                failures += len(row["failed"]) if row["kind"] in EXACT else 0
            kept = [row for row in kept if row["type"] != model_type] + rows
            if writes:
                ROWS.write_text("".join(json.dumps(row) + "\n" for row in kept))
                PAGE.write_text(with_results(PAGE.read_text(), page(kept), BEGIN, END))
    return failures


if __name__ == "__main__":
    sys.exit(main() > 0)
