"""Models that are none of transformers': how their adapter is found, and that LIVE and captures are right in them."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mimic_core as mc
from tests.support.cases import fresh_model
from tests.support.conformance import LLAMA
from tests.support.plain_models import (
    VOCABULARY,
    Block,
    Captioner,
    Encoded,
    NanoGPT,
    caption_inputs,
    decode,
    pad_right,
)

OUTPUTS = ("attn_out", "mlp_out", "layer_out")
ALL = mc.types.SITES
NANO = "tests.support.plain_models.NanoGPT"


def made(kind: Any = NanoGPT, *args: Any) -> Any:
    torch.manual_seed(0)
    return kind(*args).eval().requires_grad_(False)


def sites_of(model: nn.Module) -> list[tuple[str, ...]]:
    return [layer.sites for layer in mc.adapter_for(model).spec(model).layers]


class Paths(mc.PathAdapter):
    layers, attention, mlp, down = "transformer.h", "attn", "mlp", "c_proj"


class Narrow(Paths):
    sites = ("layer_out",)


# --- every law that goes for them


def laws(model: nn.Module, inputs: Any = None, **how: Any) -> dict[str, str]:
    before = [sorted(vars(m)) for m in model.modules()]
    report = mc.testing.check_adapter(model, inputs, **how)
    report.raise_for_failures()
    assert [sorted(vars(m)) for m in model.modules()] == before
    return {row.law: row.detail if row.verdict == "not applicable" else row.verdict for row in report.rows}


LIKE_ALL = ("MimIC", "LIVE", "zero shift", "removal", "saved and loaded")
usual = pytest.mark.usefixtures("no_shape_checks", "functions_made_in_functions_unchecked")


@usual
@pytest.mark.parametrize("adapter", [None, Paths])
def test_every_law_holds_for_a_model_like_nanogpt(adapter: Any) -> None:
    found = laws(made(), adapter=adapter, decode=decode, pad=pad_right)
    assert {law for law, verdict in found.items() if verdict == "passed"} >= {
        *ALL, "own layer", "coverage", "MimIC", "shapes", "LIVE", "zero shift", "zero shift generates", "removal",
        "all or nothing", "exception in forward", "never reached", "saved and loaded", "cached decoding", "padding",
    }  # fmt: skip


@usual
def test_what_the_kit_is_not_told_does_not_apply() -> None:
    found = laws(made())
    assert found["cached decoding"].endswith("no generate of transformers, and no `decode` was given")
    assert found["padding"] == "the model takes no idx with an attention_mask, and no `pad` was given"


@usual
def test_the_kit_sees_a_wrong_decode() -> None:
    def forgets(model: nn.Module, prompt: Any, new: Tensor) -> Tensor:
        return decode(model, {"idx": prompt["idx"][:, 1:]}, new)

    report = mc.testing.check_adapter(made(), decode=forgets)
    assert report["cached decoding"].verdict == "not applicable", "the unpatched model disagrees with itself"

    def shifts_the_prompt_alone(model: nn.Module, prompt: Any, new: Tensor) -> Tensor:
        off = [handle.disabled() for handle in mc.handles(model)]
        logits = decode(model, prompt, new)
        for one in off:
            one.__enter__()
        try:
            return torch.cat([logits[:, :1], decode(model, prompt, new)[:, 1:]], dim=1)
        finally:
            for one in off:
                one.__exit__(None, None, None)

    report = mc.testing.check_adapter(made(), decode=shifts_the_prompt_alone)
    assert report["cached decoding"].verdict == "failed"


@usual
def test_every_law_holds_for_torchs_decoder() -> None:
    """Its cross-attention is not shifted."""
    found = laws(made(Captioner), caption_inputs(), adapter=mc.GenericAdapter(example=caption_inputs()))
    assert [found[law] for law in (*ALL, *LIKE_ALL)] == ["passed"] * (len(ALL) + len(LIKE_ALL))


@pytest.fixture
def slow_path() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@usual
def test_every_law_holds_for_torchs_encoder(slow_path: None) -> None:
    found = laws(made(Encoded))
    assert [found[law] for law in (*ALL, *LIKE_ALL)] == ["passed"] * (len(ALL) + len(LIKE_ALL))


@usual
@pytest.mark.parametrize("style", ["llama", "gpt-neox", "phi"])
def test_every_law_holds_for_litgpt(style: str) -> None:
    litgpt = pytest.importorskip("litgpt", reason="litgpt is not installed; .ci/litgpt.txt has what it needs")
    options: dict[str, dict[str, Any]] = {
        "llama": {"n_query_groups": 2, "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "bias": False},
        "gpt-neox": {"parallel_residual": True, "rotary_percentage": 0.5},
        "phi": {"parallel_residual": True, "shared_attention_norm": True, "lm_head_bias": True},
    }
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 64, "vocab_size": 61, "intermediate_size": 48}
    if style == "llama":
        options[style] |= {"parallel_residual": False, "rotary_percentage": 1.0}

    def lit_decode(model: nn.Module, prompt: Any, new: Tensor) -> Tensor:
        t = prompt["idx"].shape[1]
        model.set_kv_cache(len(new), t + new.shape[1])
        try:
            first = model(prompt["idx"], torch.arange(t))[:, -1]
            rest = [model(x, torch.tensor([t + i]))[:, -1] for i, x in enumerate(new.split(1, dim=1))]
        finally:
            model.clear_kv_cache()
        return torch.stack([first, *rest], dim=1)

    model = made(litgpt.GPT, litgpt.Config(**sizes, padded_vocab_size=61, **options[style]))
    found = laws(model, decode=lit_decode, pad=pad_right)
    laws_of_it = (*ALL, *LIKE_ALL, "cached decoding", "padding")
    assert [found[law] for law in laws_of_it] == ["passed"] * len(laws_of_it)
    mc.register_adapter(for_class="litgpt.GPT")(Narrow)
    assert sites_of(model) == [("layer_out",)] * 2


# --- what is found


def test_torchs_encoder_runs_as_one_kernel() -> None:
    with pytest.raises(mc.UnsupportedModelError, match=r"as one kernel, .*set_fastpath_enabled\(False\) first"):
        mc.adapter_for(made(Encoded))


def test_an_example_says_what_a_model_runs_on() -> None:
    model = made(Captioner)
    with pytest.raises(
        mc.UnsupportedModelError, match=r"missing 1 required .*: 'image'.*GenericAdapter\(example="
    ) as e:
        mc.build_shifts(model, "live")
    assert f"@mimic_core.register_adapter(for_class='{NANO.replace('NanoGPT', 'Captioner')}')" in str(e.value)
    inputs = caption_inputs()
    adapter = mc.GenericAdapter(example=(inputs["tokens"], inputs["image"]))
    assert mc.build_shifts(model, "live", adapter=adapter).layers == (0, 1)
    square = {name: x[:, :2] for name, x in inputs.items()}
    alike = {"tokens": inputs["tokens"][:, :5], "image": inputs["image"]}
    for example, message in (
        (square, r"\[b t\] is \[2, 2\]"),
        ({"tokens": 3}, "no tensor of tokens"),
        (alike, "attention to 'image' of the example could not be told .* because both are 5"),
    ):
        with pytest.raises(mc.UnsupportedModelError, match=message):
            mc.adapter_for(model, mc.GenericAdapter(example=example))
    mc.adapter_for(model.double(), mc.GenericAdapter(example=inputs))  # it is cast as the model was


def test_tokens_on_the_first_axis_are_no_sites() -> None:
    with pytest.raises(mc.UnsupportedModelError, match=r"TransformerDecoderLayer returns \(7, 2, 32\), not \[b t c\]"):
        mc.describe(made(Captioner, False), adapter=mc.GenericAdapter(example=caption_inputs()))


class Residual(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return x + self.inside(x, *rest)


class AddsInside(nn.Module):
    """Attention and MLP, as other code bases have them: with the residual inside."""

    def __init__(self) -> None:
        super().__init__()
        block = Block()
        self.attention, self.mlp = Residual(block.attn), Residual(block.mlp)

    def forward(self, x: Tensor, past: Any) -> Tensor:
        return self.mlp(self.attention(x, past))


class Part(nn.Module):
    """A list of parts is not a list of layers: the residual is added outside."""

    def __init__(self) -> None:
        super().__init__()
        self.SelfAttention = Block().attn

    def forward(self, x: Tensor, past: Any) -> Tensor:
        return self.SelfAttention(x, past)


def test_what_holds_the_residual_is_told_from_what_does_not() -> None:
    assert sites_of(made()) == [ALL] * 3
    inside = made(NanoGPT, AddsInside)
    assert sites_of(inside) == [ALL] * 3
    block, adapter = inside.transformer.h[1], mc.adapter_for(inside)
    assert adapter.module(inside, 1, "mlp_out") is block.mlp.inside
    assert adapter.module(inside, 1, "attn_out") is block.attention.inside
    parts = made(NanoGPT, Part)
    assert sites_of(parts) == [ALL[:6]] * 3, "its argument may be as odd"
    assert "Part returns what does not hold its input" in mc.adapter_for(parts).spec(parts).layers[0].missing


def test_positions_are_said_by_a_mask_or_refused() -> None:
    model, ids = made(), torch.arange(10).view(2, 5)
    shifts = mc.build_shifts(model, "task_vector", layers=(1,))
    with torch.no_grad():
        next(iter(shifts)).weight.fill_(1.0)
        next(iter(shifts)).vector.normal_()
    mask = torch.tensor([[False, True, False, False, False], [False, False, False, False, True]])
    with torch.no_grad(), mc.patch(model, shifts) as handle:
        with pytest.raises(mc.PatchStateError, match=r"NanoGPT is none of transformers' models, .*positions=mask"):
            model(ids)
        with handle.at(prompt=mask), pytest.raises(mc.PatchStateError, match="NanoGPT is none of transformers'"):
            model(ids)
        with handle.at(positions=mask), mc.capture(model, "layer_out", layers=[1]) as seen:
            model(ids)
    with torch.no_grad(), mc.capture(model, "layer_out", layers=[1]) as plain:
        model(ids)
    moved = (seen["layer_out"][1] != plain["layer_out"][1]).any(-1)
    assert torch.equal(moved, mask)
    with torch.no_grad(), mc.capture(model, "layer_out", where=mask, layers=[1]) as some:
        model(ids)
    assert torch.equal(some["layer_out"][1], plain["layer_out"][1][mask])
    with torch.no_grad(), mc.capture(model, "mlp_out", where="prompt_end"), pytest.raises(mc.PatchStateError):
        model(ids)


def test_merging_is_refused() -> None:
    with pytest.raises(mc.UnsupportedModelError, match="NanoGPT is no transformers model"):
        mc.merge(model := made(), mc.build_shifts(model, "mlp_bias"))


# --- which adapter


class Below(NanoGPT):
    pass


def test_an_adapter_is_found_by_class() -> None:
    model = made(Below)
    mc.register_adapter(for_class=NANO)(Paths)
    assert type(mc.adapter_for(model)) is Paths
    mc.register_adapter(for_class=Below)(Narrow)
    assert (type(mc.adapter_for(model)), type(mc.adapter_for(made()))) == (Narrow, Paths)
    llama = fresh_model(LLAMA)
    mc.register_adapter(for_class="transformers.LlamaForCausalLM")(
        type("Own", (mc.PathAdapter,), {"layers": "model.layers"})
    )
    assert type(mc.adapter_for(llama)).__name__ == "Own", "a class is nearer than a model type"
    with pytest.raises(ValueError, match="NanoGPT' is already registered"):
        mc.register_adapter(for_class=NanoGPT)(Narrow)


def test_an_adapter_that_was_handed_over_stays(no_shape_checks: None) -> None:
    model, ids = made(), torch.arange(10).view(2, 5)
    calls: list[Any] = [
        lambda x, a: mc.build_shifts(x, "live", site="layer_out", adapter=a),
        lambda x, a: mc.capture(x, "layer_out", adapter=a),
        lambda x, a: mc.hook(x, "layer_out", lambda value, at: None, adapter=a),
        lambda x, a: mc.patch(x, mc.build_shifts(made(), "live", site="layer_out"), adapter=a),
        lambda x, a: mc.describe(x, adapter=a),
        lambda x, a: mc.adapter_for(x, a),
    ]
    for call in calls:
        call(one := made(), Narrow)
        assert sites_of(one) == [("layer_out",)] * 3
    assert sites_of(model) == [ALL] * 3, "other models have none of it"
    adapter = Narrow()
    assert mc.adapter_for(model, adapter) is mc.adapter_for(model)
    assert sites_of(copy.deepcopy(model)) == [("layer_out",)] * 3, "a copy must not get another one"
    assert type(mc.adapter_for(model, Paths)) is Paths
    with pytest.raises(mc.UnsupportedModelError, match="expects a module at 'h'"):
        mc.adapter_for(model, type("Wrong", (Paths,), {"layers": "h"}))
    assert type(mc.adapter_for(model)) is Paths, "one that does not fit is not kept"
    with pytest.raises(mc.WrongTypeError, match="an adapter with spec, decoder and module is needed, found dict"):
        mc.adapter_for(model, {})  # pyright: ignore[reportArgumentType]
    assert list(model.state_dict()) == list(made().state_dict())
    assert model(ids)[0].shape == (2, 5, VOCABULARY)


# --- files


def test_a_file_names_the_class_and_the_adapter(tmp_path: Path) -> None:
    model = made()
    mc.save_shifts(mc.build_shifts(model, "live"), tmp_path)
    said = json.loads((tmp_path / "shifts.json").read_text())
    assert (said["model"]["model_type"], said["origin"]["adapter"]) == (NANO, "GenericAdapter")
    assert mc.load_shifts(tmp_path, model, strict=True).origin == mc.build_shifts(model, "live").origin
    with pytest.raises(mc.CheckpointError, match="its sites were those of GenericAdapter, not of Paths"):
        mc.load_shifts(tmp_path, made(), strict=True, adapter=Paths)
    below = made(Below)
    with pytest.raises(mc.CheckpointError, match=f"model type '{NANO}', not 'tests.adapters.test_plain.Below'"):
        mc.load_shifts(tmp_path, below, strict=True)
    with pytest.raises(mc.CheckpointError, match=rf"made for .*\({NANO}\), not .*\(llama\)"):
        mc.load_shifts(tmp_path, fresh_model(LLAMA))
    llama = fresh_model(LLAMA)
    mc.save_shifts(mc.build_shifts(llama, "live"), tmp_path)
    assert "adapter" not in json.loads((tmp_path / "shifts.json").read_text())["origin"]


def test_a_patched_model_that_is_dropped_is_collected() -> None:
    """What is kept of its small forward must not hold it."""
    model = made()
    mc.patch(model, mc.build_shifts(model, "live"))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
