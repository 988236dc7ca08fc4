"""Stacks beside what else an engine does: LoRA, guessed tokens, other ways to choose tokens, models of transformers."""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false, reportOptionalSubscript=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import serving
from tests.support.serving import LENGTH, START, Ask, served

vllm = pytest.importorskip("vllm", reason="vLLM has an environment of its own")
from vllm.exceptions import VLLMValidationError  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402

import mimic_core as mc  # noqa: E402

ALL = ["mimic", "live", "layer", "out", "ia3", "end", "ends", "low-rank", "prompt", "generated"]


def test_lora_beside_a_stack(tmp_path: Path) -> None:
    """Each request has one of two adapters, and a stack or none."""
    options = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8, "max_num_batched_tokens": 48}
    with served(tmp_path, "llama", ALL, **options) as one:
        merged = [serving.lora_at(tmp_path / f"lora{i}", one.model, i) for i in range(2)]
        adapters = [LoRARequest(f"lora{i}", i + 1, str(tmp_path / f"lora{i}")) for i in range(2)]
        asks = [(Ask([*START, 110 + i % 3], name), i % 2) for i, name in enumerate([None, None, *ALL, *ALL[::-1]])]
        wanted = [one._replace(model=merged[i]).wanted(ask) for ask, i in asks]
        assert len({tuple(answer.tokens) for answer in wanted}) > len(asks) // 2
        prompts = [{"prompt_token_ids": ask.prompt} for ask, _ in asks]
        params = [serving.params(ask, LENGTH) for ask, _ in asks]
        for _ in range(2):  # the second time, blocks are in the cache
            found = one.llm.generate(prompts, params, lora_request=[adapters[i] for _, i in asks], use_tqdm=False)
            for output, answer, what in zip(found, wanted, asks, strict=True):
                serving.assert_same(serving.answer_of(output.outputs[0]), answer, what)
        for ask in (Ask([5, 6], "mimic"), Ask([5, 6])):
            with pytest.raises(VLLMValidationError, match="vLLM gives a request without LoRA that of another request"):
                serving.answers(one.llm, [ask], 1)


@pytest.mark.parametrize("method", ["ngram", pytest.param("draft_model", marks=pytest.mark.exhaustive)])
def test_tokens_that_were_guessed(method: str, tmp_path: Path) -> None:
    """Guesses are checked by the model with the stack, and those that are wrong are taken back."""
    guesses: dict[str, Any] = {"method": method, "num_speculative_tokens": 3}
    if method == "ngram":
        guesses |= {"prompt_lookup_max": 2, "prompt_lookup_min": 1}
    else:  # the same model without stacks: right for most tokens of requests without a stack
        guesses["model"] = str(tmp_path / "model")
    options = {"speculative_config": guesses, "max_num_batched_tokens": 48, "disable_log_stats": False}
    # A process of its own: once a process has guessed by n-grams, no other engine starts in it.
    with served(tmp_path, "llama", ALL, processes=True, **options) as one:
        asks = [Ask([*START, 110 + i], name) for i, name in enumerate([None, *ALL])]
        asks += [Ask(([5, 6, 7] * 20)[:41], ask.stack, 0.5) for ask in asks]
        one.check(asks)
        counts = {counter.name: getattr(counter, "value", 0) for counter in one.llm.get_metrics()}
    guessed, right = (counts[f"vllm:spec_decode_num_{what}_tokens"] for what in ("draft", "accepted"))
    assert right > 10
    assert guessed - right > 100, "many guesses were wrong"


def test_other_ways_to_choose_tokens(tmp_path: Path) -> None:
    """What comes after the logits gets those of the stack."""
    with served(tmp_path, "llama", ["mimic", "live"]) as one:
        prompt = torch.tensor([START[:20]])
        allowed = list(range(20, 60))
        in_transformers: list[dict[str, Any]] = [
            {},
            {"repetition_penalty": 1.5},
            {"prefix_allowed_tokens_fn": lambda *_: allowed},
        ]
        fixed = {"max_new_tokens": LENGTH, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        for name, stack in one.stacks.items():
            with mc.patch(one.model, stack):
                plain, punished, chosen = (
                    one.model.generate(prompt, **fixed, **more)[0, 20:].tolist() for more in in_transformers
                )
            stop = plain[LENGTH // 2]
            ways = [{"repetition_penalty": 1.5}, {"allowed_token_ids": allowed}, {"stop_token_ids": [stop]}]
            params = [serving.params(Ask([], name), LENGTH, **way) for way in ways]
            found = one.llm.generate([{"prompt_token_ids": START[:20]}] * 3, params, use_tqdm=False)
            assert [list(output.outputs[0].token_ids) for output in found] == [
                punished,
                chosen,
                plain[: plain.index(stop) + 1],
            ]
            assert len({tuple(tokens) for tokens in (plain, punished, chosen)}) == 3


OTHERS = ("gemma2", "gemma3", "granite", "mistral", "opt", "phi3", "qwen2", "qwen3")


@pytest.mark.parametrize("name", ["llama", *(pytest.param(x, marks=pytest.mark.exhaustive) for x in OTHERS)])
def test_models_of_transformers(name: str, tmp_path: Path) -> None:
    """vLLM runs transformers' own class, which it changes: so the engine has a process of its own."""
    stacks = ["mimic", "live", "layer", "out", "ia3", "ends"]
    options = {"model_impl": "transformers", "max_num_batched_tokens": 48}
    with served(tmp_path, name, stacks, processes=True, **options) as one:
        asks = [Ask([*START, 110 + i], stack) for i, stack in enumerate([None, *stacks])]
        asks += [Ask(ask.prompt[:9], ask.stack, 0.5) for ask in asks]
        one.check(asks)
        assert len({tuple(one.wanted(ask).tokens) for ask in asks}) > len(asks) // 2, "the stacks change answers"


def test_half_precision_is_as_near_with_a_stack_as_without(tmp_path: Path) -> None:
    """Whole answers: log probabilities of a prompt, against transformers in fp32 with the same weights."""
    with served(tmp_path, "llama", ["mimic", "live", "low-rank"], dtype="bfloat16") as one:
        model = one.model.bfloat16().float()
        prompts = [torch.randint(3, 128, (90,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(4)]
        apart = {}
        for name in (None, *one.stacks):
            asks = [Ask(prompt, name) for prompt in prompts]
            params = [serving.params(ask, 1, prompt_logprobs=0) for ask in asks]
            found = one.llm.generate([{"prompt_token_ids": x} for x in prompts], params, use_tqdm=False)
            rows = torch.tensor(prompts)
            if name is None:
                logits = model(rows).logits
            else:
                with mc.patch(model, one.stacks[name]):
                    logits = model(rows).logits
            wanted = logits.log_softmax(-1)[:, :-1].gather(2, rows[:, 1:, None])[..., 0]
            got = [
                [x[token].logprob for x, token in zip(out.prompt_logprobs[1:], out.prompt_token_ids[1:], strict=True)]
                for out in found
            ]
            apart[name] = float((torch.tensor(got) - wanted).abs().mean())
        print(apart)
        assert all(x < 1.5 * apart[None] for x in apart.values()), apart
