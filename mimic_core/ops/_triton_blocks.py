"""How the Triton kernels cut their work: tiles of a head, rows and keys per program, warps and stages.

A fixed table instead of autotuning: tuning takes seconds at the first call and can end differently in every process.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

# What an H100 has; used where no device can be asked.
_DEFAULT_CAPABILITY = (9, 0)
_DEFAULT_PROCESSORS = 132
WIDEST = 256


class Tiles(NamedTuple):
    """A head of width D as two tiles of D0 and D1 columns, powers of two of at least 16; D1 may be 0."""

    D: int
    D0: int
    D1: int


class Blocks(NamedTuple):
    """Queries and keys a program holds at a time, and how it is launched."""

    rows: int
    keys: int
    warps: int
    stages: int


def power_of_two(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def tiles(width: int) -> Tiles:
    """80 is 64 + 16, not 128: padding would waste 37% of every product."""
    whole = max(16, power_of_two(width))
    first = whole // 2
    second = max(16, power_of_two(width - first))
    return Tiles(width, first, second) if first >= 16 and first + second < whole else Tiles(width, whole, 0)


def _bucket(width: int) -> int:
    covered = sum(tiles(width)[1:])
    return next(limit for limit in (64, 96, 128, WIDEST) if covered <= limit)


# (rows, keys, warps, stages) by the columns the tiles cover; chosen so that nothing spills in half precision.
# "large": compute capability 9 and 10 (227 KiB of shared memory a block); "medium": 8.0 (163); "small": the rest (99).
_HALF = {
    "large": {
        "forward": {64: (128, 64, 8, 3), 96: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 2)},
        "keys": {64: (32, 128, 8, 2), 96: (32, 128, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 1)},
        "queries": {64: (128, 64, 8, 2), 96: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (128, 32, 8, 1)},
    },
    "medium": {
        "forward": {64: (128, 64, 8, 3), 96: (128, 32, 8, 3), 128: (128, 32, 8, 3), 256: (64, 32, 8, 2)},
        "keys": {64: (32, 128, 8, 2), 96: (32, 128, 8, 2), 128: (32, 128, 8, 2), 256: (32, 32, 8, 1)},
        "queries": {64: (128, 64, 8, 2), 96: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (32, 32, 8, 1)},
    },
    "small": {
        "forward": {64: (128, 64, 8, 2), 96: (128, 32, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 8, 1)},
        "keys": {64: (32, 128, 8, 2), 96: (32, 128, 8, 1), 128: (32, 64, 8, 1), 256: (32, 32, 8, 1)},
        "queries": {64: (128, 64, 8, 2), 96: (128, 32, 8, 1), 128: (64, 32, 4, 1), 256: (32, 32, 8, 1)},
    },
}
# Where a mask differs from row to row its tile takes registers too.
_MASKED = {
    "medium": {"keys": {96: (32, 64, 8, 2), 128: (32, 64, 8, 2)}, "queries": {96: (128, 32, 8, 2)}},
    "small": {"keys": {96: (32, 64, 8, 1)}},
}
# fp32 products run on the ordinary units (see `dot`): small blocks, since every operand sits in registers.
_FULL = {
    "forward": {64: (32, 32, 4, 1), 96: (32, 32, 8, 1), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
    "keys": {64: (32, 32, 8, 1), 96: (16, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    "queries": {64: (32, 32, 8, 1), 96: (32, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
}
_DECODE_KEYS = {64: 64, 96: 32, 128: 32, 256: 32}
# Splits are a power of two, so that few variants of the kernels exist; a split is worth starting from this many keys.
_MOST_SPLITS = 64
_FEWEST_KEYS = 128


def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else _DEFAULT_CAPABILITY


def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _DEFAULT_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _memory_class(device: torch.device) -> str:
    major, minor = capability(device)
    if major in (9, 10):
        return "large"
    return "medium" if (major, minor) in ((8, 0), (8, 7)) else "small"


def blocks(kernel: str, like: torch.Tensor, masked: bool) -> Blocks:
    """For "forward", "keys" (gradients of k and v) or "queries" (of q), over heads as wide as `like`'s last axis.

    `masked`: there is a mask that differs from row to row.
    """
    bucket = _bucket(like.shape[-1])
    if like.dtype == torch.float32:
        return Blocks(*_FULL[kernel][bucket])
    memory = _memory_class(like.device)
    special = _MASKED.get(memory, {}).get(kernel, {}).get(bucket) if masked else None
    return Blocks(*(special or _HALF[memory][kernel][bucket]))


def decode_blocks(like: torch.Tensor, heads_of_a_group: int) -> Blocks:
    keys = _DECODE_KEYS[_bucket(like.shape[-1])]
    # Tensor cores take no fewer than 16 rows.
    rows = max(16, power_of_two(heads_of_a_group))
    return Blocks(rows, 16 if like.dtype == torch.float32 else keys, 4, 2)


def splits(device: torch.device, groups: int, keys: int) -> int:
    """Over how many programs the keys of one group of heads are spread: about two programs a processor."""
    wanted = min(2 * processors(device) // groups, keys // _FEWEST_KEYS, _MOST_SPLITS)
    return 1 << max(0, wanted.bit_length() - 1)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
