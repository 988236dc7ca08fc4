"""Edits inside attention that a module computes by itself, by products of two tensors and a softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PatchStateError, UnsupportedModelError
from ..types import AttentionView
from .call import Plan
from .follow import Follower
from .named import Called
from .products import Axes, Product
from .scores import Scores, is_one


@dataclass(frozen=True)
class Recipe:
    """How a module was seen to compute its attention.

    Attributes:
        scores, weighed: Which of its products of two tensors is that of query and key, and which that with the values.
        heads: The number of attention heads.
        scale: The factor on query . key.
        from_last: Which of the biases that it adds counts from the last key.
    """

    scores: int
    weighed: int
    heads: int
    scale: float
    from_last: int | None = None


class EagerView(AttentionView):
    """One such attention, as far as it has come."""

    def __init__(self, module: nn.Module, query: Tensor, key: Tensor, scale: float) -> None:
        self.module, self.query, self.key, self._scale_seen = module, query, key, scale
        self.told_scale = False
        self.scores: Scores | None = None
        self._lse: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        if name not in ("value", "mask", "scale"):
            raise AttributeError(name)
        if name == "scale":
            if self.scores is not None:
                return float(self.scores.scale)
            self.told_scale = True  # before the module has multiplied by it
            return self._scale_seen
        why = "it adds its mask and biases to the logits itself" if name == "mask" else "this comes later in it"
        raise UnsupportedModelError(
            f"`at.{name}` is not known here: {type(self.module).__name__} computes its attention by itself, and {why}"
        )

    @property
    def is_causal(self) -> bool:
        return False  # what is causal in it is in its logits

    @property
    def lse(self) -> Tensor:
        if self._lse is None:
            if self.scores is None or "value" not in vars(self):
                raise UnsupportedModelError(
                    f"`at.lse` is not known before the values meet the weights, and {type(self.module).__name__} "
                    f"computes its attention by itself: read it at attn_heads or lse"
                )
            self._lse = self.scores.lse(self.value.dtype)
        return self._lse

    @property
    def lse_all_keys(self) -> Tensor:
        raise UnsupportedModelError(
            f"the LSE over all keys is only for attention like in the published models, but "
            f"{type(self.module).__name__} computes its attention by itself, and it is not known which part of its "
            f"logits is a mask; use log_z2='attended'"
        )

    @property
    def logits(self) -> tuple[str, ...]:
        return ("softcap",) if self.scores is not None and self.scores.caps else ()


_OTHERWISE = "it attends another way than when it was looked at"


class EagerFrame(Follower):
    """One forward of such a module with edits."""

    is_on = False  # calls of functions are another module's

    def __init__(self, module: nn.Module, recipe: Recipe, plan: Plan) -> None:
        super().__init__()
        self.module, self._recipe, self._plan = module, recipe, plan
        self._view: EagerView | None = None
        self._done = False
        self._has_grad = torch.is_grad_enabled()

    def attend(self, called: Called, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return called.original(*args, **kwargs)

    def heads(self, product: Product) -> int:
        if product.first.ndim == 3 and product.first.shape[0] % self._recipe.heads:
            self._refuse(_OTHERWISE)
        return self._recipe.heads

    def scored(self, product: Product, axes: Axes, index: int, factor: Any) -> tuple[Any, Scores]:
        if index != self._recipe.scores:
            return super().scored(product, axes, index, factor)
        if self._has_grad and not torch.is_grad_enabled():
            self._refuse("it runs in reentrant gradient checkpointing inside of it, without the edits the second time")
        q, k = self.sites(product, axes, factor)
        if q.shape[1] != self._recipe.heads:
            self._refuse(_OTHERWISE)
        self._view = view = EagerView(self.module, q, k, self._recipe.scale)
        for entry in self._plan.before:
            if entry.edit.site != "value":
                site = entry.edit.site
                setattr(view, site, entry.apply(getattr(view, site), self.module, view))
        edited = view.query if is_one(factor) else view.query * factor
        left = None if view.query is q else axes.left.back(edited)
        right = None if view.key is k else axes.right.back(view.key)
        if axes.swapped:
            left, right = right, left
        view.scores = Scores(index, view.query, view.key, product.factor * factor)
        return product.run(left, right), view.scores

    def biased(self, scores: Scores, bias: Tensor, out: Tensor) -> None:
        ours = self._view is not None and scores is self._view.scores
        if ours and scores.added == self._recipe.from_last and scores.shape[2] > 1:
            # In the LSE it counts from the key of the token itself, which is the same whatever follows.
            (t, s), lowest = scores.shape[2:], torch.finfo(bias.dtype).min / 2
            own = bias.expand_as(out).diagonal(s - t, -2, -1)
            own = own.masked_fill(own < lowest, 0)  # padding, where the model has joined bias and mask
            if not own.any():
                self._refuse(_OTHERWISE)
            scores.take(-own)
        super().biased(scores, bias, out)

    def weighed(self, scores: Scores) -> None:
        if scores.index != self._recipe.scores or self._done:
            self._refuse("it attends several times, or another way than when it was looked at")
        if self._recipe.from_last is not None and scores.added <= self._recipe.from_last:
            self._refuse(_OTHERWISE)

    def attended(self, product: Product, axes: Axes, index: int, scores: Scores) -> Any:
        view = self._view
        if view is None or scores is not view.scores or index != self._recipe.weighed:
            self._refuse(_OTHERWISE)
        assert view is not None
        if view.told_scale and not math.isclose(view.scale, self._recipe.scale, rel_tol=1e-5):
            self._refuse(_OTHERWISE)
        value = axes.right.site(product.second, self._recipe.heads)
        view.value = value
        for entry in self._plan.before:
            if entry.edit.site == "value":
                view.value = entry.apply(view.value, self.module, view)
        # In an fp64 model that computes its scores in fp32, what reads the query computes in fp64.
        view.query = view.query.to(torch.promote_types(view.query.dtype, value.dtype))
        out = product.run(None, None if view.value is value else axes.right.back(view.value))
        for entry in self._plan.of_lse:
            entry.apply(view.lse, self.module, view)
        heads = found = axes.out.site(out, self._recipe.heads).transpose(1, 2)
        for entry in self._plan.heads:
            heads = entry.apply(heads, self.module, view)
        self._done = True
        return out if heads is found else axes.out.back(heads.transpose(1, 2))

    def end(self) -> None:
        """The forward ends.

        Raises:
            PatchStateError: there were edits, and their attention was not seen to its end.
        """
        if self._view is not None and not self._done:
            self._refuse(f"its weights were not seen to meet its values ({'; '.join(self.odd) or 'no softmax'})")

    def _refuse(self, why: str) -> None:
        raise PatchStateError(f"the edits inside the attention of {type(self.module).__name__} can't be made: {why}")
