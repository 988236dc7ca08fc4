"""The backends by name, and which one runs a call."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from ..errors import BackendUnavailableError, UnknownNameError
from . import _cpu, _cuda, _flex, _native, _reference, _sdpa, _triton
from ._masks import Mask

BACKENDS: dict[str, ModuleType] = {
    "cpu": _cpu,
    "cuda": _cuda,
    "triton": _triton,
    "sdpa": _sdpa,
    "reference": _reference,
    "flex": _flex,
}
# What "auto" tries, by device. On CUDA torch's own kernels come first: they are the ones the unpatched model runs, and
# on an H200, from 4096 tokens on, 1.5 (bf16) to 5 times (fp32) as fast as those in Triton.
_AUTO = {"cpu": ("cpu", "sdpa", "reference"), "cuda": ("cuda", "triton", "sdpa", "reference")}
_ELSEWHERE = ("sdpa", "reference")


class Backend(NamedTuple):
    """Which backend runs a call, and why that one."""

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
        BackendUnavailableError: the named backend can't run this call; the message says why.
    """
    if backend != "auto":
        if backend not in BACKENDS:
            raise UnknownNameError(f"no backend is called {backend!r}; there are: auto, {', '.join(BACKENDS)}")
        if reason := BACKENDS[backend].unavailable(q, k, v, mask):
            raise BackendUnavailableError(
                f"backend {backend!r} was asked for and can't run this call: {reason}; "
                f'backend="auto" chooses one that can'
            )
        return Backend(backend, "asked for by name")
    passed_over = []
    for name in _AUTO.get(q.device.type, _ELSEWHERE):
        reason = BACKENDS[name].unavailable(q, k, v, mask)
        if reason is None:
            why = passed_over or ["the first choice"]
            if name == "cpu" and _native.kernels():
                why = [*why, "with the kernels of build_native around it"]
            return Backend(name, "; ".join(why))
        passed_over.append(f"not {name}: {reason}")
    raise BackendUnavailableError("; ".join(passed_over))  # the reference takes everything: not reached


def module_for(q: Tensor, k: Tensor, v: Tensor, mask: Mask, backend: str) -> ModuleType:
    """`resolve_backend`, and the module of that name."""
    return BACKENDS[resolve_backend(q, k, v, mask, backend).name]


def follows_sdpa(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s e"],
    mask: Mask,
    scale: float,
    is_causal: bool,
) -> bool:
    """Whether `backend="auto"` runs the very kernel F.scaled_dot_product_attention would, so gives the same bits."""
    if (native := _native.kernels()) and native.follows_sdpa(q, k, v, mask, scale, is_causal):
        return True
    module = _SDPA.get(q.device.type)
    return (
        module is not None
        and module.unavailable(q, k, v, mask) is None
        and module.follows_sdpa(q, k, v, mask, scale, is_causal)
    )


_SDPA = {"cpu": _cpu, "cuda": _cuda}
