"""Runs compiled.py and its neighbours in processes without shape checks: torch.compile can't trace those."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.mark.newest
@pytest.mark.parametrize("marked", ["not exhaustive", pytest.param("exhaustive", marks=pytest.mark.exhaustive)])
def test_compiled(marked: str) -> None:
    # One process for all files: it begins with 20 seconds of imports and of what torch.compile does when first called.
    files = [str(HERE / name) for name in ("compiled.py", "compiled_patches.py", "compiled_sdpa.py")]
    options = ["-q", "--no-shape-checks", "--show-capture=no", "-pno:cacheprovider", "-ptests.support.compilable"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-m", marked, *files],
        env={name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")} | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
