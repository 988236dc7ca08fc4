"""What each head is in each engine, and the table of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import distributed

import mimic_core as mc
from benchmarks.report import table
from tests.support.processes import outcomes

from . import one_process as _one_process  # noqa: F401
from . import two_processes
from .subject import COLUMNS, ENGINES, Engine

__all__ = ["COLUMNS", "ENGINES", "PAGE", "lines_of", "rows_of"]

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
COMMAND = "python -m tests.engines --page docs/scale.md"
BEGIN, END = f"<!-- engines: begin, written by {COMMAND} -->", "<!-- engines: end -->"
Row = Mapping[str, str]
"""By head: "exact", or another verdict, a colon, and what was said."""


def verdict(engine: Engine, head: str) -> str:
    """What a head is in an engine."""
    try:
        engine.run(head)
    except ImportError as error:
        return f"skipped: {_words(error)}"
    except AssertionError as error:
        return f"failed: {_words(error)}"
    except Exception as error:
        below: BaseException | None = error
        while below is not None:  # an engine may raise its own error from ours
            if isinstance(below, mc.MimicError):
                return f"refused: {_words(below)}"
            below = below.__cause__
        cannot = engine.cannot is not None and re.search(engine.cannot, str(error))
        return f"{'not supported' if cannot else 'failed'}: {_words(error)}"
    return "exact"


def _words(error: BaseException) -> str:
    """The first words of an error, without numbers of lines or places in memory."""
    said = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {said if len(said) <= 240 else said[:240].rpartition(' ')[0] + ' ...'}"


def rows_of(names: Iterable[str], folder: Path) -> dict[str, Row]:
    """A row for each engine. Those of several processes run in one group of them."""
    names = list(names)
    grouped = [name for name in names if ENGINES[name].processes > 1]
    checks = {f"{name}|{head}": partial(_in_group, name, head) for name in grouped for head in COLUMNS}
    broken = outcomes(2, folder, two_processes.begin, checks) if checks else {}
    rows: dict[str, Row] = {}
    for name in names:
        if name in grouped:
            told = {head: broken[f"{name}|{head}"] for head in COLUMNS}
            rows[name] = {
                head: f"failed: {words.splitlines()[-1]}" if words else _agreed(folder, name, head)
                for head, words in told.items()
            }
        else:
            rows[name] = {head: verdict(ENGINES[name], head) for head in COLUMNS}
    return rows


def _file(folder: Path, name: str, head: str, rank: int) -> Path:
    return folder / f"{re.sub(r'[^a-zA-Z0-9]+', '-', name)}-{head}-{rank}.verdict"


def _in_group(name: str, head: str, folder: Path) -> None:
    _file(folder, name, head, distributed.get_rank()).write_text(json.dumps(verdict(ENGINES[name], head)))


def _agreed(folder: Path, name: str, head: str) -> str:
    found = {json.loads(_file(folder, name, head, rank).read_text()) for rank in range(2)}
    return found.pop() if len(found) == 1 else f"failed: the processes differ: {'; '.join(sorted(found))}"


def lines_of(rows: Mapping[str, Row]) -> list[str]:
    """The table, a line for each engine."""
    cells = [[name, *(row[head].partition(":")[0] for head in COLUMNS)] for name, row in rows.items()]
    marked = [[f"**{cell}**" if cell == "failed" else cell for cell in line] for line in cells]
    return table(["engine", *(f"`{head}`" for head in COLUMNS)], marked, left=1 + len(COLUMNS)).splitlines()


def written(rows: Mapping[str, Row]) -> str:
    """What stands between the markers: the versions, the table, and what was said, with whom it was said of."""
    said: dict[str, dict[str, list[str]]] = {}
    for name, row in rows.items():
        for head, found in row.items():
            if found != "exact":
                said.setdefault(found, {}).setdefault(name, []).append(f"`{head}`")
    told = [
        f"- {words}\n" + "\n".join(f"    - {name}: {', '.join(heads)}" for name, heads in of.items())
        for words, of in sorted(said.items())
    ]
    versions = f"Written with torch {torch.__version__}, transformers {transformers.__version__}."
    return "\n\n".join([versions, "\n".join(lines_of(rows)), "\n".join(told)])
