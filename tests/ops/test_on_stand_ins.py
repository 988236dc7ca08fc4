"""Runs on_stand_ins.py, a test file, in a process of its own: what stands in for CUDA's driver is there to stay."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the driver itself is there")
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles the kernels with g++")
def test_the_way_of_a_gpu() -> None:
    options = ["-m", "pytest", "-q", "--show-capture=no", "-pno:cacheprovider"]
    done = subprocess.run(
        [sys.executable, *options, str(HERE / "on_stand_ins.py")],
        env={name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
