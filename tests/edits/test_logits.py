"""Whatever enters a model's attention logits is in the LSE, or is refused: softcap, sinks, windows, all masks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from transformers import (
    AttentionInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)
from transformers.integrations.flex_attention import WrappedFlexAttention

import mimic_core as mc
from mimic_core import ops
from tests.support.cases import CASES, fresh_model, logits_of, random_shifts
from tests.support.op_cases import CASES as OP_CASES
from tests.support.op_cases import DRAWN, Case, assert_near, attending_inputs, empty_rows, make_mask

LLAMA = next(case for case in CASES if case.name == "llama")


def lse_by_row(
    q: Tensor, k: Tensor, allowed: Tensor, scale: float, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """The LSE one row at a time, fp64; `allowed` is [b 1|h t s] bool, or numbers to add with -inf where forbidden."""
    b, h, t, _ = q.shape
    g = k.shape[1]
    added = allowed.double() if allowed.dtype != torch.bool else torch.zeros(allowed.shape, dtype=torch.float64)
    allowed = allowed if allowed.dtype == torch.bool else allowed > torch.finfo(allowed.dtype).min
    rows = []
    for n in range(b):
        for head in range(h):
            for i in range(t):
                seen = allowed.expand(b, h, t, -1)[n, head, i]
                row = scale * (k[n, head * g // h].double() @ q[n, head, i].double())
                if softcap is not None:
                    row = softcap * (row / softcap).tanh()
                row = (row + added.expand(b, h, t, -1)[n, head, i])[seen]
                if sinks is not None:
                    row = torch.cat([row, sinks[head : head + 1].double()])
                rows.append(torch.logsumexp(row, 0) if seen.any() else row.new_tensor(-math.inf))
    return torch.stack(rows).reshape(b, h, t)


# --- ops


def check_lse(case: Case, backend: str, softcap: float | None, sinks: bool) -> None:
    inputs = attending_inputs(case)
    names = ["q", "k", *(["sinks"] if sinks else [])]
    tensors = {**inputs.tensors, "sinks": torch.linspace(-1, 2, case.h, dtype=inputs.tensors["gate_bias"].dtype)}
    ours, exact = ([tensors[name].detach().clone().requires_grad_() for name in names] for _ in range(2))
    options = inputs.options
    got = ops.attention_lse(
        *ours[:2], options["mask"], options["scale"], options["is_causal"], softcap, *ours[2:], backend=backend
    )
    mask = options["mask"]
    if mask is None:
        mask = torch.ones(1, 1, case.t, case.s, dtype=torch.bool)
        mask = mask.tril() if case.is_causal else mask
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    scale = options["scale"] or case.d**-0.5
    want = lse_by_row(*exact[:2], mask.expand(*mask.shape[:3], case.s), scale, softcap, *exact[2:])
    empty = empty_rows(case)
    assert torch.equal(got == -math.inf, empty)
    assert_near("out lse", got.masked_fill(empty, 0.0).detach(), want.masked_fill(empty, 0.0).detach(), case.dtype)
    if empty.all():
        return
    grads = [
        torch.autograd.grad(y.masked_fill(empty, 0.0), x, inputs.incoming["lse"].to(y.dtype))
        for y, x in ((got, ours), (want, exact))
    ]
    for name, mine, theirs in zip(names, *grads, strict=True):
        assert_near(f"grad {name}", mine, theirs.double(), case.dtype)


SOME = [case for case in OP_CASES if case.layout == "contiguous" and case.s < 100 and (case.scale or 1) > 0]


@pytest.mark.parametrize("case", SOME, ids=str)
@pytest.mark.parametrize(("softcap", "sinks"), [(2.0, False), (None, True), (0.7, True)])
def test_softcap_and_sinks_are_in_the_lse(softcap: float | None, sinks: bool, case: Case) -> None:
    check_lse(case, "auto", softcap, sinks)


@pytest.mark.parametrize("backend", ["reference", "cpu", "sdpa"])
@DRAWN
@given(
    t=st.integers(1, 9), s=st.integers(1, 9), mask=st.sampled_from(["none", "bool b1ts empty", "bias bhts"]),
    softcap=st.sampled_from([None, 0.5, 30.0]),
)  # fmt: skip
def test_drawn_softcap_and_sinks(backend: str, t: int, s: int, mask: str, softcap: float | None) -> None:
    case = Case(mask, t=t, s=s, dtype=torch.float64)
    if backend == "cpu" and softcap is not None:
        q, k = (attending_inputs(case).tensors[name] for name in "qk")
        with pytest.raises(mc.BackendUnavailableError, match="only 'sdpa' and 'reference' support a softcap"):
            ops.attention_lse(q, k, make_mask(case, torch.Generator()), softcap=softcap, backend="cpu")
    else:
        check_lse(case, backend, softcap, sinks=True)


def test_wrong_softcap_and_sinks(no_shape_checks: None) -> None:
    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    with pytest.raises(
        mc.ShapeError, match=r"sinks should be \[4\] on cpu, one per attention head; given \[2\] on cpu"
    ):
        ops.attention_lse(q, k, sinks=torch.zeros(2))
    for softcap in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"softcap should be positive and finite, found {softcap}"):
            ops.attention_lse(q, k, softcap=softcap)


# --- models


class Adapter(mc.PathAdapter):
    layers = "model.layers"


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny(kind: str, attention: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "gemma2":
        # Layers take turns: a window of 4, and all.
        config, cls = Gemma2Config(**SIZES, sliding_window=4, attn_logit_softcapping=0.5), Gemma2ForCausalLM
    elif kind == "gpt_oss":
        config = GptOssConfig(
            **SIZES, sliding_window=4, num_local_experts=2, num_experts_per_tok=1,
            layer_types=["sliding_attention", "full_attention"],
        )  # fmt: skip
        cls = GptOssForCausalLM
    else:
        config, cls = MistralConfig(**SIZES, sliding_window=4), MistralForCausalLM
    config._attn_implementation = attention
    model = cls(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.normal_()
        elif "self_attn" in name and parameter.ndim == 2:
            parameter.normal_(std=0.4)  # logits that a cap or a sink can be told from
    return model


KINDS = [("gemma2", "eager"), ("gpt_oss", "eager"), ("mistral", "eager"), ("mistral", "sdpa")]


@pytest.fixture
def _adapters() -> None:
    for name in ("gemma2", "gpt_oss"):
        mc.register_adapter(name)(Adapter)


@pytest.mark.usefixtures("_adapters")
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize(("kind", "attention"), KINDS)
def test_lse_of_a_model_is_that_of_its_logits(kind: str, attention: str, padding: str) -> None:
    model = tiny(kind, attention)
    ids = torch.randint(3, 64, (2, 11))
    keep = torch.ones(2, 11, dtype=torch.long)
    if padding == "left":
        keep[1, :5] = 0
    sites = ["query", "key", "lse"]
    with torch.no_grad(), mc.capture(model, sites) as seen:
        model(input_ids=ids, attention_mask=keep)
    row, key = torch.arange(11)[:, None], torch.arange(11)
    for layer in range(2):
        windowed = kind == "mistral" or layer == 0
        allowed = (key <= row) & (row - key < 4 if windowed else torch.tensor(True))
        allowed = allowed[None, None] & keep.bool()[:, None, None]
        module = model.get_submodule(f"model.layers.{layer}.self_attn")
        q, k = seen["query"][layer], seen["key"][layer]
        want = lse_by_row(
            q, k, allowed, module.scaling, 0.5 if kind == "gemma2" else None, getattr(module, "sinks", None)
        )
        real = keep.bool()[:, None].expand(want.shape)
        assert_near("out lse", seen["lse"][layer][real], want[real], torch.float32)
        without = lse_by_row(q, k, torch.ones(1, 1, 11, 11, dtype=torch.bool), module.scaling)
        assert (without - want)[real].abs().max() > 0.1, "the window, cap and sink matter here"


@pytest.mark.usefixtures("_adapters")
@pytest.mark.parametrize(("kind", "attention"), KINDS)
def test_shifts_train_where_logits_are_odd(kind: str, attention: str) -> None:
    """Through cap, sink and window the gradients are those of a shift written with the LSE row by row."""
    model, ids = tiny(kind, attention), torch.randint(3, 64, (1, 9))
    shifts = random_shifts_of(model)
    row, key = torch.arange(9)[:, None], torch.arange(9)
    incoming = torch.randn(1, 9, 64)

    def by_hand(value: Tensor, at: mc.At) -> Tensor:
        windowed = kind == "mistral" or at.layer == 0
        allowed = (key <= row) & (row - key < 4 if windowed else torch.tensor(True))
        softcap, sinks = 0.5 if kind == "gemma2" else None, getattr(at.module, "sinks", None)
        lse = lse_by_row(at.query, at.key, allowed[None, None], at.scale, softcap, sinks)
        head = shifts[at.layer]
        log_z1 = (at.query.double() * head.gate_weight.double()[:, None]).sum(-1) + head.gate_bias.double()[:, None]
        mu = (log_z1 - lse).sigmoid().transpose(1, 2)
        return (value.double() + mu[..., None] * head.vector.double()).to(value.dtype)

    grads = []
    for put in (lambda: mc.patch(model, shifts), lambda: mc.hook(model, "attn_heads", by_hand)):
        with put():
            logits = model(input_ids=ids, use_cache=False).logits
        grads.append(torch.autograd.grad(logits, list(shifts.parameters()), incoming))
    for mine, exact in zip(*grads, strict=True):
        assert (mine - exact).abs().max() < 1e-4 * exact.abs().max()


def random_shifts_of(model: nn.Module) -> mc.ShiftStack:
    shifts = mc.build_shifts(model, "mimic")
    for parameter in shifts.parameters():
        parameter.data = torch.randn_like(parameter) * 0.5
    return shifts


@pytest.mark.usefixtures("_adapters")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prefill_of_a_static_cache_is_the_plain_forward(attention: str) -> None:
    """No mask and more keys than queries: causal at the upper left, and the empty keys are nobody's."""
    model = fresh_model(LLAMA, attention)
    shifts = random_shifts(model, "mimic")
    ids = torch.randint(3, 60, (2, 7))
    with torch.no_grad(), mc.patch(model, shifts):
        plain = logits_of(model, {"input_ids": ids})
        cache = StaticCache(config=model.config, max_cache_len=16)
        logits = [model(input_ids=ids[:, :5], past_key_values=cache).logits]
        for i in (5, 6):
            logits.append(model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, 1), plain, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_mask_per_attention_head(attention: str) -> None:
    model = fresh_model(LLAMA, attention)
    spec = mc.adapter_for(model).spec(model).layers[0]
    ids = torch.randint(3, 60, (2, 6))
    bias = torch.randn(2, spec.heads, 6, 6).masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -math.inf)
    with torch.no_grad(), mc.capture(model, ["query", "key", "lse"]) as seen:
        model(input_ids=ids, attention_mask=bias)
    want = lse_by_row(seen["query"][0], seen["key"][0], bias, spec.head_dim**-0.5)
    assert_near("out lse", seen["lse"][0], want, torch.float32)


