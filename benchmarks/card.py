"""`python -m benchmarks.card`: build, test and measure on a GPU in a few minutes.

It writes into one folder: `tests.txt` (the output of `pytest -m gpu`), the CSV file, and `page.md` with its tables.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path

import torch

import mimic_core as mc

from . import bench_heads, bench_host, bench_patch, bench_shift, records, report
from .__main__ import measured
from .bench_shift import Task
from .errors import BenchmarkError

# Patterns of case names, the most important first. When the time limit is reached, the rest is not measured.
CASES = (
    *("host call eager", "host live call eager", "host tiny_llama eager", "host smollm2 eager", "host smollm2 graphs"),
    *("d64-t1024-bf16-causal", "d64-t4096-bf16-causal", "d128-t1024-bf16-causal", "d128-t4096-bf16-causal"),
    *("smollm2 decode 1024", "smollm2 training", "qwen2.5-vl-7b-t4096-bf16-causal", "idefics-9b-t4096-bf16-causal"),
    *("host static cache", "live-c4096-t1024", "*-s4096-bf16-none", "host call graphs", "d64-t4096-fp32-causal"),
    *("smollm2 prefill 1024", "host tiny_llava eager", "host tiny_llama compiled", "*-t4096-*", "*"),
)
_TESTS = Path(__file__).parents[1] / "tests"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. It ends with status 1 if a test failed or a case was refused."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.card", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="use cpu to try the script")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit for everything together (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("card"), help="output folder (default: card)")
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "benchmarks.card needs a GPU, and torch.cuda.is_available() is False; to try the script, use --device cpu"
        )
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"built: {mc.ops.build_native()}\nruns: {_chosen(device)}", flush=True)
    failed = _tests(options.out / "tests.txt", limit=(end - time.monotonic()) / 2)
    refused = _rows(device, options.out, end)
    if failed or refused:
        sys.exit("\n".join(["benchmarks.card:", failed, *map(str, refused)]))


def _chosen(device: torch.device) -> mc.ops.Backend:
    """The backend of a call, which the first one builds for."""
    q = torch.zeros(1, 2, 4, 64, device=device, dtype=torch.bfloat16)
    mc.ops.attention_with_lse(q, q, q)
    return mc.ops.resolve_backend(q, q, q)


def _tests(path: Path, limit: float) -> str:
    """What went wrong in the tests that need a GPU; "" if nothing did."""
    cores = os.cpu_count() or 1
    workers = min(4, cores) if cores > 1 else 0  # 0: no process beside the first
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"-n{workers}", "--no-shape-checks", str(_TESTS)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
        said, status = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as stopped:
        said, status = f"{stopped.stdout or ''}\nstopped after {limit:.0f} seconds\n", 1
    path.write_text(said)
    print(said[-1000:], flush=True)
    return f"the tests failed, see {path}" if status else ""


def _rows(device: torch.device, out: Path, end: float) -> list[BenchmarkError]:
    path, rows, refused = out / records.file_name(device), [], []
    machine = records.this_machine(device)
    for task in _ordered(device):
        if time.monotonic() > end - 20:
            print("the time limit is reached; the remaining cases are not measured", flush=True)
            break
        print(task.name, flush=True)
        rows += measured(task, machine, refused)
        records.write(path, rows)
    if rows:
        (out / "page.md").write_text(report.section(rows, path.stem) + "\n")
        print(report.targets(rows, measured_only=True))
    return refused


def _ordered(device: torch.device) -> Iterator[Task]:
    """Every task once, in the order of `CASES`."""
    left = list(
        chain.from_iterable(bench.tasks(device, False) for bench in (bench_host, bench_shift, bench_patch, bench_heads))
    )
    for pattern in CASES:
        for task in [task for task in left if fnmatch(task.name, pattern)]:
            left.remove(task)
            yield task


if __name__ == "__main__":
    main()
