"""CUDA: torch's own attention kernels (flash, memory-efficient, cuDNN), which all return the LSE.

The kernel is the one that torch would choose for the call, so that a shift of zero changes no bit of the model. The ops
in C++ do the same in one call, with one kernel launch before and one after.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from .._masks import Mask, additive, rows_that_attend
from .folded import Kernel, Ops, Prepared, Saved, at_the_upper_left, ops_of

_aten = torch.ops.aten
_ALIGNMENT = 16  # in elements: the rows of a bias for the memory-efficient kernel must start at a multiple of it


def unavailable(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> str | None:
    if q.device.type != "cuda":
        return f"the tensors are on {q.device}"
    if q.dtype == torch.float64:
        return "no fused kernel supports fp64"
    if v.shape[-1] != q.shape[-1]:
        return f"the kernels need values as wide as queries, found {v.shape[-1]} and {q.shape[-1]}"
    if q.shape[-1] % 8:
        return f"head_dim should be a multiple of 8, found {q.shape[-1]}"
    if mask is not None and mask.requires_grad:
        return "the mask requires a gradient and the kernels pass none to it"
    if 0 in (q.shape[0], q.shape[2], k.shape[2]):
        return "the kernels do not take an empty batch or sequence"
    return None


def follows_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, is_causal: bool) -> bool:
    return torch.compiler.is_compiling() or _choice(q, k, v, mask, scale, is_causal) in _OPS


def _choice(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, is_causal: bool) -> int:
    grouped = k.shape[1] != q.shape[1]
    if grouped and mask is not None:
        # Only flash supports grouped heads, but without a mask. So callers repeat the keys. The number of heads does
        # not matter for the choice.
        q, grouped = q[:, : k.shape[1]], False
        mask = mask if mask.shape[1] == 1 else mask[:, : k.shape[1]]
    return torch._fused_sdp_choice(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=grouped)  # pyright: ignore[reportPrivateImportUsage]


def _ops(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, is_causal: bool) -> Ops:
    if not torch.compiler.is_compiling():
        choice = _choice(q, k, v, mask, scale, is_causal)
        if choice in _OPS:
            return _OPS[choice]
    # torch.compile cannot trace that choice. And if torch would choose its slow path, there is a better kernel.
    masked = mask is not None or (is_causal and q.shape[2] > k.shape[2])
    flash = not masked and q.dtype != torch.float32 and q.shape[-1] <= 256
    return _OPS[(SDPBackend.FLASH_ATTENTION if flash else SDPBackend.EFFICIENT_ATTENTION).value]


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    return _ops(q, k, v, mask, scale, is_causal).attention_with_lse(q, k, v, mask, scale, is_causal)


def attention_lse(q: Tensor, k: Tensor, mask: Mask, scale: float, is_causal: bool) -> Tensor:
    return _ops(q, k, k, mask, scale, is_causal).attention_lse(q, k, mask, scale, is_causal)


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
    shifted = _ops(q, k, v, mask, scale, is_causal).shifted_attention
    return shifted(q, k, v, vector, gate_weight, gate_bias, mask, scale, is_causal)


def _aligned(mask: Tensor) -> Tensor:
    """The mask, with each row at an address from which the kernel can load vectors."""
    s = mask.shape[-1]
    wanted = -(-s // _ALIGNMENT) * _ALIGNMENT
    steps = [stride for size, stride in zip(mask.shape[:-1], mask.stride()[:-1], strict=True) if size > 1]
    if mask.stride(-1) == 1 and not any(step % _ALIGNMENT for step in steps):
        return mask
    return F.pad(mask, (0, wanted - s))[..., :s]


def _laid_out_as(x: Tensor, like: Tensor) -> Tensor:
    """x in the memory order of `like`, a tensor of the same shape. If x has another order, `like` is overwritten."""
    of_x, of_like = ([stride for size, stride in zip(x.shape, y.stride(), strict=True) if size > 1] for y in (x, like))
    return x if of_x == of_like else like.copy_(x)


class _Torch(ABC):
    # Whether the kernel supports grouped key/value heads if there is no mask. Otherwise they are repeated, as in
    # transformers.
    takes_groups = False

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, is_causal: bool) -> Prepared:
        s = k.shape[2]
        attends = rows_that_attend(mask)
        k, v, mask, is_causal = at_the_upper_left(q, k, v, mask, is_causal)
        if mask is not None:
            mask = _aligned(additive(mask, q.dtype)).expand(*q.shape[:3], s)
        if k.shape[1] != q.shape[1] and not (self.takes_groups and mask is None):
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        return Prepared(q, k, v, mask, scale, is_causal, attends)

    @abstractmethod
    def forward(self, p: Prepared) -> tuple[Tensor, Tensor, Saved]: ...

    @abstractmethod
    def backward(
        self, grad: Tensor, p: Prepared, out: Tensor, lse: Tensor, saved: Saved
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class _Flash(_Torch):
    takes_groups = True

    def forward(self, p: Prepared) -> tuple[Tensor, Tensor, Saved]:
        attention = _aten._scaled_dot_product_flash_attention
        out, lse, *saved, _ = attention(p.q, p.k, p.v, 0.0, p.is_causal, False, scale=p.scale)
        return out, lse, tuple(saved)

    def backward(
        self, grad: Tensor, p: Prepared, out: Tensor, lse: Tensor, saved: Saved
    ) -> tuple[Tensor, Tensor, Tensor]:
        *lengths, seed, offset = saved
        return _aten._scaled_dot_product_flash_attention_backward(
            grad, p.q, p.k, p.v, out, lse, *lengths, 0.0, p.is_causal, seed, offset, scale=p.scale
        )


class _Efficient(_Torch):
    def forward(self, p: Prepared) -> tuple[Tensor, Tensor, Saved]:
        attention = _aten._scaled_dot_product_efficient_attention
        out, lse, *random = attention(p.q, p.k, p.v, p.mask, True, 0.0, p.is_causal, scale=p.scale)
        # The kernel pads the rows of the LSE, and its backward needs the padded form.
        return out, lse[:, :, : p.q.shape[2]], (lse, *random)

    def backward(
        self, grad: Tensor, p: Prepared, out: Tensor, lse: Tensor, saved: Saved
    ) -> tuple[Tensor, Tensor, Tensor]:
        padded, *random = saved
        wanted = [True, True, True, False]
        dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
            grad, p.q, p.k, p.v, p.mask, out, padded, *random, 0.0, wanted, p.is_causal, scale=p.scale
        )
        return dq, dk, dv


class _CuDNN(_Torch):
    """cuDNN's kernel, with a workaround for the plans that torch caches for its backward.

    The key of a plan is the sizes and strides of q, k and v and the dropout. The strides of `out` and `grad` are those
    of the first call with this key, from any code. With other strides the result is silently wrong. So `out` and `grad`
    always get the same layout, and a dropout of -0.0, which no other code uses, separates our plans from others.
    """

    takes_groups = True

    def forward(self, p: Prepared) -> tuple[Tensor, Tensor, Saved]:
        attention = _aten._scaled_dot_product_cudnn_attention
        out, lse, *saved, _ = attention(p.q, p.k, p.v, p.mask, True, 0.0, p.is_causal, False, scale=p.scale)
        return out, lse.reshape(p.q.shape[:3]), (lse, *saved)

    def backward(
        self, grad: Tensor, p: Prepared, out: Tensor, lse: Tensor, saved: Saved
    ) -> tuple[Tensor, Tensor, Tensor]:
        as_given, *lengths, seed, offset = saved
        grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
        out = _laid_out_as(out, torch.empty_like(p.q))
        return _aten._scaled_dot_product_cudnn_attention_backward(
            grad, p.q, p.k, p.v, out, as_given, seed, offset, p.mask, *lengths, -0.0, p.is_causal, scale=p.scale
        )


_KERNELS: dict[SDPBackend, Kernel] = {
    SDPBackend.FLASH_ATTENTION: _Flash(),
    SDPBackend.EFFICIENT_ATTENTION: _Efficient(),
    SDPBackend.CUDNN_ATTENTION: _CuDNN(),
}
_OPS = {kind.value: ops_of(kernel) for kind, kernel in _KERNELS.items()}
