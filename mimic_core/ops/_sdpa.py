"""Any device: torch's own scaled-dot-product attention, and the LSE taken beside it in chunks."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ._lse import attention_lse
from ._masks import Mask, causal_mask, four_axes
from ._reference import gated_shift

__all__ = ["attention_lse", "attention_with_lse", "shifted_attention", "unavailable"]


def unavailable(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> str | None:
    """Why this backend can't run the call; None: it can."""
    if mask is not None and mask.requires_grad:
        return "the mask requires a gradient and the chunked LSE passes none to it"
    return None


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    if is_causal and scale < 0:  # torch's kernel multiplies its own -inf by the scale
        mask, is_causal = four_axes(causal_mask(q.shape[2], k.shape[2], q.device)), False
    grouped = {"enable_gqa": True} if k.shape[1] != q.shape[1] else {}
    additive = mask if mask is None or not mask.is_floating_point() else mask.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=additive, is_causal=is_causal, scale=scale, **grouped)
    return out.transpose(1, 2), attention_lse(q, k, mask, scale, is_causal)


def shifted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    vector: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    mask: Mask,
    scale: float,
    is_causal: bool,
) -> Tensor:
    out, lse = attention_with_lse(q, k, v, mask, scale, is_causal)
    return gated_shift(out, q, lse, vector, gate_weight, gate_bias)
