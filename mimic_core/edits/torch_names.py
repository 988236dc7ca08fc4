"""Products of two tensors and softmaxes, seen at the names by which code calls torch for them.

A name costs next to nothing, and a `TorchFunctionMode` 2 to 6 microseconds a call of torch on a slow core, also of the
calls before and after the attention.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from functools import cache, partial, wraps
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .named import names_in, original_of, own_name, replaced
from .replaced import ReplacedMethod, retain_all

# `functional.softmax` calls the method of its tensor. torch hands that function to other code by its name, to a
# subclass of tensors for instance, so it is left as it is.
_FUNCTIONS = dict.fromkeys(("matmul", "bmm", "baddbmm", "einsum"), "product") | {"softmax": "softmax"}
_METHODS = dict.fromkeys(("matmul", "bmm", "baddbmm", "__matmul__"), "product") | {"softmax": "softmax"}


@runtime_checkable
class Taker(Protocol):
    """Who takes these calls of a thread. Both methods return what the function returns for the arguments."""

    def product(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A product of two tensors is called."""
        ...

    def softmax(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A softmax is called."""
        ...


class _Here(threading.local):
    def __init__(self) -> None:
        self.takers: list[Taker] = []


_here = _Here()


def takers() -> list[Taker]:
    """Those of this thread. The last one is asked."""
    return _here.takers


def _wrap(kind: str, original: Callable[..., Any], in_use: Callable[[], bool]) -> Callable[..., Any]:
    @wraps(original, assigned=("__name__", "__qualname__", "__doc__"), updated=())
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not (takers := _here.takers) or not in_use():
            return original(*args, **kwargs)
        return getattr(takers[-1], kind)(original, args, kwargs)

    call.original = original  # pyright: ignore[reportAttributeAccessIssue]
    return call


@cache
def _replaced(kind: str, file: str, name: str) -> ReplacedMethod:
    return replaced(lambda: sys.modules[file], name, partial(_wrap, kind))


_METHODS_OF_TENSOR = [replaced(lambda: Tensor, name, partial(_wrap, kind)) for name, kind in _METHODS.items()]


def retain(holder: object, files: Iterable[str]) -> Callable[[], object]:
    """As `ReplacedMethod.retain`, for torch's names and those that the files have."""
    known = {id(original_of(getattr(torch, name))): kind for name, kind in _FUNCTIONS.items()}
    names = {("torch", name, kind) for name, kind in _FUNCTIONS.items()}
    names |= {(file, name, kind) for file in map(own_name, files) for name, kind in names_in(file, known)}
    return retain_all((*_METHODS_OF_TENSOR, *(_replaced(kind, file, name) for file, name, kind in names)), holder)
