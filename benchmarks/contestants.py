"""Who is measured at attention level, all as functions of the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

import mimic_core as mc

from .cases import Inputs
from .published import plain_attention, published_attention

YARDSTICK, OURS, PUBLISHED = "sdpa", "mimic_core", "published"
BACKENDS = ("cpu", "cuda", "flex", "sdpa")
PARAMETERS = ("vector", "gate_weight", "gate_bias")
LEAVES = ("q", "k", "v", *PARAMETERS)
_SHORT = 1024


class Contestant(NamedTuple):
    """A way to compute attention, or attention and shift.

    Attributes:
        run: Inputs to output [b t h d].
        shifts: Whether the shift is in it.
        backend: The backend of mimic_core that runs, and `why` it.
    """

    name: str
    run: Callable[[Inputs], Tensor]
    shifts: bool = True
    backend: str = ""
    why: str = ""

    @property
    def leaves(self) -> tuple[str, ...]:
        """The inputs it has gradients in."""
        return LEAVES if self.shifts else LEAVES[:3]

    def gradients(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Forward and backward: the gradients in its leaves. As in a model, nobody holds the output by then."""
        edge = get_gradient_edge(self.run(inputs))
        return torch.autograd.grad(edge, [getattr(inputs, name) for name in self.leaves], inputs.grad)


def contestants(inputs: Inputs, flex: bool = False) -> list[Contestant]:
    """Everybody who can run these inputs, the yardstick first; FlexAttention on request.

    A backend that `auto` chooses stands there once, as mimic_core. On a CPU, the slow others are left out where the
    sequence is long: a few of their calls would take longer than the rest of the case.
    """
    chosen = mc.ops.resolve_backend(*inputs[:3], inputs.mask)
    found = [Contestant(YARDSTICK, _sdpa, shifts=False), Contestant(OURS, _ours("auto"), True, *chosen)]
    for name in BACKENDS if inputs.q.is_cuda or inputs.q.shape[2] <= _SHORT else ():
        if name == "flex" and inputs.q.is_cuda and not flex:
            continue
        try:
            backend = mc.ops.resolve_backend(*inputs[:3], inputs.mask, backend=name)
        except (mc.BackendUnavailableError, mc.UnknownNameError):
            continue
        if backend.name != chosen.name:
            found.append(Contestant(f"{OURS}[{name}]", _ours(name), True, *backend))
    found.append(Contestant(PUBLISHED, _published))
    if inputs.q.is_cuda and flex:
        # After eight shapes torch compiles no more of a function, and runs what is next a hundred times slower.
        torch.compiler.reset()
        found.append(Contestant("flex_attention", _flex, shifts=False))
    return found


def _sdpa(x: Inputs) -> Tensor:
    return plain_attention(x.q, x.k, x.v, x.mask, x.is_causal)


def _published(x: Inputs) -> Tensor:
    return published_attention(*x[:6], x.mask, x.is_causal)


def _ours(backend: str) -> Callable[[Inputs], Tensor]:
    def run(x: Inputs) -> Tensor:
        return mc.ops.shifted_attention(*x[:6], mask=x.mask, is_causal=x.is_causal, backend=backend)

    return run


def _flex(x: Inputs) -> Tensor:
    flex_attention, block_mask_of = _compiled_flex()
    grouped = x.q.shape[1] != x.k.shape[1]
    return flex_attention(x.q, x.k, x.v, block_mask=block_mask_of(x), enable_gqa=grouped).transpose(1, 2)


@cache
def _compiled_flex() -> tuple[Callable[..., Tensor], Callable[[Inputs], Any]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    kept: dict[str, Any] = {}

    def block_mask_of(x: Inputs) -> Any:
        """The block mask of a case, made at its first call: a model makes it once for all its layers."""
        if kept.get("q") is not x.q:
            kept.update(q=x.q, mask=None if x.mask is None and not x.is_causal else _block_mask(x, create_block_mask))
        return kept["mask"]

    return torch.compile(flex_attention, dynamic=False), block_mask_of


def _block_mask(x: Inputs, create_block_mask: Callable[..., Any]) -> Any:
    mask = x.mask
    if mask is None:

        def seen(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return t >= s

    else:

        def seen(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return mask[b, 0, t, s]

    return create_block_mask(
        seen, None if mask is None else x.q.shape[0], None, x.q.shape[2], x.k.shape[2], device=x.q.device
    )
