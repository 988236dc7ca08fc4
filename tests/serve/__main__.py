"""`python -m tests.serve`: run all tests of serving, and write the table of docs/serve.md.

It needs an environment with vLLM, and about twenty minutes.
"""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false

from __future__ import annotations

import sys
from datetime import date
from pathlib import Path

import pytest

from benchmarks.report import with_results
from tests.support.serving_features import BEGIN, END, PAGE, table


class Outcomes:
    """A plugin of pytest that keeps the worst outcome of each test."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.removeprefix("tests/serve/")
        if report.outcome != "passed" or (report.when == "call" and name not in self.found):
            self.found[name] = report.outcome


def main() -> int:
    """Run the tests. Return the number of those that did not pass."""
    import vllm

    outcomes = Outcomes()
    # Each file has a process of its own: what vLLM keeps in one is gone with it.
    options = ["-q", "-n", "1", "--dist", "loadfile", "--no-shape-checks", *sys.argv[1:], str(Path(__file__).parent)]
    # One after the other: tests that share an engine may not have those with one of their own between them.
    for marked in ("not exhaustive", "exhaustive"):
        pytest.main(["-m", marked, *options], [outcomes])
    text = table(
        outcomes.found, f"on {date.today()}, with vLLM {vllm.__version__} on a CPU: {len(outcomes.found)} tests"
    )
    print(text)
    PAGE.write_text(with_results(PAGE.read_text(), text, BEGIN, END))
    return sum(outcome != "passed" for outcome in outcomes.found.values())


if __name__ == "__main__":
    sys.exit(main() > 0)
