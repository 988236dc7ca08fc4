"""The laws of patching, each over every model family, head and attention implementation."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mimic_core as mc
from mimic_core.edits.interface import SLOT
from tests.support.cases import (
    CASES,
    LAW_HEADS,
    PROMPT_HEADS,
    Case,
    as_dtype,
    fresh_model,
    logits_of,
    model_of,
    over_attention,
    over_attention_of,
    over_cases,
    over_heads,
    random_shifts,
    zero_vectors,
)
from tests.support.oracle_model import shifted
from tests.support.oracle_params import decoder_layers, oracle_params
from tests.support.snapshot import snapshot

EXACT_HEADS = [head for head in LAW_HEADS if head != "mimic-all-keys"]
CACHED_HEADS = [head for head in EXACT_HEADS if head not in PROMPT_HEADS]
CLOSE = {"atol": 3e-5, "rtol": 1e-4}


def generate(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    inputs = {name: x for name, x in inputs.items() if name != "position_ids"}
    return model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, **options)


@over_attention_of()
@over_cases
def test_zero_vector_is_the_unpatched_model(case: Case, head: str, attention: str) -> None:
    model = model_of(case, attention)
    for inputs in (case.inputs("right"), case.inputs("left"), case.sample(0)):
        before = logits_of(model, inputs)
        with mc.patch(model, zero_vectors(random_shifts(model, head))):
            assert torch.equal(logits_of(model, inputs), before)


@over_attention
@pytest.mark.parametrize(
    ("case", "options"),
    [(case, {}) for case in CASES]
    # Idefics does not support a static cache.
    + [(case, {"cache_implementation": "static"}) for case in CASES if case.name != "idefics"],
    ids=str,
)
def test_zero_vector_generates_the_same(case: Case, attention: str, options: dict[str, Any]) -> None:
    model, inputs = model_of(case, attention), case.inputs("left")
    kept = {"return_dict_in_generate": True, "output_logits": True, **options}
    before = generate(model, inputs, **kept)
    with mc.patch(model, zero_vectors(random_shifts(model, "mimic"))):
        after = generate(model, inputs, **kept)
    assert torch.equal(after.sequences, before.sequences)
    assert all(torch.equal(a, b) for a, b in zip(after.logits, before.logits, strict=True))


@over_attention_of()
@over_cases
def test_removal_leaves_nothing(case: Case, head: str, attention: str) -> None:
    model, inputs = model_of(case, attention), case.inputs()
    state, before = snapshot(model), logits_of(model, inputs)
    handle = mc.patch(model, random_shifts(model, head))
    assert not torch.allclose(logits_of(model, inputs), before, atol=1e-3)
    with handle.disabled():
        assert torch.equal(logits_of(model, inputs), before)
    handle.remove()
    handle.remove()
    assert snapshot(model) == state
    assert torch.equal(logits_of(model, inputs), before)


def test_a_patched_model_of_an_earlier_test_goes_before_the_law(let_go_of_patched_models: Callable[[], None]) -> None:
    gc.disable()
    try:
        mc.patch(model := fresh_model(CASES[3]), random_shifts(model, "mimic"))
        del model
        state = snapshot(model_of(CASES[3]))
        let_go_of_patched_models()
        assert snapshot(model_of(CASES[3])) != state, "the wrap went with the other model: so it must not go in a law"
        state = snapshot(model_of(CASES[3]))
        gc.collect()
        assert snapshot(model_of(CASES[3])) == state
    finally:
        gc.enable()


@over_cases
@over_heads
def test_an_error_midway_leaves_the_model_as_it_was(case: Case, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mimic_core.edits.install import Installation

    model = model_of(case)
    state, shifts, calls = snapshot(model), random_shifts(model, head), []
    attach = Installation._attach

    def third_one_fails(self: Installation, *args: Any) -> None:
        calls.append(args)
        if len(calls) == min(3, len(shifts)):
            raise MemoryError("midway")
        attach(self, *args)

    monkeypatch.setattr(Installation, "_attach", third_one_fails)
    with pytest.raises(MemoryError, match="midway"):
        mc.patch(model, shifts)
    assert snapshot(model) == state


@over_attention
@over_cases
@pytest.mark.parametrize("site", ["query", "value", "attn_heads", "attn_out", "mlp_out", "layer_out", "layer_in"])
def test_an_exception_inside_forward_leaves_the_handle_removable(case: Case, attention: str, site: str) -> None:
    model, inputs = model_of(case, attention), case.inputs()
    state, before = snapshot(model), logits_of(model, inputs)

    def fail(value: Tensor, at: mc.At) -> None:
        raise KeyError(f"inside layer {at.layer}")

    with mc.patch(model, random_shifts(model, "mimic")), mc.hook(model, site, fail, layers=[2]):
        with pytest.raises(KeyError, match="inside layer 2"):
            logits_of(model, inputs)
    assert snapshot(model) == state
    assert torch.equal(logits_of(model, inputs), before)
    with mc.patch(model, zero_vectors(random_shifts(model, "mimic"))):
        assert torch.equal(logits_of(model, inputs), before)


@over_attention_of(CACHED_HEADS)
@over_cases
def test_cached_decoding_is_the_full_forward(case: Case, head: str, attention: str) -> None:
    model, inputs = model_of(case, attention), case.inputs("left")
    with mc.patch(model, random_shifts(model, head)):
        # Neither padding nor an image may come out: read again, they would mean something else.
        barred = [0, *case.image_ids]
        out = generate(model, inputs, return_dict_in_generate=True, output_logits=True, suppress_tokens=barred)
        new = out.sequences[:, inputs["input_ids"].shape[1] :]
        full = logits_of(model, case.longer(inputs, new[:, :-1]))
    for step, wanted in enumerate(out.logits):
        torch.testing.assert_close(full[:, inputs["input_ids"].shape[1] - 1 + step], wanted, **CLOSE)


@over_attention_of(EXACT_HEADS)
@over_cases
def test_padding_does_not_matter(case: Case, head: str, attention: str) -> None:
    model = model_of(case, attention)
    with mc.patch(model, random_shifts(model, head)):
        alone = [logits_of(model, case.sample(i))[0] for i in range(2)]
        for padding in ("right", "left"):
            inputs = case.inputs(padding)
            together = logits_of(model, inputs)
            for i in range(2):
                real = inputs["attention_mask"][i].bool()
                torch.testing.assert_close(together[i][real], alone[i], **CLOSE)


@over_attention_of()
@over_cases
def test_logits_and_gradients_equal_the_oracle(case: Case, head: str, attention: str) -> None:
    inputs, wide_model = case.inputs(), model_of(case, "eager", torch.float64)
    layers = decoder_layers(wide_model)
    real = inputs["attention_mask"].bool()
    weights = torch.randn(int(real.sum()), 1, dtype=torch.float64)

    def loss_of(logits: Tensor) -> Tensor:
        return (logits[real].double().log_softmax(-1) * weights).square().mean()

    shifts = random_shifts(model_of(case, attention), head)
    params, leaves = oracle_params(shifts, len(layers))
    last = (real.cumsum(1) == real.sum(1, keepdim=True)) & real
    with shifted(wide_model, layers, params, chosen=last.tolist() if head in PROMPT_HEADS else None):
        wanted = logits_of(wide_model, as_dtype(inputs, torch.float64))
        loss_of(wanted).backward()
    largest = {name: leaf.grad.abs().max().item() for name, leaf in leaves.items() if leaf.grad is not None}
    assert largest.keys() == leaves.keys()
    assert min(largest.values()) > 0
    for name, leaf in leaves.items():
        if leaf.numel() == 1:
            # A gradient of one number (LIVE's scale, a weight) may nearly cancel, a thousandth of the other layers',
            # while its rounding error is as large as theirs, so it is measured by the largest there is.
            largest[name] = max(largest.values())
    # transformers' eager attention takes its softmax in fp32 even in an fp64 model, so it is as near as fp32 there.
    single = 2e-4
    for dtype, tolerance in ((torch.float64, 1e-9 if attention == "sdpa" else single), (torch.float32, single)):
        model = model_of(case, attention, dtype)
        ours = random_shifts(model, head).to(dtype)
        with mc.patch(model, ours):
            found = logits_of(model, as_dtype(inputs, dtype))
            loss_of(found).backward()
        torch.testing.assert_close(found[real].double(), wanted[real], atol=tolerance, rtol=tolerance)
        for name, p in ours.named_parameters():
            assert p.grad is not None, name
            atol = tolerance * largest[name]
            torch.testing.assert_close(
                p.grad.double(), leaves[name].grad, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("head", ["mimic", "mimic-shared", "live", "mimic-and-mlp"])
@over_cases
def test_gradient_checkpointing_changes_nothing(case: Case, head: str, reentrant: bool) -> None:
    model, inputs = fresh_model(case), case.inputs()
    labels = inputs["attention_mask"].bool()

    def gradients() -> list[Tensor]:
        shifts = random_shifts(model, head)
        with mc.patch(model, shifts):
            with mc.capture(model, "attn_out", where=labels, grad=not reentrant) as seen:
                loss = mc.losses.lm(logits_of(model, inputs), inputs["input_ids"], labels)
            if not reentrant:
                loss = loss + sum(x.square().mean() for x in seen.states.values())
            loss.backward()
        return [p.grad for p in shifts.parameters()]

    plain = gradients()
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    # A reentrant checkpoint passes gradients on only if its input asks for one, which a frozen embedding doesn't.
    model.enable_input_require_grads()
    for found, wanted in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(found, wanted)


@over_heads
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_only_the_text_decoder_is_shifted(case: Case, head: str) -> None:
    model, inputs = model_of(case), case.inputs()
    inside = [f"{layer.path}." for layer in mc.adapter_for(model).spec(model).layers]
    # Everything that runs before the first decoder layer: vision tower, connector, resampler, token embeddings.
    before_decoder = [
        m
        for name, m in model.named_modules()
        if any(part in name for part in ("vision", "connector", "projector", "perceiver", "embed_tokens"))
    ]
    outputs: list[list[Tensor]] = [[], []]

    def run(record: list[Tensor]) -> None:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                record.append(output)

        hooks = [m.register_forward_hook(keep) for m in before_decoder]
        logits_of(model, inputs)
        for hook in hooks:
            hook.remove()

    run(outputs[0])
    state = {name: set(m.__dict__) for name, m in model.named_modules()}
    with mc.patch(model, random_shifts(model, head)):
        run(outputs[1])
        touched = [name for name, m in model.named_modules() if set(m.__dict__) != state[name]]
        # The decoder's own forward is replaced, to see when it begins and ends.
        touched.remove(next(name for name, m in model.named_modules() if m is mc.adapter_for(model).decoder(model)))
        slotted = [name for name in touched if SLOT in model.get_submodule(name).__dict__]
    assert len(outputs[0]) > 5
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    assert all(any(f"{name}.".startswith(path) for path in inside) for name in touched)
    if head.startswith("mimic") and head != "mimic-one-layer":
        assert len(slotted) == len(inside)


@over_attention_of()
@over_cases
def test_saved_and_loaded_shifts_give_the_same_logits(case: Case, head: str, attention: str, tmp_path: Any) -> None:
    model, inputs = model_of(case, attention), case.inputs()
    keys, shifts = list(model.state_dict()), random_shifts(model, head)
    with mc.patch(model, shifts):
        wanted = logits_of(model, inputs)
        assert list(model.state_dict()) == keys
        mc.save_shifts(shifts, tmp_path / "shifts")
    loaded = mc.load_shifts(tmp_path / "shifts", model)
    assert loaded.config == shifts.config
    assert [(n, p.shape) for n, p in loaded.named_parameters()] == [(n, p.shape) for n, p in shifts.named_parameters()]
    with mc.patch(model, loaded):
        assert torch.equal(logits_of(model, inputs), wanted)


@over_cases
def test_a_patched_model_saves_as_itself(case: Case, tmp_path: Any) -> None:
    model = fresh_model(case)
    model.save_pretrained(tmp_path / "plain")
    with mc.patch(model, random_shifts(model, "mimic-and-mlp")):
        model.save_pretrained(tmp_path / "patched")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "patched" / name).read_bytes()


def bypassed(module: nn.Module) -> Callable[..., Any]:
    """An attention forward that does not go through the interface."""

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return hidden_states, None

    return forward


@over_cases
def test_a_site_that_is_never_reached_raises(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = fresh_model(case), case.inputs()
    layers = decoder_layers(model)
    monkeypatch.setattr(layers[1].self_attn, "forward", bypassed(layers[1].self_attn))
    with mc.patch(model, random_shifts(model, "mimic")) as handle:
        with pytest.raises(
            mc.PatchStateError, match=r"never reached attn_heads of layer 1, so the edits there did noth"
        ):
            logits_of(model, inputs)
        with handle.disabled():
            logits_of(model, inputs)
    with mc.patch(model, random_shifts(model, "live")):
        logits_of(model, inputs)


def test_parameter_counts_of_the_paper() -> None:
    """On Idefics-9b, whose config class has these sizes by default. The papers say 0.26, 0.13, 2.2 and 1.18 M."""
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    with torch.device("meta"):
        model = IdeficsForVisionText2Text(IdeficsConfig())
    configs = (mc.MimICConfig(), mc.LIVEConfig(), mc.VirtualKVConfig(n=8, rank=8), mc.HyperICLConfig())
    stacks = [mc.build_shifts(model, config) for config in configs]
    counts = {stack.name: sum(p.numel() for p in stack.parameters()) for stack in stacks}
    assert counts == {"mimic": 263_168, "live": 131_104, "virtual_kv": 2_228_224, "hyper_icl": 1_180_672}
    assert json.loads(json.dumps(counts)) == counts
