"""vLLM's backends for CUDA, run on a CPU over stand-ins of their kernels: stacks get the LSE that a kernel returns."""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false

from __future__ import annotations

import inspect
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import mimic_core as mc
from tests.support import serving, serving_kernels
from tests.support.serving import Ask

vllm = pytest.importorskip("vllm", reason="vLLM has an environment of its own")
import mimic_core.vllm as mv  # noqa: E402
from mimic_core.vllm import kernels, paged  # noqa: E402

LENGTH = 5
START = list(range(10, 60))
STACKS = ["mimic", "other", "vector", "live", "hyper_icl-0", "virtual_kv-0"]


def test_the_stand_in_has_the_signature_of_vllms_function() -> None:
    path = Path(vllm.__file__).with_name("vllm_flash_attn") / "flash_attn_interface.py"
    spec = spec_from_file_location("flash_attn_interface", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    theirs, ours = (
        [(x.name, x.kind, x.default) for x in inspect.signature(one.flash_attn_varlen_func).parameters.values()]
        for one in (module, serving_kernels)
    )
    assert ours == theirs


# The sliding windows of Gemma 3 are of some layers; FlashInfer wants the same in all.
@pytest.mark.parametrize(("backend", "model"), [("flash", "gemma3"), ("flashinfer", "mistral")])
def test_a_batch_mixes_stacks(backend: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    use = {"flash": serving_kernels.use_flash, "flashinfer": serving_kernels.use_flashinfer}
    use[backend](monkeypatch)
    made = serving.model_at(tmp_path / "model", model)
    stacks = {name: serving.stack_at(tmp_path / name, made, name, seed) for seed, name in enumerate(STACKS)}
    # Prompts are cut, and requests that decode stand beside them.
    options = {"max_num_batched_tokens": 48, "attention_config": {"use_trtllm_attention": False}}
    with serving.engine(
        tmp_path / "model", **mv.engine_args({name: tmp_path / name for name in STACKS}), **options
    ) as llm:
        asks = [Ask([*START, 110 + i % 3], name) for i, name in enumerate([None, *STACKS])]
        asks += [Ask(ask.prompt[-9:], ask.stack, 0.5) for ask in asks]
        expected = [serving.wanted(made, stacks, ask, LENGTH) for ask in asks]
        assert len({tuple(one.tokens) for one in expected}) > len(asks) // 2, "the stacks change answers"
        for found, wanted, ask in zip(serving.answers(llm, asks, LENGTH), expected, asks, strict=True):
            serving.assert_same(found, wanted, ask[1:])
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        runner._dummy_run(4)  # as vLLM does to see how much memory it needs: without the metadata of attention
        runner._dummy_run(4, force_attention=True)  # as it does to warm up
        impl = type(runner.model.model.layers[0].self_attn.attn.impl).__name__
        assert impl == {"flash": "FlashAttentionImpl", "flashinfer": "FlashInferImpl"}[backend]


H, G, D, SIZE = 6, 2, 16, 16


def flash_call(monkeypatch: pytest.MonkeyPatch, counts: list[int]) -> tuple[Any, Any, Any]:
    """A call of vLLM's `FlashAttentionImpl` whose requests have new tokens, and others before them: n is H."""
    from vllm.v1.attention.backends import flash_attn

    serving_kernels.use_flash(monkeypatch)
    impl = flash_attn.FlashAttentionImpl(H, D, 0.3, G, None, 20, "auto")
    assert kernels.ask(impl) is None
    lengths = torch.tensor([40, 9, 17][: len(counts)], dtype=torch.int32)
    n = sum(counts)
    meta = flash_attn.FlashAttentionMetadata(
        num_actual_tokens=n,
        max_query_len=max(counts),
        query_start_loc=torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
        max_seq_len=40,
        seq_lens=lengths,
        block_table=torch.tensor([[3, 1, 4], [0, 7, 7], [5, 2, 7]][: len(counts)], dtype=torch.int32),
        slot_mapping=torch.zeros(n, dtype=torch.int64),
    )
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(n, H, D, generator=generator)
    cache = torch.randn(8, G, SIZE, 2 * D, generator=generator)
    scales = SimpleNamespace(**{f"_{one}_scale": torch.ones(1) for one in "qkv"})

    def call() -> paged.Attention:
        with kernels.keeping(impl) as kept:
            impl.forward(scales, query, None, None, cache, meta, output=torch.empty(n, H, D))
        return paged.Attention(impl, query, cache, meta, kept)

    return call, (query, cache, meta), impl


def by_hand(query: Tensor, cache: Tensor, meta: Any) -> Tensor:
    """The LSE [n h], by one key at a time."""
    rows = []
    for row, length in enumerate(meta.seq_lens.tolist()):
        first, last = meta.query_start_loc[row : row + 2].tolist()
        for token in range(first, last):
            place = length - (last - token)
            for head in range(H):
                keys = [
                    cache[meta.block_table[row, key // SIZE], head // (H // G), key % SIZE, :D]
                    for key in range(max(0, place - 19), place + 1)
                ]
                rows.append((torch.stack(keys) @ query[token, head] * 0.3).logsumexp(0))
    return torch.stack(rows).view(-1, H)


@pytest.mark.parametrize("counts", [[1, 1, 1], [1, 4, 1], [6]], ids=str)
def test_the_lse_is_that_of_the_keys(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    call, inputs, _ = flash_call(monkeypatch, counts)
    for _ in range(2):  # the second one is no longer compared by the library
        torch.testing.assert_close(call().lse, by_hand(*inputs))
        inputs[0].mul_(-1)


# What a kernel could return in place of its LSE [h n].
BROKEN = {
    "base 2": lambda lse: lse / torch.tensor(2.0).log(),
    "transposed": lambda lse: lse.T.contiguous(),
    "of other tokens": lambda lse: lse.roll(1, 1),
    "of some keys": lambda lse: lse - 0.05,
    "NaN": lambda lse: lse * torch.nan,
}


def break_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    inner = serving_kernels.flash_attn_varlen_func

    def broken(**kwargs: Any) -> Any:
        out, lse = inner(**kwargs)
        return out, BROKEN[name](lse)

    monkeypatch.setattr("vllm.v1.attention.backends.flash_attn.flash_attn_varlen_func", broken)


REFUSED = "the LSE of FlashAttentionImpl is not that of its keys"


@pytest.mark.parametrize("name", BROKEN)
def test_an_lse_that_is_not_that_of_the_keys_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, _, _ = flash_call(monkeypatch, [1, 4, 1])
    break_it(monkeypatch, name)
    with pytest.raises(mc.BackendUnavailableError, match=REFUSED):
        _ = call().lse


def test_steps_of_a_new_size_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    call, (_, _, meta), _ = flash_call(monkeypatch, [1, 1, 1])
    _ = call().lse
    break_it(monkeypatch, "of some keys")
    _ = call().lse
    meta.max_seq_len = 64
    with pytest.raises(mc.BackendUnavailableError, match=REFUSED):
        _ = call().lse


def test_a_query_that_is_not_finite_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    call, (query, _, _), _ = flash_call(monkeypatch, [1, 4, 1])
    query[0] = torch.nan
    found = call().lse
    assert found[0].isnan().all()
    assert found[1:].isfinite().all()


def test_kernels_that_return_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, (query, cache, meta), impl = flash_call(monkeypatch, [1, 4, 1])
    with pytest.raises(mc.PatchStateError, match=r"shape \(0,\) for queries of the shape \(6, 6, 16\), by 0 calls"):
        _ = paged.Attention(impl, query, cache, meta, []).lse


def test_nobody_else_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer without a stack in the step gets what vLLM's kernel returns to vLLM."""
    call, (query, cache, meta), impl = flash_call(monkeypatch, [1, 4, 1])
    asked = []
    inner = serving_kernels.flash_attn_varlen_func
    monkeypatch.setattr(
        "vllm.v1.attention.backends.flash_attn.flash_attn_varlen_func",
        lambda **kwargs: (asked.append(kwargs.get("return_softmax_lse", False)), inner(**kwargs))[1],
    )
    scales = SimpleNamespace(**{f"_{one}_scale": torch.ones(1) for one in "qkv"})
    impl.forward(scales, query, None, None, cache, meta, output=torch.empty(6, H, D))
    call()
    impl.forward(scales, query, None, None, cache, meta, output=torch.empty(6, H, D))
    assert asked == [False, True, False]
