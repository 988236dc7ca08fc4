"""Heads with a gate under transformers' flash implementations: the LSE of what the kernel was given, or an error.

No flash package runs here: stand-ins with the packages' signatures compute attention in plain torch, and what is
patched is compared with the same model under eager attention.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)
from transformers.integrations import flash_attention

import mimic_core as mc
from mimic_core.edits import flash
from mimic_core.ops import _lse, sequences
from tests.support import flash_stand_ins
from tests.support.cases import TEXT, random_shifts, zero_vectors

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT)),
    "mistral, window 4": lambda: MistralForCausalLM(MistralConfig(**TEXT | {"sliding_window": 4})),
    "gemma2, softcap and window": lambda: Gemma2ForCausalLM(
        Gemma2Config(**TEXT, head_dim=8, sliding_window=4, attn_logit_softcapping=2.0)
    ),
}
HEADS = ["mimic", "mimic-shared", "mimic-all-keys", "virtual-kv"]


@pytest.fixture
def flash_package(monkeypatch: pytest.MonkeyPatch) -> None:
    flash_stand_ins.install(monkeypatch)


def twins(name: str, implementation: str = "flash_attention_2") -> tuple[nn.Module, nn.Module]:
    """The same model under flash and under eager attention."""
    found = []
    for attention in (implementation, "eager"):
        torch.manual_seed(0)
        model = MODELS[name]().eval().requires_grad_(False)
        model.config._attn_implementation = attention
        found.append(model)
    return found[0], found[1]


def padded(side: str) -> dict[str, Tensor]:
    ids = torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 9, dtype=torch.long)
    if side == "none":
        return {"input_ids": ids}
    mask[1, slice(0, 3) if side == "left" else slice(6, 9)] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def run(model: nn.Module, shifts: mc.ShiftStack, inputs: dict[str, Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits at real tokens, and the gradients of every parameter."""
    with mc.patch(model, shifts):
        logits = model(**inputs, use_cache=False).logits
        if "attention_mask" in inputs:
            logits = logits[inputs["attention_mask"].bool()]
        return logits.detach(), torch.autograd.grad(logits.square().mean(), list(shifts.parameters()))


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.usefixtures("flash_package")
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_model_under_eager_attention(name: str, head: str, side: str) -> None:
    if head == "mimic-all-keys" and "gemma" in name:
        pytest.skip("that LSE has no softcap")
    if head == "mimic-all-keys" and side != "none":
        pytest.skip("that LSE is of padding too, of which flash attention makes zeros")
    on_flash, eager = twins(name)
    shifts = random_shifts(eager, head)
    found, of_found = run(on_flash, shifts, padded(side))
    wanted, of_wanted = run(eager, shifts, padded(side))
    assert_close(found, wanted)
    for mine, exact in zip(of_found, of_wanted, strict=True):
        assert_close(mine, exact)


@pytest.mark.usefixtures("flash_package")
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_a_zero_vector_changes_no_bit(name: str, side: str) -> None:
    model, _ = twins(name)
    with torch.no_grad():
        plain = model(**padded(side), use_cache=False).logits
        with mc.patch(model, zero_vectors(random_shifts(model, "mimic"))):
            assert torch.equal(model(**padded(side), use_cache=False).logits, plain)


@pytest.mark.usefixtures("flash_package")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_cached_decoding_is_the_whole_forward(name: str, side: str, cache: str) -> None:
    """A prompt in two parts and then token by token, so that there are fewer queries than keys."""
    model, _ = twins(name)
    shifts, inputs = random_shifts(model, "mimic"), padded(side)
    ids, mask = inputs["input_ids"], inputs.get("attention_mask", torch.ones(2, 9, dtype=torch.long))
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def errors() -> list[float]:
        past = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=16)
        whole = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        found = []
        for start, end in ((0, 4), (4, 7), (7, 8), (8, 9)):
            options = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
            step = model(input_ids=ids[:, start:end], **options, past_key_values=past, use_cache=True).logits
            real = mask[:, start:end].bool()
            found.append(float((step[real] - whole[:, start:end][real]).abs().max() / whole.abs().max()))
        return found

    with torch.no_grad():
        if max(errors()) > 1e-4:
            pytest.skip("this transformers itself reads a static cache's empty keys, where there is no mask")
        with mc.patch(model, shifts):
            assert max(errors()) <= 1e-4


