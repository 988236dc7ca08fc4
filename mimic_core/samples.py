"""What each sample of a batch gets: one of the stacks of a set or none, and how strongly."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from einops import repeat
from torch import Tensor

from .errors import PatchStateError, ShapeError


class Kept(Protocol):
    """An edit with numbers that are read once for many forwards."""

    edit: Any

    def is_current(self) -> bool:
        """Whether they would be the same if they were read now."""
        ...


class Samples:
    """A stack and a strength for each sample.

    Attributes:
        stacks: The stack of each sample; None stands for no stack. A tuple of length 1 if `is_uniform`.
        is_uniform: All samples get the same, however many there are.
        strength: The factor of each edit, a number or a tensor [n]. None: what the handle says.
        remembered: What edits have worked out of it, which is the same for all forwards.
        kept: What edits have read of the parameters in this call of `generate`. None: they read them for each forward.
    """

    def __init__(
        self, stacks: Sequence[Any] | None, is_uniform: bool = False, strength: float | Tensor | None = None
    ) -> None:
        self.stacks = None if stacks is None else tuple(stacks)
        self.is_uniform = is_uniform
        self.strength = strength
        self.remembered: dict[Any, Any] = {}
        self.kept: dict[Any, Kept] | None = None
        self._repeated: dict[int, Samples] = {}

    @property
    def count(self) -> int | None:
        """The number of samples. None: any."""
        if self.stacks is not None and not self.is_uniform:
            return len(self.stacks)
        return len(self.strength) if isinstance(self.strength, Tensor) and self.strength.ndim else None

    def for_rows(self, b: int, rows: int) -> Samples:
        """The same for a forward with b rows.

        Args:
            rows: How many rows `generate` makes of a sample.

        Raises:
            ShapeError: b is another number.
        """
        if self.count is None or (self.count == b and rows == 1):
            return self
        if self.count * rows != b:
            of_each = f", {rows} of each sample" if rows > 1 else ""
            raise ShapeError(
                f"`handle.using` got {self.count} samples, but the decoder runs with {b} rows{of_each}; give one stack "
                f"and one strength for each sample of the batch, or one for all"
            )
        if rows not in self._repeated:
            stacks, strength = self.stacks, self.strength
            if stacks is not None and not self.is_uniform:
                stacks = [stack for stack in stacks for _ in range(rows)]
            if isinstance(strength, Tensor) and strength.ndim:
                strength = repeat(strength, "b -> (b n)", n=rows)
            self._repeated[rows] = Samples(stacks, self.is_uniform, strength)
        return self._repeated[rows]

    def for_call(self) -> Samples:
        """The same for one call of `generate`, in which parameters are read once."""
        twin = copy.copy(self)
        twin.kept = {}
        return twin

    def check_kept(self) -> None:
        """Check at the end of the call that the parameters are still what was read.

        Raises:
            PatchStateError: they are not.
        """
        if not all(kept.is_current() for kept in (self.kept or {}).values()):
            raise PatchStateError(
                "the parameters of a stack have changed while `generate` ran, which reads those of a set once: change "
                "them between two calls, or put a changed copy into the set, which a running `handle.using` doesn't see"
            )


def by_row(x: Tensor, value: Tensor) -> Tensor:
    """One number for each row [b], with axes of length 1 behind it, so that it broadcasts to `value` [b ...]."""
    return x.view(-1, *[1] * (value.ndim - 1))


def partly(value: Tensor, result: Tensor, strength: float | Tensor) -> Tensor:
    """value + strength * (result - value): exactly `value` at strength 0, exactly `result` at 1."""
    wide = torch.promote_types(value.dtype, torch.float32)
    off = None
    if isinstance(strength, Tensor):
        strength = strength.to(value.device, wide)
        strength = by_row(strength, value) if strength.ndim else strength
        off = strength == 0
        if strength.requires_grad:  # a strength of 0 can be trained: what is finite stays
            off = off & result.isfinite().logical_not()
    elif torch.compiler.is_compiling() or strength == 0:  # first, as a question to the number would be compiled in
        off = torch.ones((), device=value.device) * strength == 0
    if off is not None:
        # The edit may have overflowed, and 0 * inf is no number.
        result = torch.where(off, value, result)
    return torch.lerp(value.to(wide), result.to(wide), strength).to(value.dtype)


def check_strength(strength: object, n: int | None = None, each: bool = False) -> float | Tensor:
    """Return a number or a tensor [], or with `each` also a tensor [b].

    Args:
        n: The number of samples; None: it is not known.

    Raises:
        ShapeError: it is something else.
    """
    found = repr(strength)
    if each and isinstance(strength, list | tuple) and all(isinstance(x, int | float) for x in strength):
        strength = torch.tensor(strength, dtype=torch.float32)
    if isinstance(strength, int | float) and not isinstance(strength, bool) and math.isfinite(strength):
        return float(strength)
    if isinstance(strength, Tensor) and strength.is_floating_point() and strength.ndim <= each:
        if n is not None and strength.ndim and len(strength) != n:
            raise ShapeError(f"{len(strength)} strengths were given for {n} samples")
        return strength
    if isinstance(strength, Tensor):
        found = f"{list(strength.shape)} {strength.dtype}"
    wanted = "a finite number or a float tensor []" + (", or a list or float tensor [b]" if each else "")
    raise ShapeError(f"a strength is {wanted}; found {found}")
