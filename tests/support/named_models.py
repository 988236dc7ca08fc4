"""Small decoders whose attention calls a function of a package by name, as the code of many chat VLMs does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers.modeling_flash_attention_utils import _flash_attention_forward

from . import flash_stand_ins, flex_stand_in, xformers_stand_in
from .flash_stand_ins import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    fourth_flash_attn_func,
)
from .flash_stand_ins import flash_attn_varlen_func as flash_attn_unpadded_func
from .plain_models import WIDTH, Block, NanoGPT
from .xformers_stand_in import (
    BlockDiagonalCausalMask,
    LowerTriangularFromBottomRightMask,
    LowerTriangularMask,
    memory_efficient_attention,
)

HEADS, GROUPS, DIM, LONGEST = 4, 2, 8, 16


def put_packages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Let the stand-ins be packages. Returns flash-attn's."""
    package = ModuleType("flash_attn")
    package.__spec__ = ModuleSpec("flash_attn", None)
    for name in (name for name in vars(flash_stand_ins) if name.startswith("flash_attn_")):
        setattr(package, name, getattr(flash_stand_ins, name))
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    fourth = ModuleType("flash_attn.cute")
    fourth.flash_attn_func = fourth_flash_attn_func  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "flash_attn.cute", fourth)
    monkeypatch.setitem(sys.modules, "xformers.ops", xformers_stand_in)
    flash_stand_ins.install(monkeypatch)
    for place in ("torch.nn.attention.flex_attention", __name__):
        monkeypatch.setattr(f"{place}.flex_attention", flex_stand_in.flex_attention)
    return package


