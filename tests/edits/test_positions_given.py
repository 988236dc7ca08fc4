"""Positions in a forward: every head against the oracle, what the caller says, and what is refused."""

from __future__ import annotations

import dataclasses
import inspect
import threading
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationMixin

import mimic_core as mc
from mimic_core.types import SITES, TOKEN_SITES
from tests.support.cases import (
    BY_NAME,
    HEADS,
    UNLIMITED_HEADS,
    as_dtype,
    fresh_model,
    logits_of,
    model_of,
    random_shifts,
)
from tests.support.oracle_model import shifted
from tests.support.oracle_params import decoder_layers, oracle_params
from tests.support.snapshot import snapshot

LLAMA = BY_NAME["llama"]
POSITIONS = ["prompt", "prompt_end", "generated", ("first", 2), ("last", 3), ("first", 2, "last", 3)]
LIMITED_HEADS = [head for head in HEADS if head not in UNLIMITED_HEADS]


def with_positions(model: nn.Module, head: str, positions: Any) -> mc.ShiftStack:
    """The stack of `random_shifts` with other positions."""
    shifts = mc.build_shifts(model, dataclasses.replace(HEADS[head], positions=positions))
    shifts.load_state_dict(random_shifts(model, head).state_dict())
    return shifts


def chosen_tokens(positions: Any, prompt: Tensor, real: Tensor) -> Tensor:
    """One row a sample, by counting."""
    rank, left = prompt.cumsum(1), prompt.flip(1).cumsum(1).flip(1)
    return {
        "prompt": prompt,
        "prompt_end": prompt & (left == 1),
        "generated": real & ~prompt,
        ("first", 2): prompt & (rank <= 2),
        ("last", 3): prompt & (left <= 3),
        ("first", 2, "last", 3): prompt & ((rank <= 2) | (left <= 3)),
    }[positions]


@pytest.mark.parametrize("positions", [*POSITIONS, "mask"], ids=str)
@pytest.mark.parametrize(
    ("name", "head"), [*(("llama", head) for head in LIMITED_HEADS), ("llava", "mimic"), ("llava", "live")]
)
def test_every_head_equals_the_oracle_on_rows_with_an_answer(name: str, head: str, positions: Any) -> None:
    """Training rows: prompt, answer, padding. Logits and every gradient."""
    case = BY_NAME[name]
    model, wide = model_of(case), model_of(case, "eager", torch.float64)
    inputs = case.inputs()
    real = inputs["attention_mask"].bool()
    prompt = real & (torch.arange(11) < torch.tensor([[7], [6]]))
    given = torch.rand(2, 11, generator=torch.Generator().manual_seed(3)) < 0.5
    chosen = given if positions == "mask" else chosen_tokens(positions, prompt, real)
    weights = torch.randn(int(real.sum()), 1, dtype=torch.float64)

    def loss_of(logits: Tensor) -> Tensor:
        return (logits[real].double().log_softmax(-1) * weights).square().mean()

    shifts = random_shifts(model, head) if positions == "mask" else with_positions(model, head, positions)
    layers = decoder_layers(wide)
    params, leaves = oracle_params(shifts, len(layers))
    with shifted(wide, layers, params, chosen=chosen.tolist()):
        wanted = logits_of(wide, as_dtype(inputs, torch.float64))
        loss_of(wanted).backward()
    with mc.patch(model, shifts) as handle:
        with handle.at(positions=given) if positions == "mask" else handle.at(prompt=prompt):
            found = logits_of(model, inputs)
        loss_of(found).backward()
    torch.testing.assert_close(found[real].double(), wanted[real], atol=2e-4, rtol=2e-4)
    largest = max(x.grad.abs().max().item() for x in leaves.values() if x.grad is not None)
    for key, p in shifts.named_parameters():
        assert p.grad is not None
        assert p.grad.abs().max() > 0
        torch.testing.assert_close(p.grad.double(), leaves[key].grad, atol=3e-4 * largest, rtol=0)


@pytest.mark.parametrize("site", TOKEN_SITES)
def test_a_hook_is_limited_at_every_site_of_tokens(site: str) -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    where = torch.zeros(2, 11, dtype=torch.bool)
    where[0, 3] = where[1, 5:7] = True
    for positions in (where, "prompt_end", ("last", 2)):
        with mc.capture(model, site, layers=[1], grad=False) as before:
            logits_of(model, inputs)
        with mc.hook(model, site, lambda value, at: value * 2 + 1, layers=[1], positions=positions):
            with mc.capture(model, site, layers=[1], grad=False) as after:
                logits_of(model, inputs)
        real = inputs["attention_mask"].bool()
        chosen = where if isinstance(positions, Tensor) else chosen_tokens("prompt_end", real, real)
        if isinstance(positions, tuple):
            chosen = real & (real.flip(1).cumsum(1).flip(1) <= 2)
        old, new = (x.states[1].transpose(1, 2) if site == "query" else x.states[1] for x in (before, after))
        assert torch.equal(new[chosen], old[chosen] * 2 + 1)
        assert torch.equal(new[~chosen], old[~chosen])


