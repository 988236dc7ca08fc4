"""MimIC as published: attention, and its scores once more and whole for their log-sum-exp, under ordinary autograd.

Written from the formula. The published code sums over all keys; here the same mask is used for both, so that it is
the function mimic_core computes. For a whole model it is an implementation in transformers' `AttentionInterface`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

import mimic_core as mc

NAME = "published_mimic"


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """torch's own attention, [b t h d]: the yardstick of everything here."""
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, **grouped)
    return out.transpose(1, 2)


def materialised_lse(
    q: Tensor, k: Tensor, mask: Tensor | None = None, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """Log-sum-exp [b h t] of scores [b h t s] that are made for it and kept for the backward."""
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ keys.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = _causal(q.shape[2], k.shape[2], q.device)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    return scores.logsumexp(-1)


@lru_cache(maxsize=4)
def _causal(t: int, s: int, device: torch.device) -> Tensor:
    # A model makes its mask once for all its layers, so it is not part of one layer's time.
    return torch.ones(t, s, dtype=torch.bool, device=device).tril()


def published_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    vector: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Shifted attention [b t h d] in the dtype of the queries throughout; arguments as `mc.ops.shifted_attention`."""
    out = plain_attention(q, k, v, mask, is_causal, scale)
    log_z2 = materialised_lse(q, k, mask, is_causal, scale)
    log_z1 = (q * gate_weight.to(q.dtype)[:, None]).sum(-1) + gate_bias.to(q.dtype)[:, None]
    mu = torch.sigmoid(log_z1 - log_z2)
    if mask is not None:
        # A row that sees no key is padding: mimic_core does not shift it either.
        mu = mu * (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min).any(-1)
    return out + mu.transpose(1, 2)[..., None] * vector.to(q.dtype)


_heads: dict[nn.Module, Any] = {}
_shifting = True


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    head = _heads.get(module)
    if head is None:  # a vision tower
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    causal = attention_mask is None and query.shape[2] > 1
    seen = (attention_mask, causal, scaling)
    if _shifting:
        parameters = (head.vector, head.gate_weight, head.gate_bias)
        return published_attention(query, key, value, *parameters, *seen).contiguous(), None
    materialised_lse(query, key, *seen)
    return plain_attention(query, key, value, *seen).contiguous(), None


@contextmanager
def published(model: nn.Module, shifts: mc.ShiftStack) -> Iterator[None]:
    """Inside, the model runs MimIC as published, with the parameters of a stack."""
    AttentionInterface.register(NAME, _attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.config._attn_implementation  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    adapter = mc.adapter_for(model)
    _heads.update({adapter.module(model, head.layer.index, "attn_heads"): head for head in shifts})
    model.set_attn_implementation(NAME)  # pyright: ignore[reportCallIssue]
    try:
        yield
    finally:
        model.set_attn_implementation(before)  # pyright: ignore[reportCallIssue]
        _heads.clear()


@contextmanager
def unshifted() -> Iterator[None]:
    """Inside `published`, for its teacher: no shift, yet every layer takes its LSE, as the published code does."""
    global _shifting
    _shifting = False
    try:
        yield
    finally:
        _shifting = True


@contextmanager
def whole_outputs(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """The outputs of modules, every token of them, in the order they ran."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        kept.append(output)

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def published_live(x: Tensor, vector: Tensor, scale: Tensor) -> Tensor:
    """LIVE's addition that keeps lengths, in the dtype of what it is added to; arguments as `mc.ops`."""
    moved = x + (scale * vector).to(x.dtype)
    return moved / moved.norm(dim=-1, keepdim=True) * x.norm(dim=-1, keepdim=True)


@contextmanager
def live_forwards(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], model: nn.Module, shifts: mc.ShiftStack
) -> Iterator[None]:
    """Inside, `function` changes the MLP outputs, with the parameters of LIVE's heads.

    It stands in the modules' `forward`: torch.compile asks for that, and never whether a module has got hooks.
    """
    adapter = mc.adapter_for(model)
    modules = [adapter.module(model, head.layer.index, "mlp_out") for head in shifts]
    for module, head in zip(modules, shifts, strict=True):
        module.forward = partial(_live_forward, module.forward, function, head)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _live_forward(forward: Callable[[Tensor], Tensor], function: Callable[..., Tensor], head: Any, x: Tensor) -> Tensor:
    return function(forward(x), head.vector, head.scale)
