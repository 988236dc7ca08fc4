"""The specification, with which every other backend is compared. Eager and readable, in fp32 or fp64."""

from __future__ import annotations

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from ._masks import Mask, causal_mask, rows_that_attend
from ._precision import wide


def logits(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g s d"],
    mask: Mask,
    scale: float,
    is_causal: bool,
    softcap: float | None = None,
) -> Float[Tensor, "b h t s"]:
    """Attention logits, scaled, capped and masked."""
    keys = repeat(wide(k), "b g s d -> b (g n) s d", n=q.shape[1] // k.shape[1])
    scores = wide(q) @ keys.mT * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if is_causal:
        mask = causal_mask(q.shape[2], k.shape[2], q.device)
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


def attention_with_lse(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s e"],
    mask: Mask,
    scale: float,
    is_causal: bool,
) -> tuple[Float[Tensor, "b t h e"], Float[Tensor, "b h t"]]:
    scores = logits(q, k, mask, scale, is_causal)
    weights = _without_empty_rows(scores).softmax(-1).masked_fill(scores == -torch.inf, 0.0)
    out = weights @ repeat(wide(v), "b g s e -> b (g n) s e", n=q.shape[1] // v.shape[1])
    return rearrange(out, "b h t e -> b t h e").to(q.dtype), _lse(scores, rows_that_attend(mask))


def attention_lse(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g s d"],
    mask: Mask,
    scale: float,
    is_causal: bool,
    softcap: float | None = None,
) -> Float[Tensor, "b h t"]:
    return _lse(logits(q, k, mask, scale, is_causal, softcap), rows_that_attend(mask))


def _without_empty_rows(scores: Tensor) -> Tensor:
    # The softmax of a row with only -inf is NaN, in forward and backward. The caller does not use the result here.
    return scores.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0.0)


def _lse(scores: Tensor, attends: Tensor | None) -> Tensor:
    lse = _without_empty_rows(scores).logsumexp(-1)
    return lse if attends is None else lse.masked_fill(~attends, -torch.inf)


def gate(log_z1: Float[Tensor, ...], lse: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """mu = sigmoid(log_z1 - lse): the weight that demonstrations would have in the softmax of this row.

    It is 0 where lse is -inf: a row that attends to no key is padding and is not shifted.
    """
    return torch.sigmoid(log_z1 - lse).masked_fill(lse == -torch.inf, 0.0)


def gate_logit(
    query: Float[Tensor, "b h t d"], weight: Float[Tensor, "h d"], bias: Float[Tensor, " h"]
) -> Float[Tensor, "b h t"]:
    """query . weight + bias for each attention head: the learned estimate of log Z1."""
    q = wide(query)
    return einsum(q, weight.to(q.dtype), "b h t d, h d -> b h t") + rearrange(bias.to(q.dtype), "h -> h 1")


def gated_shift(
    attn_out: Float[Tensor, "b t h e"],
    query: Float[Tensor, "b h t d"],
    lse: Float[Tensor, "b h t"],
    vector: Float[Tensor, "h e"],
    gate_weight: Float[Tensor, "h d"],
    gate_bias: Float[Tensor, " h"],
) -> Float[Tensor, "b t h e"]:
    mu = rearrange(gate(gate_logit(query, gate_weight, gate_bias), lse), "b h t -> b t h 1")
    return (wide(attn_out) + mu * vector.to(mu.dtype)).to(attn_out.dtype)


def virtual_context(
    attn_out: Float[Tensor, "b t h e"],
    query: Float[Tensor, "b h t d"],
    lse: Float[Tensor, "b h t"],
    keys: Float[Tensor, "*b h n d"],
    values: Float[Tensor, "*b h n e"],
    weight: Float[Tensor, "*b 1"],
    scale: float,
) -> Float[Tensor, "b t h e"]:
    logits = wide(query) @ (keys * scale).mT
    log_z1 = logits.logsumexp(-1)
    a = gate(log_z1, lse) * weight[..., None]
    # Not softmax: on a CPU, torch's takes 10 times as long for rows of less than 16 numbers.
    virtual = (logits - log_z1[..., None]).exp() @ values
    return torch.lerp(wide(attn_out), virtual.transpose(1, 2), a.transpose(1, 2)[..., None]).to(attn_out.dtype)


def norm_preserving_add(
    x: Float[Tensor, "... c"], vector: Float[Tensor, "*b c"], scale: Float[Tensor, "*b"] | float
) -> Float[Tensor, "... c"]:
    wide_x = wide(x)
    if vector.ndim == 2:  # one for each sample
        vector = vector.unflatten(0, (-1, *[1] * (x.ndim - 2)))
        scale = scale.reshape(-1, *[1] * (x.ndim - 1)) if isinstance(scale, Tensor) and scale.ndim else scale
    moved = wide_x + (scale * vector).to(wide_x.dtype)
    length = torch.linalg.vector_norm(moved, dim=-1, keepdim=True)
    # A sum of exactly zero would give NaN. It stays zero, with gradient zero.
    safe = torch.where(length > 0, length, torch.ones_like(length))
    ratio = torch.linalg.vector_norm(wide_x, dim=-1, keepdim=True) / safe
    return (moved * ratio.masked_fill(length == 0, 0.0)).to(x.dtype)


def unavailable(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Bool[Tensor, ...] | None) -> str | None:
    return None
