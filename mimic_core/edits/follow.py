"""Attention that a module computes by itself, followed through the functions of torch that it calls.

Scores are a product of two tensors. They are scaled, masked and biased, a softmax makes weights of them, and a product
of these with the values is the output of the attention heads.
"""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .products import PRODUCTS, Axes, Product

_TIMES = ("mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__")
_OVER = ("div", "div_", "divide", "true_divide", "__div__", "__truediv__", "__itruediv__", "__idiv__")
# In these, the scores come first.
_NOT_TURNED = frozenset((*_OVER, "sub", "sub_", "__sub__", "__isub__", "subtract"))
# What changes each score by itself, or all by one bias.
_EACH = ("add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__isub__", "subtract")
_EACH += ("masked_fill", "masked_fill_", "where", "clamp", "clamp_", "max", "maximum", "nan_to_num", "nan_to_num_")
_EACH += ("dropout", "dropout_", "feature_dropout", "alpha_dropout")
_CAPS = ("tanh", "tanh_")
_SAME = ("to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone", "detach")
# What keeps the order of rows.
_SHAPES = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as")
_MOVES = ("transpose", "permute", "swapaxes", "movedim", "t", "expand", "repeat", "repeat_interleave", "__get__")
_MOVES += ("__getitem__", "split", "chunk", "unbind", "tensor_split", "narrow")
_KINDS = {
    **dict.fromkeys(PRODUCTS, "_product"),
    **dict.fromkeys(_TIMES, "_times"),
    **dict.fromkeys(_OVER, "_over"),
    **dict.fromkeys(_EACH, "_each"),
    **dict.fromkeys(_CAPS, "_caps"),
    **dict.fromkeys(_SAME, "_same"),
    **dict.fromkeys(_SHAPES, "_shape"),
    **dict.fromkeys(_MOVES, "_move"),
    "softmax": "_softmax",
    "scaled_dot_product_attention": "_sdpa",
}


class Scores:
    """The scores of one attention, from the product on.

    Attributes:
        index: That of the product among those of the module.
        query, key: [b h t d], [b g s d], without the numbers by which the module multiplied them.
        scale: The factor on query . key.
        given: What the softmax got.
        caps: They went through a tanh.
    """

    given: Tensor

    def __init__(self, index: int, query: Tensor, key: Tensor, scale: Any) -> None:
        self.index, self.query, self.key, self.scale = index, query, key, scale
        b, h, t, _ = query.shape
        self.shape = (b, h, t, key.shape[2])
        self.numbers = b * h * t * key.shape[2]
        self.dtype = query.dtype
        self.caps = False

    def lse(self, dtype: torch.dtype) -> Tensor:
        """The log-sum-exp of what the softmax got, [b h t], in fp32 or a wider `dtype`."""
        logits = self.given
        lowest = max(torch.finfo(x).min for x in (self.dtype, logits.dtype)) / 2
        wide = logits.to(torch.promote_types(torch.promote_types(logits.dtype, dtype), torch.float32))
        # A mask is the lowest number of its dtype. A row of it has no key: its softmax is the same for all.
        barred = wide.detach().amax(-1) <= lowest
        return torch.logsumexp(wide, -1).masked_fill(barred, -torch.inf).reshape(self.shape[:3])


