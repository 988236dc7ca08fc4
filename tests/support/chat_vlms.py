"""Small vision-language models that attend in the styles of code that models bring with them (`trust_remote_code`)."""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from . import flash_stand_ins

WIDTH, HEADS, GROUPS, DIM = 32, 4, 2, 8

# As in such code: the names are there if the package is.
flash_attn_func: Any = None
flash_attn_varlen_func: Any = None


def import_flash_attn(there: bool) -> None:
    """What their `try: from flash_attn import ...` does."""
    globals()["flash_attn_func"] = flash_stand_ins.flash_attn_func if there else None
    globals()["flash_attn_varlen_func"] = flash_stand_ins.flash_attn_varlen_func if there else None


class OwnCache:
    """Keys and values [b h s d] of each layer."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return self.kept[0][0].shape[2] if self.kept else 0

    def joined(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        old = self.kept.get(layer, (k[:, :, :0], v[:, :, :0]))
        self.kept[layer] = k, v = torch.cat([old[0], k], 2), torch.cat([old[1], v], 2)
        return k, v


class ChatConfig(PreTrainedConfig):
    model_type = "chat_vlm_of_the_tests"

    def __init__(self, style: str = "internlm2", depth: int = 2, vocab_size: int = 61, **rest: Any) -> None:
        self.style, self.depth, self.vocab_size = style, depth, vocab_size
        super().__init__(**rest)


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """RoPE of x [b h t d]."""
    angles = positions[:, None, :, None] * 10.0 ** -torch.arange(x.shape[3] // 2)
    cos, sin = (f(angles).to(x.dtype) for f in (torch.cos, torch.sin))
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def allowed(mask: Tensor, t: int) -> Tensor:
    """[b 1 t s]: causal, and without padding. A token of padding attends to itself."""
    s = mask.shape[1]
    causal = torch.ones(t, s, dtype=torch.bool).tril(s - t)
    return (causal & mask[:, None].bool())[:, None] | torch.eye(t, s, dtype=torch.bool).roll(s - t, 1)


class OwnAttention(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.dense = nn.Linear(WIDTH, WIDTH, bias=False)

    def kept(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cache: OwnCache | None) -> Any:
        q, k = rotated(q, positions), rotated(k, positions)
        return q, *((k, v) if cache is None else cache.joined(self.index, k, v))


class InternLM2FlashAttention2(OwnAttention):
    """InternVL-Chat, MiniCPM-V: one projection, [groups, heads and key and value, d]; padding is taken out of rows."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.wqkv = nn.Linear(WIDTH, (HEADS + 2 * GROUPS) * DIM, bias=False)

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor, image: Tensor, cache: OwnCache | None) -> Tensor:
        qkv = rearrange(self.wqkv(x), "b t (g n d) -> b t g n d", n=2 + HEADS // GROUPS, d=DIM)
        q = rearrange(qkv[..., :-2, :], "b t g n d -> b (g n) t d")
        k, v = (rearrange(qkv[..., i, :], "b t g d -> b g t d") for i in (-2, -1))
        q, k, v = (y.transpose(1, 2) for y in self.kept(q, k, v, positions, cache))
        out = self._flash_attention_forward(q, k, v, mask if 0 in mask else None)
        return self.dense(out.flatten(2))

    def _flash_attention_forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return flash_attn_func(q, k, v, 0.0, softmax_scale=None, causal=True)
        real_k = mask.bool()
        real_q = real_k[:, -q.shape[1] :]
        starts_q, starts_k = (F.pad(real.sum(1).cumsum(0), (1, 0)).int() for real in (real_q, real_k))
        longest_q, longest_k = int(real_q.sum(1).max()), int(real_k.sum(1).max())
        out = flash_attn_varlen_func(
            q[real_q], k[real_k], v[real_k], cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, max_seqlen_q=longest_q,
            max_seqlen_k=longest_k, dropout_p=0.0, softmax_scale=None, causal=True,
        )  # fmt: skip
        return torch.zeros_like(q).index_put((real_q,), out)


class QWenAttention(OwnAttention):
    """Qwen-VL-Chat: query, key and value one after another; flash-attn if there is one, or else products."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor, image: Tensor, cache: OwnCache | None) -> Tensor:
        q, k, v = (y.unflatten(2, (HEADS, DIM)).transpose(1, 2) for y in self.c_attn(x).split(WIDTH, 2))
        q, k, v = self.kept(q, k, v, positions, cache)
        if flash_attn_func is not None and 0 not in mask:
            out = flash_attn_func(*(y.transpose(1, 2) for y in (q, k, v)), causal=True)
            return self.dense(out.flatten(2))
        return self.dense(self._attn(q, k, v, allowed(mask, q.shape[2])).transpose(1, 2).flatten(2))

    def _attn(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        weights = torch.matmul(q, k.transpose(-1, -2)) / v.size(-1) ** 0.5
        weights = torch.where(mask, weights, torch.full([], torch.finfo(weights.dtype).min, dtype=weights.dtype))
        return torch.matmul(F.softmax(weights.float(), dim=-1).to(weights.dtype), v)


class VisionExpertAttention(OwnAttention):
    """CogVLM: other projections for tokens of the image than for words; attention is a function of the file."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.vision_expert_query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.language_expert_query_key_value = nn.Linear(WIDTH, 3 * WIDTH, bias=False)

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor, image: Tensor, cache: OwnCache | None) -> Tensor:
        mixed = x.new_empty(*x.shape[:2], 3 * WIDTH)
        mixed[image] = self.vision_expert_query_key_value(x[image])
        mixed[~image] = self.language_expert_query_key_value(x[~image])
        q, k, v = (y.unflatten(2, (HEADS, DIM)).transpose(1, 2) for y in mixed.split(WIDTH, 2))
        q, k, v = self.kept(q, k, v, positions, cache)
        return self.dense(attention_fn(q, k, v, allowed(mask, q.shape[2])).transpose(1, 2).flatten(2))


