"""The scores of an attention, and which functions of torch make them of a product, or weights of them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .products import PRODUCTS, Axes, Product

_TIMES = ("mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__")
_OVER = ("div", "div_", "divide", "true_divide", "__div__", "__truediv__", "__itruediv__", "__idiv__")
# In these, the scores come first.
NOT_TURNED = frozenset((*_OVER, "sub", "sub_", "__sub__", "__isub__", "subtract"))
# What changes each score by itself, or all by one bias.
_EACH = ("add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__isub__", "subtract")
_EACH += ("masked_fill", "masked_fill_", "where", "clamp", "clamp_", "max", "maximum", "nan_to_num", "nan_to_num_")
_EACH += ("dropout", "dropout_", "feature_dropout", "alpha_dropout")
_CAPS = ("tanh", "tanh_")
# What gives a number of each row, or of all: code takes it away before the softmax, which gives the same weights then.
_ROWS = ("amax", "max")
_SAME = ("to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone", "detach")
# What keeps the order of rows.
_SHAPES = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as")
_MOVES = ("transpose", "permute", "swapaxes", "movedim", "t", "expand", "repeat", "repeat_interleave", "__get__")
_MOVES += ("__getitem__", "split", "chunk", "unbind", "tensor_split", "narrow")
KINDS = {
    **dict.fromkeys(PRODUCTS, "_product"),
    **dict.fromkeys(_TIMES, "_times"),
    **dict.fromkeys(_OVER, "_over"),
    **dict.fromkeys(_EACH, "_each"),
    **dict.fromkeys(_CAPS, "_caps"),
    **dict.fromkeys(_SAME, "_same"),
    **dict.fromkeys(_SHAPES, "_shape"),
    **dict.fromkeys(_MOVES, "_move"),
    **dict.fromkeys(("cat", "concat"), "_joined"),
    **dict.fromkeys(_ROWS, "_of_rows"),
    "softmax": "_softmax",
    "scaled_dot_product_attention": "_sdpa",
    "multi_head_attention_forward": "_opened",
}


@cache
def _how(given: torch.dtype, scores: torch.dtype, value: torch.dtype) -> tuple[torch.dtype, float]:
    """In which dtype an LSE is computed, and which numbers come from masks alone."""
    lowest = max(torch.finfo(x).min for x in (given, scores)) / 2
    return torch.promote_types(torch.promote_types(given, value), torch.float32), lowest


class Scores:
    """The scores of one attention, from the product on.

    Attributes:
        index: That of the product among those of the module.
        shape: [b h t s].
        kv_heads, head_dim: g and d of query [b h t d] and key [b g s d].
        dtype: Of the query.
        scale: The factor on query . key, as it is for small ones if they go through a tanh.
        given: What the softmax got.
        samples_first: If samples and heads of the query were one axis: whether the samples were seen to come first.
        caps: They went through a tanh.
        less: What was taken away from each row, if it was made of the scores, as their maximum: it is in the LSE.
        added: How many biases were added, each for every key.
        from_last: Which of them counts from the last key, see `counts_from_last`.
    """

    given: Tensor | None = None
    less: Any = None
    added = 0
    from_last: int | None = None

    def __init__(self, index: int, product: Product, axes: Axes, heads: int, scale: Any) -> None:
        self.index, self.scale = index, scale
        q, k = product.turned(axes)
        (b, h, t, self.head_dim), (_, self.kv_heads, s, _) = axes.left.shape(q, heads), axes.right.shape(k, heads)
        self.shape = (b, h, t, s)
        self.rows, self.columns = b * h * t, s
        self.dtype = q.dtype
        self.caps = self.samples_first = False

    def is_whole(self, x: Any) -> bool:
        """Whether a tensor has a row for each query, and the columns that the scores have."""
        whole = isinstance(x, Tensor) and x.numel() == self.rows * self.columns
        return whole and x.ndim > 0 and x.shape[-1] == self.columns

    def take(self, less: Tensor) -> None:
        """Note what was taken away from each row: one number for each."""
        less = less.reshape(self.shape[:3])
        self.less = less if self.less is None else self.less + less

    def lse(self, dtype: torch.dtype) -> Tensor:
        """The log-sum-exp of what the softmax got, [b h t], in fp32 or a wider `dtype`."""
        logits = self.given
        assert logits is not None
        dtype, lowest = _how(logits.dtype, self.dtype, dtype)
        lse = torch.logsumexp(logits if logits.dtype == dtype else logits.to(dtype), -1)
        if self.less is not None:
            lse = lse.reshape(self.shape[:3]) + self.less.to(dtype)
        # A mask is the lowest number of its dtype. A row of it has no key: its softmax is the same for all.
        lse = functional.threshold(lse, lowest, -torch.inf)
        return lse if lse.shape == self.shape[:3] else lse.reshape(self.shape[:3])


def counts_from_last(bias: Tensor) -> bool:
    """Whether a bias grows evenly up to 0 at the last key, for all queries alike, as MPT's.

    What it adds to a row then depends on how many tokens follow. The softmax does not, but the LSE would.
    """
    steps = bias[..., -1, :].diff()
    even = steps.numel() > 0 and bool((steps[..., 0] > 0).all()) and torch.allclose(steps, steps[..., :1])
    alike = (bias - bias[..., -1:, :]).tril() if bias.shape[-2] > 1 else bias.new_zeros(())
    return even and not bool(bias[..., -1, -1].any()) and not bool(alike.any())


def is_number(x: Any) -> bool:
    """Whether it multiplies all numbers of a tensor alike."""
    return isinstance(x, int | float) or (isinstance(x, Tensor) and x.ndim == 0)


def is_one(factor: Any) -> bool:
    """Whether it changes nothing."""
    return isinstance(factor, int | float) and factor == 1


FIRST = frozenset(("_product", "_times", "_over", "_softmax", "_sdpa", "_opened"))
"""The kinds of calls that matter where no tensor has been marked yet."""
