"""Which tokens of a forward end a prompt, from the mask and the cache of the decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import PatchStateError, ShapeError
from ..types import ForwardView


class Forward(ForwardView):
    """One forward of the decoder: its attention mask, and the number of tokens in its cache before (`held`).

    `unknown` says why the end of the prompt is not known. It is empty if the end is known.
    """

    def __init__(self, unknown: str = "", mask: Any = None, held: int | Tensor = 0) -> None:
        self._unknown = unknown
        self._mask = mask
        self._held = held

    @classmethod
    def of(cls, kwargs: Mapping[str, Any]) -> Forward:
        """From the arguments of the decoder. Call it before the decoder runs, which adds new tokens to the cache."""
        # The argument with the cache has several names, such as past_key_values and cache.
        lengths = (getattr(x, "get_seq_length", None) for x in kwargs.values())
        length = next((found for found in lengths if found is not None), None)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Mapping):  # one mask for each kind of layer; all mask the same padding
            mask = next((m for m in mask.values() if m is not None), None)
        return cls(mask=mask, held=0 if length is None else length())

    def prompt_end(self, value: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            raise PatchStateError("`at.prompt_end` is not available inside torch.compile; run the model uncompiled")
        if self._unknown:
            raise PatchStateError(self._unknown)
        b, t = value.shape[:2]
        if self._held:
            return torch.zeros(b, t, dtype=torch.bool, device=value.device)
        real = self._real(b, t).to(value.device)
        return real & (real.flip(1).cumsum(1).flip(1) == 1)

    def _real(self, b: int, t: int) -> Tensor:
        mask = self._mask
        if mask is None:
            return torch.ones(b, t, dtype=torch.bool)
        if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
            found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ShapeError(
                f"`at.prompt_end` needs an attention mask [b t] or [b h t s] in the decoder; found {found}"
            )
        if mask.ndim == 4:  # a token attends to itself if it is not padding
            mask = mask[:, 0].diagonal(dim1=1, dim2=2)
            mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
        if mask.shape[0] not in (1, b) or mask.shape[1] != t:
            raise ShapeError(
                f"the decoder's attention mask has [b t] = {list(mask.shape)}, but its hidden states have {[b, t]}"
            )
        return (mask != 0).expand(b, t)


AGAIN = Forward(
    "`at.prompt_end` was asked for outside a forward, where the attention mask is not known: in code made by "
    "torch.compile, or where gradient checkpointing runs layers again; run the model without them"
)
