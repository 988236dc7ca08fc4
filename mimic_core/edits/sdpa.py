"""Attention that asks nobody: calls of torch's SDPA by a module, seen by whoever stands around the module's forward.

`torch.nn.functional.scaled_dot_product_attention` is replaced while a slot or a probe needs it, or another name that
code has for it. The replacement looks for a frame: what stands around the forward of a module that runs in this thread.
Without one, it calls what was there.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from .replaced import ReplacedMethod

_TORCHS: Any = torch._C._nn.scaled_dot_product_attention  # pyright: ignore[reportAttributeAccessIssue]


# They call what they have replaced: `original`.
_OURS = (__name__, "mimic_core.testing.oracle")


@runtime_checkable
class Frame(Protocol):
    """A forward of a module that attends."""

    @property
    def is_on(self) -> bool:
        """Whether it takes the call. Otherwise the module around it does."""
        ...

    def attend(self, original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """SDPA with these arguments, by `original`."""
        ...


class _Here(threading.local):
    def __init__(self) -> None:
        self.frames: list[Frame | None] = []


_here = _Here()


def frames() -> list[Frame | None]:
    """The forwards that this thread is inside, the innermost last. None: what is around does not count."""
    return _here.frames


@contextmanager
def by_nobody() -> Iterator[None]:
    """Inside the `with`, calls of SDPA are nobody's attention."""
    _here.frames.append(None)
    try:
        yield
    finally:
        _here.frames.pop()


def _wrap(original: Callable[..., Tensor], in_use: Callable[[], bool]) -> Callable[..., Tensor]:
    def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Tensor:
        # In code made by torch.compile there are no edits of this kind: see `EditedForward.run`.
        if torch.compiler.is_compiling():
            return original(*args, **kwargs)
        for frame in reversed(_here.frames):
            if frame is None or not in_use():
                break
            if frame.is_on:
                return frame.attend(original, *args, **kwargs)
        return original(*args, **kwargs)

    scaled_dot_product_attention.original = original  # pyright: ignore[reportFunctionMemberAccess]
    return scaled_dot_product_attention


watched_sdpa = ReplacedMethod(lambda: functional, "scaled_dot_product_attention", _wrap)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Named:
    """Where code has torch's SDPA under a name of its own, as after `from torch.nn.functional import ...`."""

    file: str
    name: str

    @staticmethod
    def of_caller() -> Named | None:
        """That of the code that calls it now. None if no global name there is torch's function."""
        frame = sys._getframe(1)
        while frame is not None and frame.f_globals.get("__name__", "").startswith(("mimic_core.", "jaxtyping")):
            frame = frame.f_back
        of_file = {} if frame is None else frame.f_globals
        names = [name for name, x in of_file.items() if x is _TORCHS]
        return Named(of_file["__name__"], names[0]) if len(names) == 1 and of_file["__name__"] in sys.modules else None

    def retain(self, holder: object) -> Callable[[], object]:
        """As `ReplacedMethod.retain`."""
        return _replaced(self).retain(holder)


@cache
def _replaced(named: Named) -> ReplacedMethod:
    return ReplacedMethod(lambda: sys.modules[named.file], named.name, _wrap)  # pyright: ignore[reportArgumentType]


def is_sdpa_of_torch() -> bool:
    """Whether a call of SDPA reaches torch's function. Edits that call `ops` in its place need that."""
    found: Any = functional.scaled_dot_product_attention
    while found is not _TORCHS and found.__module__ in _OURS:
        found = found.original
    return found is _TORCHS
