"""Edits inside attention that a module computes by itself, by products of two tensors and a softmax."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..errors import PatchStateError, UnsupportedModelError
from ..types import AttentionView
from .call import Plan
from .named import Called
from .paths import Paths
from .products import Axes, Product
from .scores import Scores, is_one
from .torch_names import retain, takers


@dataclass(frozen=True)
class Recipe:
    """How a module was seen to compute its attention.

    Attributes:
        scores, weighed: Which of its products of two tensors is that of query and key, and which that with the values.
        heads: The number of attention heads.
        scale: The factor on query . key.
        from_last: Which of the biases that it adds counts from the last key.
        files: Besides torch, which files may have the names by which it calls its products and its softmax.
    """

    scores: int
    weighed: int
    heads: int
    scale: float
    from_last: int | None = None
    files: tuple[str, ...] = ()

    def retain(self, holder: object) -> Callable[[], object]:
        """See `Named.retain`."""
        return retain(holder, self.files)


class EagerView(AttentionView):
    """One such attention, as far as it has come."""

    def __init__(self, module: nn.Module, product: Product, axes: Axes, factor: Any, recipe: Recipe) -> None:
        self.module, self._factor, self._recipe = module, factor, recipe
        self._tensors, self._axes = product.turned(axes), axes
        self._values: tuple[Tensor, Axes] | None = None
        self.told_scale = False
        self.scores: Scores | None = None
        self._lse: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        # Late, because an edit reads few of them, and each costs functions of torch.
        heads = self._recipe.heads
        if name == "query":
            query = self._axes.left.site(self._tensors[0], heads)
            self.query = query = self._as_values(query if is_one(self._factor) else query / self._factor)
            return query
        if name == "key":
            self.key = key = self._axes.right.site(self._tensors[1], heads)
            return key
        if name == "value" and self._values is not None:
            self.value = value = self._values[1].right.site(self._values[0], heads)
            return value
        if name not in ("value", "mask", "scale"):
            raise AttributeError(name)
        if name == "scale":
            if self.scores is not None:
                return float(self.scores.scale)
            self.told_scale = True  # before the module has multiplied by it
            return self._recipe.scale
        why = "it adds its mask and biases to the logits itself" if name == "mask" else "this comes later in it"
        raise UnsupportedModelError(
            f"`at.{name}` is not known here: {type(self.module).__name__} computes its attention by itself, and {why}"
        )

    def meets(self, value: Tensor, axes: Axes) -> None:
        """The weights meet the values."""
        self._values = value, axes
        if "query" in vars(self):
            self.query = self._as_values(self.query)

    def _as_values(self, query: Tensor) -> Tensor:
        """In an fp64 model that computes its scores in fp32, what reads the query computes in fp64."""
        if self._values is None:
            return query
        return query.to(torch.promote_types(query.dtype, self._values[0].dtype))

    @property
    def is_causal(self) -> bool:
        return False  # what is causal in it is in its logits

    @property
    def lse(self) -> Tensor:
        if self._lse is None:
            if self.scores is None or self._values is None:
                raise UnsupportedModelError(
                    f"`at.lse` is not known before the values meet the weights, and {type(self.module).__name__} "
                    f"computes its attention by itself: read it at attn_heads or lse"
                )
            self._lse = self.scores.lse(self._values[0].dtype)
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


OTHERWISE = "it attends another way than when it was looked at"


class EagerFrame:
    """One forward of such a module with edits: what is done where its attention is seen."""

    is_on = False  # calls of functions are another module's

    def __init__(self, module: nn.Module, recipe: Recipe, plan: Plan, kind: Hashable, paths: Paths) -> None:
        self.module, self._recipe, self._plan = module, recipe, plan
        self._kind, self._paths = kind, paths
        self._view: EagerView | None = None
        self._done = self._is_busy = False
        self._has_grad = torch.is_grad_enabled()

    def begin(self) -> None:
        """The forward begins."""
        takers().append(self)

    def attend(self, called: Called, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return called.original(*args, **kwargs)

    def product(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `Taker`."""
        raise NotImplementedError

    def softmax(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `Taker`."""
        raise NotImplementedError

    def heads(self, product: Product) -> int:
        if product.first.ndim == 3 and product.first.shape[0] % self._recipe.heads:
            self._refuse(OTHERWISE)
        return self._recipe.heads

    def scored(self, product: Product, axes: Axes, index: int, factor: Any) -> tuple[Any, Scores]:
        """The product of query and key, with edits. `factor` has multiplied the query."""
        if self._has_grad and not torch.is_grad_enabled():
            self._refuse("it runs in reentrant gradient checkpointing inside of it, without the edits the second time")
        heads = self.heads(product)
        scores = Scores(index, product, axes, heads, product.factor * factor)
        if scores.shape[1] != heads:
            self._refuse(OTHERWISE)
        self._view = view = EagerView(self.module, product, axes, factor, self._recipe)
        edited: set[str] = set()
        for entry in self._plan.before:
            if (site := entry.edit.site) != "value":
                before = getattr(view, site)
                after = entry.apply(before, self.module, view)
                if after is not before:
                    setattr(view, site, after)
                    edited.add(site)
        left = right = None
        if "query" in edited:
            left = axes.left.back(view.query if is_one(factor) else view.query * factor)
        if "key" in edited:
            right = axes.right.back(view.key)
        if axes.swapped:
            left, right = right, left
        view.scores = scores
        return product.run(left, right), scores

    def attended(self, product: Product, axes: Axes, index: int, scores: Scores) -> Any:
        """The product of weights and values, with edits."""
        view = self._view
        if view is None or scores is not view.scores or index != self._recipe.weighed:
            self._refuse(OTHERWISE)
        # What the model learns, or has on another device, is compared only where an edit was told the number.
        scale, seen = self._recipe.scale, scores.scale
        is_known = view.told_scale or not isinstance(seen, Tensor)
        if is_known and seen != scale and not math.isclose(seen, scale, rel_tol=1e-5):
            self._refuse(OTHERWISE)
        view.meets(product.second, axes)
        values = None
        for entry in self._plan.before:
            if entry.edit.site == "value":
                before, view.value = view.value, entry.apply(view.value, self.module, view)
                values = values if view.value is before else axes.right.back(view.value)
        out = product.run(None, values)
        for entry in self._plan.of_lse:
            entry.apply(view.lse, self.module, view)
        if self._plan.heads:
            heads = found = axes.out.site(out, self._recipe.heads).transpose(1, 2)
            for entry in self._plan.heads:
                heads = entry.apply(heads, self.module, view)
            out = out if heads is found else axes.out.back(heads.transpose(1, 2))
        self._done = True
        return out

    def leave(self) -> None:
        """The forward ends, however."""
        here = takers()
        while here and here.pop() is not self:  # of others, an interrupt may have left some
            pass

    def end(self) -> None:
        """It has ended without an error.

        Raises:
            PatchStateError: there were edits, and their attention was not seen to its end.
        """
        if self._view is not None and not self._done:
            self._refuse(f"its weights were not seen to meet its values ({self._odd})")

    @property
    def _odd(self) -> str:
        """What was not understood."""
        return "no softmax"

    def _refuse(self, why: str) -> NoReturn:
        raise PatchStateError(f"the edits inside the attention of {type(self.module).__name__} can't be made: {why}")
