"""Positions: which tokens an edit acts on, in every way in which a model is run."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

import mimic_core as mc
from mimic_core.positions import select
from mimic_core.types import At
from tests.support.cases import BY_NAME, fresh_model, model_of

LLAMA = BY_NAME["llama"]
POSITIONS = ["prompt", "prompt_end", "generated", ("first", 2), ("last", 3)]
over_positions = pytest.mark.parametrize("positions", POSITIONS, ids=str)
PROMPT = 9
NEW = 4


# What the words mean, by loops over single tokens.


def by_hand(positions: Any, prompt: list[bool], real: list[bool]) -> list[bool]:
    """One row."""
    where = [i for i, is_prompt in enumerate(prompt) if is_prompt]
    last = where[-1] if where else -1
    chosen = {
        "all": list(range(len(prompt))),
        "prompt": where,
        "prompt_end": where[-1:],
        "generated": [i for i in range(last + 1, len(prompt)) if real[i]],
        "first": where[: positions[1]] if isinstance(positions, tuple) else [],
        "last": where[-positions[1] :] if isinstance(positions, tuple) else [],
    }[positions if isinstance(positions, str) else positions[0]]
    return [i in chosen for i in range(len(prompt))]


@pytest.mark.parametrize("seed", range(20))
def test_the_words_token_by_token(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    b, s = 3, 12
    real = torch.rand(b, s, generator=generator) < 0.8
    prompt = real & (torch.rand(b, s, generator=generator) < 0.5)
    begins = torch.rand(b, s, generator=generator) < 0.2
    for positions in ["all", *POSITIONS, ("first", 1), ("last", 1), ("last", 50)]:
        found = select(positions, prompt, real, begins)
        for row in range(b):
            cuts = [0, *[i for i in range(1, s) if begins[row, i]], s]
            wanted = [
                x
                for i, j in itertools.pairwise(cuts)
                for x in by_hand(positions, prompt[row, i:j].tolist(), real[row, i:j].tolist())
            ]
            assert found[row].tolist() == wanted, positions


# Every way of running a model, against one forward over the whole text with the edit put there by hand.


def prompt_of(padding: str) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 120, (2, PROMPT), generator=torch.Generator().manual_seed(2))
    ids[:, 5:8] = ids[:, 2:5]  # repeated, so that a prompt lookup finds candidates
    mask = torch.ones_like(ids)
    if padding == "left":
        ids[1, :3], mask[1, :3] = 0, 0
    elif padding == "right":
        ids[1, -3:], mask[1, -3:] = 0, 0
    return ids, mask


def directions(model: nn.Module) -> Tensor:
    return torch.randn(model.config.get_text_config().hidden_size, generator=torch.Generator().manual_seed(4))


def edit_of(model: nn.Module) -> Callable[[Tensor, At], Tensor]:
    direction = directions(model)
    return lambda value, at: value + direction * (1 + at.layer)


def whole(model: nn.Module, ids: Tensor, mask: Tensor, chosen: Tensor) -> Tensor:
    """Logits of one forward over the whole text, with the edit at `chosen` [b s] by torch's own hooks."""
    direction, hooks = directions(model), []
    for i, layer in enumerate(model.model.layers):

        def add(module: nn.Module, args: Any, output: Any, i: int = i) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            states = states + chosen[..., None] * direction * (1 + i)
            return (states, *output[1:]) if isinstance(output, tuple) else states

        hooks.append(layer.register_forward_hook(add))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits


def chosen_by_hand(positions: Any, mask: Tensor, total: int) -> Tensor:
    rows = []
    for row in mask.bool().tolist():
        longer = total - len(row)
        rows.append(by_hand(positions, row + [False] * longer, row + [True] * longer))
    return torch.tensor(rows)


