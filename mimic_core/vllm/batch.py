"""Which head each token of a step gets: indices in buffers, and one gather from stacked parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..heads import ShiftHead, ShiftStack
from ..heads.base import Edit, reading
from ..positions import Positions
from ..samples import partly
from ..types import At, Site
from .places import acts

# The most tokens of a step whose parameters are kept for the next one.
_KEPT = 128


class Step(NamedTuple):
    """What a step runs of its requests [r].

    Attributes:
        counts: How many tokens.
        starts: The place of the first of them.
        prompts: The length of the prompt.
    """

    counts: np.ndarray
    starts: np.ndarray
    prompts: np.ndarray

    def reaches(self, positions: Positions) -> np.ndarray | bool:
        """Whether it may run tokens of a request on which a stack with these positions acts [r]."""
        if positions == "all":
            return True
        return self.starts + self.counts > self.prompts if positions == "generated" else self.starts < self.prompts

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each token, its place and the length of its prompt."""
        ends = self.counts.cumsum()
        of_tokens = np.arange(ends[-1]) + np.repeat(self.starts - ends + self.counts, self.counts)
        return of_tokens, np.repeat(self.prompts, self.counts)


class Tokens:
    """For the stacks of one kind: the row of each token of the running step, and its strength.

    Attributes:
        at: The tokens that have such a stack, and on which it acts. None: all.
        is_active: Whether there are any.
        only: Their row, if all of these have the same one at strength 1.
        is_whole: All of these have strength 1.
        version: Another number whenever tokens have other rows than in the step before.
    """

    def __init__(self, most: int, positions: Positions, device: torch.device) -> None:
        self._positions: Positions = positions
        self._rows = torch.zeros(most, dtype=torch.int64, device=device)
        self._strengths = torch.zeros(most, device=device)
        self.at: Tensor | None = None
        self.is_active = False
        self.only: int | None = None
        self.is_whole = False
        self.version = 0
        self._last = np.zeros(0, dtype=np.int64)
        self._seen: tuple[np.ndarray, ...] = ()
        self._step: tuple[Tensor, Tensor] = (self._rows, self._strengths)
        self._chosen: tuple[Tensor, Tensor] | None = None

    def begin(self, rows: np.ndarray, strengths: np.ndarray, step: Step) -> bool:
        """Say what the next step runs. Returns whether it is something else than in the step before.

        Args:
            rows: The row of each request's stack [r]; -1: it has none of this kind. Another array if one changes.
            strengths: [r]. The same.
        """
        # Steps that decode are alike until a request comes or goes, if a stack acts on all tokens. To work it out again
        # takes as long as LIVE in ten layers.
        if self._positions == "all":
            seen = self._seen
            if seen and rows is seen[0] and strengths is seen[1] and np.array_equal(step.counts, seen[2]):
                return False
            self._seen = rows, strengths, step.counts.copy()
        self._begin(rows, strengths, step)
        return True

    def _begin(self, rows: np.ndarray, strengths: np.ndarray, step: Step) -> None:
        has = (rows >= 0) & (strengths != 0) & step.reaches(self._positions)
        self.is_active = bool(has.any())
        if not self.is_active:
            return
        of_tokens = np.repeat(np.where(has, rows, -1), step.counts)
        if self._positions != "all":
            of_tokens[~acts(self._positions, *step.places())] = -1
        here = np.flatnonzero(of_tokens >= 0)
        self.is_active = len(here) > 0
        if not self.is_active:
            return
        n = len(of_tokens)
        if not np.array_equal(of_tokens, self._last):
            self.version += 1
            self._last = of_tokens
            device = self._rows.device
            _write(self._rows, np.maximum(of_tokens, 0))
            self.at = None if len(here) == n else _ready(here, device).to(device, non_blocking=True)
        of_strengths = np.where(of_tokens >= 0, np.repeat(strengths, step.counts), 0)
        _write(self._strengths, of_strengths)
        self._strengths[n:] = 0
        self._step = self._rows[:n], self._strengths[:n]
        self._chosen = None if self.at is None else (self._rows[self.at], self._strengths[self.at])
        self.is_whole = bool((of_strengths[here] == 1).all())
        first = int(of_tokens[here[0]])
        self.only = first if self.is_whole and bool((of_tokens[here] == first).all()) else None

    def of(self, n: int) -> tuple[Tensor, Tensor]:
        """The rows and strengths of the first n tokens: those of the step, or also some that fill it up."""
        return self._step if n == len(self._step[0]) else (self._rows[:n], self._strengths[:n])

    def chosen(self, n: int) -> tuple[Tensor, Tensor]:
        """Those of the first n tokens that have such a stack."""
        return self.of(n) if self._chosen is None else self._chosen


def _write(buffer: Tensor, found: np.ndarray) -> None:
    """Write the first numbers of a buffer, without waiting for a GPU."""
    buffer[: len(found)].copy_(_ready(found, buffer.device), non_blocking=True)


def _ready(found: np.ndarray, device: torch.device) -> Tensor:
    """Numbers that can be copied to a device without waiting for it."""
    source = torch.from_numpy(found)
    return source if device.type == "cpu" else source.pin_memory()


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
        self._heads_first = site in ("query", "key", "value")  # a head gets them as [b h t d], and vLLM has [t h d]
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
        at = self._tokens.at
        edited = self._edited(value if at is None else value[at], attention)
        return edited if at is None else value.index_copy(0, at, edited)

    def _edited(self, value: Tensor, attention: Any) -> Tensor:
        only = self._tokens.only
        if only is not None:
            head = self._heads[only]
            assert head is not None
            as_one = value.transpose(0, 1) if self._heads_first else value
            edited = head.edits()[self._site](as_one[None], self._at(attention, at_once=True))[0]
            return edited.transpose(0, 1) if self._heads_first else edited
        rows, strengths = self._tokens.chosen(len(value))
        token = 2 if self._heads_first else 1
        edited = self._edit(rows)(value.unsqueeze(token), self._at(attention, at_once=False)).squeeze(token)
        if self._has is not None:
            # What a head makes of a token that does not have it may be infinite; `partly` doesn't look at it then.
            return partly(value, edited, strengths * self._has[rows])
        return edited if self._tokens.is_whole else partly(value, edited, strengths)

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
        return At(
            self._layer,
            self._site,
            self._module,
            None if attention is None else attention.view(at_once, self._tokens.at),
        )


def _gated_shift(heads: Sequence[ShiftHead | None]) -> list[Tensor]:
    """Vector, gate weight and gate bias of each row [rows h ...]. A row without a head has a vector of zeros."""
    some = next(head for head in heads if head is not None)
    here = torch.empty(0)
    without = [torch.zeros_like(x) for x in some.gated_shift(here)]
    of_rows = [without if head is None else head.gated_shift(here) for head in heads]
    return [torch.stack([x.detach().float() for x in same]).contiguous() for same in zip(*of_rows, strict=True)]
