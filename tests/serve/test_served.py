"""Stacks in vLLM answer as the patched model of transformers does: tokens, and log probabilities up to rounding.

Run in an environment with vLLM: `python -m pytest -n 0 tests/serve`.
"""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false, reportOptionalSubscript=false

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

import mimic_core as mc
from tests.support import serving
from tests.support.serving import LENGTH, START, Ask, Served, served

vllm = pytest.importorskip("vllm", reason="vLLM has an environment of its own")
from vllm.exceptions import VLLMValidationError  # noqa: E402

import mimic_core.vllm as mv  # noqa: E402
from mimic_core.heads.base import _HEADS  # noqa: E402


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Prompts come in chunks of 48 tokens, and the cache is too small for all requests: some are preempted."""
    folder = tmp_path_factory.mktemp("llama")
    options = {"max_num_batched_tokens": 48, "max_num_seqs": 16, "num_gpu_blocks_override": 24}
    with served(folder, "llama", list(serving.STACKS), **options) as one:
        yield one


def asks_of(stacks: list[str]) -> list[Ask]:
    whole = [Ask([*START, 110 + i % 3], one) for i, one in enumerate([None, *stacks])]
    parts = [Ask([*START, 120], one, strength) for one, strength in zip(stacks, itertools.cycle([0.5, -1.0, 0.0, 2.0]))]
    return [*whole, *parts, Ask([5], "mimic"), Ask([7, 8, 9])]


def test_a_batch_mixes_stacks_strengths_and_none(llama: Served) -> None:
    asks = asks_of(list(serving.STACKS))
    llama.check(asks)
    assert len({tuple(llama.wanted(ask).tokens) for ask in asks}) > len(asks) // 2, "the stacks change answers"
    llama.check(asks[::-1])  # the blocks are in the cache now


def test_every_head(llama: Served, tmp_path: Path) -> None:
    stacks = {name: serving.stack_at(tmp_path / name, llama.model, name, i) for i, name in enumerate(serving.HEADS)}
    for name in stacks:
        mv.add(llama.llm, name, tmp_path / name)
    served = llama._replace(stacks={**llama.stacks, **stacks})
    asks = [Ask([*START, 110 + i % 3], one) for i, one in enumerate([None, *stacks, "mimic"])]
    asks += [Ask(ask.prompt[:9], ask.stack, 0.5) for ask in asks if ask.stack is not None]
    served.check(asks)
    for name in stacks:
        served.check([Ask([*START[:60], 120], name)])  # alone, at strength 1: no parameters are gathered
        mv.remove(llama.llm, name)
    plain = llama.wanted(asks[0]).tokens
    assert sum(served.wanted(ask).tokens != plain for ask in asks[1 : len(stacks)]) > len(stacks) // 2


def test_a_head_of_ones_own(llama: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is served as the library's own, if it says that it takes samples and reads nothing but its site."""

    class Gain(mc.ShiftHead):
        site = "mlp_out"
        needs_at = False
        takes_samples = True

        def __init__(self, config: mc.HeadConfig, layer: mc.LayerSpec) -> None:
            super().__init__(config, layer)
            self.gain = torch.nn.Parameter(torch.zeros(layer.hidden_size))

        def forward(self, value: torch.Tensor, at: mc.At | None) -> torch.Tensor:
            gain = self.own("gain")
            return value * (1 + (gain[:, None] if gain.ndim == 2 else gain))

    class Reader(Gain):
        needs_at = True

    monkeypatch.setattr(_HEADS, "_items", dict(_HEADS._items))
    mc.register_head("gain")(Gain)
    mc.register_head("reader")(Reader)
    stacks = {f"gain-{i}": serving.stack_at(tmp_path / f"gain-{i}", llama.model, "gain", i) for i in range(2)}
    for name in stacks:
        mv.add(llama.llm, name, tmp_path / name)
    one = llama._replace(stacks={**llama.stacks, **stacks})
    one.check([Ask([*START, 120], name, strength) for name in (*stacks, "mimic") for strength in (1.0, 0.5)])
    mc.save_shifts(mc.build_shifts(llama.model, "reader"), tmp_path / "reader")
    with pytest.raises(mc.CheckpointError, match="reads more than its site"):
        mv.add(llama.llm, "reader", tmp_path / "reader")
    for name in stacks:
        mv.remove(llama.llm, name)


