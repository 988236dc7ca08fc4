"""A tensor-parallel model: which attention heads this process has, and the way between these and all heads."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .errors import PatchStateError

# The axis of attention heads of each site that has one.
_AXIS = {"query": 1, "key": 1, "value": 1, "lse": 1, "attn_heads": 2}


@dataclass(frozen=True)
class Parallel:
    """The processes among which the layers of a model are split, and where they split attention heads.

    Attributes:
        group: The processes.
        rank: The place of this process in the group. It has the attention heads in this place.
        size: The number of processes.
        layers: The layers of which each process has only some attention and key/value heads.
    """

    group: Any
    rank: int
    size: int
    layers: frozenset[int] = frozenset()

    def splits(self, layer: int, site: str) -> bool:
        """Whether this process has only some of the heads of a site."""
        return site in _AXIS and layer in self.layers

    def own(self, whole: Tensor) -> Tensor:
        """The slice of this process of a tensor whose first axis is all heads. Its gradient is that of all heads.

        Every process gets the whole gradient, so each must run the backward.
        """
        return _Own.apply(whole, self) if torch.is_grad_enabled() and whole.requires_grad else self.slice(whole, 0)

    def shared(self, x: Tensor) -> Tensor:
        """A tensor that is used with every head. Each process gets its gradient from all heads."""
        return _Shared.apply(x, self) if torch.is_grad_enabled() and x.requires_grad else x

    def whole(self, value: Tensor, site: str) -> Tensor:
        """The value of a site with all heads. Each process gets the gradient of its own heads."""
        return _Whole.apply(value, self, _AXIS[site])  # pyright: ignore[reportReturnType]

    def slice(self, whole: Tensor, axis: int) -> Tensor:
        """The part of a tensor that belongs to this process."""
        count = whole.shape[axis] // self.size
        return whole.narrow(axis, self.rank * count, count)

    def gather(self, part: Tensor, axis: int) -> Tensor:
        """The parts of all processes together."""
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part, group=self.group)
        return torch.cat(parts, dim=axis)

    def gathered(self, found: object) -> list[Any]:
        """What each process has found."""
        all_found: list[Any] = [None] * self.size
        dist.all_gather_object(all_found, found, group=self.group)
        return all_found

    def share(self, module: nn.Module) -> None:
        """Give the parameters and buffers of the first process to all."""
        first = dist.get_global_rank(self.group, 0)
        for x in module.state_dict().values():
            dist.broadcast(x, first, group=self.group)

    def check_same(self, modules: Sequence[nn.Module]) -> None:
        """Check that modules have the same numbers in all processes.

        Raises:
            PatchStateError: they differ. All processes raise it.
        """
        found = hashlib.sha256()
        for name, x in (named for module in modules for named in module.state_dict().items()):
            found.update(f"{name} {list(x.shape)} {x.dtype}".encode())
            found.update(x.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        if len(set(self.gathered(found.digest()))) > 1:
            raise PatchStateError(
                f"these shifts are not the same in the {self.size} processes of a tensor-parallel model: build or load "
                f"them in all processes, and change them in all in the same way"
            )


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, parallel: Parallel) -> Tensor:
        ctx.parallel = parallel
        return parallel.slice(whole, 0).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.parallel.gather(grads[0], 0), None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parallel: Parallel) -> Tensor:
        ctx.parallel = parallel
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.parallel.group)
        return grad, None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, parallel: Parallel, axis: int) -> Tensor:
        ctx.parallel, ctx.axis = parallel, axis
        return parallel.gather(part, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.parallel.slice(grads[0], ctx.axis), None, None


def is_sharded(module: nn.Module) -> bool:
    """Whether a process has only a part of the numbers of a parameter, as after fully_shard (a DTensor)."""
    return any(hasattr(x, "device_mesh") for x in module.parameters())
