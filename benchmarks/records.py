"""Rows that describe themselves, and the CSV files that hold them."""

from __future__ import annotations

import csv
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar, overload

import torch

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Machine:
    """Where, when and with what a row was measured. `cores` and `threads` are the CPU's and torch's."""

    date: str = ""
    commit: str = ""
    device: str = ""
    cores: int | None = None
    threads: int | None = None
    torch: str = ""
    transformers: str = ""
    triton: str = ""
    python: str = ""


@dataclass(frozen=True)
class Row(Machine):
    """One contestant in one measurement, or one error. What doesn't apply is empty.

    Attributes:
        bench: "shift", "patch" or "host".
        case: A name for shape, length, dtype and mask together; `model` is the first part of it.
        what: "forward", "forward+backward", "decode", "prefill", "training", "live forward", ..., or "error".
        backend: Which backend of mimic_core ran, and `why`.
        yardstick: Whom `ratio` is against.
        ratio: Median of the time ratios within a round; `ratio_p20` and `ratio_p80` beside it.
        time_us: Median time of a call.
        added_us: Median of the time differences to the yardstick within a round.
        speed_up: Median of published time / this time within a round.
        peak_bytes: Most memory a call held at a time, above its inputs.
        extra_over_yardstick: `peak_bytes` over the yardstick's.
        layers: How many layers `time_us` and `added_us` are divided by.
        of: Which output or gradient an error is of, or what `count` counts.
        count: Above the yardstick's: "launches" a layer (kernels on a GPU, operators on a CPU); in all: "graph breaks"
            and "recompiles".
        error: Relative, in length, to fp64; `yardstick_error` is that of the yardstick, or the largest of its
            gradients' where it has no such input.
    """

    bench: str = ""
    case: str = ""
    model: str = ""
    b: int | None = None
    h: int | None = None
    g: int | None = None
    t: int | None = None
    s: int | None = None
    d: int | None = None
    dtype: str = ""
    mask: str = ""
    what: str = ""
    contestant: str = ""
    backend: str = ""
    why: str = ""
    yardstick: str = ""
    ratio: float | None = None
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    time_us: float | None = None
    added_us: float | None = None
    speed_up: float | None = None
    peak_bytes: int | None = None
    extra_over_yardstick: float | None = None
    rounds: int | None = None
    layers: int | None = None
    of: str = ""
    count: float | None = None
    error: float | None = None
    yardstick_error: float | None = None


Kind = TypeVar("Kind", bound=Machine)


def stamped(rows: Iterable[Kind], machine: Machine) -> list[Kind]:
    """Rows with the machine's facts in them."""
    return [replace(row, **asdict(machine)) for row in rows]


def this_machine(device: torch.device) -> Machine:
    """The facts of here and now."""
    return Machine(
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        commit=_commit(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        transformers=_version("transformers"),
        triton=_version("triton"),
        python=platform.python_version(),
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@cache
def _commit() -> str:
    """What git calls the code, "-dirty" where it was changed since; "" outside a repository."""
    return _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--tags")


def _cpu_name() -> str:
    found = re.search(r"(?m)^Model name:\s*(.+?)\s*$", _output("lscpu"))
    return found[1] if found else platform.processor() or platform.machine()


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def file_name(device: torch.device) -> str:
    """ "cpu.csv", or "cuda-" and the card's name."""
    if device.type != "cuda":
        return f"{device.type}.csv"
    card = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return f"cuda-{card}.csv"


def write(path: Path, rows: Iterable[Machine], kind: type[Machine] = Row) -> None:
    """One line a row under a line of names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, _types(kind), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _written(value) for name, value in asdict(row).items()})


@overload
def read(path: Path) -> list[Row]: ...
@overload
def read(path: Path, kind: type[Kind]) -> list[Kind]: ...
def read(path: Path, kind: Any = Row) -> list[Any]:
    """The rows of a file written by `write`."""
    types = _types(kind)
    with path.open(newline="") as file:
        return [
            kind(**{name: _parsed(types[name], text) for name, text in line.items()}) for line in csv.DictReader(file)
        ]


def _types(kind: type[Machine]) -> dict[str, str]:
    return {field.name: str(field.type) for field in fields(kind)}


def _written(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _parsed(kind: str, text: str) -> Any:
    if kind == "str":
        return text
    if not text:
        return None
    return int(text) if kind.startswith("int") else float(text)