@pytest.mark.newest
def test_flex_attention_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mask is a function of the indices. Forward alone: on a CPU flex attention gives no gradients."""
    # transformers would compile this function of torch with inductor, for 15 seconds.
    monkeypatch.setattr(WrappedFlexAttention, "__call__", lambda self: flex_attention)
    ids = torch.randint(3, 60, (2, 9))
    keep = torch.ones(2, 9, dtype=torch.long)
    keep[1, :4] = 0
    logits = {}
    for attention in ("sdpa", "flex_attention"):
        model = tiny("mistral", attention)
        with torch.no_grad(), mc.patch(model, random_shifts_of(model)):
            logits[attention] = model(input_ids=ids, attention_mask=keep).logits[keep.bool()]
    torch.testing.assert_close(logits["flex_attention"], logits["sdpa"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_position_bias_is_in_the_lse_if_the_implementation_adds_it(attention: str) -> None:
    model = fresh_model(LLAMA, attention)
    ids = LLAMA.inputs()["input_ids"]
    t = ids.shape[1]
    bias = torch.randn(1, model.config.num_attention_heads, t, t)
    with torch.no_grad(), mc.capture(model, ["query", "key", "lse"], layers=[1]) as seen:
        biased = model(ids, position_bias=bias, use_cache=False).logits
    added = not torch.equal(biased, model(ids, use_cache=False).logits)
    q, k = seen["query"][1], seen["key"][1]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = q @ k.mT * q.shape[-1] ** -0.5 + (bias if added else 0.0)
    wanted = logits.masked_fill(~torch.ones(t, t, dtype=torch.bool).tril(), -torch.inf).logsumexp(-1)
    torch.testing.assert_close(seen["lse"][1], wanted)
    with (
        mc.hook(model, "query", lambda value, at: at.lse and None),
        pytest.raises(  # pyright: ignore[reportArgumentType]
            mc.UnsupportedModelError, match="known only after its attention, because its logits have position_bias"
        ),
    ):
        model(ids, position_bias=bias)


def test_logits_that_lse_does_not_follow_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Position bias and the like, what an implementation ignores, and implementations that hide their mask."""
    model, inputs = fresh_model(LLAMA, "eager"), LLAMA.inputs()
    monkeypatch.setitem(AttentionInterface._global_mapping, "hidden", lambda *args, **kwargs: None)
    with mc.patch(model, random_shifts(model, "mimic")):
        with pytest.raises(mc.UnsupportedModelError, match="indices enter"):
            logits_of(model, inputs, indices=torch.zeros(1, 1, 1, 1))
        model.config._attn_implementation = "sdpa"
        with pytest.raises(mc.UnsupportedModelError, match="softcap enter"):
            logits_of(model, inputs, softcap=30.0)
        model.config._attn_implementation = "hidden"
        with pytest.raises(mc.UnsupportedModelError, match="attention implementation 'hidden' are not known"):
            logits_of(model, inputs)
    model.config._attn_implementation = "eager"
    with mc.patch(model, random_shifts(model, "mimic-all-keys")):
        with pytest.raises(
            mc.UnsupportedModelError,
            match="over all keys is only for attention like in the published models, but .* has softcap",
        ):
            logits_of(model, inputs, softcap=30.0)
