"""`python -m tests.zoo`: run the conformance kit over every model type, and write the support matrix."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from tqdm import tqdm

from .matrix import every_place, run
from .page import lines_of, read, serves, summary, updated, write


def main() -> int:
    """Run the types that have no row yet, and write the page. Return the number of failed types."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("types", nargs="*", help="model types (default: all of the installed transformers)")
    parser.add_argument(
        "--rows",
        type=Path,
        default=Path("support-matrix"),
        help="folder of the rows; types that have a row there are not run again (default: support-matrix)",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many types run at the same time")
    parser.add_argument(
        "--page",
        type=Path,
        help="write the page to this Markdown file, and a .jsonl beside it; of some types: renew their lines of it",
    )
    parser.add_argument("--lowest", type=Path, help="folder of the rows with the oldest transformers, for their column")
    arguments = parser.parse_args()
    places = [place for place in every_place() if not arguments.types or place.model_type in arguments.types]
    if unknown := set(arguments.types) - {place.model_type for place in places}:
        parser.error(f"transformers has no model type {', '.join(sorted(unknown))}")
    rows = []
    with tqdm(total=len(places), unit="type") as bar:
        for row in run(places, arguments.rows, arguments.jobs):
            bar.set_postfix_str(row["type"])
            bar.update()
            rows.append(row)
    failed = [row["type"] for row in rows if serves(row) == "failed"]
    lowest = [json.loads(path.read_text()) for path in arguments.lowest.glob("*.json")] if arguments.lowest else []
    lines = lines_of(rows, lowest)
    print(summary(lines), *(f"failed: {name}" for name in failed), sep="\n")
    if arguments.page is not None:
        renews = arguments.types and arguments.page.exists()
        write(updated(read(arguments.page), lines) if renews else lines, arguments.page)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main() > 0)
