"""Ops with exactly the bits of transformers' sdpa attention function. They return None if this is not possible.

That function calls torch's SDPA without `is_causal` for a single query. For a single query of grouped heads with a
mask, newer versions put the heads of a group into the rows of one matrix, which rounds differently. `packs` says
whether the installed version does this.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from . import attention_with_lse as _attention_with_lse
from . import gated_shift, native
from . import shifted_attention as _shifted_attention
from ._backends import follows_sdpa
from ._masks import Mask


def shifted_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s e"],
    shift: tuple[Tensor, Tensor, Tensor],
    mask: Mask,
    scale: float | None,
    is_causal: bool,
    packs: bool,
) -> Float[Tensor, "b t h e"] | None:
    """`mimic_core.ops.shifted_attention`; `shift` is vector, gate_weight and gate_bias."""
    if ops := native.ops_for(q):
        follow = native.PACKING_TRANSFORMERS if packs else native.TRANSFORMERS
        out = ops.shifted_attention(q, k, v, *shift, mask, scale, is_causal, follow)
        if out is not None:
            return out
    if is_packed(q, k, mask, packs):
        found = attention_with_lse(q, k, v, mask, scale, is_causal, packs)
        return None if found is None else gated_shift(found[0], q, found[1], *shift)
    is_causal = is_causal and q.shape[2] != 1
    if not follows_sdpa(q, k, v, mask, _scale(scale, q), is_causal):
        return None
    return _shifted_attention(q, k, v, *shift, mask=mask, scale=scale, is_causal=is_causal)


def attention_with_lse(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s e"],
    mask: Mask,
    scale: float | None,
    is_causal: bool,
    packs: bool,
) -> tuple[Float[Tensor, "b t h e"], Float[Tensor, "b h t"]] | None:
    """`mimic_core.ops.attention_with_lse`."""
    if ops := native.ops_for(q):
        follow = native.PACKING_TRANSFORMERS if packs else native.TRANSFORMERS
        found = ops.attention_with_lse(q, k, v, mask, scale, is_causal, follow)
        if found is not None:
            return found
    is_causal = is_causal and q.shape[2] != 1
    if not is_packed(q, k, mask, packs):
        if not follows_sdpa(q, k, v, mask, _scale(scale, q), is_causal):
            return None
        return _attention_with_lse(q, k, v, mask, scale, is_causal)
    packed = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
    if (mask is not None and mask.shape[1] != 1) or not follows_sdpa(packed, k, v, mask, _scale(scale, q), False):
        return None
    out, lse = _attention_with_lse(packed, k, v, mask, scale)
    return out.transpose(1, 2).reshape(q.shape[0], 1, q.shape[1], -1), lse.reshape(q.shape[:3])


def is_packed(q: Tensor, k: Tensor, mask: Mask, packs: bool) -> bool:
    """Whether transformers' function puts a group's heads into one matrix in this call. It never does if compiled."""
    packs = packs and not torch.compiler.is_compiling()
    return packs and q.shape[2] == 1 and q.shape[1] != k.shape[1] and (mask is not None or q.shape[-1] > 256)


def _scale(scale: float | None, q: Tensor) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale
