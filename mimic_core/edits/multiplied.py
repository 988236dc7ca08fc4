"""Products of two tensors, seen at the names by which code calls them.

To follow every call of torch inside a module costs 2 to 6 microseconds a call on a slow core, also of those before and
after its attention. So one follows from the product of query and key on, which a replaced name shows.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from functools import cache, wraps
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .named import names_in, original_of, own_name, replaced
from .replaced import ReplacedMethod, retain_all

number_of_modes = torch._C._len_torch_function_stack  # pyright: ignore[reportAttributeAccessIssue]
mode_at = torch._C._get_function_stack_at  # pyright: ignore[reportAttributeAccessIssue]
_FUNCTIONS, _METHODS = ("matmul", "bmm", "baddbmm", "einsum"), ("matmul", "bmm", "baddbmm", "__matmul__")


@runtime_checkable
class Taker(Protocol):
    """Who takes the products of a thread."""

    def product(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the function returns for these arguments."""
        ...


class _Here(threading.local):
    def __init__(self) -> None:
        self.takers: list[Taker] = []


_here = _Here()


def takers() -> list[Taker]:
    """Those of this thread. The last one is asked."""
    return _here.takers


def _wrap(original: Callable[..., Any], in_use: Callable[[], bool]) -> Callable[..., Any]:
    @wraps(original, assigned=("__name__", "__qualname__", "__doc__"), updated=())
    def product(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not (takers := _here.takers) or not in_use():
            return original(*args, **kwargs)
        return takers[-1].product(original, args, kwargs)

    product.original = original  # pyright: ignore[reportAttributeAccessIssue]
    return product


@cache
def _replaced(file: str, name: str) -> ReplacedMethod:
    return replaced(lambda: sys.modules[file], name, _wrap)


_METHODS_OF_TENSOR = [replaced(lambda: Tensor, name, _wrap) for name in _METHODS]


def retain(holder: object, files: Iterable[str]) -> Callable[[], object]:
    """As `ReplacedMethod.retain`, for torch's names and those that the files have."""
    known = {id(original_of(getattr(torch, name))): name for name in _FUNCTIONS}
    names = {("torch", name) for name in _FUNCTIONS}
    names |= {(file, name) for file in map(own_name, files) for name, _ in names_in(file, known)}
    return retain_all((*_METHODS_OF_TENSOR, *(_replaced(*name) for name in names)), holder)
