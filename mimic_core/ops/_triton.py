"""CUDA through Triton: attention, LSE, gate and shift in one kernel, and one folded backward.

Triton is imported when a kernel is wanted, not before. Under its interpreter the same kernels take CPU tensors.

With G the gradient of the shifted output and mu = sigmoid(query . weight + bias - lse), the gradient through the LSE is
in delta = G . (shifted - mu^2 vector): the backward costs what that of plain attention costs.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._folded import needs_grad
from ._masks import Mask
from ._precision import full_precision
from ._triton_blocks import WIDEST, blocks, capability, decode_blocks, on, splits, tiles

INSTALLED = find_spec("triton") is not None
# The kernels' words for a mask: none, bool, additive.
_NO_MASK, _BOOL, _ADDITIVE = 0, 1, 2


def unavailable(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> str | None:
    """Why this backend can't run the call; None: it can."""
    if not INSTALLED:
        return "triton is not installed"
    if q.device.type != "cuda" and not (q.device.type == "cpu" and _interpreted()):
        return f"the tensors are on {q.device}"
    if capability(q.device) < (8, 0):
        return "the kernels want a GPU of compute capability 8.0 or later"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels take fp32, bf16 and fp16, found {q.dtype}"
    if v.shape[-1] != q.shape[-1]:
        return f"the kernels want values as wide as queries, found {v.shape[-1]} and {q.shape[-1]}"
    if q.shape[-1] > WIDEST:
        return f"the kernels take heads up to {WIDEST} wide, found {q.shape[-1]}"
    if mask is not None and mask.requires_grad:
        return "the mask requires a gradient and the kernels pass none to it"
    if 0 in (q.shape[0], q.shape[2], k.shape[2]):
        return "the kernels do not take an empty batch or sequence"
    return None


def _interpreted() -> bool:
    from ._triton_tiles import INTERPRETED

    return bool(INTERPRETED.value)


class _Call(NamedTuple):
    """What else a call of attention is, besides its tensors."""

    mask: Tensor | None
    scale: float  # positive
    is_causal: bool
    values: bool = True  # False: only the LSE is wanted


class _Shift(NamedTuple):
    vector: Tensor
    weight: Tensor
    bias: Tensor


class _Found(NamedTuple):
    out: Tensor
    lse: Tensor | None
    mu: Tensor | None


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    # The kernels take a positive scale, and turning a sign is exact.
    q, scale = (q, scale) if scale > 0 else (-q, -scale)
    if needs_grad(q, k, v):
        return _Attention.apply(q, k, v, mask, scale, is_causal, True)  # pyright: ignore[reportReturnType]
    out, lse, _ = _forward(q, k, v, _Call(mask, scale, is_causal), None, save=True)
    assert lse is not None
    return out, lse


def attention_lse(q: Tensor, k: Tensor, mask: Mask, scale: float, is_causal: bool) -> Tensor:
    q, scale = (q, scale) if scale > 0 else (-q, -scale)
    if needs_grad(q, k):
        return _Attention.apply(q, k, k.detach(), mask, scale, is_causal, False)[1]  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
    lse = _forward(q, k, k, _Call(mask, scale, is_causal, values=False), None, save=True).lse
    assert lse is not None
    return lse


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
    if scale < 0:
        q, gate_weight, scale = -q, -gate_weight, -scale
    if needs_grad(q, k, v, vector, gate_weight, gate_bias):
        return _ShiftedAttention.apply(q, k, v, vector, gate_weight, gate_bias, mask, scale, is_causal)  # pyright: ignore[reportReturnType]
    call = _Call(mask, scale, is_causal)
    return _forward(q, k, v, call, _Shift(vector, gate_weight, gate_bias), save=False).out


class _MaskArguments(NamedTuple):
    tensor: Tensor
    strides: tuple[int, int, int, int]
    kind: int
    lowest: float

    @property
    def by_row(self) -> bool:
        return self.strides[2] != 0


def _mask_arguments(mask: Tensor | None, like: Tensor) -> _MaskArguments:
    if mask is None:
        return _MaskArguments(like, (0, 0, 0, 0), _NO_MASK, 0.0)
    b, h, t, s = (0 if n == 1 else stride for n, stride in zip(mask.shape, mask.stride(), strict=True))
    if mask.dtype == torch.bool:
        return _MaskArguments(mask.view(torch.uint8), (b, h, t, s), _BOOL, 0.0)
    return _MaskArguments(mask, (b, h, t, s), _ADDITIVE, torch.finfo(mask.dtype).min)


