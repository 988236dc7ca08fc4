"""Several stacks as one: what is trained, saved and put into a model together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from ..errors import ShapeError, WrongTypeError
from .base import ShiftHead
from .stack import ShiftStack

MOST = 16


class ComposedStack(ShiftStack):
    """Stacks that act together: `mimic_core.build_shifts(model, ["mimic", "live"])`.

    At a site that several of them edit, they act in their order here: the second gets what the first returns. Each has
    its own layers and positions. `shifts.parts` are the stacks, and iteration gives the heads of the first part, then
    those of the second. Everything that takes a stack takes this one, except what is for one kind of heads:
    `mimic_core.merge` and `estimate`.

    Raises:
        ShapeError: there are none, or more than 16, or they were built for models of different sizes.
    """

    def __init__(self, parts: Sequence[ShiftStack]) -> None:
        nn.Module.__init__(self)
        check_count(len(parts))
        self.stacks = nn.ModuleList(parts)
        self.name = "+".join(part.name for part in parts)
        self.spec, self.origin = parts[0].spec, parts[0].origin
        if misfit := next((x for part in parts if (x := part.spec.misfit(self.spec))), None):
            raise ShapeError(f"the parts of a stack do not fit each other: one was built for {misfit}")
        # What tells two stacks of the same heads apart; a part has the config that its heads read.
        self.config = tuple(part.config for part in parts)  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def parts(self) -> tuple[ShiftStack, ...]:
        return tuple(self.stacks)  # pyright: ignore[reportReturnType]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({layer for part in self.parts for layer in part.layers}))

    def __getitem__(self, layer: int) -> ShiftHead:
        raise WrongTypeError(f"these shifts are {len(self.parts)} stacks: choose one, as in shifts.parts[0][{layer}]")

    def __iter__(self) -> Iterator[ShiftHead]:
        return (head for part in self.parts for head in part)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)


def check_count(count: int) -> None:
    """Check the number of parts.

    Raises:
        ShapeError: there are none, or too many.
    """
    if not 1 <= count <= MOST:
        raise ShapeError(f"1 to {MOST} heads can be composed, found {count}")
