"""On which tokens of a request a stack acts, and what its cache blocks are told apart by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..positions import Positions, counts_of

# What the front end found, in the `extra_args` of a request: the digest of a stack, a strength, and positions of its
# parts that do not act on all tokens.
FOUND = "mimic_core"


def acts(positions: Positions, place: np.ndarray, prompt: Any) -> np.ndarray:
    """Whether a stack acts on tokens: `mimic_core.positions.select`, for tokens whose places are known.

    Args:
        place: The place of each token in its request [n].
        prompt: The length of its prompt, a number or [n].
    """
    if positions == "all":
        return np.ones(len(place), dtype=bool)
    inside = place < prompt
    if positions == "generated":
        return ~inside
    if positions == "prompt":
        return inside
    first, last = counts_of(positions)
    return inside & ((place < first) | (place >= prompt - last))


def mark(inner: Callable[..., Any], request: Any, start: int, end: int, *more: Any) -> Any:
    """What vLLM hashes of a block besides its tokens: also on which of them the request's stack acts.

    The end of a prompt may be in the middle of another one with the same stack, which then needs other blocks.
    """
    keys, rest = inner(request, start, end, *more)
    extra = getattr(request.sampling_params, "extra_args", None) or {}
    of_parts = extra[FOUND][2] if FOUND in extra else ()
    chosen = [acts(positions, np.arange(start, end), request.num_prompt_tokens) for positions in of_parts]
    if any(tokens.any() for tokens in chosen):
        keys = (*(keys or ()), (FOUND, b"".join(tokens.tobytes() for tokens in chosen)))
    return keys, rest
