"""The LSE of attention over keys in pages, in C++ and in plain torch, against a loop over requests in fp64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mimic_core.ops import native
from mimic_core.vllm import paged

# Tokens of each request in the step, and all keys that it has by then: some decode, some are in their prompt.
COUNTS, LENGTHS = (1, 5, 1, 33, 1), (200, 7, 1, 90, 130)


def oracle(query: Tensor, cache: Tensor, table: Tensor, window: int, scale: float, softcap: float = 0) -> Tensor:
    """vLLM's CPU keeps the keys of a page as [d size] in front of its values."""
    found, at = [], 0
    _, g, size, both = cache.shape
    for count, length, pages in zip(COUNTS, LENGTHS, table, strict=True):
        used = cache[pages[: -(-length // size)].long()].double()
        keys = used.reshape(len(used), g, 2 * size * both // 2)[..., : size * both // 2]
        keys = keys.view(len(used), g, both // 2, size).permute(1, 0, 3, 2).reshape(g, -1, both // 2)
        for token in range(count):
            last = length - count + token
            seen = keys[:, max(0, last - window + 1) if window else 0 : last + 1]
            of_heads = seen.repeat_interleave(query.shape[1] // g, 0)
            logits = (of_heads @ query[at].double()[..., None])[..., 0] * scale
            found.append((softcap * (logits / softcap).tanh() if softcap else logits).logsumexp(-1))
            at += 1
    return torch.stack(found)


def call(g: int, h: int, d: int, size: int, window: int, dtype: torch.dtype, **more: Any) -> tuple[Any, ...]:
    """Query, cache, what vLLM says of a layer, and of the step."""
    query = (3 * torch.randn(sum(COUNTS), h + g, d)).to(dtype)[:, :h]
    cache = torch.randn(30, g, size, 2 * d).to(dtype)
    meta = SimpleNamespace(
        causal=True,
        dynamic_causal=None,
        block_table=torch.stack([torch.randperm(30) for _ in COUNTS]).int(),
        query_start_loc=torch.tensor([0, *COUNTS]).cumsum(0).int(),
        seq_lens=torch.tensor(LENGTHS).int(),
    )
    of_layer = {"scale": d**-0.5, "sliding_window": window or -1, "logits_soft_cap": 0, "sinks": None}
    return query, cache, SimpleNamespace(**{**of_layer, **more}), meta


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_softcaps_and_sinks_are_in_the_lse(window: int, softcap: float) -> None:
    """The ops in C++ don't know them, so they are not asked."""
    sinks = torch.randn(6) if window else None
    query, cache, impl, meta = call(2, 6, 64, 32, window, torch.float32, logits_soft_cap=softcap, sinks=sinks)
    wanted = oracle(query, cache, meta.block_table, window, impl.scale, softcap)
    if sinks is not None:
        wanted = torch.cat([wanted[..., None], sinks.double().expand_as(wanted)[..., None]], -1).logsumexp(-1)
    torch.testing.assert_close(paged.lse(impl, query, cache, meta).double(), wanted, rtol=0, atol=2e-5)
    if softcap or window:
        attention = paged.Attention(impl, query, cache, meta)
        strengths = torch.ones(len(query))
        assert not attention.gated_shift(query.clone(), [torch.zeros(1, 6, 64)] * 3, strengths.long() * 0, strengths)


@pytest.mark.parametrize("backend", ["native", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("g", "h", "d", "size", "window"), [(3, 9, 64, 32, 0), (1, 6, 80, 16, 5), (4, 4, 128, 64, 40)])
def test_lse_of_paged_keys(backend: str, dtype: torch.dtype, g: int, h: int, d: int, size: int, window: int) -> None:
    query, cache, impl, meta = call(g, h, d, size, window, dtype)
    table, starts, lengths = meta.block_table, meta.query_start_loc, meta.seq_lens
    if backend == "native":
        direct = native.ops_for(query).paged_lse(query, paged.keys_of(cache), table, starts, lengths, d**-0.5, window)
        assert direct is not None, "the C++ form takes this call"
    found = paged.lse(impl, query, cache, meta)
    wanted = oracle(query, cache, table, window, d**-0.5)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-5)

    out = torch.randn(len(query), h, d).to(dtype)
    parameters = torch.randn(3, h, d), torch.randn(3, h, d) / d, wanted.float().mean(0).expand(3, h).contiguous()
    rows = torch.arange(len(query)) % 3
    strengths = torch.tensor([1.0, 0.0, 0.5, -2.0, 1.0]).repeat_interleave(torch.tensor(COUNTS))
    strengths[7:25] = 0  # the stack of a request acts at some of its tokens alone
    vector, weight, bias = (x[rows].double() for x in parameters)
    mu = ((query.double() * weight).sum(-1) + bias - wanted).sigmoid() * strengths[:, None]
    shifted = out.double() + mu[..., None] * vector
    if paged.Attention(impl, query, cache, meta).gated_shift(out, parameters, rows, strengths):
        torch.testing.assert_close(out.double(), shifted, rtol=0, atol=2e-5 if dtype == torch.float32 else 4e-2)
    else:
        assert backend == "plain"