@pytest.mark.usefixtures("flash_package")
@pytest.mark.parametrize("told_by", ["positions", "lengths"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_sequences_do_not_see_each_other(name: str, told_by: str) -> None:
    model, eager = twins(name)
    shifts = random_shifts(eager, "mimic")
    ids, parts = padded("none")["input_ids"][:1], ((0, 3), (3, 8), (8, 9))
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(b - a) for a, b in parts])[None],
    }
    if told_by == "lengths":
        starts = torch.tensor([0, 3, 8, 9], dtype=torch.int32)
        inputs |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 5, "max_length_k": 5}
    with torch.no_grad():
        with mc.patch(model, shifts):
            packed = model(**inputs, use_cache=False).logits
        with mc.patch(eager, shifts):
            alone = [eager(input_ids=ids[:, a:b], use_cache=False).logits for a, b in parts]
    assert_close(packed, torch.cat(alone, dim=1))


@pytest.mark.usefixtures("flash_package")
@pytest.mark.parametrize("implementation", ["flash_attention_3", "flash_attention_4"])
def test_the_other_packages(implementation: str) -> None:
    if implementation not in AttentionInterface._global_mapping:
        pytest.skip("this transformers does not know it")
    on_flash, eager = twins("llama", implementation)
    shifts = random_shifts(eager, "mimic")
    assert_close(run(on_flash, shifts, padded("left"))[0], run(eager, shifts, padded("left"))[0])


def test_a_kernel_of_the_hub_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    flash_stand_ins.install(monkeypatch)
    name = "kernels-community/some-flash"
    monkeypatch.setitem(AttentionInterface._global_mapping, name, flash_attention.flash_attention_forward)
    of_flash = ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"]
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, of_flash)
    on_flash, eager = twins("llama", name)
    shifts = random_shifts(eager, "mimic")
    assert_close(run(on_flash, shifts, padded("left"))[0], run(eager, shifts, padded("left"))[0])


@pytest.mark.usefixtures("flash_package")
def test_the_lse_that_is_captured() -> None:
    model, _ = twins("mistral, window 4")
    with torch.no_grad(), mc.capture(model, ["query", "key", "lse"]) as seen:
        model(**padded("left"), use_cache=False)
    for layer in range(3):
        q, k, lse = (seen[site][layer] for site in ("query", "key", "lse"))
        for sample, start in ((0, 0), (1, 3)):
            of_q, of_k = (x[sample, :, start:].transpose(0, 1) for x in (q, k))
            scores = flash_stand_ins.logits_of(of_q, of_k, None, True, (3, 3), 0.0)
            torch.testing.assert_close(lse[sample, :, start:], scores.logsumexp(-1))
        assert (lse[1, :, :3] == -torch.inf).all(), "padding attends to nothing"


# --- refused


