"""A decoder that runs its layers several times in a forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WIDTH, HEADS, PASSES = 16, 2, 3


class Attention(nn.Module):
    def __init__(self, eager: bool) -> None:
        super().__init__()
        self.eager, self.qkv, self.out = eager, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (y.view(b, t, HEADS, -1).transpose(1, 2) for y in self.qkv(x).split(WIDTH, dim=-1))
        if self.eager:
            logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            barred = torch.ones(t, t, dtype=torch.bool).triu(1)
            out = torch.softmax(logits.masked_fill(barred, -torch.inf), -1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(out.transpose(1, 2).reshape(b, t, WIDTH))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, eager: bool) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(eager), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(F.layer_norm(x, (WIDTH,)))
        return x + self.mlp(F.layer_norm(x, (WIDTH,)))


class Looped(nn.Module):
    """Two layers, three times; `reentrant` says whether each runs under gradient checkpointing."""

    def __init__(self, eager: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList([Block(eager) for _ in range(2)])
        self.head = nn.Linear(WIDTH, 11)
        self.passes, self.reentrant = PASSES, None

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.reentrant is not None:
            x = x.requires_grad_()
        for _ in range(self.passes):
            for layer in self.layers:
                x = layer(x) if self.reentrant is None else self.checkpointed(layer, x)
        return self.head(x)

    def checkpointed(self, layer: nn.Module, x: Tensor) -> Tensor:
        found: Any = checkpoint(layer, x, use_reentrant=self.reentrant)
        return found
