"""`python -m tests.engines`: run every head in every engine, and write the table of docs/scale.md.

It needs the packages of the engines. Where one is missing, its line says so.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.report import with_results

from .subject import quiet
from .table import BEGIN, COMMAND, END, ENGINES, rows_of, written


def main() -> int:
    """Run the engines, print their lines. Return the number of failures."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("names", nargs="*", help="engines with one of these words in their names (default: all)")
    parser.add_argument("--page", type=Path, help="write the table into this Markdown file, between its markers")
    options = parser.parse_args()
    if options.names and options.page:
        parser.error("a page gets all engines: leave the names out, or --page")
    quiet()
    chosen = [name for name in ENGINES if not options.names or any(word in name for word in options.names)]
    with TemporaryDirectory() as folder:
        rows = rows_of(chosen, Path(folder))
    text = written(rows)
    print(text)
    if options.page:
        options.page.write_text(with_results(options.page.read_text(), text, BEGIN, END))
    return sum(cell.startswith("failed") for row in rows.values() for cell in row.values())


if __name__ == "__main__":
    sys.exit(main() > 0)