def check_generation(model: nn.Module, positions: Any, padding: str, rows: int = 1, **options: Any) -> None:
    ids, mask = prompt_of(padding)
    if options.pop("one_row", False):
        ids, mask = ids[1:], mask[1:]
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **options}
    generator_options = {"return_dict_in_generate": True, "output_logits": True, "suppress_tokens": [0, 2]}
    given = options.pop("inputs", None)
    with mc.hook(model, "layer_out", edit_of(model), positions=positions):
        inputs = {"input_ids": ids} if given is None else given(model, ids)
        out = model.generate(**inputs, attention_mask=mask, **options, **generator_options)
    text = out.sequences if "inputs_embeds" not in inputs else torch.cat([ids, out.sequences], dim=1)
    mask = mask.repeat_interleave(rows, dim=0)
    total = text.shape[1]
    longer = torch.cat([mask, torch.ones(len(mask), total - PROMPT, dtype=mask.dtype)], dim=1)
    logits = whole(model, text, longer, chosen_by_hand(positions, mask, total))
    if "num_beams" in options:
        scores = logits[:, PROMPT - 1 : -1].log_softmax(-1).gather(-1, text[:, PROMPT:, None])[..., 0]
        torch.testing.assert_close(scores.sum(1) / NEW, out.sequences_scores, atol=1e-4, rtol=1e-4)
    else:
        torch.testing.assert_close(logits[:, PROMPT - 1 : -1], torch.stack(out.logits, dim=1), atol=3e-5, rtol=1e-4)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 4},
    "chunks of one": {"prefill_chunk_size": 1},
    "chunks, static": {"prefill_chunk_size": 4, "cache_implementation": "static"},
    "lookup": {"prompt_lookup_num_tokens": 3, "one_row": True},
    "beams": {"num_beams": 3, "rows": 1, "output_scores": True},
    "sequences": {"num_beams": 4, "num_return_sequences": 2, "rows": 2, "output_scores": True},
    "embeds": {"inputs": lambda model, ids: {"inputs_embeds": model.get_input_embeddings()(ids)}},
}


# transformers 5.1 itself is wrong there: an index error, and logits 2.0 apart from those of the whole text, unpatched.
NEWEST_ONLY = ("chunks, static", "chunks and a window")


def ways(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.newest if name in NEWEST_ONLY else ()) for name in names]


@over_positions
@pytest.mark.parametrize("way", ways(*WAYS))
def test_generation_acts_where_it_is_asked(way: str, positions: Any) -> None:
    check_generation(model_of(LLAMA), positions, "left", **WAYS[way])


@over_positions
@pytest.mark.parametrize("way", ways("greedy", "static", "chunks and a window", "no cache"))
def test_generation_with_a_sliding_window(way: str, positions: Any) -> None:
    check_generation(model_of(BY_NAME["mistral"]), positions, "none", **WAYS[way.removesuffix(" and a window")])


@over_positions
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_virtual_tokens_of_peft(kind: str, positions: Any) -> None:
    """PEFT puts them into the cache or before the prompt. Only in the second case they are tokens of the decoder."""
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    torch.manual_seed(0)
    config = {"prefix": PrefixTuningConfig, "prompt": PromptTuningConfig}[kind]
    model = get_peft_model(fresh_model(LLAMA), config(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    ids, mask = prompt_of("left")
    seen: list[list[list[int]]] = []

    def read(value: Tensor, at: At) -> None:
        seen.append([row.nonzero()[:, 0].tolist() for row in at.positions(positions)])

    virtual = 4 if kind == "prompt" else 0
    row = torch.cat([torch.ones(2, virtual, dtype=mask.dtype), mask], dim=1)
    first = [row.nonzero()[:, 0].tolist() for row in chosen_by_hand(positions, row, row.shape[1])]
    with mc.hook(model, "layer_out", read, layers=[0]):
        if kind == "prefix" or positions == "generated":
            with pytest.raises(mc.PatchStateError, match=r"outside model\.generate"):
                model(input_ids=ids, attention_mask=mask)
        else:
            model(input_ids=ids, attention_mask=mask)
            assert seen.pop() == first
        if "cache" in inspect.signature(model.base_model.model.forward).parameters:
            return  # this transformers ignores the cache that this PEFT gives to generate, with a warning
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert seen == [first, [[0], [0]] if positions == "generated" else [[], []]]


@pytest.mark.newest
def test_continuous_batching_is_refused() -> None:
    """Its forward holds tokens of several requests, and only its scheduler knows which."""
    from transformers import ContinuousBatchingConfig

    model = fresh_model(LLAMA)
    few = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=16, max_memory_percent=0.01)
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=2, pad_token_id=0, use_cuda_graph=False)
    prompts = [[5, 6, 7, 8], [9, 10, 11]]
    options = {"generation_config": config, "continuous_batching_config": few}
    with mc.hook(model, "layer_out", edit_of(model), positions="prompt_end"):
        with pytest.raises(mc.PatchStateError, match="failed for 2 requests: .*not continuous batching"):
            model.generate_batch(prompts, **options)
    with mc.patch(fresh_model(LLAMA), mc.build_shifts(model, "live")):  # another model has edits: this one is as it is
        assert len(model.generate_batch(prompts, **options)) == 2
    assert all(len(x.generated_tokens) > 0 for x in model.generate_batch(prompts, **options).values())
