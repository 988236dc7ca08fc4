"""The table of each head in each engine is whole, and a few of its lines are run again."""

from __future__ import annotations

from pathlib import Path

import pytest

import mimic_core as mc
from mimic_core.heads.base import _HEADS
from tests.engines.table import BEGIN, COLUMNS, END, ENGINES, PAGE, rows_of
from tests.support.cases import HEADS

# Quick ones, with every package in the tests' own environment, and one with a head that is refused.
AGAIN = (
    "`StackSet`",
    "gradient checkpointing",
    "`torch.export`, logits",
    "PEFT, LoRA",
    "`device_map`, a layer on disk",
)


def cells() -> list[list[str]]:
    text = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_the_table_has_each_registered_head_and_each_engine() -> None:
    head, _, *lines = cells()
    assert head == ["engine", *(f"`{name}`" for name in COLUMNS)]
    assert {mc.heads.head_for_config(HEADS[name]).name for name in COLUMNS} == set(_HEADS)
    assert [line[0] for line in lines] == list(ENGINES)
    assert {cell for line in lines for cell in line[1:]} <= {"exact", "refused", "not supported"}


@pytest.mark.newest
@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("name", AGAIN)
def test_a_line_is_still_so(name: str, tmp_path: Path) -> None:
    (written,) = (line[1:] for line in cells() if line[0] == name)
    row = rows_of([name], tmp_path)[name]
    assert [row[head].partition(":")[0] for head in COLUMNS] == written, row