class _Tag:
    """What a tensor is: scores or weights of `scores`, or another one times `factor`."""

    __slots__ = ("factor", "scores", "weights")

    def __init__(self, scores: Scores | None = None, weights: bool = False, factor: Any = 1) -> None:
        self.scores, self.weights, self.factor = scores, weights, factor


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

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = _KINDS.get(getattr(func, "__name__", ""))
        if kind is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        return getattr(self, kind)(func, args, kwargs or {})

    # What a follower does with the three calls; others change nothing.

    def scored(self, product: Product, axes: Axes, index: int, factors: tuple[Any, Any]) -> tuple[Any, Scores]:
        """A product that may be of query and key, each another tensor times one of `factors`."""
        q, k = self.sites(product, axes, factors)
        return product.run(), Scores(index, q, k, product.factor * factors[0] * factors[1])

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

    def sites(self, product: Product, axes: Axes, factors: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
        """The query [b h t d] and the key [b g s d] of a product."""
        q, k = (product.second, product.first) if axes.swapped else (product.first, product.second)
        heads = self.heads(product)
        q, k = axes.left.site(q, heads), axes.right.site(k, heads)
        return q if _is_one(factors[0]) else q / factors[0], k if _is_one(factors[1]) else k / factors[1]

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
        found = [tag for x in (*args, *kwargs.values()) if (tag := self._tag(x)) is not None]
        scores = [tag for tag in found if tag.scores is not None]
        if len({tag.scores for tag in scores}) > 1:
            self.odd.append("logits that are a sum of several products")
            return None
        return (scores or found or [None])[0]

    def _product(self, func: Any, args: Any, kwargs: Any) -> Any:
        product = Product(func, args, kwargs)
        if not product.is_of_values:
            return func(*args, **kwargs)
        index = self.products
        self.products += 1
        tags = (self._tag(product.first), self._tag(product.second))
        weights = next((tag for tag in tags if tag is not None and tag.weights), None)
        if weights is not None:
            axes = product.heads() if weights is tags[0] else None
            if axes is None or weights.scores is None:
                self.odd.append(f"weights in {func.__name__} {product.equation}")
                return product.run()
            return self.attended(product, axes, index, weights.scores)
        axes = product.scores()
        if axes is None:
            return product.run()
        left, right = (tag.factor if tag is not None else 1 for tag in (tags[::-1] if axes.swapped else tags))
        out, scores = self.scored(product, axes, index, (left, right))
        return self._mark(out, _Tag(scores))

    def _softmax(self, func: Any, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get("input")
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        out = func(*args, **kwargs)
        tag = self._tag(x)
        if tag is None or tag.scores is None or tag.weights:
            self.odd.append("a softmax of what is no product of two tensors")
            return out
        if dim not in (-1, x.ndim - 1):
            self.odd.append(f"a softmax over axis {dim}")
            return out
        tag.scores.given = x
        self.weighed(tag.scores)
        return self._mark(out, _Tag(tag.scores, weights=True))

    def _sdpa(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self.sdpa(func, args, kwargs)

    def _each(self, func: Any, args: Any, kwargs: Any) -> Any:
        tag = self._tagged(args, kwargs) if self._tags else None
        turned = func.__name__ in _NOT_TURNED and tag is not self._tag(args[0])
        out = func(*args, **kwargs)
        if tag is None or tag.scores is None or turned or not isinstance(out, Tensor):
            return out
        return self._mark(out, tag) if out.numel() == tag.scores.numbers else out

    def _shape(self, func: Any, args: Any, kwargs: Any) -> Any:
        tag = self._tag(args[0]) if args else None
        out = func(*args, **kwargs)
        if tag is None or (tag.scores is not None and out.shape[-1] != tag.scores.shape[3]):
            return out
        return self._mark(out, tag)

    def _same(self, func: Any, args: Any, kwargs: Any) -> Any:
        tag = self._tag(args[0]) if args else None
        out = func(*args, **kwargs)
        return out if tag is None else self._mark(out, tag)

    def _move(self, func: Any, args: Any, kwargs: Any) -> Any:
        tag = self._tag(args[0]) if args else None
        out = func(*args, **kwargs)
        if tag is None or (tag.scores is not None and not self._keeps_order(args[0], out)):
            return out
        return self._mark(out, tag)

    def _keeps_order(self, x: Any, out: Any) -> bool:
        """Whether a slice, a repetition or the like is of all and the same."""
        return isinstance(out, Tensor) and out.shape == x.shape and out.stride() == x.stride()

    def _caps(self, func: Any, args: Any, kwargs: Any) -> Any:
        tag = self._tag(args[0])
        out = func(*args, **kwargs)
        if tag is None or tag.scores is None or tag.weights:
            return out
        tag.scores.caps = True
        return self._mark(out, tag)

    def _times(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self._scaled(func, args, kwargs, over=False)

    def _over(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self._scaled(func, args, kwargs, over=True)

    def _scaled(self, func: Any, args: Any, kwargs: Any, over: bool) -> Any:
        if len(args) != 2 or kwargs:
            return self._each(func, args, kwargs)
        x, number = args
        if not over and not _is_number(number):
            x, number = number, x
        if not _is_number(number) or not isinstance(x, Tensor):
            return self._each(func, args, kwargs)
        tag = self._tag(x)
        out = func(*args, **kwargs)
        if tag is not None and tag.scores is not None:
            if not tag.weights and not tag.scores.caps:
                tag.scores.scale = tag.scores.scale / number if over else tag.scores.scale * number
            return self._mark(out, tag)
        factor = 1 if tag is None else tag.factor
        return self._mark(out, _Tag(factor=factor / number if over else factor * number))


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) or (isinstance(x, Tensor) and x.ndim == 0)


def _is_one(factor: Any) -> bool:
    return isinstance(factor, int | float) and factor == 1
