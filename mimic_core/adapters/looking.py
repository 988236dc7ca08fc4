"""Attention that modules compute by themselves, looked for in a small forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

from torch import Tensor, nn

from ..edits.eager import Recipe
from ..edits.follow import Follower
from ..edits.named import SDPA, TORCHS_FILE, Called, Named, frames
from ..edits.products import Axes, Product
from ..edits.scores import KINDS, Scores, counts_from_last
from ..edits.signatures import reading
from ..types import AttentionView

_NOBODY = nn.Identity()  # whose attention it is does not matter to its sizes


def sizes_of(call: AttentionView, own: Named) -> tuple[Any, ...]:
    """What `AttentionSeen` says of a call of a function, in its order."""
    (b, h, t, d), (_, g, s, _) = call.query.shape, call.key.shape
    return h, g, d, call.value.shape[-1], (b, t), s, call.logits, own


def _files(module: nn.Module) -> tuple[str, ...]:
    """Where names are looked for by which a module may call products."""
    files = dict.fromkeys(one.__module__ for one in type(module).__mro__ if issubclass(one, nn.Module))
    return tuple(file for file in files if not file.startswith("torch."))


class Looking(Follower):
    """What one module computes.

    Attributes:
        found: What `AttentionSeen` says of each attention, in its order.
    """

    def __init__(self, module: nn.Module, rows: int) -> None:
        super().__init__()
        self._module, self._rows = module, rows
        self._samples_first: dict[int, ref[Tensor]] = {}
        self.found: list[tuple[Any, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs)
        if type(out) is Tensor and out.ndim == 3 and args and type(args[0]) is Tensor:
            if KINDS.get(getattr(func, "__name__", "")) == "_shape":
                # [b h t d] -> [(b h) t d], or [t b (h d)] -> [t (b h) d]. With one sample, its axis is that of size 1.
                before, b = args[0].shape, self._rows
                known = before[0] == b if args[0].ndim == 4 else before[:2] == (out.shape[0], b)
            else:
                known = self._has_samples_first(args[0])
            if known:
                self._samples_first[id(out)] = ref(out)
        return out

    def _has_samples_first(self, x: Any) -> bool:
        found = self._samples_first.get(id(x))
        return found is not None and found() is x

    def heads(self, product: Product) -> int:
        return max(product.first.shape[0] // self._rows, 1)

    def scored(self, product: Product, axes: Axes, index: int, factor: Any) -> tuple[Any, Scores]:
        out, scores = super().scored(product, axes, index, factor)
        scores.samples_first = self._has_samples_first(product.second if axes.swapped else product.first)
        return out, scores

    def biased(self, scores: Scores, bias: Tensor, out: Tensor) -> None:
        if counts_from_last(bias):
            scores.from_last = scores.added
        super().biased(scores, bias, out)

    def attended(self, product: Product, axes: Axes, index: int, scores: Scores) -> Any:
        out = product.run()
        if axes.left.heads == "rows" and not scores.samples_first:
            self.odd.append("samples and heads in one axis, and it is not known which of them comes first")
            return out
        (b, h, t, s), kv_heads, width = scores.shape, scores.kv_heads, scores.head_dim
        logits = ("softcap",) if scores.caps else ()
        values = axes.out.site(out, h).shape[-1]
        recipe = Recipe(scores.index, index, h, float(scores.scale), scores.from_last, _files(self._module))
        self.found.append((h, kv_heads, width, values, (b, t), s, logits, recipe))
        return out

    def sdpa(self, func: Any, args: Any, kwargs: Any) -> Any:
        if not frames() or frames()[-1] is not None:  # otherwise it was seen by its name
            call = reading(Called(SDPA, TORCHS_FILE, func), _NOBODY, args, kwargs, (), {})
            if isinstance(call, str):
                self.odd.append(f"{SDPA} {call}")
            else:
                self.found.append(sizes_of(call, Named.hidden()))
        return func(*args, **kwargs)


@contextmanager
def followed(modules: list[nn.Module], rows: int) -> Iterator[dict[nn.Module, list[Looking]]]:
    """Inside the `with`, each of the modules is followed each time that it runs."""
    found: dict[nn.Module, list[Looking]] = {}
    running: list[Looking] = []

    def begins(module: nn.Module, args: Any) -> None:
        running.append(Looking(module, rows))
        running[-1].__enter__()
        found.setdefault(module, []).append(running[-1])

    def ends(module: nn.Module, args: Any, output: Any) -> None:
        running.pop().__exit__(None, None, None)

    hooks = [m.register_forward_pre_hook(begins) for m in modules]
    hooks += [m.register_forward_hook(ends) for m in modules]
    try:
        yield found
    finally:
        while running:
            running.pop().__exit__(None, None, None)
        for hook in hooks:
            hook.remove()
