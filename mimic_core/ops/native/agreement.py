"""Compare the ops in C++ with the reference on a few tokens, because compiler, driver or torch may be untested ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _reference

# The largest allowed difference, relative to the largest entry of the reference: a few times the rounding error.
_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def disagreement(native: ModuleType, device: torch.device) -> str | None:
    """How the ops differ from the reference on a device. None if they agree.

    The first call of an op may be inside gradient checkpointing or autocast. These belong to a thread, so this is done
    in another one: otherwise a checkpoint would count the tensors of the comparison as its own.
    """
    with ThreadPoolExecutor(1) as other:
        return other.submit(_disagreement, native, device).result()


def _disagreement(native: ModuleType, device: torch.device) -> str | None:
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        for dtype, limit in _LIMITS.items():
            for name, found, wanted in _results(native, device, dtype):
                difference = float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())
                if not difference <= limit:
                    return f"{name} in {dtype} on {device} is {difference:.2g} off, relative to the reference"
    return None


def _results(native: ModuleType, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    torch.manual_seed(0)

    def normal(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape).to(device, kind).requires_grad_()

    q, k, v = (normal(1, heads, 9, 64, kind=dtype) for heads in (4, 2, 2))
    shift = normal(4, 64), (normal(4, 64).detach() / 8).requires_grad_(), normal(4)
    x, vector, scale = normal(5, 72, kind=dtype), normal(72), normal()
    cases: list[tuple[str, Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]] = [
        (
            "shifted_attention",
            lambda *y: native.shifted_attention(*y, None, 0.125, True, 0),
            lambda *y: _reference.gated_shift(_attention(*y[:3])[0], y[0], _attention(*y[:3])[1], *y[3:]),
            (q, k, v, *shift),
        ),
        (
            "attention_with_lse",
            lambda *y: native.attention_with_lse(*y, None, 0.125, True, 0)[1],
            lambda *y: _attention(*y)[1],
            (q, k, v),
        ),
        ("norm_preserving_add", native.norm_preserving_add, _reference.norm_preserving_add, (x, vector, scale)),
    ]
    for name, ours, reference, leaves in cases:
        found, wanted = ours(*leaves), reference(*leaves)
        if found is None:
            continue  # not supported on this device
        grad = torch.randn(found.shape).to(device, found.dtype)
        of_found, of_wanted = (torch.autograd.grad(y, leaves, grad, allow_unused=True) for y in (found, wanted))
        yield f"{name}", found.detach(), wanted.detach()
        for i, (mine, exact) in enumerate(zip(of_found, of_wanted, strict=True)):
            if mine is not None and exact is not None:
                yield f"gradient {i} of {name}", mine, exact
    with torch.no_grad():  # for decoding alone
        own = x[:, None], normal(5, 72), normal(5)
        if (found := native.norm_preserving_add(*own)) is not None:
            yield "norm_preserving_add of samples", found, _reference.norm_preserving_add(*own)
        out, lse = _attention(q, k, v)
        beside = out, q, lse, normal(4, 3, 64), normal(4, 3, 64), normal(1), 0.125
        if (found := native.virtual_context(*beside)) is not None:
            yield "virtual_context", found, _reference.virtual_context(*beside)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _reference.attention_with_lse(q, k, v, None, 0.125, True)
