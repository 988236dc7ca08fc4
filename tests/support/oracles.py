"""Slow oracles in fp64, written from the formulae of the papers: what everything else is compared with.

They import nothing of mimic_core and loop over samples, attention heads and rows, so that each line is its formula and
a row that attends to nothing is an empty case, not a NaN to mask. Gradients are autograd's on these loops.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor


def allowed_and_bias(
    mask: Tensor | None, is_causal: bool, shape: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor | None]:
    """Which keys each row may see, and what is added to its logits; [b h t s] both.

    A forbidden key is False, -inf or the mask dtype's lowest number, or comes after the query (upper left aligned).
    """
    allowed = torch.ones(shape, dtype=torch.bool)
    if is_causal:
        for i in range(shape[2]):
            allowed[:, :, i, i + 1 :] = False
    if mask is None:
        return allowed, None
    if mask.dtype == torch.bool:
        return allowed & mask.expand(shape), None
    return allowed & (mask > torch.finfo(mask.dtype).min).expand(shape), mask.double().expand(shape)


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Softmax attention [b t h e] and the LSE of its logits [b h t], one row after the other.

    A row that may attend to no key has output 0 and LSE -inf.
    """
    q, k, v = q.double(), k.double(), v.double()
    b, h, t, d = q.shape
    g, s = k.shape[1], k.shape[2]
    scale = 1 / math.sqrt(d) if scale is None else scale
    allowed, bias = allowed_and_bias(mask, is_causal, (b, h, t, s))
    outs, lses = [], []
    for n in range(b):
        for head in range(h):
            keys, values = k[n, head * g // h], v[n, head * g // h]
            logits = scale * (q[n, head] @ keys.T)
            if bias is not None:
                logits = logits + bias[n, head]
            for row, seen in zip(logits, allowed[n, head], strict=True):
                if not seen.any():
                    outs.append(torch.zeros(v.shape[-1], dtype=torch.float64))
                    lses.append(torch.tensor(-math.inf, dtype=torch.float64))
                    continue
                masked = row.masked_fill(~seen, -math.inf)
                highest = masked.max().detach()
                lse = highest + (masked - highest).exp().sum().log()
                outs.append((masked - lse).exp() @ values)
                lses.append(lse)
    out = rearrange(torch.stack(outs), "(b h t) e -> b t h e", b=b, h=h)
    return out, rearrange(torch.stack(lses), "(b h t) -> b h t", b=b, h=h)


def gated_shift(
    attn_out: Tensor, query: Tensor, lse: Tensor, vector: Tensor, gate_weight: Tensor, gate_bias: Tensor
) -> Tensor:
    """out + mu v, mu = Z1 / (Z1 + Z2) with log Z1 = q.w + b and log Z2 the LSE; mu = 0 where the LSE is -inf."""
    attn_out, query, lse = attn_out.double(), query.double(), lse.double()
    vector, gate_weight, gate_bias = vector.double(), gate_weight.double(), gate_bias.double()
    b, h, t, _ = query.shape
    rows = []
    for n in range(b):
        for i in range(t):
            for head in range(h):
                row, log_z2 = attn_out[n, i, head], lse[n, head, i]
                if log_z2 > -math.inf:
                    log_z1 = query[n, head, i] @ gate_weight[head] + gate_bias[head]
                    row = row + vector[head] / (1 + (log_z2 - log_z1).exp())
                rows.append(row)
    return rearrange(torch.stack(rows), "(b t h) e -> b t h e", b=b, t=t)


def shifted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    vector: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
) -> Tensor:
    out, lse = attention_with_lse(q, k, v, mask, scale, is_causal)
    return gated_shift(out, q, lse, vector, gate_weight, gate_bias)


def norm_preserving_add(x: Tensor, vector: Tensor, scale: Tensor | float) -> Tensor:
    """(x + a v) |x| / |x + a v|, row by row; a sum of exactly zero stays zero."""
    x, vector = x.double(), vector.double()
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        moved = row + scale * vector
        length = moved.square().sum().sqrt()
        rows.append(moved * row.square().sum().sqrt() / length if length > 0 else torch.zeros_like(row))
    return torch.stack(rows).reshape(x.shape)


