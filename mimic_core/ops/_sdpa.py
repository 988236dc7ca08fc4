"""Any device: torch's own scaled-dot-product attention, and the LSE computed separately in chunks."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ._lse import attention_lse
from ._masks import Mask

__all__ = ["attention_lse", "attention_with_lse", "unavailable"]


def unavailable(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> str | None:
    if mask is not None and mask.requires_grad:
        return "the mask requires a gradient and the chunked LSE passes none to it"
    return None


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    grouped = {"enable_gqa": True} if k.shape[1] != q.shape[1] else {}
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, **grouped)
    return out.transpose(1, 2), attention_lse(q, k, mask, scale, is_causal)
