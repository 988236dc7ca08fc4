"""Calls of torch that the oracle writes down, and the softmax of one attention."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Call(NamedTuple):
    """A call of torch, and for a product of two tensors: whose it is and how many samples that got.

    `earlier` is the call that gave the same tensor before, which was written to since. `largest`: it took away the
    largest number of each row.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Tensor
    module: nn.Module | None = None
    samples: int = 0
    earlier: int | None = None
    largest: bool = False

    @property
    def tensors(self) -> list[Tensor]:
        tensors = [x for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor)]
        return tensors + [x for y in self.args if isinstance(y, list | tuple) for x in y if isinstance(x, Tensor)]

    @property
    def factors(self) -> list[Tensor]:
        return self.tensors[-2:]

    def again(self, old: list[Tensor], new: list[Tensor]) -> Any:
        """The same call with other tensors."""

        def other(x: Any) -> Any:
            if isinstance(x, list | tuple):
                return type(x)(map(other, x))
            return next((b for a, b in zip(old, new, strict=True) if a is x), x)

        return self.func(*map(other, self.args), **{name: other(x) for name, x in self.kwargs.items()})


class Softmax(NamedTuple):
    """The softmax of one attention: its module, query [b h t d], key [b g s d], its input and its output.

    `whole` is its input with the largest score of each row, if that was taken away before.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    logits: Tensor
    out: Tensor
    samples: int
    whole: Tensor


def lse_of(found: Softmax) -> Tensor:
    """The log-sum-exp of what a softmax got, in fp64, [b h t]. -inf in a row of which each key is masked."""
    logits = wide(found.whole)
    lowest = max(torch.finfo(x.dtype).min for x in (found.query, found.logits))
    none = (logits < lowest / 2).all(-1)
    lse = torch.logsumexp(logits.masked_fill(none[..., None], 0.0), -1).masked_fill(none, -torch.inf)
    return lse.reshape(found.query.shape[:3])


def wide(x: Tensor) -> Tensor:
    """In fp64, where the device has it."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def with_heads(x: Tensor, b: int) -> Tensor:
    """[(b h) . .] as [b h . .]; without heads, [b 1 . .]."""
    return x if x.ndim == 4 else x.reshape(b, -1, *x.shape[1:])


def mixes(way: list[Call]) -> bool:
    """Whether calls after the first do not keep rows and columns. More columns are sinks."""
    for call in way[1:]:
        name, width = getattr(call.func, "__name__", ""), way[0].out.shape[-1]
        if name in ("transpose", "permute", "topk"):
            return True
        if name == "cat" and call.out.numel() * width != way[0].out.numel() * call.out.shape[-1]:
            return True
    return False


def takes_largest(name: str, args: tuple[Any, ...], out: Tensor) -> bool:
    """Whether the largest number of each row, or of all, was taken away. What is left may be written to later."""
    if "sub" not in name or len(args) != 2 or not isinstance(args[1], Tensor) or out.ndim < 3:
        return False
    left = out.amax(-1) if args[1].ndim else out.max()
    return (args[1].ndim == 0 or args[1].shape[-1] == 1) and bool((left == 0).all())


def own_bias(call: Call) -> Tensor | None:
    """Of a bias that counts from the last key, what the key of each token itself gets: [... t 1]. None: of another."""
    if "add" not in getattr(call.func, "__name__", "") or len(call.tensors) != 2:
        return None
    for bias in call.tensors:
        t, s = call.out.shape[-2:]
        rows = bias.expand_as(call.out) if bias.ndim > 1 and bias.shape[-1] == s > 1 else None
        if rows is None or t == 1 or not torch.equal(rows[..., 0, :1], rows[..., -1, :1]):
            continue
        slopes = rows[..., -1, 1:] - rows[..., -1, :-1]
        if rows[..., -1, -1].eq(0).all() and slopes.gt(0).all() and torch.allclose(slopes, slopes[..., :1]):
            return torch.stack([rows[..., i, s - t + i] for i in range(t)], -1)[..., None]
    return None


def nth(func: Callable[..., Any], n: int) -> Callable[..., Any]:
    """A function that gives one of what another one gives."""
    return wraps(func)(lambda *args, **kwargs: func(*args, **kwargs)[n])


def is_moved(x: Tensor, out: Tensor) -> bool:
    """Whether a tensor has the same numbers as another, in another order or shape."""
    if x.numel() != out.numel():
        return False
    return torch.equal(x.detach().flatten().double().sort()[0], out.detach().flatten().double().sort()[0])


def running() -> tuple[nn.Module | None, int]:
    """The innermost module whose call this code runs in, and how many samples it got, read from the stack."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        module = frame.f_locals.get("self") if frame.f_code.co_name == "_call_impl" else None
        if isinstance(module, nn.Module):
            given = (*frame.f_locals.get("args", ()), *frame.f_locals.get("kwargs", {}).values())
            rows = [x.shape[0] for x in given if isinstance(x, Tensor) and x.ndim > 2 and x.is_floating_point()]
            return module, rows[0] if rows else 1
        frame = frame.f_back
    return None, 0