def attention_fn(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    is_low_triangle = torch.equal(mask, torch.ones_like(mask).tril())
    if is_low_triangle or bool(mask.all()):
        return F.scaled_dot_product_attention(query, key, value, dropout_p=0.0, is_causal=not bool(mask.all()))
    return F.scaled_dot_product_attention(query, key, value, mask)


class InterleavedAttention(OwnAttention):
    """[h, 3, d] as in GPT-NeoX and Falcon, and samples and heads on one axis, as in BLOOM and ChatGLM."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm_factor = math.sqrt(DIM)

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor, image: Tensor, cache: OwnCache | None) -> Tensor:
        b, t = x.shape[:2]
        fused = self.query_key_value(x).view(b, t, HEADS, 3 * DIM)
        q, k, v = self.kept(*(y.transpose(1, 2) for y in fused.chunk(3, -1)), positions, cache)
        s = k.shape[2]
        scores = torch.baddbmm(
            torch.zeros(b * HEADS, t, s, dtype=q.dtype),
            q.reshape(b * HEADS, t, DIM),
            k.reshape(b * HEADS, s, DIM).transpose(1, 2),
            beta=0.0,
            alpha=1.0 / self.norm_factor,
        )
        scores = scores.view(b, HEADS, t, s).masked_fill(~allowed(mask, t), -1e4)
        out = torch.bmm(torch.softmax(scores, dim=-1).view(b * HEADS, t, s), v.reshape(b * HEADS, s, DIM))
        return self.dense(out.view(b, HEADS, t, DIM).permute(0, 2, 1, 3).reshape(b, t, WIDTH))


STYLES: dict[str, type[OwnAttention]] = {
    "internlm2": InternLM2FlashAttention2,
    "qwen": QWenAttention,
    "cogvlm": VisionExpertAttention,
    "interleaved": InterleavedAttention,
}


class Block(nn.Module):
    def __init__(self, style: str, index: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = STYLES[style](index)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        x = x + self.attention(self.ln_1(x), *rest)
        return x + self.feed_forward(self.ln_2(x))


class ChatVLM(PreTrainedModel):
    """The image goes first. The cache says how many tokens it holds, and it is no cache of transformers."""

    config_class = ChatConfig

    def __init__(self, config: ChatConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, WIDTH)
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.layers = nn.ModuleList([Block(config.style, i) for i in range(config.depth)])
        self.head = nn.Linear(WIDTH, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
            nn.init.normal_(module.weight, std=0.3)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, pixel_values: Tensor | None = None,
        cache: OwnCache | None = None,
    ) -> CausalLMOutput:  # fmt: skip
        x = self.words(input_ids)
        image = 0
        if pixel_values is not None:
            patches = self.patches(pixel_values).flatten(2).transpose(1, 2)
            image, x = patches.shape[1], torch.cat([patches, x], 1)
        held, (b, t, _) = 0 if cache is None else len(cache), x.shape
        mask = torch.ones(b, held + t, dtype=torch.long)
        if attention_mask is not None:
            mask[:, -attention_mask.shape[1] :] = attention_mask
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -t:]
        of_image = (torch.arange(t) < image).expand(b, t)
        for layer in self.layers:
            x = layer(x, mask, positions, of_image, cache)
        return CausalLMOutput(logits=self.head(x)[:, image:])


def made(style: str) -> ChatVLM:
    torch.manual_seed(0)
    return ChatVLM(ChatConfig(style)).eval().requires_grad_(False)


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 61, (2, 7), generator=generator)
    image = torch.randn(2, 3, 16, 16, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": image}


def decode(model: nn.Module, prompt: Any, new: Tensor) -> Tensor:
    """Decoding with the cache, for the conformance kit."""
    cache, mask = OwnCache(), prompt.get("attention_mask")
    logits = [model(**prompt, cache=cache).logits[:, -1]]
    for step in new.split(1, dim=1):
        mask = None if mask is None else F.pad(mask, (0, 1), value=1)
        logits.append(model(step, attention_mask=mask, cache=cache).logits[:, -1])
    return torch.stack(logits, dim=1)