def test_steps_of_the_same_size_with_other_stacks(llama: Served) -> None:
    """Each step has one token, and parameters that were gathered for a step are kept for the next one."""
    for stack in ("live", "alive", "live"):
        llama.check([Ask([5], stack, 0.5)])


def test_requests_are_cut_preempted_and_share_blocks(llama: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above and below are meant to go through does happen in this engine."""
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted, steps = [], []
    inner, schedule = Scheduler._preempt_request, Scheduler.schedule
    monkeypatch.setattr(Scheduler, "_preempt_request", lambda *x, **y: (preempted.append(1), inner(*x, **y))[1])
    monkeypatch.setattr(Scheduler, "schedule", lambda *x, **y: (steps.append(schedule(*x, **y)), steps[-1])[1])
    asks = asks_of(list(serving.STACKS))
    llama.llm.reset_prefix_cache()
    llama.check(asks)
    cut = [one for step in steps for one in step.num_scheduled_tokens.values() if 1 < one < len(START)]
    assert preempted
    assert cut
    assert max(len(step.num_scheduled_tokens) for step in steps) > 4


def one_by_one(llama: Served, asks: list[Ask]) -> list[bool]:
    """Whether each answer is right, of requests that find the blocks of those before them."""
    llama.llm.reset_prefix_cache()
    pairs = [(serving.answers(llama.llm, [ask], LENGTH)[0], llama.wanted(ask)) for ask in asks]
    return [found.tokens == wanted.tokens and found.apart(wanted) < 1e-4 for found, wanted in pairs]


def test_blocks_are_shared_by_the_same_stack_and_strength_only(llama: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    asks = [
        Ask([*START, 111], "mimic"),
        Ask([*START, 111]),
        Ask([*START, 111], "other"),
        Ask([*START, 111], "mimic", 0.5),
    ]
    assert all(one_by_one(llama, asks))
    monkeypatch.setattr("mimic_core.vllm.requests.salt", lambda _, given: given)
    assert one_by_one(llama, asks) == [True, False, False, False], "without the salt, blocks of another stack are used"


@pytest.mark.parametrize("stack", ["end", "ends"])
def test_blocks_know_where_a_prompt_ends(llama: Served, stack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block may hold the end of one prompt and the middle of another, with the same stack."""
    from vllm.v1.core import kv_cache_utils

    whole = [*START, 111]
    asks = [Ask(prompt, stack) for prompt in (whole[:64], whole, whole[:68], whole[:64])]
    assert all(one_by_one(llama, asks))
    hasher = kv_cache_utils.generate_block_hash_extra_keys
    monkeypatch.setattr(kv_cache_utils, "generate_block_hash_extra_keys", hasher.__wrapped__)
    assert not all(one_by_one(llama, asks))


def test_no_salt_of_a_client_reaches_blocks_of_a_stack(llama: Served) -> None:
    from mimic_core.vllm.requests import salt

    stacks = llama.llm.llm_engine.input_processor.mimic_core_stacks
    forged = salt((stacks["mimic"].digest, 1.0), None)
    first, second = Ask([*START, 112], "mimic"), Ask([*START, 112])
    llama.check([first])
    prompt = {"prompt_token_ids": second.prompt, "cache_salt": forged}
    (found,) = llama.llm.generate([prompt], serving.params(second, LENGTH), use_tqdm=False)
    serving.assert_same(serving.answer_of(found.outputs[0]), llama.wanted(second), "a forged salt")


@pytest.mark.parametrize("name", ["mimic", "ends"])
def test_several_answers_and_log_probabilities_of_the_prompt(llama: Served, name: str) -> None:
    ask = Ask([*START, 113], name)
    options = {"n": 3, "temperature": 1.0, "top_k": 1, "prompt_logprobs": 0}
    prompt = {"prompt_token_ids": ask.prompt}
    (found,) = llama.llm.generate([prompt], serving.params(ask, LENGTH, **options), use_tqdm=False)
    assert [list(one.token_ids) for one in found.outputs] == [llama.wanted(ask).tokens] * 3
    with mc.patch(llama.model, llama.stacks[name]):
        logprobs = llama.model(torch.tensor([ask.prompt])).logits[0].log_softmax(-1)
    for place, one in enumerate(found.prompt_logprobs[1:]):
        token = ask.prompt[place + 1]
        assert abs(one[token].logprob - float(logprobs[place, token])) < 1e-4


def test_a_prompt_ends_where_it_ended_before_a_preemption(llama: Served) -> None:
    """All are preempted after some tokens, and compute these again together with the prompt."""
    asks = [Ask([*START[:40], 112 + i], name) for i, name in enumerate(["end", "ends", None])]
    for i, ask in enumerate(asks):
        llama.llm.llm_engine.add_request(str(i), {"prompt_token_ids": ask.prompt}, serving.params(ask, LENGTH))
    for _ in range(8):
        llama.llm.llm_engine.step()
    assert llama.llm.reset_prefix_cache(reset_running_requests=True)
    for one in finish(llama.llm):
        ask = asks[int(one.request_id)]
        serving.assert_same(serving.answer_of(one.outputs[0]), llama.wanted(ask), ask)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"shifts": "vqa"}, "no stack is called 'vqa'; this engine serves 'mimic'"),
    ({"shifts": "/tmp/mimic"}, "no stack is called '/tmp/mimic'"),
    ({"shifts": 3}, "no stack is called 3"),
    ({"shifts": "mimic", "strength": "1"}, "a strength is a finite number; found '1'"),
    ({"shifts": "mimic", "strength": True}, "a strength is a finite number; found True"),
    ({"shifts": "mimic", "strength": float("nan")}, "a strength is a finite number; found nan"),
    ({"strength": 1.0}, "a strength is given without a stack"),
]


