"""Which tokens of a forward end a prompt: read from the mask and the cache the decoder is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import PatchStateError, ShapeError
from ..types import ForwardView


class Forward(ForwardView):
    """One forward of the decoder.

    Args:
        unknown: Why nothing can be said of it; empty: it can.
        mask: The attention mask given to the decoder, in whatever form.
        held: How many tokens its cache held before.
    """

    def __init__(self, unknown: str = "", mask: Any = None, held: int | Tensor = 0) -> None:
        self._unknown = unknown
        self._mask = mask
        self._held = held

    @classmethod
    def of(cls, kwargs: Mapping[str, Any]) -> Forward:
        """From the arguments of the decoder, before it runs: afterwards the cache holds the new tokens too."""
        # Caches go by several names (past_key_values, cache, ...).
        lengths = (getattr(x, "get_seq_length", None) for x in kwargs.values())
        length = next((found for found in lengths if found is not None), None)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Mapping):  # one per kind of layer; all hide the same padding
            mask = next((m for m in mask.values() if m is not None), None)
        return cls(mask=mask, held=0 if length is None else length())

    def prompt_end(self, value: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            raise PatchStateError("`at.prompt_end` is not there inside torch.compile; run the model uncompiled")
        if self._unknown:
            raise PatchStateError(self._unknown)
        b, t = value.shape[:2]
        if self._held:
            return torch.zeros(b, t, dtype=torch.bool, device=value.device)
        real = self._real(b, t).to(value.device)
        return real & (real.flip(1).cumsum(1).flip(1) == 1)

    def _real(self, b: int, t: int) -> Tensor:
        """Which tokens aren't padding, [b t]."""
        mask = self._mask
        if mask is None:
            return torch.ones(b, t, dtype=torch.bool)
        if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
            found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ShapeError(
                f"which token ends a prompt is read from an attention mask [b t] or [b h t s]; found {found}"
            )
        if mask.ndim == 4:  # a token attends to itself if it is real
            mask = mask[:, 0].diagonal(dim1=1, dim2=2)
            mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
        if mask.shape[0] not in (1, b) or mask.shape[1] != t:
            raise ShapeError(
                f"the decoder's attention mask is of {list(mask.shape)} tokens [b t], its hidden states of {[b, t]}"
            )
        return (mask != 0).expand(b, t)


AGAIN = Forward(
    "`at.prompt_end` was asked for where no forward was seen to begin: in code made by torch.compile, or where "
    "gradient checkpointing runs layers again, when the mask of their forward is gone; run the model without"
)