def test_a_limited_edit_in_place_stays_at_its_positions() -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()

    def in_place(value: Tensor, at: mc.At) -> None:
        value.mul_(2)

    results = []
    for fn in (in_place, lambda value, at: value * 2):
        with torch.no_grad(), mc.hook(model, "mlp_out", fn, positions="prompt_end"):
            results.append(logits_of(model, inputs))
    assert torch.equal(*results)


@pytest.mark.parametrize("site", [site for site in SITES if site not in TOKEN_SITES])
def test_sites_of_the_cache_have_no_positions(site: str) -> None:
    model = fresh_model(LLAMA)
    state = snapshot(model)
    with pytest.raises(mc.PatchStateError, match=f"at site '{site}' cannot be limited to positions"):
        mc.hook(model, site, lambda value, at: None, positions="prompt")
    with pytest.raises(mc.PatchStateError, match="give a mask"):
        mc.capture(model, site, where="prompt")
    assert snapshot(model) == state
    if site != "lse":
        with mc.hook(model, site, lambda value, at: value) as handle, handle.at(positions=torch.ones(2, 11).bool()):
            with pytest.raises(mc.PatchStateError, match="cannot be limited to positions"):
                logits_of(model, LLAMA.inputs())


@pytest.mark.parametrize("positions", ["end", ("first", 0), ("first", True), ("middle", 2), 3, None, ("last", 2.0)])
def test_unknown_positions(positions: Any, no_shape_checks: None) -> None:
    model = model_of(LLAMA)
    for ask in (
        lambda: mc.hook(model, "mlp_out", lambda value, at: None, positions=positions),
        lambda: mc.build_shifts(model, "mimic", positions=positions),
        lambda: mc.LIVEConfig(positions=positions),
    ):
        with pytest.raises(mc.UnknownNameError, match="positions should be 'all', 'prompt'"):
            ask()


def test_a_capture_by_positions() -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    real = inputs["attention_mask"].bool()
    ends = chosen_tokens("prompt_end", real, real)
    with mc.capture(model, ["layer_out", "query"], where=ends) as wanted:
        logits_of(model, inputs)
    with mc.capture(model, ["layer_out", "query"], where="prompt_end") as found:
        logits_of(model, inputs)
    for site in ("layer_out", "query"):
        assert torch.equal(found[site][2], wanted[site][2])
    assert torch.equal(found.samples, wanted.samples)


def test_labels_need_the_prompt() -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    labels = inputs["input_ids"].masked_fill(torch.arange(11) < 6, -100)
    real = inputs["attention_mask"].bool()
    shifts = random_shifts(model, "function-vector")
    with mc.patch(model, shifts) as handle:
        with pytest.raises(mc.PatchStateError, match="was given labels"):
            model(**inputs, labels=labels, use_cache=False)
        with handle.at(prompt=(labels == -100) & real):
            model(**inputs, labels=labels, use_cache=False).loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in shifts.parameters())
        logits_of(model, inputs)  # without labels, the row is the prompt


@pytest.mark.newest  # transformers 5.1 refuses early exit with a minimal length
@pytest.mark.parametrize("early_exit", [False, True])
def test_an_assistant(early_exit: bool) -> None:
    """Assisted decoding gives the text of greedy decoding, with the edit in the model and in its assistant."""
    model, assistant = fresh_model(LLAMA), fresh_model(LLAMA)
    ids = LLAMA.sample(0)["input_ids"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    helped = {"assistant_early_exit": 2} if early_exit else {"assistant_model": assistant}
    for head in ("function-vector", "mimic"):
        shifts = random_shifts(model, head)
        with mc.patch(model, shifts):
            plain = model.generate(ids, **options, return_dict_in_generate=True, output_logits=True)
            with nullcontext() if early_exit else mc.patch(assistant, random_shifts(assistant, head)):
                found = model.generate(ids, **options, **helped, return_dict_in_generate=True, output_logits=True)
        assert torch.equal(found.sequences, plain.sequences)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(plain.logits), atol=3e-5, rtol=1e-4)


def test_what_a_call_says_is_of_its_thread() -> None:
    model, inputs = fresh_model(LLAMA), LLAMA.inputs()
    shifts = random_shifts(model, "mimic")
    with torch.no_grad(), mc.patch(model, shifts) as handle:
        everywhere = logits_of(model, inputs)
        here = torch.zeros(2, 11, dtype=torch.bool)
        found: list[Tensor] = []
        with handle.at(positions=here):
            nowhere = logits_of(model, inputs)
            other = threading.Thread(target=lambda: found.append(_without_grad(model, inputs)))
            other.start()
            other.join()
        assert torch.equal(found[0], everywhere)
        assert torch.equal(logits_of(model, inputs), everywhere)
    assert torch.equal(nowhere, logits_of(model, inputs))


