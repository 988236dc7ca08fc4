"""Positions: which tokens of a row an edit acts on."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from .errors import ShapeError, UnknownNameError

Positions = (
    Literal["all", "prompt", "prompt_end", "generated"]
    | tuple[Literal["first", "last"], int]
    | tuple[Literal["first"], int, Literal["last"], int]
)
"""Which tokens of a row an edit acts on. A row is all tokens of one sample, also those in the cache. Its prompt is what
`model.generate` was given, or what `Handle.at` says, or else the whole row of a forward without a cache.

| positions | tokens |
|---|---|
| `"all"` | every token, also padding |
| `"prompt"` | the tokens of the prompt that are not padding |
| `"prompt_end"` | the last of them |
| `("first", k)`, `("last", k)` | the first or last k of them |
| `("first", k, "last", m)` | the first k and the last m of them |
| `"generated"` | the tokens after the prompt |

If several samples are packed into a row, each has a prompt of its own.
"""

_NAMES = ("all", "prompt", "prompt_end", "generated")


def check_positions(positions: Any) -> Positions:
    """Return `positions` as `Positions`.

    Raises:
        UnknownNameError: it is no name, and not first or last tokens, or both, with counts of at least 1.
    """
    if isinstance(positions, str) and positions in _NAMES:
        return positions  # pyright: ignore[reportReturnType]
    if isinstance(positions, (tuple, list)) and list(positions[::2]) in (["first"], ["last"], ["first", "last"]):
        counts = positions[1::2]
        if len(positions) % 2 == 0 and all(type(count) is int and count >= 1 for count in counts):
            return tuple(positions)  # pyright: ignore[reportReturnType]
    raise UnknownNameError(
        f"positions should be {', '.join(map(repr, _NAMES))}, ('first', k), ('last', k) or ('first', k, 'last', m) "
        f"with k, m >= 1; found {positions!r}"
    )


def select(
    positions: Positions,
    prompt: Bool[Tensor, "b s"],
    real: Bool[Tensor, "b s"],
    begins: Bool[Tensor, "b s"],
) -> Bool[Tensor, "b s"]:
    """The tokens of whole rows that `positions` names.

    Args:
        prompt: Whether a token belongs to the prompt.
        real: Whether a token is not padding. It matters only for "generated".
        begins: True at the first token of each packed sample. A row begins a sample anyway.
    """
    if positions == "all":
        return torch.ones_like(prompt)
    if positions == "prompt":
        return prompt
    ends = torch.cat([begins[:, 1:], torch.ones_like(begins[:, :1])], dim=1)
    from_end = _counted(prompt.flip(1), ends.flip(1)).flip(1)
    if positions == "generated":
        return real & ~prompt & (from_end == 0)
    first, last = counts_of(positions)
    chosen = from_end <= last
    return prompt & (chosen | (_counted(prompt, begins) <= first) if first else chosen)


def counts_of(positions: Positions) -> tuple[int, int]:
    """How many of the first and of the last tokens of a prompt are meant, where it is some of them."""
    named: Any = ("last", 1) if positions == "prompt_end" else positions
    counts = dict(zip(named[::2], named[1::2], strict=True))
    return counts.get("first", 0), counts.get("last", 0)


def _counted(prompt: Tensor, begins: Tensor) -> Tensor:
    """How many prompt tokens of the sample there are up to each token, with itself."""
    count = prompt.long().cumsum(1)
    earlier = torch.where(begins, count - prompt.long(), 0).cummax(1).values
    return count - earlier


def check_mask(mask: object, name: str) -> Bool[Tensor, "b t"]:
    """Return `mask`.

    Raises:
        ShapeError: it is not a bool mask [b t].
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 2:
        found = f"{list(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ShapeError(f"{name} should be a bool mask [b t], found {found}")
    return mask
