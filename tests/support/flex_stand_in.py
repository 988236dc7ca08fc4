"""A stand-in for torch's `flex_attention` with a backward, which torch has on a GPU alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from .flash_stand_ins import opaque


@opaque
def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, score_mod: Any = None, block_mask: Any = None,
    scale: float | None = None, enable_gqa: bool = False, return_lse: bool = False, kernel_options: Any = None,
) -> Any:  # fmt: skip
    times = query.shape[1] // key.shape[1]
    assert times == 1 or enable_gqa
    key, value = (x.repeat_interleave(times, 1) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if score_mod is not None:
        b, h, t, s = (torch.arange(n) for n in scores.shape)
        scores = score_mod(scores, b[:, None, None, None], h[:, None, None], t[:, None], s)
    if block_mask is not None:
        mask = create_mask(block_mask.mask_mod, 1, 1, *scores.shape[-2:], device="cpu")
        scores = scores.masked_fill(~mask, -torch.inf)
    out = scores.softmax(-1) @ value
    return (out, scores.logsumexp(-1)) if return_lse else out
