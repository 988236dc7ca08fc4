"""Pages of the documentation: their blocks, and their prose."""

from __future__ import annotations

import re
import textwrap
from typing import NamedTuple

_FENCE = re.compile(r"(?P<indent>\s*)(?P<ticks>`{3,}|~{3,})\s*(?P<language>[^\s`{]*)")
_SETUP = re.compile(r"\s*<!--\s*setup\s*$")


class Block(NamedTuple):
    """What stands between two fences (or in a comment), its language, and the number of lines above it."""

    language: str
    text: str
    above: int


def split(page: str) -> tuple[list[Block], str]:
    """The blocks of a page in order, and its prose: the page with every line of a block blank."""
    blocks, prose = [], []
    lines = page.splitlines()
    start, language, end = 0, "", None
    for number, line in enumerate(lines):
        if end is not None:
            if end.fullmatch(line):
                blocks.append(Block(language, textwrap.dedent("\n".join(lines[start:number])) + "\n", start))
                end = None
            prose.append("")
        elif fence := _FENCE.match(line):
            start, language = number + 1, fence["language"]
            end = re.compile(rf"\s*{fence['ticks'][0]}{{{len(fence['ticks'])},}}\s*")
            prose.append("")
        elif _SETUP.match(line):
            start, language, end = number + 1, "setup", re.compile(r"\s*-->\s*")
            prose.append("")
        else:
            prose.append(line)
    assert end is None, f"the block that starts on line {start} has no end"
    return blocks, "\n".join(prose)
