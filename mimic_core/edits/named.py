"""Attention that asks nobody: calls of attention functions by a module, seen by whoever stands around its forward.

The names that code has for these functions are replaced while a slot or a probe needs it. The replacement looks for a
frame: what stands around the forward of a module that runs in this thread. Without one, it calls what was there.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial, wraps
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn import functional

from .replaced import ReplacedMethod, retain_all

TORCHS: Any = torch._C._nn.scaled_dot_product_attention  # pyright: ignore[reportAttributeAccessIssue]
SDPA, TORCHS_FILE = "scaled_dot_product_attention", "torch.nn.functional"
# The functions and where packages have them.
_PACKED = ("flash_attn_qkvpacked_func", "flash_attn_kvpacked_func")
_PACKED += ("flash_attn_varlen_qkvpacked_func", "flash_attn_varlen_kvpacked_func")
_FLASH = ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache", *_PACKED)
XFORMERS, FLEX, TRANSFORMERS = "memory_efficient_attention", "flex_attention", "_flash_attention_forward"
_HOMES = {
    TORCHS_FILE: (SDPA,),
    "torch.nn.attention.flex_attention": (FLEX,),
    "transformers.modeling_flash_attention_utils": (TRANSFORMERS,),
    **dict.fromkeys(("xformers.ops", "xformers.ops.fmha"), (XFORMERS,)),
    **dict.fromkeys(("flash_attn", "flash_attn.flash_attn_interface", "flash_attn_interface"), _FLASH),
    **dict.fromkeys(("flash_attn.cute", "flash_attn.cute.interface"), _FLASH[:2]),
}
# They call what they have replaced: `original`.
_OURS = (__name__, "mimic_core.edits.torch_names", "mimic_core.testing.oracle")
_KINDS = frozenset((FunctionType, BuiltinFunctionType, partial))
_COMPILED = "_torchdynamo_orig_callable"
# Their own code asks transformers' interface, or calls the functions where packages have them.
_NOT_SEARCHED = ("torch.", "transformers.", "mimic_core.")


class Called(NamedTuple):
    """A function that is called: which one, and the file that has the name by which it is."""

    kind: str
    file: str
    original: Callable[..., Any]


@runtime_checkable
class Frame(Protocol):
    """A forward of a module that attends."""

    @property
    def is_on(self) -> bool:
        """Whether it takes the call. Otherwise the module around it does."""
        ...

    def attend(self, called: Called, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the function returns for these arguments."""
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
    """Inside the `with`, calls of attention functions are nobody's attention."""
    _here.frames.append(None)
    try:
        yield
    finally:
        _here.frames.pop()


def _wrap(kind: str, file: str, original: Callable[..., Any], in_use: Callable[[], bool]) -> Callable[..., Any]:
    bound: Any = original if type(original) is partial else partial(original)
    called = Called(kind, file, bound.func)

    @wraps(original, assigned=("__name__", "__qualname__", "__doc__"), updated=())
    def attention(*args: Any, **kwargs: Any) -> Any:
        # Code made by torch.compile has edits of torch's SDPA alone, and `Traced` makes them.
        if torch.compiler.is_compiling():
            return original(*args, **kwargs)
        for frame in reversed(_here.frames):
            if frame is None or not in_use():
                break
            if frame.is_on:
                return frame.attend(called, (*bound.args, *args), {**bound.keywords, **kwargs})
        return original(*args, **kwargs)

    attention.original = original  # pyright: ignore[reportAttributeAccessIssue]
    return attention


@cache
def _replaced(kind: str, file: str, name: str) -> ReplacedMethod:
    return replaced(lambda: sys.modules[file], name, partial(_wrap, kind, file))


def replaced(find: Callable[[], Any], name: str, wrap: Callable[..., Callable[..., Any]]) -> ReplacedMethod:
    """See `ReplacedMethod`, for a name that code has for a function. `is_replaced` counts it."""
    _all.append(found := ReplacedMethod(find, name, wrap))
    return found


_all: list[ReplacedMethod] = []


def is_replaced() -> bool:
    """Whether any name is replaced now."""
    return any(one.holders for one in _all)


def original_of(found: Any) -> Any:
    """The function itself: below our replacements, a `partial` of it, and what torch.compile makes of it."""
    below = found
    while below is not None:
        found = below
        if type(found) is partial:
            below = found.func
        elif type(found) is FunctionType:
            below = getattr(found, "original" if found.__module__ in _OURS else _COMPILED, None)
        else:
            below = None
    return found


def _known() -> dict[int, str]:
    """The functions that are there, by `id`."""
    homes = [(vars(sys.modules[file]), names) for file, names in _HOMES.items() if file in sys.modules]
    found = {id(original_of(home[name])): name for home, names in homes for name in names if name in home}
    return {**found, id(TORCHS): SDPA}


def own_name(file: str) -> str:
    """What a file calls itself: it can be loaded under several names."""
    name = getattr(sys.modules.get(file), "__name__", file)
    return name if sys.modules.get(name) is sys.modules.get(file) else file


def names_in(file: str, known: dict[int, str], own: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """The names that a file has for the functions, each with the function, and those of its `own` functions."""
    has = getattr(sys.modules.get(file), "__dict__", None)
    if not isinstance(has, dict):
        return
    for name, x in list(has.items()):
        kind = known.get(id(original_of(x))) if type(x) in _KINDS else None
        if kind is not None or name in own:
            yield name, kind or name


@dataclass(frozen=True)
class Named:
    """Files that have names for attention functions.

    Attributes:
        is_sdpa: What was seen to be called is torch's SDPA.
        is_hidden: It is called by what no file has as a name: an attribute, a closure, a default of an argument.
    """

    files: tuple[str, ...]
    is_sdpa: bool = False
    is_hidden: bool = False

    @staticmethod
    def everywhere() -> Named:
        """All files that are loaded."""
        return Named((*_HOMES, *(file for file in list(sys.modules) if not file.startswith(_NOT_SEARCHED))))

    @staticmethod
    def seen(called: Called, module: nn.Module) -> Named:
        """Where calls of a module are looked for that was seen to call a function.

        It may call another one, for padded tokens or for a dtype. So the file of its class counts, and torch's SDPA.
        """
        files = called.file, type(module).__module__, TORCHS_FILE
        return Named(tuple(dict.fromkeys(files)), called.kind == SDPA)

    @staticmethod
    def hidden() -> Named:
        """Where a module has torch's SDPA by another way than a name."""
        return Named((TORCHS_FILE,), is_sdpa=True, is_hidden=True)

    def retain(self, holder: object) -> Callable[[], object]:
        """As `ReplacedMethod.retain`, for all names in the files."""
        known = _known()
        return retain_all(
            (
                _replaced(kind, file, name)
                for file in set(map(own_name, self.files))
                for name, kind in names_in(file, known, _HOMES.get(file, ()))
            ),
            holder,
        )


def is_sdpa_of_torch() -> bool:
    """Whether a call of SDPA reaches torch's function. Edits that call `ops` in its place need that."""
    found: Any = functional.scaled_dot_product_attention
    while found is not TORCHS and found.__module__ in _OURS:
        found = found.original
    return found is TORCHS
