"""Attention that a module computes by itself, followed through the functions of torch that it calls.

Scores are a product of two tensors. They are scaled, masked and biased, a softmax makes weights of them, and a product
of these with the values is the output of the attention heads.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any
from weakref import ref

from torch import Tensor
from torch.overrides import TorchFunctionMode

from .products import Axes, Product
from .scores import FIRST, KINDS, NOT_TURNED, Scores, is_number


class _Tag:
    """What a tensor is: scores or weights of `scores`, a number `of` each row, or another one times `factor`."""

    __slots__ = ("factor", "of", "scores", "weights")

    def __init__(
        self, scores: Scores | None = None, weights: bool = False, factor: Any = 1, of: Scores | None = None
    ) -> None:
        self.scores, self.weights, self.factor, self.of = scores, weights, factor, of


_NONE = _Tag()


class Follower(TorchFunctionMode):
    """Follows the calls of torch inside one forward.

    Attributes:
        products: How many products of two tensors there were.
        odd: What was not understood.
    """

    def __init__(self) -> None:
        super().__init__()
        self._tags: dict[int, tuple[ref[Tensor], _Tag]] = {}
        self.products = 0
        self.odd: list[str] = []
        self._mixed = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        follow = _FOLLOW.get(getattr(func, "__name__", ""))
        if follow is None or (not self._tags and follow not in _FIRST):
            return func(*args, **kwargs) if kwargs else func(*args)
        return follow(self, func, args, kwargs or {})

    # What a follower does with the three calls; others change nothing.

    def scored(self, product: Product, axes: Axes, index: int, factor: Any) -> tuple[Any, Scores]:
        """A product that may be of query and key. The query is another tensor times `factor`."""
        return product.run(), Scores(index, product, axes, self.heads(product), product.factor * factor)

    def biased(self, scores: Scores, bias: Tensor, out: Tensor) -> None:
        """A bias for every key was added to scores, which gave `out`."""
        scores.added += 1

    def weighed(self, scores: Scores) -> None:
        """A softmax makes weights of scores."""

    def attended(self, product: Product, axes: Axes, index: int, scores: Scores) -> Any:
        """A product of weights and values."""
        return product.run()

    def sdpa(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A call of torch's SDPA."""
        return func(*args, **kwargs)

    def heads(self, product: Product) -> int:
        """The number of heads of a product whose samples and heads are one axis."""
        raise NotImplementedError

    # The kinds of calls.

    def _tag(self, x: Any) -> _Tag | None:
        found = self._tags.get(id(x))
        return found[1] if found is not None and found[0]() is x else None

    def _mark(self, out: Any, tag: _Tag) -> Any:
        if isinstance(out, Tensor):
            self._tags[id(out)] = ref(out), tag
        elif isinstance(out, tuple | list):
            for x in out:
                self._mark(x, tag)
        return out

    def _tagged(self, args: Any, kwargs: Any) -> _Tag | None:
        """The tag of what a call gets. None if there is none, or several of scores."""
        found = None
        for x in (*args, *kwargs.values()) if kwargs else args:
            tag = self._tag(x)
            if tag is None or (found is not None and tag.scores is None):
                continue
            if found is not None and found.scores not in (None, tag.scores):
                self._mixed = True
                return None
            if found is None or found.scores is None:
                found = tag
        return found

    def _product(self, func: Any, args: Any, kwargs: Any) -> Any:
        product = Product(func, args, kwargs)
        return self.multiply(product) if product.equation else product.run()

    def multiply(self, product: Product) -> Any:
        """A product of two tensors."""
        index = self.products
        self.products += 1
        tags = (self._tag(product.first), self._tag(product.second))
        weights = next((tag for tag in tags if tag is not None and tag.weights), None)
        if weights is not None:
            axes = product.heads() if weights is tags[0] else None
            if axes is None or weights.scores is None:
                self.odd.append(f"weights in {product.name} {product.equation}")
                return product.run()
            return self.attended(product, axes, index, weights.scores)
        axes = product.scores()
        if axes is None:
            return product.run()
        # Not that of the key: a cache may hold scaled keys, and joins them to new ones.
        tag = tags[1] if axes.swapped else tags[0]
        out, scores = self.scored(product, axes, index, 1 if tag is None else tag.factor)
        return self._mark(out, _Tag(scores))

    def _softmax(self, func: Any, args: Any, kwargs: Any) -> Any:
        x, dim = softmax_of(args, kwargs)
        out = func(*args, **kwargs)
        tag = self._tag(x)
        if tag is None or tag.scores is None or tag.weights:
            of = "several products together" if self._mixed else "what is no product of two tensors"
            self.odd.append(f"a softmax of {of}")
            return out
        if dim not in (-1, x.ndim - 1):
            self.odd.append(f"a softmax over axis {dim}")
            return out
        tag.scores.given = x
        self.weighed(tag.scores)
        return self._mark(out, _Tag(tag.scores, weights=True))

    def _sdpa(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self.sdpa(func, args, kwargs)

    def _opened(self, func: Any, args: Any, kwargs: Any) -> Any:
        """torch's multi-head attention calls a mode instead of running under it. So it runs without that question."""
        names = {**func.__globals__, "has_torch_function": lambda tensors: False}
        body = FunctionType(func.__code__, names, func.__name__, func.__defaults__)
        with self:
            return body(*args, **kwargs)

    def _each(self, func: Any, args: Any, kwargs: Any) -> Any:
        tag = self._tagged(args, kwargs)
        turned = func.__name__ in NOT_TURNED and tag is not self._tag(args[0])
        out = func(*args, **kwargs)
        if tag is None or turned or not isinstance(out, Tensor):
            return out
        if tag.scores is None:
            return out if tag.of is None else self._mark(out, tag)
        if not tag.scores.is_whole(out):
            return out
        if tag.weights:
            return self._mark(out, tag)
        row = self._tag(args[1]) if "sub" in func.__name__ and len(args) > 1 else None
        if row is not None and row.of is tag.scores and (args[1].ndim == 0 or args[1].shape[-1] == 1):
            tag.scores.take(args[1].expand(*out.shape[:-1], 1))
        if "add" in func.__name__ and len(args) == 2:
            bias = args[1] if self._tag(args[0]) is tag else args[0]
            if isinstance(bias, Tensor) and bias.ndim > 1 and bias.shape[-1] == out.shape[-1]:
                self.biased(tag.scores, bias, out)
        return self._mark(out, tag)

    def _of_rows(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func.__name__ == "max" and any(isinstance(x, Tensor) for x in (*args[1:], *kwargs.values())):
            return self._each(func, args, kwargs)  # of two tensors
        tag = self._tag(args[0]) if args else None
        out = func(*args, **kwargs)
        known = tag is not None and tag.scores is not None and not tag.weights
        return self._mark(out, _Tag(of=tag.scores)) if known else out  # pyright: ignore[reportOptionalMemberAccess]

    def _shape(self, func: Any, args: Any, kwargs: Any) -> Any:
        tag = self._tag(args[0]) if args else None
        out = func(*args, **kwargs)
        if tag is None or (tag.scores is not None and not tag.scores.is_whole(out)):
            return out
        return self._mark(out, tag)

    def _same(self, func: Any, args: Any, kwargs: Any) -> Any:
        tag = self._tag(args[0]) if args else None
        out = func(*args, **kwargs)
        return out if tag is None else self._mark(out, tag)

    def _move(self, func: Any, args: Any, kwargs: Any) -> Any:
        tag = self._tag(args[0]) if args else None
        out = func(*args, **kwargs)
        if tag is None or tag.scores is None:
            return out if tag is None else self._mark(out, tag)
        if not isinstance(out, Tensor):
            return out
        # Of scores, only what changes nothing, or takes a column of sinks away.
        same = out.shape == args[0].shape and out.stride() == args[0].stride()
        less = func.__name__ == "__getitem__" and tag.weights and out.shape[-1] == tag.scores.shape[3]
        if less and out.shape[:-1] == args[0].shape[:-1]:
            tag.scores.columns = out.shape[-1]
            same = True
        return self._mark(out, tag) if same else out

    def _joined(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Scores with a column of sinks."""
        out = func(*args, **kwargs)
        tag = self._tagged(args[0], {}) if args and isinstance(args[0], list | tuple) else None
        if tag is None or tag.scores is None or tag.weights or out.numel() != tag.scores.rows * out.shape[-1]:
            return out
        tag.scores.columns = out.shape[-1]
        return self._mark(out, tag)

    def _caps(self, func: Any, args: Any, kwargs: Any) -> Any:
        tag = self._tag(args[0])
        out = func(*args, **kwargs)
        if tag is None or tag.scores is None or tag.weights:
            return out
        tag.scores.caps, tag.scores.less = True, None
        return self._mark(out, tag)

    def _times(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self._scaled(func, args, kwargs, over=False)

    def _over(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self._scaled(func, args, kwargs, over=True)

    def _scaled(self, func: Any, args: Any, kwargs: Any, over: bool) -> Any:
        if len(args) != 2 or kwargs:
            return self._each(func, args, kwargs)
        x, number = args
        if not over and not is_number(number):
            x, number = number, x
        if not is_number(number) or not isinstance(x, Tensor):
            return self._each(func, args, kwargs)
        tag = self._tag(x)
        out = func(*args, **kwargs)
        if tag is not None and tag.scores is not None:
            if not tag.weights:
                tag.scores.scale = tag.scores.scale / number if over else tag.scores.scale * number
                if tag.scores.less is not None:
                    tag.scores.less = tag.scores.less / number if over else tag.scores.less * number
            return self._mark(out, tag)
        factor, of = (1, None) if tag is None else (tag.factor, tag.of)
        return self._mark(out, _Tag(factor=factor / number if over else factor * number, of=of))


def softmax_of(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """What a softmax gets, and over which axis it is."""
    return args[0] if args else kwargs.get("input"), args[1] if len(args) > 1 else kwargs.get("dim")


_FOLLOW = {name: getattr(Follower, kind) for name, kind in KINDS.items()}
_FIRST = frozenset(getattr(Follower, kind) for kind in FIRST)
