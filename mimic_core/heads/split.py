"""A head in a tensor-parallel model: each process runs its slice of the parameters that are per attention head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import nn

from ..errors import UnsupportedModelError
from ..parallel import Parallel
from .base import ShiftHead


def of_process(head: ShiftHead, parallel: Parallel | None) -> ShiftHead:
    """The head as this process runs it: itself, or one with its own attention heads.

    Raises:
        UnsupportedModelError: the process lacks attention heads, and the head's formula needs all of them.
    """
    index = head.layer.index
    inside = [] if parallel is None else [site for site in head.edits() if parallel.splits(index, site)]
    if parallel is None or not inside:
        return head
    if head.per_head is None or not {"key", "value"}.isdisjoint(inside):
        raise UnsupportedModelError(
            f"{type(head).__name__} with {head.config} edits {', '.join(inside)} of layer {index}, where each of "
            f"{parallel.size} processes has only its own attention heads, and it does not say that its formula is "
            f"the same for each attention head (ShiftHead.per_head): load the model without tp_plan, or use another "
            f"head or other options"
        )
    # Not a copy: the parameters stay those of the stack, and are sliced each time they are read.
    one = object.__new__(type(head))
    layer = replace(head.layer, heads=head.layer.heads // parallel.size)
    one.__dict__ = {**head.__dict__, "layer": layer, "_parameters": _Slices(head, parallel)}
    return one


class _Slices(Mapping[str, "nn.Parameter | None"]):
    def __init__(self, head: ShiftHead, parallel: Parallel) -> None:
        self._head, self._parallel = head, parallel

    def __getitem__(self, name: str) -> nn.Parameter | None:
        whole = self._head._parameters[name]
        if whole is None or name not in (self._head.per_head or ()):
            return whole
        return self._parallel.own(whole)  # pyright: ignore[reportReturnType]

    def __contains__(self, name: object) -> bool:
        return name in self._head._parameters

    def __iter__(self) -> Iterator[str]:
        return iter(self._head._parameters)

    def __len__(self) -> int:
        return len(self._head._parameters)
