"""Where a prompt ends: caches, masks, packed rows and arguments of every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import mimic_core as mc
from tests.support.cases import BY_NAME, logits_of, model_of, random_shifts

LLAMA = BY_NAME["llama"]


def end_of(
    run: Callable[[mc.Handle], object], model: nn.Module, positions: Any = "prompt_end"
) -> list[list[list[int]]]:
    """The tokens at which an edit acts, forward by forward: indices by sample."""
    seen = []

    def read(value: Tensor, at: mc.At) -> None:
        seen.append([row.nonzero()[:, 0].tolist() for row in at.positions(positions)])

    with mc.hook(model, "layer_out", read, layers=[1]) as handle:
        run(handle)
    return seen


def test_prompts_that_the_caller_runs_in_parts() -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs("left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]

    def run(handle: mc.Handle) -> None:
        cache = DynamicCache(config=model.config)
        for part in (slice(0, 4), slice(4, 10), slice(10, 11)):
            model(ids[:, part], attention_mask=mask[:, : part.stop], past_key_values=cache)
        longer = torch.cat([mask, mask[:, :1] * 0 + 1], dim=1)
        model(ids[:, :1], attention_mask=longer, past_key_values=cache)

    def told(handle: mc.Handle) -> None:
        with handle.at(prompt=mask.bool()):
            run(handle)

    assert end_of(told, model) == [[[], []], [[], []], [[0], [0]], [[], []]]
    assert end_of(told, model, "generated") == [[[], []], [[], []], [[], []], [[0], [0]]]
    assert end_of(told, model, ("first", 2)) == [[[0, 1], [3]], [[], [0]], [[], []], [[], []]]
    with pytest.raises(mc.PatchStateError, match=r"continues a cache with 4 tokens.*handle\.at\(prompt=mask\)"):
        end_of(run, model)


def test_a_token_at_a_time_is_refused() -> None:
    """Neither of the two that could be meant: a prompt in parts, or decoding."""
    model, ids = model_of(LLAMA), LLAMA.sample(0)["input_ids"]
    for first in (1, 10):
        cache = DynamicCache(config=model.config)

        def run(handle: mc.Handle, cache: DynamicCache = cache, first: int = first) -> None:
            model(ids[:, :first], past_key_values=cache)
            model(ids[:, first : first + 1], past_key_values=cache)

        with pytest.raises(mc.PatchStateError, match="outside model.generate"):
            end_of(run, model)


@pytest.mark.parametrize("kind", ["early", "reset", "new"])
def test_a_static_cache(kind: str) -> None:
    model, ids = model_of(LLAMA), LLAMA.sample(0)["input_ids"]
    cache = StaticCache(config=model.config, max_cache_len=32)
    if kind == "early":
        cache.early_initialization(1, 2, 24, torch.float32, torch.device("cpu"))
    if kind == "reset":
        model(ids, past_key_values=cache)
        cache.reset()
    assert end_of(lambda handle: model(ids, past_key_values=cache), model) == [[[10]]]
    cache.reset()
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    ran = end_of(lambda handle: model.generate(ids, past_key_values=cache, **options), model)
    assert ran == [[[10]], [[]], [[]]]


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -1e9, -1e4, -torch.inf, False])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_mask_of_four_axes(padding: str, lowest: Any) -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs(padding)
    real = inputs.pop("attention_mask").bool()
    allowed = real[:, None, None, :] & real[:, None, :, None] & torch.ones(11, 11).tril().bool()
    mask = allowed if lowest is False else torch.zeros(2, 1, 11, 11).masked_fill(~allowed, lowest)
    ends = [[10], [7 if padding == "right" else 10]]
    assert end_of(lambda handle: model(**inputs, attention_mask=mask, use_cache=False), model) == [ends]
    if lowest == -1e4:
        with pytest.raises(mc.ShapeError, match="may be padding or a bias"):
            end_of(lambda handle: model(**inputs, attention_mask=mask / 25, use_cache=False), model)


def test_the_base_model_with_arguments_by_position() -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs("right")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for patched in (model, model.model):
        assert end_of(lambda handle: model.model(ids, mask), patched) == [[[10], [7]]]
        cache = DynamicCache(config=model.config)
        model.model(ids[:, :4], mask[:, :4], None, cache)
        with pytest.raises(mc.PatchStateError, match="continues a cache with 4 tokens"):
            end_of(lambda handle, cache=cache: model.model(ids[:, 4:], mask, None, cache), patched)


def test_generate_of_the_whole_model_with_a_patch_of_its_base() -> None:
    model, ids = model_of(LLAMA), LLAMA.sample(0)["input_ids"]
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "prefill_chunk_size": 4}
    assert end_of(lambda handle: model.generate(ids, **options), model.model) == [[[]], [[]], [[2]], [[]], [[]]]


def test_packed_rows() -> None:
    """Three samples in a row, as trainers pack them: each has a prompt, and equals the sample alone."""
    model = model_of(LLAMA, "eager")
    lengths = [4, 1, 6]
    ids = torch.randint(3, 120, (1, 11), generator=torch.Generator().manual_seed(8))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    wanted = [[[3, 4, 10]]]
    assert end_of(lambda handle: model(ids, position_ids=positions, use_cache=False), model) == wanted
    assert end_of(lambda handle: model(ids, position_ids=positions, use_cache=False), model, ("first", 2)) == [
        [[0, 1, 4, 5, 6]]
    ]
    shifts = random_shifts(model, "function-vector")
    with torch.no_grad(), mc.patch(model, shifts):
        packed = model(ids, position_ids=positions, use_cache=False).logits[0]
        begin = 0
        for n in lengths:
            alone = model(ids[:, begin : begin + n], use_cache=False).logits[0]
            torch.testing.assert_close(packed[begin : begin + n], alone, atol=3e-5, rtol=1e-4)
            begin += n


def test_padding_is_no_packed_sample() -> None:
    model = model_of(LLAMA)
    for padding in ("left", "right"):
        inputs = LLAMA.inputs(padding)
        for pad in (0, 1, 5):
            odd = inputs["position_ids"].masked_fill(inputs["attention_mask"] == 0, pad)
            found = end_of(lambda handle, x=inputs | {"position_ids": odd}: logits_of(model, x), model)
            assert found == [[[10], [10 if padding == "left" else 7]]]


@pytest.mark.newest  # transformers 5.1 runs the chunks of the whole prompt again
def test_a_prompt_that_begins_in_the_cache() -> None:
    model, ids = model_of(LLAMA), LLAMA.sample(0)["input_ids"]
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    for more in ({}, {"prefill_chunk_size": 3}):
        cache = DynamicCache(config=model.config)
        model(ids[:, :5], past_key_values=cache)
        ran = end_of(lambda handle, c=cache, m=more: model.generate(ids, past_key_values=c, **options, **m), model)
        assert ran == ([[[5]], [[]]] if not more else [[[]], [[2]], [[]]])
        cache = DynamicCache(config=model.config)
        model(ids[:, :5], past_key_values=cache)
        first = end_of(
            lambda handle, c=cache, m=more: model.generate(ids, past_key_values=c, **options, **m), model, ("first", 7)
        )
        assert next(row for step in first for row in step) == [0, 1]
