"""Edits inside attention that a module computes by itself, by products of two tensors and a softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PatchStateError, UnsupportedModelError
from ..types import AttentionView
from .call import Plan
from .follow import Follower
from .multiplied import mode_at, number_of_modes, retain, takers
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
        is_scaled: It multiplies the query before the product.
        files: Besides torch, which files have the names by which it calls its products. None: it has them otherwise.
    """

    scores: int
    weighed: int
    heads: int
    scale: float
    from_last: int | None = None
    is_scaled: bool = False
    files: tuple[str, ...] | None = None

    def retain(self, holder: object) -> Callable[[], object]:
        """See `Named.retain`."""
        return (lambda: None) if self.files is None else retain(holder, self.files)


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


_OTHERWISE = "it attends another way than when it was looked at"


class EagerFrame(Follower):
    """One forward of such a module with edits.

    It follows the calls of torch from the product of query and key to that with the values if the names show the
    products. From the beginning if they do not, or if the module multiplies the query before.
    """

    is_on = False  # calls of functions are another module's

    def __init__(self, module: nn.Module, recipe: Recipe, plan: Plan) -> None:
        super().__init__()
        self.module, self._recipe, self._plan = module, recipe, plan
        self._view: EagerView | None = None
        self._done = self._follows = self._is_busy = False
        self._has_grad = torch.is_grad_enabled()
        self._modes = number_of_modes()

    def begin(self) -> None:
        """The forward begins."""
        takers().append(self)
        if self._recipe.is_scaled or self._recipe.files is None:
            self._follow()

    def _follow(self) -> None:
        if number_of_modes() != self._modes:  # what is put in last must go first
            self._refuse("it multiplies inside a context of torch, such as `torch.device`, in which it did not begin")
        self.__enter__()
        self._follows = True

    def product(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A product, by its name. Those after the attention are followed too: there may be another one."""
        if self._follows:
            was_done = self._done
            out = original(*args, **kwargs)
            # In a context that was entered since, or inside a function, it goes on to the end.
            ends = self._done and not was_done and not self.is_opened
            if ends and mode_at(number_of_modes() - 1) is self:
                self._stop()
            return out
        if self._is_busy:  # an edit calls it
            return original(*args, **kwargs)
        product = Product(original, args, kwargs)
        if not product.equation:
            return product.run()
        if not self._done and self.products != self._recipe.scores:
            self.products += 1
            return product.run()
        self._is_busy = True
        out = self.multiply(product)
        self._is_busy = False
        self._follow()
        return out

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
        heads = self.heads(product)
        scores = Scores(index, product, axes, heads, product.factor * factor)
        if scores.shape[1] != heads:
            self._refuse(_OTHERWISE)
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
        # A number is compared always, because what multiplied the query before may not have been seen. Not so what the
        # model learns or has on another device.
        scale, seen = self._recipe.scale, scores.scale
        is_known = view.told_scale or not isinstance(seen, Tensor)
        if is_known and seen != scale and not math.isclose(seen, scale, rel_tol=1e-5):
            self._refuse(_OTHERWISE)
        view.meets(product.second, axes)
        values = None
        for entry in self._plan.before:
            if entry.edit.site == "value":
                before, view.value = view.value, entry.apply(view.value, self.module, view)
                values = values if view.value is before else axes.right.back(view.value)
        out = product.run(None, values)
        for entry in self._plan.of_lse:
            entry.apply(view.lse, self.module, view)
        heads = found = axes.out.site(out, self._recipe.heads).transpose(1, 2)
        for entry in self._plan.heads:
            heads = entry.apply(heads, self.module, view)
        self._done = True
        return out if heads is found else axes.out.back(heads.transpose(1, 2))

    def leave(self) -> None:
        """The forward ends, however."""
        here = takers()
        while here and here.pop() is not self:  # of others, an interrupt may have left some
            pass
        if self._follows:
            self._stop()

    def _stop(self) -> None:
        self.__exit__(None, None, None)
        self._follows = False

    def end(self) -> None:
        """It has ended without an error.

        Raises:
            PatchStateError: there were edits, and their attention was not seen to its end.
        """
        if self._view is not None and not self._done:
            self._refuse(f"its weights were not seen to meet its values ({'; '.join(self.odd) or 'no softmax'})")

    def _refuse(self, why: str) -> None:
        raise PatchStateError(f"the edits inside the attention of {type(self.module).__name__} can't be made: {why}")
