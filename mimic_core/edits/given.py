"""The LSE of what a softmax or torch's SDPA was given inside an attention function, seen while it runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import ops
from .follow import Follower
from .scores import Scores


class LSEInside(Follower):
    """Follows one call of an attention function. Biases of any form are then in the LSE, and those it ignores are not.

    Args:
        query: [b h t d], what it gets.
    """

    def __init__(self, query: Tensor) -> None:
        super().__init__()
        self._query = query
        self._scores: list[Scores] = []
        self._calls: list[dict[str, Any]] = []

    def heads(self, product: Any) -> int:
        return self._query.shape[1]

    def weighed(self, scores: Scores) -> None:
        self._scores.append(scores)

    def sdpa(self, func: Any, args: Any, kwargs: Any) -> Any:
        names = ("query", "key", "value", "mask", "dropout", "is_causal", "scale")
        given = dict(zip(names, args, strict=False)) | kwargs
        given["mask"] = given.get("attn_mask", given.get("mask"))
        self._calls.append(given)
        return func(*args, **kwargs)

    def lse(self) -> Tensor | None:
        """[b h t]. None if it was not one attention with these queries."""
        b, h, t, _ = self._query.shape
        if len(self._scores) == 1 and not self._calls and self._scores[0].shape[:3] == (b, h, t):
            return self._scores[0].lse(self._query.dtype)
        if len(self._calls) != 1 or self._scores:
            return None
        q, k, mask, scale, is_causal = (self._calls[0].get(x) for x in ("query", "key", "mask", "scale", "is_causal"))
        # A token of grouped heads may be packed: the heads of a group are rows.
        if q is None or k is None or q.ndim != 4 or (q.shape[2] != t and t != 1):
            return None
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return ops.attention_lse(q, k, mask, scale, bool(is_causal)).reshape(b, h, t)