def _without_grad(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return logits_of(model, inputs)


def test_what_a_caller_says_is_checked(no_shape_checks: None) -> None:
    model, inputs = fresh_model(LLAMA), LLAMA.inputs()
    handle = mc.patch(model, random_shifts(model, "mimic"))
    shape = torch.ones(2, 11, dtype=torch.bool)
    for wrong in ({}, {"positions": shape, "prompt": shape}, {"positions": shape.long()}, {"prompt": shape[0]}):
        with pytest.raises(mc.ShapeError), handle.at(**wrong):
            pass
    with handle.at(positions=shape[:, :9]), pytest.raises(mc.ShapeError, match=r"\[2, 9\], but the decoder runs"):
        logits_of(model, inputs)
    limited = mc.patch(model, with_positions(model, "live", "prompt"))
    with limited.at(prompt=shape[:1].expand(3, -1)), pytest.raises(mc.ShapeError, match="3 rows"):
        logits_of(model, inputs)
    handle.remove()
    with pytest.raises(mc.PatchStateError, match="was removed"), handle.at(positions=shape):
        pass


def test_an_edit_of_generated_tokens_needs_to_know_them() -> None:
    model, inputs = fresh_model(LLAMA), LLAMA.inputs()
    with mc.patch(model, with_positions(model, "live", "generated")):
        with pytest.raises(mc.PatchStateError, match="acts on the tokens after the prompt"):
            logits_of(model, inputs)


def test_positions_are_saved(tmp_path: Any) -> None:
    model = fresh_model(LLAMA)
    for positions in ("generated", ("last", 3)):
        mc.save_shifts(with_positions(model, "live", positions), tmp_path / str(positions))
        assert mc.load_shifts(tmp_path / str(positions), model).config.positions == positions


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_caller_and_gradient_checkpointing(reentrant: bool) -> None:
    """The second run of a layer is outside the forward, perhaps outside `at`: right, or an error."""
    model, inputs = fresh_model(LLAMA), LLAMA.inputs()
    chosen = torch.rand(2, 11, generator=torch.Generator().manual_seed(0)) < 0.5

    def gradients() -> list[Tensor]:
        shifts = random_shifts(model, "mimic")
        with mc.patch(model, shifts) as handle:
            with handle.at(positions=chosen):
                loss = logits_of(model, inputs).square().mean()
            loss.backward()
        return [p.grad for p in shifts.parameters()]

    plain = gradients()
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    try:
        found = gradients()
    except (mc.PatchStateError, torch.utils.checkpoint.CheckpointError):
        return
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_a_gradient_of_exactly_zero_is_told() -> None:
    """The vector sits on the last token of a row that ends with the answer, so the loss does not depend on it."""
    model, inputs = fresh_model(LLAMA), LLAMA.sample(0)
    ids = inputs["input_ids"]
    shifts = random_shifts(model, "function-vector")

    def loss_of(logits: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits[0, 5:-1], ids[0, 6:])

    with mc.patch(model, shifts) as handle:
        with pytest.warns(UserWarning, match=r"the gradient is exactly 0 .*handle\.at\(prompt=mask\)"):
            loss_of(logits_of(model, inputs)).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with handle.at(prompt=torch.arange(11)[None] < 6):
                loss_of(logits_of(model, inputs)).backward()
            logits_of(model, inputs)[0, -1].sum().backward()


def test_a_hook_that_runs_the_model_inside_generate() -> None:
    model, ids = model_of(LLAMA), LLAMA.sample(0)["input_ids"]
    seen = []

    def read(value: Tensor, at: mc.At) -> None:
        seen.append(at.prompt_end.nonzero().tolist())
        if len(seen) == 1:
            model(torch.cat([ids, ids[:, :4]], dim=1), use_cache=False)

    with mc.hook(model, "layer_out", read, layers=[1]):
        model.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False, use_cache=False)
    assert seen == [[[0, 10]], [[0, 14]], [[0, 10]]]


def test_generate_is_wrapped_while_it_is_needed() -> None:
    plain = GenerationMixin.generate
    model = fresh_model(LLAMA)
    with mc.patch(model, random_shifts(model, "task-vector")), mc.hook(model, "mlp_out", lambda value, at: None):
        assert GenerationMixin.generate is not plain
        assert inspect.signature(GenerationMixin.generate) == inspect.signature(plain)
    assert GenerationMixin.generate is plain