def _forward(q: Tensor, k: Tensor, v: Tensor, call: _Call, shift: _Shift | None, save: bool) -> _Found:
    """The output, shifted where there is a shift; with `save` the LSE and mu as well."""
    from ._triton_epilogue import last_axis_contiguous, parameters

    q, k, v = (last_axis_contiguous(x) for x in (q, k, v))
    b, h, t, d = q.shape
    # Of one query they are a few numbers, and compiled without them its kernel rounds differently: a decoded token
    # would not be the same under no_grad.
    save = save or t == 1
    found = _Found(
        torch.empty((b, t, h, d), dtype=q.dtype, device=q.device),
        torch.empty((b, h, t), dtype=torch.float32, device=q.device) if save else None,
        torch.empty((b, h, t), dtype=torch.float32, device=q.device) if save and shift else None,
    )
    # A kernel takes a pointer even where it follows none.
    given = parameters(*shift) if shift else [q, q, q]
    results = [q if x is None else x for x in found]
    with on(q.device):
        if t == 1:
            _decode(q, k, v, call, results, given, shift is not None, save)
        else:
            _attend(q, k, v, call, results, given, shift is not None, save)
    return found


# The formatter would put each of the kernels' many arguments on a line of its own.
# fmt: off
def _attend(
    q: Tensor, k: Tensor, v: Tensor, call: _Call, results: list[Tensor], given: list[Tensor], shift: bool, save: bool
) -> None:
    from ._triton_forward import attention_kernel

    b, h, t, d = q.shape
    g, s = k.shape[1:3]
    mask = _mask_arguments(call.mask, q)
    cut = blocks("forward", q, mask.by_row)
    launch: Any = attention_kernel[(b * h * -(-t // cut.rows),)]
    launch(
        q, k, v, mask.tensor, *results, *given,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *mask.strides,
        call.scale, h, h // g, t, s,
        *tiles(d), cut.rows, cut.keys, mask.kind, mask.by_row, mask.lowest, call.is_causal, shift, save, call.values,
        num_warps=cut.warps, num_stages=cut.stages,
    )


def _decode(
    q: Tensor, k: Tensor, v: Tensor, call: _Call, results: list[Tensor], given: list[Tensor], shift: bool, save: bool
) -> None:
    from ._triton_decode import combine_kernel, decode_kernel

    b, h, _, d = q.shape
    g = k.shape[1]
    # The only query is the first one: in a causal call it sees one key.
    s = 1 if call.is_causal else k.shape[2]
    cut = decode_blocks(q, h // g)
    parts = splits(q.device, b * g, s)
    # Whole blocks, but never so few keys that the last splits have none to look at.
    chunk = -(-s // (parts * cut.keys)) * cut.keys
    mask = _mask_arguments(call.mask, q)
    mask_b, mask_h, _, mask_s = mask.strides
    part_out, part_lse = q, q
    if parts > 1:
        part_out = torch.empty((b, h, parts, d) if call.values else 0, dtype=torch.float32, device=q.device)
        part_lse = torch.empty((b, h, parts), dtype=torch.float32, device=q.device)
    launch: Any = decode_kernel[(b * g * parts,)]
    launch(
        q, k, v, mask.tensor, *results, *given, part_out, part_lse,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], mask_b, mask_h, mask_s,
        call.scale, g, h // g, s, chunk,
        *tiles(d), cut.rows, cut.keys, parts, mask.kind, mask_h != 0, mask.lowest, shift, save, call.values,
        num_warps=cut.warps, num_stages=cut.stages,
    )
    if parts > 1:
        launch: Any = combine_kernel[(b * h,)]
        launch(
            part_out, part_lse, q, *results, *given, *q.stride()[:2], h,
            *tiles(d), parts, shift, save, call.values,
            num_warps=4,
        )


def _backward(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None, lse: Tensor, delta: Tensor, call: _Call,
    wanted: tuple[bool, ...], df: Tensor | None = None, weight: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k and v, those that are `wanted`. Without `grad` the output has none, and v gets none."""
    from ._triton_backward import keys_kernel, queries_kernel
    from ._triton_epilogue import last_axis_contiguous

    q, k, v = (last_axis_contiguous(x) for x in (q, k, v))
    values = grad is not None
    # From here on [b h t d], as a view.
    grad = last_axis_contiguous(grad).transpose(1, 2) if grad is not None else q
    b, h, t, d = q.shape
    g, s = k.shape[1:3]
    mask = _mask_arguments(call.mask, q)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *mask.strides, *grad.stride()[:3])
    dq = dk = dv = None
    if wanted[1] or wanted[2]:
        cut = blocks("keys", q, mask.by_row)
        dk = torch.empty_like(k)
        dv = torch.empty_like(v) if values else dk
        launch: Any = keys_kernel[(b * g * -(-s // cut.keys),)]
        launch(
            q, k, v, mask.tensor, grad, lse, delta, dk, dv, *strides, *dk.stride()[:3], *dv.stride()[:3],
            call.scale, g, h // g, t, s,
            *tiles(d), cut.rows, cut.keys, mask.kind, mask.by_row, mask.lowest, call.is_causal, values,
            num_warps=cut.warps, num_stages=cut.stages,
        )
    if wanted[0]:
        cut = blocks("queries", q, mask.by_row)
        dq = torch.empty_like(q)
        launch: Any = queries_kernel[(b * h * -(-t // cut.rows),)]
        launch(
            q, k, v, mask.tensor, grad, lse, delta, q if df is None else df, q if weight is None else weight, dq,
            *strides, *dq.stride()[:3],
            call.scale, h, h // g, t, s,
            *tiles(d), cut.rows, cut.keys, mask.kind, mask.by_row, mask.lowest, call.is_causal, df is not None, values,
            num_warps=cut.warps, num_stages=cut.stages,
        )
    return dq, dk, dv if values else None
# fmt: on


class _Attention(torch.autograd.Function):
    """Attention and LSE, differentiable in both."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool, values: bool
    ) -> Any:
        out, lse, _ = _forward(q, k, v, _Call(mask, scale, is_causal, values), None, save=True)
        ctx.save_for_backward(q, k, v, out, lse, mask)
        ctx.call = scale, is_causal
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from ._triton_epilogue import fold

        grad, d_lse = grads
        q, k, v, out, lse, mask = ctx.saved_tensors
        if grad is None and d_lse is None:
            return (None,) * 7
        with on(q.device), full_precision(q):
            delta = None if grad is None else fold(grad, out, q, d_lse=d_lse, delta=True).delta
            if delta is None:
                assert d_lse is not None
                delta = -d_lse.contiguous()
            call = _Call(mask, *ctx.call)
            return *_backward(q, k, v, grad, lse, delta, call, ctx.needs_input_grad[:3]), None, None, None, None


class _ShiftedAttention(torch.autograd.Function):
    """Attention, gate and shift with the folded backward of this file's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        vector: Tensor,
        gate_weight: Tensor,
        gate_bias: Tensor,
        mask: Tensor | None,
        scale: float,
        is_causal: bool,
    ) -> Tensor:
        call = _Call(mask, scale, is_causal)
        shifted, lse, mu = _forward(q, k, v, call, _Shift(vector, gate_weight, gate_bias), save=True)
        ctx.save_for_backward(q, k, v, shifted, lse, mu, vector, gate_weight, mask)
        ctx.call = scale, is_causal
        return shifted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from ._triton_epilogue import fold, parameters

        q, k, v, shifted, lse, mu, vector, gate_weight, mask = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        d_vector = d_weight = d_bias = None
        dq = dk = dv = None
        with on(q.device), full_precision(q):
            wide_vector, weight = parameters(vector, gate_weight)
            attention = any(wanted[:3])
            folded = fold(grads[0], shifted, q, mu, wide_vector, delta=attention, sums=any(wanted[3:6]))
            if attention:
                assert folded.delta is not None
                call = _Call(mask, *ctx.call)
                dq, dk, dv = _backward(q, k, v, grads[0], lse, folded.delta, call, wanted[:3], folded.df, weight)
            if folded.sums is not None:
                d_vector, d_weight, d_bias = folded.of(vector.dtype, gate_weight.dtype)
        return dq, dk, dv, d_vector, d_weight, d_bias, None, None, None