def rotated(x: Tensor, start: int) -> Tensor:
    """RoPE of x [b t h d]."""
    angles = (torch.arange(x.shape[1], dtype=x.dtype) + start)[:, None] * 10.0 ** -torch.arange(x.shape[3] // 2)
    cos, sin = (f(angles).to(x.dtype)[:, None] for f in (torch.cos, torch.sin))
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Flash(nn.Module):
    """Grouped heads with RoPE. The cache holds keys and values [b g s d]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, (HEADS + 2 * GROUPS) * DIM), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, past: Any) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (-1, DIM)).split((HEADS, GROUPS, GROUPS), 2)
        old = past.pop(0) if past is not None else None
        start = 0 if old is None else old[0].shape[2]
        q, k = rotated(q, start), rotated(k, start)
        if old is not None:
            k, v, kept = self.extended(k, v, old)
            past.append(kept)
        return self.out(self.attend(q, k, v, old).flatten(2))

    def extended(self, k: Tensor, v: Tensor, old: Any) -> Any:
        k, v = (torch.cat([before.transpose(1, 2), now], 1) for before, now in zip(old, (k, v), strict=True))
        return k, v, (k.transpose(1, 2), v.transpose(1, 2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, old: Any) -> Tensor:
        return flash_attn_func(q, k, v, 0.0, softmax_scale=0.3, causal=True)


class Capped(Flash):
    """A window of four keys and a softcap, and it asks for the LSE itself."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, old: Any) -> Tensor:
        out, lse, _ = flash_attn_func(q, k, v, causal=True, window_size=(3, 0), softcap=2.0, return_attn_probs=True)
        assert lse.shape == (len(q), HEADS, q.shape[1])
        return out


class Packed(Flash):
    """All samples in one row, without a cache."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, old: Any) -> Tensor:
        t = q.shape[1]
        starts = torch.arange(len(q) + 1, dtype=torch.int32) * t
        rows = (x.flatten(0, 1) for x in (q, k, v))
        return flash_attn_unpadded_func(*rows, starts, starts, t, t, causal=True).unflatten(0, (-1, t))


class Together(Flash):
    """Keys and values in one tensor; without a cache, the queries too."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, old: Any) -> Tensor:
        if old is not None:
            return flash_attn_kvpacked_func(q, torch.stack([k, v], 2), softmax_scale=0.3, causal=True)
        k, v = (x.repeat_interleave(HEADS // GROUPS, 2) for x in (k, v))
        return flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), 0.0, 0.3, causal=True)


class PackedTogether(Flash):
    """All samples in one row, without a cache: keys and values in one tensor, or the queries too."""

    has_queries = False

    def attend(self, q: Tensor, k: Tensor, v: Tensor, old: Any) -> Tensor:
        t = q.shape[1]
        starts = torch.arange(len(q) + 1, dtype=torch.int32) * t
        if self.has_queries:
            k, v = (x.repeat_interleave(HEADS // GROUPS, 2) for x in (k, v))
            qkv = torch.stack([q, k, v], 2).flatten(0, 1)
            return flash_attn_varlen_qkvpacked_func(qkv, starts, t, causal=True).unflatten(0, (-1, t))
        kv = torch.stack([k, v], 2).flatten(0, 1)
        out = flash_attn_varlen_kvpacked_func(q.flatten(0, 1), kv, starts, starts, t, t, causal=True)
        return out.unflatten(0, (-1, t))


class PackedWhole(PackedTogether):
    has_queries = True


class Fourth(Flash):
    """It returns a tuple in any case."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, old: Any) -> Tensor:
        return self.called(q, k, v)

    def called(self, *args: Any, **more: Any) -> Tensor:
        out, lse = fourth_flash_attn_func(*args, None, None, 0.3, True, **more)
        assert lse is None or lse.shape == (len(out), HEADS, out.shape[1])
        return out


class FourthWithSinks(Fourth):
    """And a window of four keys."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, old: Any) -> Tensor:
        return self.called(q, k, v, window_size=(3, None), learnable_sink=self.sinks)


class Transformers(Flash):
    """transformers' own function, with a window of four keys. It gets a mask of padding, or none."""

    padding: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, old: Any) -> Tensor:
        more = {"softmax_scale": 0.3, "sliding_window": 4, "softcap": 2.0, "attn_implementation": "flash_attention_2"}
        return _flash_attention_forward(q, k, v, self.padding, q.shape[1], is_causal=True, **more)


class Xformers(Flash):
    """The upper left corner of a mask is where the first key is; with a cache it is the lower right one."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, old: Any) -> Tensor:
        k, v = (x.repeat_interleave(HEADS // GROUPS, 2) for x in (k, v))
        mask = LowerTriangularMask() if q.shape[1] == k.shape[1] else LowerTriangularFromBottomRightMask()
        return memory_efficient_attention(q, k, v, attn_bias=mask)


class Blocks(Flash):
    """All samples in one row, without a cache."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, old: Any) -> Tensor:
        b, t = q.shape[:2]
        k, v = (x.repeat_interleave(HEADS // GROUPS, 2) for x in (k, v))
        rows = (x.flatten(0, 1)[None] for x in (q, k, v))
        return memory_efficient_attention(*rows, BlockDiagonalCausalMask([t] * b), 0.0, 0.3)[0].unflatten(0, (b, t))


class Flex(Flash):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, old: Any) -> Tensor:
        t, s = q.shape[1], k.shape[1]
        mask = create_block_mask(lambda b, h, i, j: i + s - t >= j, None, None, t, s, device="cpu")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flex_attention(q, k, v, nearer, mask, enable_gqa=True).transpose(1, 2)


def nearer(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """A bias that grows with the key, and differs between heads."""
    return score + 0.1 * (h + 1) * j


class Kept(Flash):
    """It decodes with a cache in which the function itself puts the new keys: how many it has, and [b s g d]."""

    def extended(self, k: Tensor, v: Tensor, old: Any) -> Any:
        return k, v, (torch.empty(1, 1, old[0].shape[2] + k.shape[1]), *old[1:])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, old: Any) -> Tensor:
        if old is None:
            return super().attend(q, k, v, old)
        held = torch.full((len(q),), old[0].shape[2], dtype=torch.int32)
        return flash_attn_with_kvcache(q, *old[1:], k, v, cache_seqlens=held, softmax_scale=0.3, causal=True)


STYLES: dict[str, type[Flash]] = {"flash": Flash, "capped": Capped, "packed": Packed, "kept": Kept}
STYLES |= {"together": Together, "packed-together": PackedTogether, "packed-whole": PackedWhole}
STYLES |= {"fourth": Fourth, "fourth-sinks": FourthWithSinks}
STYLES |= {"transformers": Transformers, "xformers": Xformers, "blocks": Blocks, "flex": Flex}
PACKED = ("packed", "blocks", "packed-together", "packed-whole")


def made(style: str | type[nn.Module]) -> Any:
    kind = STYLES[style] if isinstance(style, str) else style

    def block() -> Block:
        found = Block()
        found.attn = kind()
        return found

    torch.manual_seed(0)
    return NanoGPT(block).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]


def calling(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Any:
    """A decoder whose attention is `attend`, of [b t h d]."""
    return made(type("Own", (Flash,), {"attend": lambda self, q, k, v, old: attend(q, k, v)}))


def usual(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
    return flash_attn_func(q, k, v, causal=True, **more)


def empty_cache(model: nn.Module, b: int) -> list[Any]:
    like = next(model.parameters())
    if any(isinstance(m, Kept) for m in model.modules()):
        # What is not written yet is no number.
        shape = (b, LONGEST, GROUPS, DIM)
        return [
            (torch.empty(1, 1, 0), *(torch.full(shape, torch.nan, dtype=like.dtype) for _ in range(2)))
            for _ in range(3)
        ]
    return [tuple(torch.empty(b, GROUPS, 0, DIM, dtype=like.dtype) for _ in range(2)) for _ in range(3)]


def decode(model: nn.Module, prompt: Any, new: Tensor) -> Tensor:
    """Decoding with a cache, for the conformance kit."""
    past = empty_cache(model, len(new))
    steps = [prompt["idx"], *new.split(1, dim=1)]
    return torch.stack([model(step, past=past)[0][:, -1] for step in steps], dim=1)
