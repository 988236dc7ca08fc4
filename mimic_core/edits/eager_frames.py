"""Two ways to see attention by products and a softmax: all calls of torch are followed, or some seen at their names.

The numbers are the same. On a slow core, the first adds about 420 microseconds to a layer of BLOOM, the second 150.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .call import Plan
from .eager import OTHERWISE, EagerFrame, Recipe
from .follow import Follower, softmax_of
from .paths import Path, Paths, Seen, kind_of, sizes_of
from .products import Axes, Product
from .scores import Scores


class FollowedFrame(EagerFrame, Follower):
    """All calls of torch are followed. Those by names are kept, if that tells enough of others of its kind."""

    def __init__(
        self, module: nn.Module, recipe: Recipe, plan: Plan, kind: Hashable, paths: Paths, sizes: Hashable
    ) -> None:
        EagerFrame.__init__(self, module, recipe, plan, kind, paths)
        Follower.__init__(self)
        self._sizes = sizes
        self._seen, self._weighs = Seen(), 0
        self._factors: tuple[Any, Any] = (1, 1)

    def begin(self) -> None:
        super().begin()
        self.__enter__()

    def leave(self) -> None:
        super().leave()
        self.__exit__(None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs)
        self._seen.follow(getattr(func, "__name__", ""), args, out, self.products)
        return out

    def product(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A product by its name. torch hands it to the mode, which can call it by its name again."""
        if self._is_busy or self._seen.is_inside:
            return original(*args, **kwargs)
        self._seen.products += bool(Product(original, args, kwargs).equation)
        return self._seen.run(original, args, kwargs)

    def softmax(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A softmax by its name."""
        if self._is_busy or self._seen.is_inside:
            return original(*args, **kwargs)
        self._seen.softmaxes += 1
        return self._seen.run(original, args, kwargs)

    def multiply(self, product: Product) -> Any:
        self._is_busy = True  # what edits call is not the module's
        out = Follower.multiply(self, product)
        self._is_busy = False
        return out

    def scored(self, product: Product, axes: Axes, index: int, factor: Any) -> tuple[Any, Scores]:
        if index != self._recipe.scores:
            return Follower.scored(self, product, axes, index, factor)
        self._factors = factor, product.factor
        return EagerFrame.scored(self, product, axes, index, factor)

    def biased(self, scores: Scores, bias: Tensor, out: Tensor) -> None:
        ours = self._view is not None and scores is self._view.scores
        if ours and scores.added == self._recipe.from_last and scores.shape[2] > 1:
            # In the LSE it counts from the key of the token itself, which is the same whatever follows.
            (t, s), lowest = scores.shape[2:], torch.finfo(bias.dtype).min / 2
            own = bias.expand_as(out).diagonal(s - t, -2, -1)
            own = own.masked_fill(own < lowest, 0)  # padding, where the model has joined bias and mask
            if not own.any():
                self._refuse(OTHERWISE)
            scores.take(-own)
        Follower.biased(self, scores, bias, out)

    def weighed(self, scores: Scores) -> None:
        if scores.index != self._recipe.scores or self._done:
            self._refuse("it attends several times, or another way than when it was looked at")
        if self._recipe.from_last is not None and scores.added <= self._recipe.from_last:
            self._refuse(OTHERWISE)
        self._weighs = self._seen.softmaxes - 1

    def end(self) -> None:
        super().end()
        scores = None if self._view is None else self._view.scores
        if scores is None or not self._seen.is_all:
            return
        numbers = (*self._factors, scores.scale)
        is_read = scores.less is None and scores.is_whole(scores.given)
        if is_read and all(isinstance(x, int | float) for x in numbers):
            factor, alpha, scale = map(float, numbers)
            path = Path(
                self.products, self._seen.softmaxes, self._weighs, factor, alpha, scale, scores.caps, self._sizes
            )
            self._paths.keep(self._kind, path)

    @property
    def _odd(self) -> str:
        return "; ".join(self.odd) or super()._odd


class NamedFrame(EagerFrame):
    """It is read at the names of its products and its softmax, because others of its kind were followed."""

    def __init__(self, module: nn.Module, recipe: Recipe, plan: Plan, kind: Hashable, paths: Paths, path: Path) -> None:
        super().__init__(module, recipe, plan, kind, paths)
        self._path, self._products, self._softmaxes = path, 0, 0

    def product(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A product by its name."""
        if self._is_busy:
            return original(*args, **kwargs)
        product = Product(original, args, kwargs)
        if not product.equation:
            return product.run()
        index = self._products
        self._products += 1
        if index == self._recipe.scores:
            self._is_busy = True
            out = self._meets_key(product, index)
        elif index == self._recipe.weighed:
            self._is_busy = True
            out = self._meets_value(product, index)
        else:
            return product.run()
        self._is_busy = False
        return out

    def _meets_key(self, product: Product, index: int) -> Any:
        axes, path = product.scores(), self._path
        if axes is None or product.factor != path.alpha:
            self._refuse(OTHERWISE)
        out, scores = self.scored(product, axes, index, path.factor)
        scores.scale, scores.caps = path.scale, path.caps
        return out

    def _meets_value(self, product: Product, index: int) -> Any:
        axes, scores = product.heads(), None if self._view is None else self._view.scores
        if axes is None or scores is None or scores.given is None or not scores.is_whole(product.first):
            self._refuse(OTHERWISE)
        return self.attended(product, axes, index, scores)

    def softmax(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A softmax by its name."""
        if not self._is_busy:
            if self._softmaxes == self._path.softmax:
                x, dim = softmax_of(args, kwargs)
                scores = None if self._view is None else self._view.scores
                if scores is None or not scores.is_whole(x) or dim not in (-1, x.ndim - 1):
                    self._refuse(OTHERWISE)
                scores.given = x
            self._softmaxes += 1
        return original(*args, **kwargs)

    def end(self) -> None:
        super().end()
        if (self._products, self._softmaxes) != (self._path.products, self._path.softmaxes):
            self._refuse(OTHERWISE)

    def _refuse(self, why: str) -> NoReturn:
        self._paths.pop(self._kind, None)  # the next one is followed
        super()._refuse(why)


def frame_of(
    module: nn.Module, recipe: Recipe, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any], paths: Paths
) -> EagerFrame:
    """What sees the attention of a forward with these arguments.

    The first forward of each kind is followed, and the first one of other sizes. So are the others where names do not
    show enough: where a call goes by no name, where the numbers in a tensor decide something, or where the scores lose
    something that is in the LSE.
    """
    kind = kind_of(module, args, kwargs)
    path = paths.of(kind, args, kwargs)
    if path is None:
        return FollowedFrame(module, recipe, plan, kind, paths, sizes_of(args, kwargs))
    return NamedFrame(module, recipe, plan, kind, paths, path)
