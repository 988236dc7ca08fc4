"""Small decoders in plain PyTorch: no config, no class and no attention of transformers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mimic_core as mc

VOCABULARY, WIDTH = 61, 32
Cache = list[tuple[Tensor, Tensor]]


class CausalSelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, past: Cache | None) -> Tensor:
        q, k, v = self.c_attn(x).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        if past is not None:
            old = past.pop(0)
            k, v = torch.cat([old[0], k], 2), torch.cat([old[1], v], 2)
            past.append((k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        return self.c_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = (
            nn.LayerNorm(WIDTH),
            CausalSelfAttention(),
            nn.LayerNorm(WIDTH),
            MLP(),
        )

    def forward(self, x: Tensor, past: Cache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), past)
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """As in nanoGPT, and with a cache: a list of keys and values, which each layer takes from its front."""

    def __init__(self, block: type[nn.Module] = Block) -> None:
        super().__init__()
        parts = {"wte": nn.Embedding(VOCABULARY, WIDTH), "wpe": nn.Embedding(64, WIDTH)}
        self.transformer = nn.ModuleDict({**parts, "h": nn.ModuleList(block() for _ in range(3))})
        self.lm_head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, idx: Tensor, targets: Tensor | None = None, past: Cache | None = None) -> Any:
        start = past[0][0].shape[2] if past else 0
        x = self.transformer["wte"](idx) + self.transformer["wpe"](torch.arange(start, start + idx.shape[1]))
        for block in self.transformer["h"]:  # pyright: ignore[reportGeneralTypeIssues]
            x = block(x, past)
        logits = self.lm_head(x)
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def empty_cache(b: int) -> Cache:
    return [(torch.empty(b, 4, 0, WIDTH // 4), torch.empty(b, 4, 0, WIDTH // 4)) for _ in range(3)]


def decode(model: nn.Module, prompt: Any, new: Tensor) -> Tensor:
    """NanoGPT's decoding with a cache, for the conformance kit."""
    past = empty_cache(len(new))
    steps = [prompt["idx"], *new.split(1, dim=1)]
    return torch.stack([model(step, past=past)[0][:, -1] for step in steps], dim=1)


def pad_right(samples: list[dict[str, Any]], side: str) -> tuple[dict[str, Any], Tensor] | None:
    """Padding of a causal decoder without a mask: only later tokens may be padding."""
    if side == "left":
        return None
    ids = [s["idx"][0] for s in samples]
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    lengths = torch.tensor([len(one) for one in ids])
    return {"idx": padded}, torch.arange(padded.shape[1]) < lengths[:, None]


class Captioner(nn.Module):
    """torch's own decoder, which also attends to an image."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerDecoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=batch_first)
        self.decoder, self.batch_first = nn.TransformerDecoder(layer, 2), batch_first
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor, image: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=image.dtype)
        x = self.words(tokens)
        if not self.batch_first:
            x, image = x.transpose(0, 1), image.transpose(0, 1)
        x = self.decoder(x, image, tgt_mask=causal)
        return self.head(x if self.batch_first else x.transpose(0, 1))


def caption_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (2, 7), generator=generator)
    return {"tokens": ids, "image": torch.randn(2, 5, WIDTH, generator=generator)}


class Encoded(nn.Module):
    """A decoder of torch's encoder layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True), 2)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], dtype=x.dtype)
        return self.head(self.encoder(x, mask, is_causal=True))


class MultiHead(nn.Module):
    """torch's multi-head attention, with a mask of numbers or of truths."""

    needs_weights, batch_first, numbers = True, True, True

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.MultiheadAttention(WIDTH, 4, batch_first=self.batch_first)

    def forward(self, x: Tensor, past: Cache | None) -> Tensor:
        mask: Tensor = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        if self.numbers:
            mask = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(mask, -torch.inf)
        x = x if self.batch_first else x.transpose(0, 1)
        out, weights = self.inside(x, x, x, attn_mask=mask, need_weights=self.needs_weights)
        assert (weights is not None) == self.needs_weights
        return out if self.batch_first else out.transpose(0, 1)


def multi_head(**options: bool) -> Block:
    block = Block()
    block.attn = type("MultiHead", (MultiHead,), options)()
    return block


def check_only_own_calls_are_edited(
    model: nn.Module, other: nn.Module, ids: Tensor, attend: Callable[[], Tensor]
) -> None:
    """While a module with an edit runs, the calls of others are as they were: of a hook, another thread, another model.

    Args:
        other: A model with the same numbers.
        attend: Calls the function by which the modules attend, always on the same numbers.
    """
    wanted, plain, found = attend(), model(ids)[0], []

    def elsewhere(value: Tensor, at: mc.At) -> Tensor:
        thread = threading.Thread(target=lambda: found.append(attend()))
        thread.start()
        thread.join()
        found.append(attend())
        assert torch.equal(other(ids)[0], plain)
        return value * 2

    with mc.hook(model, "attn_heads", elsewhere, layers=[1]):
        assert not torch.equal(model(ids)[0], plain)
    assert len(found) == 2
    assert all(torch.equal(one, wanted) for one in found)
    assert torch.equal(model(ids)[0], plain)
