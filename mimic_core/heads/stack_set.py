"""A set of stacks: each sample of a batch gets one of them, or none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ShapeError, UnknownNameError
from ..parallel import Parallel
from ..samples import Samples, by_row
from ..types import At, Site
from .base import ShiftHead
from .split import of_process
from .stack import ShiftStack, check_stack

Kind = tuple[type[ShiftHead], str]


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


def kind_of(stack: ShiftStack) -> Kind:
    """Stacks of one kind have heads with the same formula, in whatever layers: they differ in their numbers alone."""
    options = {**stack.config.to_dict(), "layers": None}
    return type(next(iter(stack))), json.dumps(options, sort_keys=True)


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
            return self._edit_of(heads[0]), rows
        together = heads[0].takes_samples and not heads[0]._modules
        return (self._gathered if together else self._one_by_one)(heads, index), rows

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
        if stack is None or str(self.layer) not in stack.heads or kind_of(stack) != self.kind:
            return None
        return stack[self.layer]

    def _edit_of(self, head: ShiftHead) -> Callable[[Tensor, At], Tensor]:
        return head.edits()[self.site]

    def _gathered(self, heads: list[ShiftHead], index: Tensor) -> Callable[[Tensor, At], Tensor]:
        """One head whose parameters have one more axis in front, for the rows."""
        of_rows = {
            name: torch.stack([head.own(name).to(index.device) for head in heads])[index]
            for name in (*heads[0]._parameters, *heads[0]._buffers)
        }
        twin = object.__new__(type(heads[0]))
        twin.__dict__ = {**heads[0].__dict__, "_parameters": of_rows}
        return self._edit_of(twin)

    def _one_by_one(self, heads: list[ShiftHead], index: Tensor) -> Callable[[Tensor, At], Tensor]:
        def run(value: Tensor, at: At) -> Tensor:
            result = value
            for place, head in enumerate(heads):
                result = torch.where(by_row(index == place, value), self._edit_of(head)(value, at), result)
            return result

        return run


def kinds(stacks: Iterable[ShiftStack]) -> dict[Kind, list[ShiftStack]]:
    """Stacks by their kind, in the order in which the kinds first come."""
    found: dict[Kind, list[ShiftStack]] = {}
    for stack in stacks:
        found.setdefault(kind_of(stack), []).append(stack)
    return found
