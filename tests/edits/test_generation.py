"""Every way transformers generates, shifted: it gives what the shifted model gives token by token without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import mimic_core as mc
from tests.support.cases import BY_NAME, Case, fresh_model, logits_of, model_of, random_shifts

FAMILIES = [BY_NAME[name] for name in ("idefics2", "llava", "llama", "mistral", "qwen2")]  # mistral's window is 5
TOKENS = 6
over_families = pytest.mark.parametrize("case", FAMILIES, ids=str)
over_heads = pytest.mark.parametrize("head", ["mimic", "live"])


def barred(case: Case) -> list[int]:
    """Neither padding nor an image may come out: read again, they would mean something else. Nor the end."""
    return [0, 2, *case.image_ids]


def token_by_token(model: nn.Module, case: Case, inputs: dict[str, Tensor]) -> Tensor:
    """Greedy decoding by full forwards: the new tokens."""
    new = inputs["input_ids"][:, :0]
    for _ in range(TOKENS):
        logits = logits_of(model, case.longer(inputs, new) if new.shape[1] else inputs)[:, -1].clone()
        logits[:, barred(case)] = -torch.inf
        new = torch.cat([new, logits.argmax(-1, keepdim=True)], dim=1)
    return new


def generate(model: nn.Module, case: Case, inputs: dict[str, Tensor], **options: Any) -> Any:
    given = {name: x for name, x in inputs.items() if name != "position_ids"}
    fixed = {"max_new_tokens": TOKENS, "do_sample": False, "suppress_tokens": barred(case)}
    return model.generate(**given, **fixed, **options)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@over_heads
@over_families
def test_caches(case: Case, head: str, cache: str) -> None:
    model, inputs = model_of(case), case.inputs("left")
    plain = token_by_token(model, case, inputs)
    with mc.patch(model, random_shifts(model, head)):
        wanted = token_by_token(model, case, inputs)
        found = generate(model, case, inputs, cache_implementation=cache)
    assert not torch.equal(wanted, plain), "the shift has to matter"
    assert torch.equal(found[:, -TOKENS:], wanted)


@over_heads
@over_families
def test_beam_search(case: Case, head: str) -> None:
    """The score of each sequence is the log-probability full forwards give it."""
    model, inputs = model_of(case), case.inputs("left")
    kept = {"return_dict_in_generate": True, "output_scores": True, "length_penalty": 0.0}
    with mc.patch(model, random_shifts(model, head)):
        out = generate(model, case, inputs, num_beams=3, **kept)
        new = out.sequences[:, -TOKENS:]
        logits = logits_of(model, case.longer(inputs, new))[:, -TOKENS - 1 : -1]
    wanted = logits.log_softmax(-1).gather(2, new[..., None]).squeeze(2).sum(1)
    torch.testing.assert_close(out.sequences_scores, wanted, atol=1e-3, rtol=1e-4)


@over_heads
@over_families
def test_assisted_decoding(case: Case, head: str) -> None:
    """An unpatched assistant proposes, the shifted model decides."""
    model, assistant, inputs = fresh_model(case), fresh_model(case), case.sample(0)
    with torch.no_grad():
        for p in assistant.parameters():
            p.add_(0.02 * torch.randn_like(p))
    with mc.patch(model, random_shifts(model, head)):
        wanted = token_by_token(model, case, inputs)
        found = generate(model, case, inputs, assistant_model=assistant)
    assert torch.equal(found[:, -TOKENS:], wanted)


@pytest.mark.parametrize(
    ("case", "head"),
    [
        pytest.param(case, head, marks=() if i % 2 == j else pytest.mark.exhaustive)
        for i, case in enumerate(FAMILIES[2:])
        for j, head in enumerate(("mimic", "live"))
    ],
    ids=str,
)
def test_continuous_batching(case: Case, head: str) -> None:
    model = fresh_model(case)
    prompts = [[5, 6, 7, 8, 9], [10, 11, 12]]
    with mc.patch(model, random_shifts(model, head)):
        wanted = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            for _ in range(TOKENS):
                ids = torch.cat([ids, logits_of(model, {"input_ids": ids})[:, -1:].argmax(-1)], dim=1)
            wanted.append(ids[0, len(prompt) :].tolist())
        assert generate_batch(model, prompts) == wanted


def generate_batch(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    if not hasattr(transformers, "ContinuousBatchingConfig"):
        pytest.skip("this transformers has another attention for it, which is refused: see below")
    config = transformers.GenerationConfig(max_new_tokens=TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = transformers.ContinuousBatchingConfig(num_blocks=64, block_size=16, max_batch_tokens=64)
    given = {"generation_config": config, "continuous_batching_config": batching, "warmup": False}
    out = model.generate_batch(prompts, **given, **options)
    assert options or [*out] == [f"req_{i}" for i in range(len(prompts))]
    return [answer.generated_tokens for answer in out.values()]


def test_a_manager_that_stays_shares_no_keys_between_edits() -> None:
    """Equal prompts share blocks of keys and values, which the edits have changed."""
    model = fresh_model(BY_NAME["llama"])
    shifts, prompts = random_shifts(model, "mimic", scale=2.0), [[*range(3, 43)]]
    plain = generate_batch(model, prompts)
    with mc.patch(model, shifts):
        patched = generate_batch(model, prompts)
    assert patched != plain
    assert generate_batch(model, prompts, persistent_manager=True) == plain
    with mc.patch(model, shifts) as handle:
        assert generate_batch(model, prompts, persistent_manager=True) == patched
        with handle.using(strength=0.5), pytest.raises(mc.PatchStateError, match="a manager that stays"):
            generate_batch(model, prompts)
    assert generate_batch(model, prompts, persistent_manager=True) == plain
    model.destroy_cached_continuous_batching_manager()


def test_continuous_batching_with_a_stack_for_each_request() -> None:
    model = fresh_model(BY_NAME["llama"])
    stacks = {name: random_shifts(model, name, scale=2.0) for name in ("mimic", "live")}
    names = ["mimic", None, "live", "mimic", "live"]
    prompts = [[*range(3, 43)], [*range(3, 43)], [*range(3, 43)], [5, 6, 7], [5, 6, 7]]
    alone = {None: generate_batch(model, prompts)}
    for name, shifts in stacks.items():
        with mc.patch(model, shifts):
            alone[name] = generate_batch(model, prompts)
    with mc.patch(model, mc.StackSet(stacks)) as handle:
        with handle.using(names):
            assert generate_batch(model, prompts) == [alone[name][i] for i, name in enumerate(names)]
        with handle.using("live"):
            assert generate_batch(model, prompts) == alone["live"]
        with handle.using(names[:2]), pytest.raises(mc.ShapeError, match="got 2 samples, but `generate_batch` got 5"):
            generate_batch(model, prompts)
        with pytest.raises(mc.PatchStateError, match="it is not known which stack each sample gets"):
            generate_batch(model, prompts)
    with mc.patch(model, stacks["mimic"]) as handle:
        with handle.using(strength=[1.0, 0.0, 1.0, 1.0, 0.0]):
            wanted = [alone["mimic" if i in (0, 2, 3) else None][i] for i in range(5)]
            assert generate_batch(model, prompts) == wanted
        mask = torch.ones(1, 40, dtype=torch.bool)
        with handle.at(positions=mask), pytest.raises(mc.PatchStateError, match="can't follow `handle.at`"):
            generate_batch(model, prompts)


@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_paged_attention_is_refused_where_it_would_be_wrong(case: Case) -> None:
    """Its function updates the cache itself, so what it is handed are the new tokens."""
    model = fresh_model(case)
    model.set_attn_implementation("paged|eager")
    inputs = case.sample(0)
    with mc.patch(model, random_shifts(model, "mimic")):
        with pytest.raises(mc.UnsupportedModelError, match=r"attention implementation 'paged\|eager' are not known"):
            logits_of(model, inputs)
    for site in ("key", "value"):
        with mc.hook(model, site, lambda value, at: value):
            with pytest.raises(mc.UnsupportedModelError, match="gets only the keys and values of new tokens"):
                logits_of(model, inputs)
