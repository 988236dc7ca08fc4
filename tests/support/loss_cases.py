"""Hidden states and masks for the tests of losses."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

LAYER_LOSSES = ("layer_mse", "layer_cosine", "layer_lorentz")


@dataclass
class States:
    """All a layer loss asks for: hidden states by layer, and the sample of each token."""

    states: Mapping[int, Tensor]
    samples: Tensor | None = None


def plain(function: Any) -> Any:
    """The function as users get it: shape annotations, where tests check them, would speak before its own errors."""
    return inspect.unwrap(function)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(
    samples: list[int], layers: tuple[int, ...] = (0, 3), width: int = 6, seed: int = 0, dtype=torch.float64
) -> tuple[States, States]:
    """A student that trains and a teacher that would, if it were let."""
    student, teacher = (
        {
            layer: normal(len(samples), width, seed=seed + 10 * layer + i, dtype=dtype).requires_grad_()
            for layer in layers
        }
        for i in range(2)
    )
    return States(student, torch.tensor(samples)), States(teacher, torch.tensor(samples))


def windows(lengths: list[int], total: int, left: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Which positions hold `lengths` tokens, padded at one side, and random numbers of their shape to fill the rest."""
    where = torch.zeros(len(lengths), total, dtype=torch.bool)
    for row, length in zip(where, lengths, strict=True):
        row[total - length :] = left
        row[:length] |= not left
        if left and length == 0:
            row[:] = False
    return where, normal(len(lengths), total, seed=seed)


lengths_of_samples = st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any)
