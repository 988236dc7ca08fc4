"""The calls of modules that a thread is inside, read from its stack.

A flag set by a hook would stay after an interrupt, because torch calls no hook then. And a patch can be put in during a
forward whose beginning it has not seen.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from types import FrameType
from typing import Any

import torch
from torch import nn


# Not traced: where torch.compile runs a forward in parts, it would trace this too, and fails at the frames.
@torch.compiler.disable
def is_called(module: nn.Module) -> bool:
    """Whether this thread is inside a call of the module."""
    return _is_on(sys._getframe(1), module)


@torch.compiler.disable
def is_called_anywhere(module: nn.Module) -> bool:
    """Whether any thread is inside a call of the module."""
    return any(_is_on(frame, module) for frame in sys._current_frames().values())


@torch.compiler.disable
def has_labels(decoder: nn.Module) -> bool:
    """Whether the call of the decoder that this thread is inside belongs to a call of a model that was given labels."""
    inside = False
    for module, args, kwargs in _calls(sys._getframe(1)):
        if module is decoder and inside:
            return False  # a hook runs the model: the labels of the forward around it are of other rows
        inside = inside or module is decoder
        given = by_name(type(module).forward, args, kwargs).get("labels") is not None
        if given and any(one is decoder for one in module.modules()):
            return True
    return False


def _checkpointed() -> list[Any]:
    """The arguments with which gradient checkpointing, not reentrant, runs again what this code is inside of."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        here = frame.f_locals
        if frame.f_code.co_name == "recompute_fn" and frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            fn, args, kwargs = here.get("fn"), here.get("args", ()), here.get("kwargs", {})
            bound = (*fn.args, *fn.keywords.values()) if isinstance(fn, partial) else ()
            return [*args, *kwargs.values(), *bound]
        frame = frame.f_back
    return []


checkpointed: Any = torch.compiler.disable(_checkpointed)


def _is_on(frame: FrameType, module: nn.Module) -> bool:
    return any(called is module for called, _, _ in _calls(frame))


def _calls(frame: FrameType | None) -> Iterator[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """The calls of modules on a stack, the innermost first, with their arguments."""
    while frame is not None:
        # By name, because torch.compile puts other code of the same name there.
        if frame.f_code.co_name == "_call_impl":
            here = frame.f_locals
            if isinstance(module := here.get("self"), nn.Module):
                yield module, here.get("args", ()), here.get("kwargs", {})
        frame = frame.f_back


def _by_name(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a method of a module, without `self`."""
    return {**dict(zip(_names(forward), args, strict=False)), **kwargs} if args else kwargs


# As above: torch 2.6 fails in what follows the cache of names.
by_name: Any = torch.compiler.disable(_by_name)


@cache
def _names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]
