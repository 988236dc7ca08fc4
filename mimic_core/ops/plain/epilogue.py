"""The code around an attention kernel in plain torch: gate and shift after it, and their backward before its own."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .._precision import wide
from .._reference import gate_logit


def gated_shift_(
    out: Float[Tensor, "b t h e"],
    q: Float[Tensor, "b h t d"],
    lse: Float[Tensor, "b h t"],
    attends: Bool[Tensor, "#b #h #t"] | None,
    vector: Float[Tensor, "h e"],
    gate_weight: Float[Tensor, "h d"],
    gate_bias: Float[Tensor, " h"],
) -> Float[Tensor, "b h t"]:
    """Shift `out` in place and return mu. A row that attends to no key keeps its output, whatever its lse is."""
    mu = torch.sigmoid(gate_logit(q, gate_weight, gate_bias) - lse)
    if attends is not None:
        mu = mu.masked_fill(~attends, 0.0)
    shift = mu.transpose(1, 2)[..., None], vector.to(mu.dtype)
    if out.dtype == mu.dtype:
        out.addcmul_(*shift)
    else:
        out.copy_(wide(out).addcmul_(*shift))
    return mu


def folded_gradients(
    grad: Float[Tensor, "b t h e"],
    shifted: Float[Tensor, "b t h e"],
    q: Float[Tensor, "b h t d"],
    mu: Float[Tensor, "b h t"],
    vector: Float[Tensor, "h e"],
    gate_weight: Float[Tensor, "h d"],
    attention: bool,
) -> tuple[
    Float[Tensor, "b t h e"] | None,
    Float[Tensor, "b h t"],
    Float[Tensor, "h e"],
    Float[Tensor, "h d"],
    Float[Tensor, " h"],
]:
    """The `out` argument for the attention backward (None unless `attention`), d f, and the parameters' gradients."""
    wide_grad, wide_vector = wide(grad).transpose(1, 2), vector.to(mu.dtype)
    df = mu * (1 - mu) * (wide_grad @ wide_vector[:, :, None]).squeeze(-1)
    out = None
    if attention:
        weight = -(mu * mu).transpose(1, 2)[..., None]
        out = torch.addcmul(wide(shifted), weight, wide_vector).to(shifted.dtype)
    d_vector = torch.einsum("bht,bhte->he", mu, wide_grad).to(vector.dtype)
    d_weight = torch.einsum("bht,bhtd->hd", df, wide(q)).to(gate_weight.dtype)
    return out, df, d_vector, d_weight, df.sum((0, 2)).to(gate_weight.dtype)


def add_to_dq_(dq: Float[Tensor, "b h t d"], df: Float[Tensor, "b h t"], gate_weight: Float[Tensor, "h d"]) -> None:
    """Add the gradient of q through the gate in place: dq += df * weight."""
    weight = gate_weight.to(df.dtype)[:, None]
    if dq.dtype == df.dtype:
        dq.addcmul_(df[..., None], weight)
    else:
        dq.copy_(wide(dq).addcmul_(df[..., None], weight))
