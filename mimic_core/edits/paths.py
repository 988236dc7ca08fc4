"""Which forwards of a module that computes its attention itself call the same functions of torch in the same order."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .scores import KINDS

_PLAIN = frozenset((bool, int, float, str, type(None), torch.dtype))
# What a call of torch returns of a tensor that is not in its numbers.
_METADATA = frozenset(("__get__", "__len__", "__hash__", "dim", "ndimension", "size", "numel"))
_METADATA |= {"nelement", "stride", "storage_offset", "element_size", "get_device", "is_contiguous"}
_METADATA |= {"is_floating_point", "is_complex", "is_signed", "is_inference", "is_conj", "is_neg", "is_same_size"}
_NO_NUMBERS = (type(None), torch.Size, torch.dtype, torch.device, torch.layout)
# What has a size that depends on numbers.
_SIZED = frozenset(("nonzero", "argwhere", "unique", "unique_consecutive", "masked_select", "bincount"))
# A module that gets another number each time has another kind each time. What is known of so many is forgotten.
_MOST = 64


@dataclass(frozen=True)
class Path:
    """What a forward called by names, where the next forwards of its kind can be read by that alone.

    Attributes:
        products, softmaxes: How many there are.
        softmax: Which of them makes weights of the scores.
        factor: The number that multiplied the query before the product.
        alpha: The number by which the product itself multiplies.
        scale: The factor on query . key.
        caps: The scores went through a tanh.
        sizes: Those of what the forward got, see `sizes_of`. None: other sizes of the kind gave the same path.
    """

    products: int
    softmaxes: int
    softmax: int
    factor: float
    alpha: float
    scale: float
    caps: bool
    sizes: Hashable


class Paths(dict[Hashable, Path]):
    """The paths of a module, by kind."""

    def of(self, kind: Hashable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Path | None:
        """The path of a forward. None if it must be followed: a number may be computed of its sizes."""
        path = self.get(kind)
        return path if path is None or path.sizes is None or path.sizes == sizes_of(args, kwargs) else None

    def keep(self, kind: Hashable, path: Path) -> None:
        if kind is None:
            return
        if len(self) >= _MOST:
            self.clear()
        before = self.get(kind)
        is_same = before is not None and before.sizes != path.sizes and before == replace(path, sizes=before.sizes)
        self[kind] = replace(path, sizes=None) if is_same else path


class Seen:
    """What a followed forward calls by names.

    Attributes:
        products, softmaxes: How many were called by a name.
        is_inside: One of them runs. What it calls itself does not count.
        is_all: Names show all of them, and no number in a tensor has decided anything.
    """

    def __init__(self) -> None:
        self.products = self.softmaxes = self._met = 0
        self.is_inside, self.is_all = False, True

    def run(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Such a call, by its name."""
        self.is_inside = True
        try:
            return original(*args, **kwargs)
        finally:
            self.is_inside = False

    def follow(self, name: str, args: tuple[Any, ...], out: Any, products: int) -> None:
        """A call of torch, by a name or not. There were so many `products` until now."""
        self._met += KINDS.get(name) == "_softmax"
        by_names = self.products == products and self.softmaxes == self._met
        self.is_all = self.is_all and by_names and not is_decision(name, args, out)


_bits = lru_cache(maxsize=512)(lambda shape: tuple(map(int.bit_length, shape)))


def _of(x: Any) -> Hashable:
    if x.__class__ in _PLAIN:
        return x
    if isinstance(x, Tensor):
        return x.dtype, x.device, x.requires_grad, _bits(x.shape)
    return tuple(map(_of, x)) if isinstance(x, tuple | list) else x.__class__


def kind_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """What decides the way of a forward through its code, but for numbers in tensors and state elsewhere.

    That is: its arguments, with sizes up to a power of two; the attributes of the module; what is set in torch. So a
    text that grows has a new kind at each power of two. None if it can't be said.
    """
    plain, bits = _PLAIN, _bits
    try:
        given = [  # as `_of`, without calls of it: this runs in each layer for each token
            (x.dtype, x.device, x.requires_grad, bits(x.shape)) if x.__class__ is Tensor else x if x is None else _of(x)
            for x in (*args, *kwargs.values())
        ]
    except TypeError:  # sizes without a number
        return None
    own = [x for x in vars(module).values() if x.__class__ in plain]
    cast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    cast = cast if True not in cast else (cast, torch.get_autocast_dtype("cpu"), torch.get_autocast_dtype("cuda"))
    return (module.__class__, *given, *kwargs, *own, torch.is_grad_enabled(), cast)


def sizes_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """The sizes of the tensors that a forward gets."""
    return tuple(map(_sizes, (*args, *kwargs.values())))


def _sizes(x: Any) -> Hashable:
    if isinstance(x, Tensor):
        return x.shape
    return tuple(map(_sizes, x)) if isinstance(x, tuple | list) else None


def is_decision(name: str, args: tuple[Any, ...], out: Any) -> bool:
    """Whether a call of torch may let code decide by the numbers in tensors.

    Without one, another forward of the same kind goes the same way, whatever these numbers are.
    """
    if isinstance(out, Tensor):
        if name == "repeat_interleave":
            return len(args) < 2 or isinstance(args[1], Tensor)
        if name != "__getitem__":
            return name in _SIZED
        index = args[1] if isinstance(args[1], tuple) else args[1:]
        return any(isinstance(x, Tensor) and x.dtype == torch.bool for x in index)
    if name in _METADATA or isinstance(out, _NO_NUMBERS):
        return False
    tensors = isinstance(out, tuple | list) and all(x is None or isinstance(x, Tensor) for x in out)
    return not tensors or name in _SIZED or name == "where"  # of one tensor
