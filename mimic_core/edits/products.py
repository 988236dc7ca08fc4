"""Products of two tensors, as attention computes them, and where their axes are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor, nn

# Where the two factors are among the arguments, and their names.
_FACTORS = {
    "matmul": ((0, "input"), (1, "other")),
    "__matmul__": ((0, "input"), (1, "other")),
    "__rmatmul__": ((1, "other"), (0, "input")),
    "bmm": ((0, "input"), (1, "mat2")),
    "baddbmm": ((1, "batch1"), (2, "batch2")),
    "einsum": ((1, "first"), (2, "second")),
}
PRODUCTS = frozenset(_FACTORS)
_MATRICES = {3: "nij,njk->nik", 4: "bhij,bhjk->bhik"}


class Order(NamedTuple):
    """How a tensor becomes the value of a site: its axes are put in an order, and one for heads is made.

    Attributes:
        axes: None: they are in order.
        heads: "are": there is an axis of heads; "rows": samples and heads are one axis; "none": there is no such axis.
    """

    axes: tuple[int, ...] | None
    heads: str

    def shape(self, x: Tensor, heads: int) -> tuple[int, ...]:
        """That of `site`, which costs a few functions of torch."""
        shape = x.shape if self.axes is None else tuple(x.shape[n] for n in self.axes)
        if self.heads == "are":
            return shape
        return (shape[0] // heads, heads, *shape[1:]) if self.heads == "rows" else (shape[0], 1, *shape[1:])

    def site(self, x: Tensor, heads: int) -> Tensor:
        """[b h . .]"""
        x = x if self.axes is None else x.permute(self.axes)
        if self.heads == "are":
            return x
        # Not by einops or `unflatten`, which is Python in torch: each decoded token comes here twice in a layer.
        return x.view(-1, heads, *x.shape[1:]) if self.heads == "rows" else x.unsqueeze(1)

    def back(self, x: Tensor) -> Tensor:
        if self.heads != "are":
            x = x.flatten(0, 1) if self.heads == "rows" else x.squeeze(1)
        return x if self.axes is None else x.permute([self.axes.index(n) for n in range(len(self.axes))])


class Axes(NamedTuple):
    """The orders of the two factors and of the result.

    Attributes:
        left, right: Query and key, or weights and value; `swapped` if the first factor of the product is the right one.
    """

    left: Order
    right: Order
    out: Order
    swapped: bool


class Product:
    """A call that multiplies two tensors.

    Attributes:
        name: That of the function.
        equation: As of einsum. Empty if these are no batches of matrices, or one is a parameter.
        first, second: The factors.
    """

    __slots__ = ("_args", "_func", "_kwargs", "_places", "equation", "first", "name", "second")

    def __init__(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self._func, self._kwargs = func, kwargs
        self.name = name = func.__name__
        equation = ""
        if name == "einsum":
            if len(args) == 2 and isinstance(args[1], list | tuple):
                args = (args[0], *args[1])
            equation = args[0].replace(" ", "") if isinstance(args[0], str) and len(args) == 3 else ""
        self._args = args
        one, two = _FACTORS[name]
        self._places = (one[0] if one[0] < len(args) else one[1], two[0] if two[0] < len(args) else two[1])
        self.first, self.second = self._get(self._places[0]), self._get(self._places[1])
        a, b = self.first, self.second
        kinds = a.__class__, b.__class__
        if kinds != (Tensor, Tensor) and (
            nn.Parameter in kinds or not isinstance(a, Tensor) or not isinstance(b, Tensor)
        ):
            equation = ""
        elif name != "einsum" and a.ndim == b.ndim:
            equation = _MATRICES.get(a.ndim, "")
        self.equation = equation

    def _get(self, place: Any) -> Any:
        return self._args[place] if place.__class__ is int else self._kwargs.get(place)

    def run(self, first: Tensor | None = None, second: Tensor | None = None) -> Any:
        """The result, with other factors where they are given."""
        if first is None and second is None:
            return self._func(*self._args, **self._kwargs)
        args, kwargs = list(self._args), self._kwargs
        for place, factor in zip(self._places, (first, second), strict=True):
            if factor is None:
                continue
            if isinstance(place, int):
                args[place] = factor
            else:
                kwargs = {**kwargs, place: factor}
        return self._func(*args, **kwargs)

    def turned(self, axes: Axes) -> tuple[Tensor, Tensor]:
        """Its left and its right factor: query and key, or weights and value."""
        return (self.second, self.first) if axes.swapped else (self.first, self.second)

    @property
    def factor(self) -> Any:
        """The number by which the function itself multiplies."""
        return self._kwargs.get("alpha", 1)

    def scores(self) -> Axes | None:
        """The axes of query . key -> [b h t s]. None if it is no such product."""
        return _scores(self.equation)

    def heads(self) -> Axes | None:
        """The axes of weights . value, with a result [b t h e]. None if it is no such product."""
        return _heads(self.equation)


def _parts(equation: str) -> tuple[str, str, str] | None:
    given, _, out = equation.partition("->")
    first, _, second = given.partition(",")
    usual = out and second and "," not in second and "." not in equation
    unique = all(len(set(part)) == len(part) for part in (first, second, out))
    return (first, second, out) if usual and unique else None


@lru_cache
def _scores(equation: str) -> Axes | None:
    parts = _parts(equation)
    if parts is None or len(parts[2]) not in (3, 4):
        return None
    first, second, out = parts
    batch, t, s = out[:-2], out[-2], out[-1]
    swapped = t in second
    q, k = (second, first) if swapped else (first, second)
    summed = (set(q) & set(k)) - set(out)
    if len(summed) != 1 or s in q or t in k or s not in k:
        return None
    d = summed.pop()
    orders = (_order(q, batch, t + d), _order(k, batch, s + d), _order(out, batch, t + s))
    return None if None in orders else Axes(*orders, swapped)  # pyright: ignore[reportArgumentType]


@lru_cache
def _heads(equation: str) -> Axes | None:
    parts = _parts(equation)
    if parts is None or len(parts[0]) not in (3, 4):
        return None
    weights, value, out = parts
    batch, t, s = weights[:-2], weights[-2], weights[-1]
    wide = set(value) - set(weights)
    if len(wide) != 1 or s in out or s not in value or t in value or t not in out:
        return None
    e = wide.pop()
    order = _order(out, batch, t + e)
    of_value = _order(value, batch, s + e)
    whole = _order(weights, batch, t + s)
    if order is None or of_value is None or whole is None or order.heads == "none":
        return None
    return Axes(whole, of_value, order, swapped=False)


def _order(letters: str, batch: str, last: str) -> Order | None:
    """The order of axes `batch` and `last`. The key and the value may have no axis of heads."""
    lacks = len(batch) == 2 and batch[1] not in letters
    wanted = (batch[:1] if lacks else batch) + last
    if sorted(wanted) != sorted(letters):
        return None
    axes = tuple(letters.index(c) for c in wanted)
    heads = "rows" if len(batch) == 1 else "none" if lacks else "are"
    return Order(None if axes == tuple(range(len(axes))) else axes, heads)