def test_a_wrong_request_is_refused_and_the_others_go_on(llama: Served) -> None:
    llm_engine = llama.llm.llm_engine
    ask = Ask([*START, 114], "live")
    options = serving.params(ask, LENGTH)
    prompt = {"prompt_token_ids": ask.prompt}
    llm_engine.add_request("good", prompt, options)
    llm_engine.step()
    for extra, message in WRONG:
        with pytest.raises(VLLMValidationError, match=re.escape(message)):
            llm_engine.add_request("bad", prompt, vllm.SamplingParams(extra_args=extra))
    process = llm_engine.input_processor.process_inputs
    process("parts", prompt, options, ("generate",), resumable=True)
    with pytest.raises(VLLMValidationError, match="comes in parts, and its stack needs to know its end"):
        process("parts", prompt, serving.params(Ask([], "end"), LENGTH), ("generate",), resumable=True)
    found = [one for one in finish(llama.llm) if one.request_id == "good"]
    serving.assert_same(serving.answer_of(found[0].outputs[0]), llama.wanted(ask), ask)


def finish(llm: Any) -> list[Any]:
    """Run what was asked to its end."""
    done = []
    while llm.llm_engine.has_unfinished_requests():
        done += [one for one in llm.llm_engine.step() if one.finished]
    return done


def test_stacks_come_and_go_while_the_engine_runs(llama: Served, tmp_path: Path) -> None:
    llm, ask = llama.llm, Ask([*START, 115], "new")
    stacks = [serving.stack_at(tmp_path / str(seed), llama.model, "mimic", 10 + seed) for seed in range(2)]
    with pytest.raises(VLLMValidationError, match="no stack is called 'new'"):
        serving.answers(llm, [ask], LENGTH)
    mv.add(llm, "new", tmp_path / "0")
    assert mv.names(llm) == [*serving.STACKS, "new"]
    old = llama._replace(stacks={"new": stacks[0]})
    old.check([ask])

    llm.llm_engine.add_request("old", {"prompt_token_ids": ask.prompt}, serving.params(ask, LENGTH))
    llm.llm_engine.step()
    mv.add(llm, "new", tmp_path / "1")
    llm.llm_engine.add_request("new", {"prompt_token_ids": ask.prompt}, serving.params(ask, LENGTH))
    mv.remove(llm, "new")
    found = {one.request_id: serving.answer_of(one.outputs[0]) for one in finish(llm)}
    serving.assert_same(found["old"], old.wanted(ask), "a request goes on with the stack that it began with")
    serving.assert_same(found["new"], llama._replace(stacks={"new": stacks[1]}).wanted(ask), "the stack was replaced")
    with pytest.raises(mc.UnknownNameError, match="no stack is called 'new'"):
        mv.remove(llm, "new")