def test_a_kernel_that_drops_the_softcap_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older transformers drops it without a word, newer ones raise."""
    flash_stand_ins.install(monkeypatch, "softcap")
    model, _ = twins("gemma2, softcap and window")
    with (
        pytest.raises((mc.UnsupportedModelError, ValueError), match="softcap"),
        mc.patch(model, random_shifts(model, "mimic")),
    ):
        model(**padded("none"), use_cache=False)


CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "paged": ({"block_table": torch.zeros(1)}, "its flash attention works on a paged cache (block_table)"),
    "mask": ({"mask": torch.zeros(1, 1, 4, 4)}, "its flash attention was given a mask that is not [batch, keys]"),
    "bias": ({"position_bias": torch.zeros(1)}, "position_bias enter(s) its attention logits"),
}


@pytest.mark.usefixtures("flash_package")
@pytest.mark.parametrize("name", CALLS)
def test_what_is_not_known_is_refused_before_attention_runs(name: str) -> None:
    model, _ = twins("llama")
    options, message = CALLS[name]
    options, attention = dict(options), model.model.layers[0].self_attn
    mask = options.pop("mask", None)
    q = torch.randn(1, 4, 4, 8)
    with mc.patch(model, random_shifts(model, "mimic")):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        function = ALL_ATTENTION_FUNCTIONS.get_interface("flash_attention_2", flash_attention.flash_attention_forward)
        with pytest.raises(mc.UnsupportedModelError) as error:
            function(attention, q, q, q, mask, **options)
    assert message in str(error.value)


def test_a_package_with_another_causal_mask_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attention, "_use_top_left_mask", True)
    q = torch.randn(1, 4, 4, 8)
    assert flash.why_not(nn.Module(), q, q, None, {}) is None
    problem = flash.why_not(nn.Module(), q[:, :, :2], q, None, {})
    assert problem is not None
    assert "older than 2.1" in problem


# --- torch's own flash kernel for sequences, which runs on a GPU


@pytest.mark.parametrize("old_layout", [False, True])
@pytest.mark.parametrize(("is_causal", "window"), [(True, None), (False, None), (True, 2), (False, 1)])
def test_the_lse_of_torchs_kernel(is_causal: bool, window: int | None, old_layout: bool) -> None:
    """What it is asked and what is made of its answer; a stand-in gives it, in the layout of either torch."""
    lengths_q, lengths_k = (3, 1, 5), (3, 4, 2)
    starts = [torch.tensor([0, *torch.tensor(x).cumsum(0).tolist()], dtype=torch.int32) for x in (lengths_q, lengths_k)]
    q, k = (torch.randn(n + extra, h, 8) for n, h, extra in ((9, 4, 1), (9, 2, 0)))
    of = sequences.Sequences(starts[0], starts[1], 5, 4, is_causal, window)
    ends_q, ends_k = (x.tolist() for x in starts)
    ends = (-1, -1) if window is None else (window, 0 if is_causal else window)

    def logits(q: Tensor, k: Tensor) -> list[Tensor]:
        pairs = zip(pairwise(ends_q), pairwise(ends_k), strict=True)
        return [flash_stand_ins.logits_of(q[a:b], k[c:d], 0.3, is_causal, ends, 0.0) for (a, b), (c, d) in pairs]

    def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: float, **windows: Any) -> Any:
        starts_q, starts_k, longest_q, longest_k, dropout, causal, debug = rest
        assert (longest_q, longest_k, dropout, causal, debug) == (5, 4, 0.0, is_causal, False)
        assert windows == ({} if window is None else {"window_size_left": ends[0], "window_size_right": ends[1]})
        assert (starts_q.dtype, starts_k.dtype) == (torch.int32, torch.int32)
        found = [x.logsumexp(-1).masked_fill(x.logsumexp(-1) == -torch.inf, torch.inf) for x in logits(q, k)]
        if old_layout:
            lse = torch.full((3, 4, 5), torch.nan)
            for row, x in zip(lse, found, strict=True):
                row[:, : x.shape[1]] = x
        else:
            lse = torch.cat([*found, torch.full((4, 1), torch.nan)], dim=1)
        return q, lse, torch.zeros(2), torch.zeros(1), torch.zeros(0)

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any, **_: Any) -> Any:
        of_q, of_k = torch.zeros_like(q), torch.zeros_like(k)
        keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
        for scores, (a, b), (c, d) in zip(logits(q, k), pairwise(ends_q), pairwise(ends_k), strict=True):
            # delta is rowsum(grad * out), with the `out` that is given.
            through = torch.einsum("thd,shd->hts", grad[a:b], values[c:d]) - (grad[a:b] * out[a:b]).sum(-1).T[..., None]
            of_scores = scores.softmax(-1).nan_to_num(0.0) * through * 0.3
            of_q[a:b] = torch.einsum("hts,shd->thd", of_scores, keys[c:d])
            of_k[c:d] = torch.einsum("hts,thd->shd", of_scores, q[a:b]).unflatten(1, (2, 2)).sum(2)
        return of_q, of_k, torch.zeros_like(v)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    try:
        results = []
        for function in (sequences._FlashLSE.apply, sequences.sequences_lse):
            leaves = [x.detach().requires_grad_() for x in (q, k)]
            lse = function(*leaves, of, 0.3)
            finite = lse.masked_fill(lse == -torch.inf, 0.0)
            weight = torch.linspace(-1, 1, finite.numel()).view_as(finite)
            results.append((lse.detach(), *torch.autograd.grad((finite * weight).sum(), leaves)))
    finally:
        library._destroy()
    assert results[0][0].shape == (4, 10)
    assert (results[0][0][:, 9] == -torch.inf).all(), "a query after the last sequence"
    for mine, exact in zip(*results, strict=True):
        torch.testing.assert_close(mine, exact)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
def test_sequences_in_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lse, "_CHUNK_ELEMENTS", chunk)
    starts = torch.tensor([0, 4, 9])
    q, k = torch.randn(9, 4, 8, dtype=torch.float64), torch.randn(9, 2, 8, dtype=torch.float64)
    of = sequences.Sequences(starts, starts, 5, 5, True, 2)
    for softcap in (None, 1.5):
        leaves = [x.clone().requires_grad_() for x in (q, k)]
        found = sequences.sequences_lse(*leaves, of, 0.3, softcap)
        scores = [
            flash_stand_ins.logits_of(leaves[0][a:b], leaves[1][a:b], 0.3, True, (2, 0), softcap or 0.0)
            for a, b in ((0, 4), (4, 9))
        ]
        wanted = torch.cat([x.logsumexp(-1) for x in scores], dim=1)
        torch.testing.assert_close(found, wanted)
        for mine, exact in zip(*(torch.autograd.grad(x.square().sum(), leaves) for x in (found, wanted)), strict=True):
            torch.testing.assert_close(mine, exact)