def _on_hyperboloid(x: Tensor) -> Tensor:
    """The exponential map at the origin (1, 0, ...) of the Lorentz model of curvature -1."""
    length = (x @ x).sqrt()
    return torch.cat([length.cosh()[None], length.sinh() * x / length])


def _mean_over_samples(
    student: Mapping[int, Tensor], teacher: Mapping[int, Tensor], samples: Sequence[int], per_token: str
) -> Tensor:
    """The mean over layers and tokens within each sample, then over the samples that have tokens."""
    means = []
    for sample in sorted(set(samples)):
        terms = []
        for layer in student:
            for i, owner in enumerate(samples):
                if owner == sample:
                    ours, others = student[layer][i].double(), teacher[layer].double().detach()
                    theirs = others[i]
                    if per_token == "mse":
                        terms.append(((ours - theirs) ** 2).mean())
                    elif per_token == "cosine":
                        lengths = (ours @ ours).sqrt() * (theirs @ theirs).sqrt()
                        terms.append(1 - (ours @ theirs) / lengths)
                    elif per_token == "lorentz":
                        unit = others.square().sum(-1).mean().sqrt()
                        x, y = _on_hyperboloid(ours / unit), _on_hyperboloid(theirs / unit)
                        terms.append(torch.arccosh(x[0] * y[0] - x[1:] @ y[1:]) ** 2)
                    else:
                        cosines = torch.stack([ours @ x / (ours.norm() * x.norm()) for x in others])
                        terms.append(torch.log((cosines / 0.1).exp().sum()) - cosines[i] / 0.1)
        means.append(torch.stack(terms).mean())
    return torch.stack(means).mean()


def layer_mse(student: Mapping[int, Tensor], teacher: Mapping[int, Tensor], samples: Sequence[int]) -> Tensor:
    """States by layer [n c], and the sample each of the n tokens belongs to."""
    return _mean_over_samples(student, teacher, samples, "mse")


def layer_cosine(student: Mapping[int, Tensor], teacher: Mapping[int, Tensor], samples: Sequence[int]) -> Tensor:
    return _mean_over_samples(student, teacher, samples, "cosine")


def layer_lorentz(student: Mapping[int, Tensor], teacher: Mapping[int, Tensor], samples: Sequence[int]) -> Tensor:
    return _mean_over_samples(student, teacher, samples, "lorentz")


def layer_contrastive(student: Mapping[int, Tensor], teacher: Mapping[int, Tensor], samples: Sequence[int]) -> Tensor:
    return _mean_over_samples(student, teacher, samples, "contrastive")


def logits_kl(
    student: Tensor, teacher: Tensor, student_where: Tensor, teacher_where: Tensor, temperature: float = 1.0
) -> Tensor:
    """T^2 sum_n p_n (log p_n - log q_n), p of the teacher, mean over the chosen positions."""
    student, teacher = student.double(), teacher.double().detach()
    terms = []
    for ours, theirs, our_where, their_where in zip(student, teacher, student_where, teacher_where, strict=True):
        for i, j in zip(our_where.nonzero()[:, 0], their_where.nonzero()[:, 0], strict=True):
            p = (theirs[j] / temperature).exp() / (theirs[j] / temperature).exp().sum()
            q = (ours[i] / temperature).exp() / (ours[i] / temperature).exp().sum()
            terms.append((p * (p.log() - q.log())).sum())
    return torch.stack(terms).mean() * temperature**2


def lm(logits: Tensor, input_ids: Tensor, label_mask: Tensor) -> Tensor:
    """-log p(token) of every labelled token, from the logits one position before it; the first has none before it."""
    logits = logits.double()
    terms = []
    for n in range(input_ids.shape[0]):
        for i in range(1, input_ids.shape[1]):
            if label_mask[n, i]:
                probabilities = logits[n, i - 1].exp() / logits[n, i - 1].exp().sum()
                terms.append(-probabilities[input_ids[n, i]].log())
    return torch.stack(terms).mean()
