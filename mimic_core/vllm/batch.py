"""Which head each token of a step gets: indices in buffers, and one gather from stacked parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..heads import ShiftHead, ShiftStack
from ..heads.base import Edit, reading
from ..samples import by_row, partly
from ..types import At, Site

# The most tokens of a step whose parameters are kept for the next one.
_KEPT = 128


class Tokens:
    """For the stacks of one kind: the row of each token of the running step, and its strength.

    Attributes:
        is_active: Whether any token of the step has such a stack.
        only: The row, if all tokens have the same one at strength 1.
        is_whole: All tokens have one, at strength 1.
        version: Another number whenever tokens have other rows than in the step before.
    """

    def __init__(self, most: int, device: torch.device) -> None:
        self._rows = torch.zeros(most, dtype=torch.int64, device=device)
        self._strengths = torch.zeros(most, device=device)
        self.is_active = False
        self.only: int | None = None
        self.is_whole = False
        self.version = 0
        self._last = np.zeros(0, dtype=np.int64)

    def begin(self, rows: np.ndarray, strengths: np.ndarray, counts: np.ndarray) -> None:
        """Say what the next step runs.

        Args:
            rows: The row of each request's stack [r]; -1: it has none of this kind.
            strengths: [r].
            counts: How many tokens of each request the step runs [r].
        """
        has = rows >= 0
        self.is_active = bool(has.any())
        self.only = None
        if not self.is_active:
            return
        self.is_whole = bool(has.all() and (strengths == 1).all())
        if self.is_whole and (rows == rows[0]).all():
            self.only = int(rows[0])
        n = int(counts.sum())
        of_tokens = np.repeat(np.where(has, rows, 0), counts)
        if not np.array_equal(of_tokens, self._last):
            self.version += 1
            self._last = of_tokens
            _write(self._rows, of_tokens)
        _write(self._strengths, np.repeat(np.where(has, strengths, 0.0), counts))
        self._strengths[n:] = 0

    def end(self) -> None:
        """The step is over: what runs outside a step, such as a warm-up, has no stack."""
        self.is_active = False

    def of(self, n: int) -> tuple[Tensor, Tensor]:
        """The rows and strengths of the first n tokens."""
        return self._rows[:n], self._strengths[:n]


def _write(buffer: Tensor, found: np.ndarray) -> None:
    """Write the first numbers of a buffer, without waiting for a GPU."""
    source = torch.from_numpy(found)
    buffer[: len(source)].copy_(source.pin_memory() if buffer.is_cuda else source, non_blocking=True)


class Heads:
    """The heads of one kind at one site of one layer, for tokens of which each may have another one.

    Args:
        stacks: The stacks of the kind, one for each row. Not all need to have a head in the layer.
        module: vLLM's module of the site.
    """

    def __init__(self, stacks: Sequence[ShiftStack], layer: int, site: Site, module: nn.Module, tokens: Tokens) -> None:
        found = [stack[layer] if layer in stack.layers else None for stack in stacks]
        self._heads = found
        self._tokens = tokens
        self._site: Site = site
        self._heads_first = site == "query"  # a head gets it as [b h t d], and vLLM has [t h d]
        self._layer = layer
        self._module = module
        self._some = next(head for head in found if head is not None)
        names = (*self._some._parameters, *self._some._buffers)
        # A row without a head here has another one's numbers, and strength 0.
        filled = [head or self._some for head in found]
        self._stacked = {name: torch.stack([head.own(name).detach() for head in filled]) for name in names}
        self._kept: tuple[tuple[int, int], Edit] | None = None
        self._shift = _gated_shift(found) if site == "attn_heads" and self._some.is_gated_shift else None
        has = [float(head is not None) for head in found]
        self._has = None if all(has) else torch.tensor(has, device=self._stacked[names[0]].device)

    @property
    def is_active(self) -> bool:
        """Whether a token of the step may get a head here."""
        tokens = self._tokens
        return tokens.is_active and (tokens.only is None or self._heads[tokens.only] is not None)

    def __call__(self, value: Tensor, attention: Any = None) -> Tensor:
        """The edited value of a step's tokens [n ...]; it may be `value` itself, changed."""
        if self._shift is not None and attention.gated_shift(value, self._shift, *self._tokens.of(len(value))):
            return value
        only = self._tokens.only
        if only is not None:
            head = self._heads[only]
            assert head is not None
            as_one = value.transpose(0, 1) if self._heads_first else value
            edited = head.edits()[self._site](as_one[None], self._at(attention, at_once=True))[0]
            return edited.transpose(0, 1) if self._heads_first else edited
        rows, strengths = self._tokens.of(len(value))
        token = 2 if self._heads_first else 1
        edited = self._edit(rows)(value.unsqueeze(token), self._at(attention, at_once=False)).squeeze(token)
        if self._has is not None:
            strengths = strengths * self._has[rows]
        elif self._tokens.is_whole:
            return edited
        # What a head makes of a token that does not have it may be infinite.
        return torch.where(by_row(strengths == 0, value), value, partly(value, edited, strengths))

    def _edit(self, rows: Tensor) -> Edit:
        """The edit of heads with these rows of the parameters: to it, each token is a sample of its own."""
        key = (self._tokens.version, len(rows))
        if self._kept is not None and self._kept[0] == key:
            return self._kept[1]
        edit = reading(self._some, {name: x[rows] for name, x in self._stacked.items()}).edits()[self._site]
        # Steps that decode have the same rows until a request comes or goes. Those of a prompt would take much memory.
        self._kept = (key, edit) if len(rows) <= _KEPT else None
        return edit

    def _at(self, attention: Any, at_once: bool) -> At:
        return At(self._layer, self._site, self._module, None if attention is None else attention.view(at_once))


def _gated_shift(heads: Sequence[ShiftHead | None]) -> list[Tensor]:
    """Vector, gate weight and gate bias of each row [rows h ...]. A row without a head has a vector of zeros."""
    some = next(head for head in heads if head is not None)
    here = torch.empty(0)
    without = [torch.zeros_like(x) for x in some.gated_shift(here)]
    of_rows = [without if head is None else head.gated_shift(here) for head in heads]
    return [torch.stack([x.detach().float() for x in same]).contiguous() for same in zip(*of_rows, strict=True)]
