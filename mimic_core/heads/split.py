"""A head in a tensor-parallel model: each process runs its slice of the parameters that are per attention head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from ..errors import UnsupportedModelError
from ..parallel import Parallel
from ..types import Site
from .base import ShiftHead, reading


def of_process(head: ShiftHead, parallel: Parallel | None, site: Site) -> ShiftHead:
    """The head as this process runs it at a site: itself, or one with its own attention heads.

    Raises:
        UnsupportedModelError: the process lacks attention heads, and the head's formula may need all of them.
    """
    if parallel is None or not parallel.splits(head.layer.index, site):
        return head
    if head.per_head is None or head._modules or site in ("key", "value"):
        raise UnsupportedModelError(
            f"{type(head).__name__} with {head.config} edits {site} of layer {head.layer.index}, where each of "
            f"{parallel.size} processes has only its own attention heads. Its formula must be the same for each "
            f"attention head, with parameters of its own (ShiftHead.per_head) and no modules, at query or attn_heads. "
            f"Load the model without tp_plan, or use another head or other options"
        )
    # Not a copy: the parameters stay those of the stack, and are sliced each time they are read.
    layer = replace(head.layer, heads=head.layer.heads // parallel.size)
    return reading(head, _Slices(head, parallel), layer=layer)


class _Slices(Mapping[str, "Tensor | None"]):
    def __init__(self, head: ShiftHead, parallel: Parallel) -> None:
        self._head, self._parallel = head, parallel

    def __getitem__(self, name: str) -> Tensor | None:
        whole = self._head._parameters[name]
        if whole is None:
            return None
        return self._parallel.own(whole) if name in (self._head.per_head or ()) else self._parallel.shared(whole)

    def __contains__(self, name: object) -> bool:
        return name in self._head._parameters

    def __iter__(self) -> Iterator[str]:
        return iter(self._head._parameters)

    def __len__(self) -> int:
        return len(self._head._parameters)
