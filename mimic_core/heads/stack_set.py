"""A set of stacks: each sample of a batch gets one of them, or none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import count

import torch
from torch import Tensor, nn

from ..errors import PatchStateError, ShapeError, UnknownNameError
from ..parallel import Parallel
from ..samples import Samples, by_row
from ..types import At, Site
from .base import ShiftHead, reading
from .split import of_process
from .stack import ShiftStack, check_stack

Kind = tuple[type[ShiftHead], str]
"""Class and options of heads. See `kind_of`."""


class StackSet(nn.Module):
    """Named stacks for one model. Each sample of a batch gets one of them, or none.

        stacks = StackSet({"vqa": a, "caption": b})
        with patch(model, stacks) as handle, handle.using(["vqa", None, "caption"]):
            model.generate(**batch)

    The stacks can have different heads and layers. `stacks["new"] = c` adds or replaces one and `del stacks["vqa"]`
    removes one, also while the set is in a model. A running `handle.using` goes on with the stacks that it began with.
    `parameters()` are those of all stacks. Save each stack by itself with `save_shifts`.

    Args:
        stacks: The stacks by name.

    Raises:
        WrongTypeError: something else than a stack is given.
        UnknownNameError: a name is no string, or empty, or has a dot.
        ShapeError: the stacks were built for models of different sizes.
    """

    def __init__(self, stacks: Mapping[str, ShiftStack] | None = None) -> None:
        super().__init__()
        self.stacks = nn.Module()
        for name, stack in (stacks or {}).items():
            self[name] = stack

    def __getitem__(self, name: str) -> ShiftStack:
        stack = self.stacks._modules.get(name)
        if stack is None:
            raise UnknownNameError(f"no stack is called {name!r}; the set has {', '.join(map(repr, self)) or 'none'}")
        assert isinstance(stack, ShiftStack)
        return stack

    def __setitem__(self, name: str, stack: ShiftStack) -> None:
        check_stack(stack)
        if not isinstance(name, str) or not name or "." in name:
            raise UnknownNameError(f"the name of a stack is a string without dots, and not empty; found {name!r}")
        for other in self:
            if other != name and (misfit := stack.spec.misfit(self[other].spec)):
                raise ShapeError(f"stack {name!r} does not fit stack {other!r} of the set: it was built for {misfit}")
        self.stacks._modules[name] = stack  # not by setattr: a stack may be called "forward"

    def __delitem__(self, name: str) -> None:
        del self.stacks._modules[self._known(name)]

    def _known(self, name: str) -> str:
        self[name]
        return name

    def __iter__(self) -> Iterator[str]:
        return iter(list(self.stacks._modules))

    def __len__(self) -> int:
        return len(self.stacks._modules)

    def __contains__(self, name: object) -> bool:
        return name in self.stacks._modules

    def values(self) -> list[ShiftStack]:
        """The stacks, in the order in which their names were added."""
        return [self[name] for name in self]


def kind_of(stack: ShiftStack, nth: int = 0) -> Kind:
    """Stacks of one kind have heads with the same formula, in whatever layers: they differ in their numbers alone.

    If a stack is composed of several of one kind, `nth` tells them apart.
    """
    options = {**stack.config.to_dict(), "layers": None}
    return type(next(iter(stack))), json.dumps([options, nth], sort_keys=True)


def by_kind(stack: ShiftStack) -> dict[Kind, ShiftStack]:
    """The parts of a stack, in their order."""
    found: dict[Kind, ShiftStack] = {}
    for part in stack.parts:
        kind = next(kind for n in count() if (kind := kind_of(part, n)) not in found)
        found[kind] = part
    return found


@dataclass(frozen=True)
class Mixed:
    """The heads of one kind at one site of one layer, for rows of which each may have another one."""

    kind: Kind
    layer: int
    site: Site
    parallel: Parallel | None = None

    def __call__(
        self, samples: Samples, device: torch.device
    ) -> tuple[Callable[[Tensor, At], Tensor], Tensor | None] | None:
        """The function that edits the site, and the rows [b] for which it does. None in place of the rows: all."""
        key = (self, device)
        if key not in samples.remembered:
            samples.remembered[key] = self._chosen(samples, device)
        heads, index, rows = samples.remembered[key]
        if not heads:
            return None
        if len(heads) == 1:
            return heads[0].edits()[self.site], rows
        if samples.kept is not None and key in samples.kept:
            return samples.kept[key].edit, rows
        if not heads[0].takes_samples or heads[0]._modules:
            return self._one_by_one(heads, index), rows
        gathered = _Gathered(heads, index, self.site)
        if samples.kept is not None:
            samples.kept[key] = gathered
        return gathered.edit, rows

    def _chosen(self, samples: Samples, device: torch.device) -> tuple[list[ShiftHead], Tensor | None, Tensor | None]:
        """The different heads, which of them each row gets [b], and whether it gets any [b]."""
        stacks = samples.stacks or ()
        of_stack = {stack: self._head_of(stack) for stack in set(stacks)}  # many samples have the same
        heads = [of_stack[stack] for stack in stacks]
        different = {id(head): head for head in heads if head is not None}
        ours = [of_process(head, self.parallel, self.site) for head in different.values()]
        if samples.is_uniform:
            return ours, None, None
        places = {one: place for place, one in enumerate(different)}
        index = torch.tensor([places.get(id(head), 0) for head in heads], device=device)
        rows = None if None not in heads else torch.tensor([head is not None for head in heads], device=device)
        return ours, index, rows

    def _head_of(self, stack: ShiftStack | None) -> ShiftHead | None:
        part = None if stack is None else by_kind(stack).get(self.kind)
        return None if part is None or self.layer not in part.layers else part[self.layer]

    def _one_by_one(self, heads: list[ShiftHead], index: Tensor) -> Callable[[Tensor, At], Tensor]:
        def run(value: Tensor, at: At) -> Tensor:
            result = value
            for place, head in enumerate(heads):
                result = torch.where(by_row(index == place, value), head.edits()[self.site](value, at), result)
            return result

        return run


class _Gathered:
    """One head for all rows: each parameter has one more axis in front.

    Outside `generate` it lives for one forward. What writes to a parameter does not always leave a trace (`.data`, a
    kernel of an optimizer), so it can't be known whether numbers that were read before are still right.

    Attributes:
        edit: The function that edits the site.
    """

    def __init__(self, heads: list[ShiftHead], index: Tensor, site: Site) -> None:
        self._heads, self._index = heads, index
        self._names = [(name, held) for held in ("_parameters", "_buffers") for name in heads[0].__dict__[held]]
        self._own = self._read()
        self.edit = reading(heads[0], self._own).edits()[site]

    def is_current(self) -> bool:
        now = self._read()
        return all(_same(x, now[name]) for name, x in self._own.items())

    def _read(self) -> dict[str, Tensor]:
        return {name: self._of_rows(name, held) for name, held in self._names}

    def _of_rows(self, name: str, held: str) -> Tensor:
        heads, device = self._heads, self._index.device
        try:
            whole = torch.stack([head.__dict__[held][name] for head in heads])
        except (KeyError, TypeError, RuntimeError):  # a parametrization computes it, or they are on several devices
            whole = torch.stack([head.own(name).to(device) for head in heads])
        return (whole if whole.device == device else whole.to(device)).index_select(0, self._index)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether the numbers are the same. NaN is the same as NaN."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def kinds(stacks: Iterable[ShiftStack]) -> dict[Kind, list[ShiftStack]]:
    """Stacks, or their parts, by their kind. The kinds are in the order of the parts of each stack.

    Raises:
        PatchStateError: there is no such order.
    """
    found: dict[Kind, list[ShiftStack]] = {}
    order: TopologicalSorter[Kind] = TopologicalSorter()
    for stack in stacks:
        before: list[Kind] = []
        for kind, part in by_kind(stack).items():
            found.setdefault(kind, []).append(part)
            order.add(kind, *before)
            before = [kind]
    try:
        return {kind: found[kind] for kind in order.static_order()}
    except CycleError as error:
        raise PatchStateError(
            "two stacks of the set compose the same heads in different orders, and a set has one order: build one of "
            "them anew, or give each its own patch"
        ) from error


def is_order_of(order: Iterable[Kind], stacks: Iterable[ShiftStack]) -> bool:
    """Whether the parts of each stack come in this order."""
    places = {kind: place for place, kind in enumerate(dict.fromkeys(order))}
    found = [[places[kind] for kind in by_kind(stack)] for stack in stacks]
    return all(one == sorted(one) for one in found)