def broken_stacks(folder: Path, model: PreTrainedModel) -> Iterator[tuple[Path, str]]:
    """Stacks that can't be served, and why."""
    larger = serving.model_at(folder / "larger", "llama", num_attention_heads=8)
    serving.stack_at(folder / "size", larger, "mimic")
    yield folder / "size", "do not fit this model: they were made for heads 8 in layer 0"
    stack = serving.stack_at(folder / "nan", model, "live")
    tensors = {**stack.state_dict(), "heads.0.vector": torch.full((64,), float("nan"))}
    save_file(tensors, folder / "nan" / "shifts.safetensors")
    yield folder / "nan", "heads.0.vector holds NaN"
    yield folder / "gone", "no shifts at"
    for name, config, why in [
        ("keys", mc.MimICConfig(log_z2="all_keys"), "masked keys are not there: pass log_z2='attended'"),
        ("ia3", mc.IA3Config(positions="prompt"), "edits key by another formula than IA3's, or not of all tokens"),
    ]:
        mc.save_shifts(mc.build_shifts(model, config), folder / name)
        yield folder / name, why
    mc.save_shifts(mc.build_shifts(model, ["virtual_kv", "mimic"]), folder / "turned")
    yield folder / "turned", "compose the same heads in different orders"


def test_a_stack_that_can_not_be_served_is_refused(llama: Served, tmp_path: Path) -> None:
    serving.stack_at(tmp_path / "gate-and-pairs", llama.model, "gate-and-pairs")
    mv.add(llama.llm, "gate-and-pairs", tmp_path / "gate-and-pairs")
    mv.remove(llama.llm, "gate-and-pairs")
    for path, why in broken_stacks(tmp_path, llama.model):
        with pytest.raises(mc.MimicError, match=re.escape(why)):
            mv.add(llama.llm, "broken", path)
    assert mv.names(llama.llm) == list(serving.STACKS)
    llama.check([Ask([*START, 116], "mimic")])


def test_a_stack_that_overflows_harms_no_other_request(llama: Served, tmp_path: Path) -> None:
    """It is the only one of its kind, so tokens with no stack are computed with its numbers, and these are left out."""
    stack = mc.build_shifts(llama.model, "live", scale_init=2.0)
    for head in stack:
        head.vector.data.fill_(3e38)
    mc.save_shifts(stack, tmp_path / "huge")
    mv.add(llama.llm, "huge", tmp_path / "huge")
    asks = [Ask([*START, 117]), Ask([*START, 118], "huge"), Ask([*START, 119], "mimic")]
    found = serving.answers(llama.llm, asks, LENGTH)
    for place in (0, 2):
        serving.assert_same(found[place], llama.wanted(asks[place]), asks[place])
    mv.remove(llama.llm, "huge")


