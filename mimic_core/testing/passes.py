"""Layers that run several times in a forward, each pass with an entry of its own in the spec."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from ..types import LayerSpec, ModelSpec
from .oracle import Edit, Place, Seen


def passes(spec: ModelSpec, layer: LayerSpec) -> int:
    """How many passes of a layer have entries of their own."""
    return len({other.run for other in spec.layers if other.path == layer.path})


def by_place(spec: ModelSpec, edits: Iterable[tuple[LayerSpec, Place, Edit]]) -> dict[Place, Edit]:
    """Edits of layers as those of modules: of a layer with several passes, each edit acts in its own."""
    found: dict[Place, Edit] = {}
    turns: dict[Place, list[Edit | None]] = {}
    for layer, place, edit in edits:
        if (runs := passes(spec, layer)) == 1:
            found[place] = edit
        else:
            turns.setdefault(place, [None] * runs)[layer.run] = edit
    return found | {place: _InTurn(its_edits) for place, its_edits in turns.items()}


class _InTurn:
    """The edit of a module that each forward runs several times: each time another one, or none."""

    def __init__(self, edits: list[Edit | None]) -> None:
        self._edits, self._count = edits, 0

    def __call__(self, value: Tensor, seen: Seen | None) -> Tensor:
        edit = self._edits[self._count % len(self._edits)]
        self._count += 1
        return value if edit is None else edit(value, seen)


def numbered(calls: Iterable[Seen], times: Mapping[nn.Module, int] | None = None) -> dict[tuple[nn.Module, int], Seen]:
    """The calls, by module and by how many of its calls came before.

    Args:
        times: After how many the count of a module starts again; of others, after each. None: of none.
    """
    numbers: Counter[nn.Module] = Counter()
    found: dict[tuple[nn.Module, int], Seen] = {}
    for one in calls:
        number = numbers[one.module]
        found[one.module, number if times is None else number % times.get(one.module, 1)] = one
        numbers[one.module] += 1
    return found
