"""The backends by name, and the choice of the backend for a call."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import BackendUnavailableError, UnknownNameError
from . import _flex, _reference, _sdpa, native
from ._checks import is_transformed
from ._masks import Mask
from .plain import cpu, cuda

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda, "sdpa": _sdpa, "reference": _reference, "flex": _flex}
# What "auto" tries, in this order, by device. It never chooses "flex".
_AUTO = {"cpu": ("cpu", "sdpa", "reference"), "cuda": ("cuda", "sdpa", "reference")}
_ELSEWHERE = ("sdpa", "reference")


class Backend(NamedTuple):
    """The backend that runs a call, and why it was chosen."""

    name: str
    why: str


def resolve_backend(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s e"],
    mask: Mask = None,
    backend: str = "auto",
) -> Backend:
    """The backend that would run attention over these tensors.

    Raises:
        UnknownNameError: there is no backend of that name.
        BackendUnavailableError: the named backend cannot run this call; the message says why.
    """
    return _resolved(q, k, v, mask, backend)


def _resolved(q: Tensor, k: Tensor, v: Tensor, mask: Mask, backend: str, beside: tuple[Tensor, ...] = ()) -> Backend:
    if backend != "auto":
        if backend not in BACKENDS:
            raise UnknownNameError(f"no backend is called {backend!r}; there are: auto, {', '.join(BACKENDS)}")
        if reason := _unavailable(backend, q, k, v, mask, beside):
            raise BackendUnavailableError(
                f"backend {backend!r} was asked for and can't run this call: {reason}; "
                f'backend="auto" chooses one that can'
            )
        return Backend(backend, "asked for by name")
    passed_over = []
    for name in _AUTO.get(q.device.type, _ELSEWHERE):
        reason = _unavailable(name, q, k, v, mask, beside)
        if reason is None:
            why = passed_over or ["the first choice"]
            if name in _AUTO and native.serves(q.device):
                why = [*why, "in C++"]
            return Backend(name, "; ".join(why))
        passed_over.append(f"not {name}: {reason}")
    raise BackendUnavailableError("; ".join(passed_over))  # not reached: the reference runs every call


def _unavailable(backend: str, q: Tensor, k: Tensor, v: Tensor, mask: Mask, beside: tuple[Tensor, ...]) -> str | None:
    if backend != "reference" and is_transformed(q, k, v, *beside):
        return "it does not support torch.func and forward-mode differentiation"
    # When torch decomposes their kernels for an exported program, the second result is no LSE. onnxruntime could not
    # load such a program, and other shapes would broadcast to wrong numbers.
    if backend in ("cpu", "cuda") and _is_exporting():
        return "torch.export needs ops that can be decomposed"
    return BACKENDS[backend].unavailable(q, k, v, mask)


def module_for(q: Tensor, k: Tensor, v: Tensor, mask: Mask, backend: str, *beside: Tensor) -> ModuleType:
    """The module of the backend for a call. `beside` are further tensors of the call."""
    return BACKENDS[_resolved(q, k, v, mask, backend, beside).name]


def follows_sdpa(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s e"],
    mask: Mask,
    scale: float,
    is_causal: bool,
) -> bool:
    """Whether `backend="auto"` runs the kernel of F.scaled_dot_product_attention, and so gives the same bits."""
    module = _SDPA.get(q.device.type)
    return (
        module is not None
        and module.unavailable(q, k, v, mask) is None
        and module.follows_sdpa(q, k, v, mask, scale, is_causal)
    )


_SDPA = {"cpu": cpu, "cuda": cuda}
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.6 does not say