def test_a_stack_of_other_weights_is_reported(llama: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As `load_shifts` does: by the files of the weights, because vLLM has them fused."""
    other = serving.model_at(tmp_path / "model", "llama", initializer_range=0.2)
    serving.stack_at(tmp_path / "stack", other, "live")
    mv.add(llama.llm, "stranger", tmp_path / "stack")
    serving.stack_at(tmp_path / "own", llama.model, "live", seed=99)
    mv.add(llama.llm, "own", tmp_path / "own")
    assert [record.args[0] for record in caplog.records if "made for another model" in record.message] == ["stranger"]
    for name in ("stranger", "own"):
        mv.remove(llama.llm, name)


def test_a_step_in_which_an_edit_does_not_run_raises(llama: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody put the module's own forward back: no answer comes that is not shifted. The engine has ended then."""
    model = llama.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    mlp = model.model.layers[1].mlp
    monkeypatch.setattr(mlp, "forward", type(mlp).forward.__get__(mlp))
    with pytest.raises(mc.PatchStateError, match="1 edits that did not run"):
        serving.answers(llama.llm, [Ask([4, 5], "live")], 1)


HALF: list[dict[str, Any]] = [
    {"dtype": "bfloat16"},
    {"dtype": "float16"},
    {"dtype": "bfloat16", "quantization": "gptq"},
]


@pytest.mark.parametrize("options", HALF, ids=str)
def test_half_precision_shifts_what_attention_gave(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The LSE is that of the keys in this dtype, and the shift is computed in fp32 and rounded to it."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    from mimic_core.vllm.batch import Heads

    if "quantization" in options and not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        pytest.skip("vLLM has its quantised products only in its build for AVX512")
    before, after = [], []
    attend, run = CPUAttentionBackendImpl.forward, Heads.__call__

    def forward(
        self: Any, module: Any, query: Any, key: Any, value: Any, cache: Any, meta: Any, output: Any, **more: Any
    ) -> Any:
        result = attend(self, module, query, key, value, cache, meta, output, **more)
        before.append((query.clone(), key.clone(), output.clone()))
        return result

    monkeypatch.setattr(CPUAttentionBackendImpl, "forward", forward)
    monkeypatch.setattr(Heads, "__call__", lambda *x: (after.append(run(*x).clone()), after[-1])[1])
    with served(tmp_path, "llama", ["mimic"], **options) as one:
        for strength in (1.0, 0.5):  # one head for all tokens, and parameters gathered by token
            before.clear()
            after.clear()
            serving.answers(one.llm, [Ask([*START[:40], 110], "mimic", strength)], 8)
            assert len(before) == len(after) == 3 * 8
            for layer in range(3):
                assert_shifted(one.stacks["mimic"][layer], before[layer::3], after[layer::3], strength)


def assert_shifted(head: Any, before: list[Any], after: list[torch.Tensor], strength: float) -> None:
    """Compare with the formula in fp64. `before` has query, key and output of each call of attention."""
    moved = [float((x - value).abs().max()) for (_, _, value), x in zip(before, after, strict=True)]
    assert max(moved) > 0.1
    keys = torch.cat([key for _, key, _ in before]).repeat_interleave(2, dim=1).double()
    end = 0
    for (query, _, value), shifted in zip(before, after, strict=True):
        end += len(query)
        logits = torch.einsum("thd,shd->ths", query.double(), keys[:end]) * 32**-0.5
        future = torch.ones(len(query), end).triu(end - len(query) + 1).bool()
        lse = logits.masked_fill(future[:, None], -torch.inf).logsumexp(-1)
        mu = torch.sigmoid((query.double() * head.gate_weight).sum(-1) + head.gate_bias - lse)
        whole = value + mu[..., None] * head.vector
        expected = value + strength * (whole - value)
        rounding = torch.finfo(value.dtype).eps / 2 * 1.01  # once for the head and once for the strength
        allowed = rounding * (expected.abs() + (strength != 1) * strength * whole.abs()) + 1e-6
        assert ((shifted - expected).abs() <= allowed).all()


MORE = [name for name in serving.MODELS if name != "llama"]
LONG = ("gemma2", "gpt2", "gpt_oss", "mixtral", "qwen2", "qwen3_moe")
EXPERTS = ("gpt_oss", "mixtral", "qwen3_moe")  # they have no `mlp_hidden`


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.exhaustive] if name in LONG else []) for name in MORE]
)
def test_models(name: str, tmp_path: Path) -> None:
    stacks = ["mimic", "live", "layer", "out", *([] if name in EXPERTS else ["ia3"])]
    with served(tmp_path, name, stacks, max_num_batched_tokens=48) as one:
        asks = [Ask([*START, 110 + i], stack) for i, stack in enumerate([None, *stacks])]
        asks += [Ask(ask.prompt[:9], ask.stack, 0.5) for ask in asks]
        one.check(asks)
        assert len({tuple(one.wanted(ask).tokens) for ask in asks}) > len(asks) // 2, "the stacks change answers"
