"""Where a prompt ends: `at.prompt_end`, and the heads that act there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

import mimic_core as mc
from mimic_core.edits.forward import Forward
from tests.support.cases import (
    ATTENTION,
    CASES,
    PROMPT_HEADS,
    SITE_OF_HEAD,
    Case,
    fresh_model,
    logits_of,
    model_of,
    random_shifts,
)

LLAMA = next(case for case in CASES if case.name == "llama")
over_cases = pytest.mark.parametrize("case", CASES, ids=str)
SITES = ("attn_heads", "attn_out", "mlp_out", "layer_out")


def seen(model: nn.Module, site: str, run: Any) -> list[list[list[bool]]]:
    """`at.prompt_end` in every forward of `run`, at one layer."""
    found = []
    with mc.hook(model, site, lambda value, at: found.append(at.prompt_end.tolist()), layers=[1]):
        run()
    return found


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("attention", ATTENTION)
@over_cases
def test_it_is_the_last_real_token(case: Case, attention: str, site: str) -> None:
    model = model_of(case, attention)
    for padding, ends in (("right", (10, 7)), ("left", (10, 10))):
        wanted = [[i == end for i in range(11)] for end in ends]
        assert seen(model, site, lambda p=padding: logits_of(model, case.inputs(p))) == [wanted]
    unmasked = {name: x for name, x in case.sample(1).items() if name != "attention_mask"}
    assert seen(model, site, lambda: logits_of(model, unmasked)) == [[[i == 7 for i in range(8)]]]


@pytest.mark.parametrize("cache", [None, "static"])
@over_cases
def test_decoding_has_none(case: Case, cache: str | None) -> None:
    if cache and case.name == "idefics":
        pytest.skip("Idefics does not support a static cache")
    model, inputs = model_of(case), case.inputs("left")
    del inputs["position_ids"]
    options = {"cache_implementation": cache} if cache else {}
    steps = seen(
        model,
        "layer_out",
        lambda: model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, **options),
    )
    assert [len(step[0]) for step in steps] == [11, 1, 1]
    assert steps[0] == [[i == 10 for i in range(11)]] * 2
    assert steps[1:] == [[[False]] * 2] * 2


@pytest.mark.parametrize("head", PROMPT_HEADS)
@over_cases
def test_generation_is_the_full_forward_shifted_where_the_prompt_ended(case: Case, head: str) -> None:
    """The same shift put by hand at that position of the whole text."""
    model, inputs = model_of(case), case.inputs("left")
    shifts = random_shifts(model, head)
    prompt = {name: x for name, x in inputs.items() if name != "position_ids"}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "suppress_tokens": [0, *case.image_ids]}
    with mc.patch(model, shifts):
        out = model.generate(**prompt, **options, return_dict_in_generate=True, output_logits=True)
    new = out.sequences[:, 11:]

    def by_hand(value: Tensor, at: mc.At) -> Tensor:
        vector = shifts[at.layer].vector
        weight: Any = getattr(shifts[at.layer], "weight", None)
        value = value.clone()
        weight = weight[:, None] if head == "mtv" else weight
        value[:, 10] = value[:, 10] + vector if weight is None else value[:, 10] * (1 - weight) + weight * vector
        return value

    with torch.no_grad(), mc.hook(model, SITE_OF_HEAD[head], by_hand, layers=shifts.layers):
        full = logits_of(model, case.longer(inputs, new[:, :-1]))
    for step, wanted in enumerate(out.logits):
        torch.testing.assert_close(full[:, 10 + step], wanted, atol=3e-5, rtol=1e-4)


def test_a_task_vector_of_weight_one_replaces_the_state_to_the_bit() -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    ends = torch.zeros(2, 11, dtype=torch.bool)
    ends[0, 10] = ends[1, 7] = True
    with torch.no_grad(), mc.capture(model, "layer_out", where=ends, layers=[1]) as taken:
        plain = logits_of(model, inputs)
    shifts = mc.build_shifts(model, "task_vector", layers=(1,))
    with torch.no_grad(), mc.patch(model, shifts):
        assert torch.equal(logits_of(model, inputs), plain)
        shifts[1].weight.fill_(1)
        shifts[1].vector.copy_(taken.states[1][0])
        found = logits_of(model, inputs)
    assert torch.equal(found[0], plain[0])
    assert not torch.allclose(found[1, 7], plain[1, 7], atol=1e-3)
    assert torch.equal(found[1, :7], plain[1, :7])


def test_an_encoder_decoder_is_asked_for_the_decoders_prompt() -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval().requires_grad_(False)
    ids = torch.arange(3, 10)[None]
    found = seen(
        model,
        "layer_out",
        lambda: model(
            input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=ids[:, :4], use_cache=False
        ),
    )
    assert found == [[[False, False, False, True]]]


def test_where_it_is_not_there(no_shape_checks: None) -> None:
    model, inputs = fresh_model(LLAMA), LLAMA.inputs()

    def read(value: Tensor, at: mc.At) -> None:
        assert at.prompt_end is not None

    with mc.hook(model, "key", read), pytest.raises(mc.PatchStateError, match="asked for at site 'key'"):
        logits_of(model, inputs)

    @mc.register_head("undeclared-for-test")
    class Undeclared(mc.ShiftHead):
        site = "layer_out"

        def forward(self, value: Tensor, at: mc.At) -> Tensor:
            return value * at.prompt_end[..., None]

    with mc.patch(model, mc.build_shifts(model, "undeclared-for-test")):
        with pytest.raises(mc.PatchStateError, match="heads with needs_prompt_end"):
            logits_of(model, inputs)
    # What a decoder of odd habits would hand on.
    forward = Forward(2, 11, {"attention_mask": torch.ones(2, 9)})
    with pytest.raises(mc.ShapeError, match=r"has \[b t\] = \[2, 9\], but its hidden states have \[2, 11\]"):
        forward.tokens("prompt_end", 2, 11, torch.device("cpu"))


@pytest.mark.newest
def test_torch_compile_is_refused(no_shape_checks: None) -> None:
    """A graph has no forward to ask; it must not pass without a word."""
    model, inputs = fresh_model(LLAMA), LLAMA.inputs()
    with torch.no_grad(), mc.patch(model, random_shifts(model, "function-vector")):
        with pytest.raises(mc.PatchStateError, match=r"torch\.compile"):
            torch.compile(model, backend="eager")(**inputs, use_cache=False)
    torch.compiler.reset()
    logits_of(model, inputs)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("head", PROMPT_HEADS)
def test_gradient_checkpointing_changes_nothing_or_is_refused(head: str, reentrant: bool) -> None:
    """Some versions of transformers run a layer's hooks a second time, outside any forward: then it is refused."""
    model, inputs = fresh_model(LLAMA), LLAMA.inputs()

    def gradients() -> list[Tensor]:
        shifts = random_shifts(model, head)
        with mc.patch(model, shifts):
            mc.losses.lm(logits_of(model, inputs), inputs["input_ids"], inputs["attention_mask"].bool()).backward()
        return [p.grad for p in shifts.parameters()]

    plain = gradients()
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    try:
        found = gradients()
    except mc.PatchStateError as error:
        assert "gradient checkpointing runs layers again" in str(error)  # noqa: PT017 - one of two right answers
    else:
        for a, b in zip(found, plain, strict=True):
            torch.testing.assert_close(a, b)
