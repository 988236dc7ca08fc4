"""Decoders in plain PyTorch that compute their attention by products and a softmax, and the formula of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .plain_models import MLP, WIDTH, Cache

HEADS, D = 4, WIDTH // 4
SCALE, CAP = D**-0.5, 2.0
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
STYLES = ("after", "before", "in", "einsum", "sinks", "last")


def alibi(t: int, s: int) -> Tensor:
    """[h t s], zero at a token itself."""
    distance = torch.arange(s - t, s)[:, None] - torch.arange(s)
    return -SLOPES[:, None, None] * distance


class Computed(nn.Module):
    """Attention in one of several styles, which differ in how query and key are multiplied, and in what is added."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style, self.drop = style, nn.Dropout(0.1)
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def forward(self, x: Tensor, past: Cache | None) -> Tensor:
        q, k, v = self.c_attn(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if past is not None:
            old = past.pop(0)
            k, v = torch.cat([old[0], k], 2), torch.cat([old[1], v], 2)
            past.append((k, v))
        b, _, t, s = *q.shape[:3], k.shape[2]
        barred = ~torch.ones(t, s, dtype=torch.bool).tril(s - t)
        if self.style == "after":
            scores = torch.matmul(q, k.transpose(-1, -2))
            scores -= scores.max(-1, keepdim=True).values
            scores = scores / D**0.5
            weights = F.softmax(scores.masked_fill(barred, torch.finfo(scores.dtype).min).float(), dim=-1)
            out = self.drop(weights.to(v.dtype)) @ v
        elif self.style == "before":
            rows = (q * SCALE).reshape(b * HEADS, t, D), k.reshape(b * HEADS, s, D), v.reshape(b * HEADS, s, D)
            scores = torch.bmm(rows[0], rows[1].mT).view(b, HEADS, t, s)
            scores += torch.zeros(t, s, dtype=x.dtype).masked_fill(barred, -torch.inf)
            weights = torch.softmax(scores.view(b * HEADS, t, s), -1)
            out = torch.bmm(weights, rows[2]).view(b, HEADS, t, D)
        elif self.style == "in":
            bias = alibi(t, s).to(x.dtype).repeat(b, 1, 1)
            rows = [y.reshape(b * HEADS, -1, D) for y in (q, k, v)]
            scores = torch.baddbmm(bias, rows[0], rows[1].transpose(1, 2), alpha=SCALE).unflatten(0, (b, HEADS))
            weights = scores.masked_fill_(barred, -torch.inf).softmax(-1)
            out = (weights.flatten(0, 1) @ rows[2]).unflatten(0, (b, HEADS))
        elif self.style == "einsum":
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))
            scores = CAP * torch.tanh(SCALE * torch.einsum("bthd,bshd->bhts", q, k) / CAP)
            weights = torch.where(barred, -torch.inf, scores).softmax(dim=3)
            return self.c_proj(torch.einsum("bhts,bshd->bthd", weights, v).flatten(2))
        elif self.style == "last":  # as MPT counts
            scores = q @ k.mT * SCALE + SLOPES[:, None, None] * torch.arange(1 - s, 1)
            out = scores.masked_fill(barred, -torch.inf).softmax(-1) @ v
        else:
            scores = (q @ k.mT * SCALE).masked_fill(barred, -torch.inf)
            column = self.sinks[:, None, None].expand(b, -1, t, 1)
            scores = torch.cat([scores, column], -1)
            scores = scores - scores.amax(-1, keepdim=True).detach()
            out = scores.softmax(-1)[..., :-1] @ v
        return self.c_proj(out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A layer of such a decoder."""

    style = "after"

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(WIDTH), Computed(self.style)
        self.ln_2, self.mlp = nn.LayerNorm(WIDTH), MLP()

    def forward(self, x: Tensor, past: Cache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), past)
        return x + self.mlp(self.ln_2(x))


def layer_of(style: str) -> type[nn.Module]:
    """The class of layers whose attention has a style."""
    return type("Layer", (Layer,), {"style": style})


def formula(attention: Computed, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention [b t h e] and the log-sum-exp of its logits [b h t], from unscaled [b h t d], key by key."""
    t, s, style = q.shape[2], k.shape[2], attention.style
    logits = SCALE * (q[:, :, :, None] * k[:, :, None]).sum(-1)
    if style == "einsum":
        logits = CAP * torch.tanh(logits / CAP)
    if style in ("in", "last"):
        logits = logits + alibi(t, s).to(logits)
    later = torch.arange(s) > torch.arange(s - t, s)[:, None]
    numbers = logits.exp() * ~later
    total = numbers.sum(-1)
    if style == "sinks":
        total = total + attention.sinks.exp()[:, None]
    out = (numbers[..., None] * v[:, :, None]).sum(3) / total[..., None]
    return out.transpose(1, 2), total.log()


class Written(nn.Module):
    """The same attention by the formula, with what is to be done to query, key, value and output.

    Args:
        edits: Functions by site. That of `attn_heads` gets the output, the query and the log-sum-exp.
    """

    def __init__(self, attention: Computed, edits: dict) -> None:
        super().__init__()
        self.attention, self.edits = attention, edits

    def forward(self, x: Tensor, past: Cache | None) -> Tensor:
        q, k, v = self.attention.c_attn(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = (self.edits.get(site, lambda y: y)(y) for site, y in (("query", q), ("key", k), ("value", v)))
        out, lse = formula(self.attention, q, k, v)
        if "attn_heads" in self.edits:
            out = self.edits["attn_heads"](out, q, lse)
        return self.attention.c_proj(out.flatten(2))
