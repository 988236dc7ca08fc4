"""CPU: torch's flash kernel, which returns the LSE with the output. The ops in C++ do the same in one call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.torch_version import TorchVersion

from .._masks import Mask, additive, rows_that_attend
from .._precision import has_bf16_instructions
from .folded import Prepared, Saved, at_the_upper_left, ops_of

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# With fewer key/value heads than query heads, the kernel of torch 2.6 reads past their end; that of 2.13 is correct.
_GROUPED_HEADS = TorchVersion(torch.__version__) >= "2.13"

# Without bf16 instructions (AVX2), the kernel's bf16 backward is 10 to 12 times slower than its fp32 backward. With
# AVX512-BF16 it is 1.5 times slower and needs half the memory. Its fp16 backward is 1.2 to 1.6 times slower
# (torch 2.15), or a thousand times (2.6).
_BF16_INSTRUCTIONS = has_bf16_instructions()


def unavailable(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> str | None:
    if q.device.type != "cpu":
        return f"the tensors are on {q.device}"
    if v.shape[-1] != q.shape[-1]:
        return f"the kernel needs values as wide as queries, found {v.shape[-1]} and {q.shape[-1]}"
    if mask is not None and mask.requires_grad:
        return "the mask requires a gradient and the kernel passes none to it"
    if 0 in (q.shape[0], q.shape[2], k.shape[2]):
        return "the kernel does not take an empty batch or sequence"
    return None


def follows_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, is_causal: bool) -> bool:
    if torch.compiler.is_compiling():
        return True  # compiled code rounds differently anyway, also in the model's own attention
    grouped = k.shape[1] != q.shape[1]
    choice = torch._fused_sdp_choice(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=grouped)  # pyright: ignore[reportPrivateImportUsage]
    return choice == SDPBackend.FLASH_ATTENTION.value


def prepare(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, is_causal: bool) -> Prepared:
    s = k.shape[2]
    attends = rows_that_attend(mask)
    k, v, mask, is_causal = at_the_upper_left(q, k, v, mask, is_causal)
    if mask is not None:
        mask = additive(mask, q.dtype)
        # torch 2.6 assumes that the last axis is contiguous.
        mask = mask.expand(*mask.shape[:-1], s)
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    if not _GROUPED_HEADS and k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    # If the last axis is not contiguous, the LSE is correct but the output is wrong.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return Prepared(q, k, v, mask, scale, is_causal, attends)


def forward(p: Prepared) -> tuple[Tensor, Tensor, Saved]:
    return *_flash(p.q, p.k, p.v, 0.0, p.is_causal, attn_mask=p.mask, scale=p.scale), ()


def backward(grad: Tensor, p: Prepared, out: Tensor, lse: Tensor, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, mask = p.q, p.k, p.v, p.mask
    dtype = q.dtype
    if dtype == torch.float16 or (dtype == torch.bfloat16 and not _BF16_INSTRUCTIONS):
        grad, q, k, v, out = (x.float() for x in (grad, q, k, v, out))
        mask = None if mask is None else mask.float()
    grads = _flash_backward(grad, q, k, v, out, lse, 0.0, p.is_causal, attn_mask=mask, scale=p.scale)
    return tuple(x.to(dtype) for x in grads)  # pyright: ignore[reportReturnType]


class _Kernel:
    prepare, forward, backward = staticmethod(prepare), staticmethod(forward), staticmethod(backward)


attention_with_lse, attention_lse, shifted_attention = ops_of(_Kernel())
