"""State dicts with the names of the published code: which variant they are, where their numbers go, what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

import mimic_core as mc
from tests.support.cases import CASES, logits_of, model_of
from tests.support.golden_data import golden_names, load_golden, load_model
from tests.support.snapshot import snapshot

State = dict[str, Tensor]
golden_model = lru_cache(maxsize=8)(load_model)

VARIANTS: dict[str, mc.HeadConfig] = {
    "mimic": mc.MimICConfig(log_z2="all_keys"),
    "mimic_attn_record": mc.MimICConfig(log_z2="all_keys"),
    "mimic_singlehead": mc.MimICConfig(log_z2="all_keys", shared=True),
    "mimic_vector_only": mc.MimICConfig(log_z2="all_keys", gate=False),
    "mimic_ffn_shift": mc.MimICConfig(log_z2="all_keys", mlp_vector=True),
    "live": mc.LIVEConfig(site="mlp_out"),
    "live_record": mc.LIVEConfig(site="mlp_out"),
    "attnffn_attn_vector": mc.LIVEConfig(site="attn_out", learn_scale=False, scale_init=1.0),
}
GATED = ("mimic", "mimic_singlehead", "mimic_ffn_shift")
UNGATED = ("mimic_vector_only", "live", "attnffn_attn_vector")


def state_of(variant: str, case: str = "idefics2") -> State:
    """A copy of a golden's parameters: 3 layers, 4 attention heads of 16, hidden size 64."""
    return {name: x.clone() for name, x in load_golden(case, variant, "right").params.items()}


def placed(state: State, layer: int) -> Iterator[tuple[str, Tensor]]:
    """Our name for each number of a layer, written out: what is checked must not come from the code under test."""
    if "attn_shift_scale" in state:
        yield "vector", state["attn_shift"][layer]
        yield "scale", state["attn_shift_scale"][layer]
    elif "ffn_shift_scale" in state:
        yield "vector", state["ffn_shift"][layer]
        yield "scale", state["ffn_shift_scale"][layer]
    else:
        yield "vector", state["attn_shift"][layer]
        if f"log_Z1_lin.{layer}.weight" in state:
            weight, bias = state[f"log_Z1_lin.{layer}.weight"], state[f"log_Z1_lin.{layer}.bias"]
            one_gate = weight.shape[0] == 1
            yield "gate_weight", weight[0] if one_gate else weight
            yield "gate_bias", bias[0] if one_gate else bias
        if "ffn_shift" in state:
            yield "mlp_vector", state["ffn_shift"][layer]


def assert_placed(shifts: mc.ShiftStack, state: State) -> None:
    for layer in shifts.layers:
        found, wanted = shifts[layer].state_dict(), dict(placed(state, layer))
        assert sorted(found) == sorted(wanted)
        for name, x in found.items():
            assert x.dtype == torch.float32
            assert torch.equal(x, wanted[name].float()), f"{name} of layer {layer}"


def test_every_variant_there_is_a_golden_of_is_expected_here() -> None:
    assert {variant for _, variant, _ in golden_names()} == set(VARIANTS)


@pytest.mark.parametrize(("case", "variant", "padding"), golden_names())
def test_variants_are_recognised_and_every_number_lands(case: str, variant: str, padding: str) -> None:
    state = load_golden(case, variant, padding).params
    shifts = mc.shifts_from_reference(state, golden_model(case, "sdpa"))
    assert shifts.config == VARIANTS[variant]
    assert shifts.name == ("live" if isinstance(shifts.config, mc.LIVEConfig) else "mimic")
    assert_placed(shifts, state)
    total = sum(x.numel() for x in state.values())
    assert total == sum(x.numel() for x in shifts.state_dict().values()), "no number is left over"
    assert all(p.requires_grad for p in shifts.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("variant", ["mimic_singlehead", "live", "attnffn_attn_vector"])
def test_other_dtypes_become_fp32(variant: str, dtype: torch.dtype) -> None:
    state = {name: x.to(dtype) for name, x in state_of(variant).items()}
    assert_placed(mc.shifts_from_reference(state, golden_model("idefics2", "sdpa")), state)


def test_a_fixed_scale_is_a_buffer() -> None:
    state = state_of("attnffn_attn_vector")
    state["attn_shift_scale"] = torch.tensor([0.25, 1.0, -2.0])
    shifts = mc.shifts_from_reference(state, golden_model("idefics2", "sdpa"))
    assert [name for name, _ in shifts.named_parameters()] == [f"heads.{i}.vector" for i in range(3)]
    assert {name: x.item() for name, x in shifts.named_buffers()} == {
        "heads.0.scale": 0.25,
        "heads.1.scale": 1.0,
        "heads.2.scale": -2.0,
    }


def shifted(state: State, log_z2: str) -> tuple[mc.ShiftStack, Tensor]:
    model, inputs = golden_model("idefics2", "sdpa"), load_golden("idefics2", "mimic", "right").inputs("query")
    shifts = mc.shifts_from_reference(state, model, log_z2=log_z2)
    with mc.patch(model, shifts):
        return shifts, logits_of(model, inputs)


@pytest.mark.parametrize("variant", GATED + UNGATED)
def test_log_z2_only_matters_with_a_gate(variant: str) -> None:
    state = state_of(variant)
    exact, exact_logits = shifted(state, "attended")
    published, published_logits = shifted(state, "all_keys")
    default = mc.shifts_from_reference(state, golden_model("idefics2", "sdpa"))
    assert default.config == published.config
    for shifts in (exact, published):
        assert_placed(shifts, state)
    if variant in GATED:
        assert exact.config != published.config
        assert not torch.allclose(exact_logits, published_logits, atol=1e-3)
    else:
        assert torch.equal(exact_logits, published_logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_shared_with_the_state_dict(variant: str) -> None:
    state, original = state_of(variant), state_of(variant)
    shifts = mc.shifts_from_reference(state, golden_model("idefics2", "sdpa"))
    with torch.no_grad():
        for x in shifts.state_dict().values():
            x.add_(1.0)
    assert all(torch.equal(state[name], x) for name, x in original.items())
    before = {name: x.clone() for name, x in shifts.state_dict().items()}
    for x in state.values():
        x.fill_(9.0)
    assert all(torch.equal(x, before[name]) for name, x in shifts.state_dict().items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_is_left_alone(variant: str) -> None:
    model = golden_model("idefics2", "sdpa")
    state, weights = snapshot(model), {name: x.clone() for name, x in model.state_dict().items()}
    mc.shifts_from_reference(state_of(variant), model)
    with pytest.raises(mc.CheckpointError):
        mc.shifts_from_reference({"attn_shift": torch.zeros(3, 4, 5)}, model)
    assert snapshot(model) == state
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("case", ["idefics", "idefics2", "llava", "llava_gqa"])
def test_a_bare_model_takes_them_too(case: str) -> None:
    bare = golden_model(case, "sdpa").base_model
    assert isinstance(bare, nn.Module)
    state = state_of("mimic", case)
    assert_placed(mc.shifts_from_reference(state, bare), state)


Change = Callable[[State], object]


def put(**tensors: Tensor) -> Change:
    """Names as keywords: two underscores stand for a dot."""
    return lambda state: state.update({name.replace("__", "."): x for name, x in tensors.items()})


def drop(*names: str) -> Change:
    def change(state: State) -> None:
        for name in names:
            del state[name]

    return change


GATES = [f"log_Z1_lin.{layer}.{part}" for layer in range(3) for part in ("weight", "bias")]
NO_VARIANT = r"these names fit no variant of the published code: .*; expected attn_shift"
ONE, ROW = torch.ones(()), torch.ones(16)

REFUSED: dict[str, tuple[str, Change, str]] = {
    "nothing": ("live", lambda state: state.clear(), "no variant of the published code: none at all; expected"),
    "our own names": (
        "live",
        lambda state: (state.clear(), state.update({"heads.0.vector": ROW})),
        r"no variant of the published code: heads\.0\.vector; expected",
    ),
    "gates alone": ("mimic", drop("attn_shift"), NO_VARIANT),
    "ffn_shift alone": ("live", drop("ffn_shift_scale"), NO_VARIANT),
    "a scale alone": ("live", drop("ffn_shift"), NO_VARIANT),
    "an unknown name beside": ("mimic", put(extra=ONE), NO_VARIANT),
    "a wrapper's prefix": ("mimic", put(module__attn_shift=ROW), NO_VARIANT),
    "LIVE and a MimIC vector": ("live", put(attn_shift=torch.ones(3, 4, 16)), NO_VARIANT),
    "LIVE with gates": ("live", put(log_Z1_lin__0__weight=torch.ones(4, 16)), NO_VARIANT),
    "LIVE with a scale of each kind": ("live", put(attn_shift_scale=torch.ones(3)), NO_VARIANT),
    "fixed scale with gates": (
        "attnffn_attn_vector",
        put(log_Z1_lin__0__weight=torch.ones(4, 16), log_Z1_lin__0__bias=torch.ones(4)),
        NO_VARIANT,
    ),
    "a gate that has no layer": ("mimic", put(log_Z1_lin__weight=ROW), NO_VARIANT),
    "too few layers": ("mimic_vector_only", put(attn_shift=torch.ones(2, 4, 16)), "no attn_shift for layer 2"),
    "too few layers, LIVE": (
        "live",
        put(ffn_shift=torch.ones(2, 64), ffn_shift_scale=torch.ones(2)),
        "no ffn_shift for layer 2",
    ),
    "too few scales": ("live", put(ffn_shift_scale=torch.ones(2)), "no ffn_shift_scale for layer 2"),
    "too few MLP vectors": ("mimic_ffn_shift", put(ffn_shift=torch.ones(2, 64)), "no ffn_shift for layer 2"),
    "too many layers": (
        "mimic_vector_only",
        put(attn_shift=torch.ones(4, 4, 16)),
        "for 4 layers, the model has 3",
    ),
    "too many layers, LIVE": (
        "live",
        put(ffn_shift=torch.ones(5, 64), ffn_shift_scale=torch.ones(5)),
        "for 5 layers, the model has 3",
    ),
    "too many scales": ("live", put(ffn_shift_scale=torch.ones(5)), "for 5 layers, the model has 3"),
    "too many fixed scales": (
        "attnffn_attn_vector",
        put(attn_shift_scale=torch.ones(5)),
        "for 5 layers, the model has 3",
    ),
    "too many MLP vectors": ("mimic_ffn_shift", put(ffn_shift=torch.ones(5, 64)), "for 5 layers, the model has 3"),
    "too many gates": (
        "mimic",
        put(log_Z1_lin__3__weight=torch.ones(4, 16), log_Z1_lin__3__bias=torch.ones(4)),
        "for 4 layers, the model has 3",
    ),
    "a layer without its gate": ("mimic", drop(*GATES[2:4]), r"no log_Z1_lin\.1\.weight for layer 1"),
    "a gate without bias": ("mimic", drop(GATES[5]), r"no log_Z1_lin\.2\.bias for layer 2"),
    "a gate without weight": ("mimic_singlehead", drop(GATES[0]), r"no log_Z1_lin\.0\.weight for layer 0"),
    "head width": (
        "mimic_vector_only",
        put(attn_shift=torch.ones(3, 4, 8)),
        r"(vector of layer 0|attn_shift) .*4 attention heads of 16, hidden size 64",
    ),
    "hidden size": ("live", put(ffn_shift=torch.ones(3, 32)), r"(vector of layer 0|ffn_shift) .*hidden size 64"),
    "MLP vector's width": ("mimic_ffn_shift", put(ffn_shift=torch.ones(3, 63)), r"(mlp_vector|ffn_shift) .*\b63\b"),
    "gate's width": (
        "mimic",
        put(log_Z1_lin__1__weight=torch.ones(4, 8)),
        r"gate_weight of layer 1|log_Z1_lin\.1\.weight",
    ),
    "gate's heads": ("mimic", put(log_Z1_lin__1__bias=torch.ones(2)), r"gate_bias of layer 1|log_Z1_lin\.1\.bias"),
    "one gate for a vector per head": (
        "mimic",
        put(log_Z1_lin__0__weight=torch.ones(1, 64), log_Z1_lin__0__bias=torch.ones(1)),
        r"gate_(weight|bias) of layer 0|log_Z1_lin\.0",
    ),
    "a gate per head for one vector": (
        "mimic_singlehead",
        put(log_Z1_lin__0__weight=torch.ones(4, 16), log_Z1_lin__0__bias=torch.ones(4)),
        r"gate_(weight|bias) of layer 0|log_Z1_lin\.0",
    ),
    "NaN": ("mimic", put(attn_shift=torch.full((3, 4, 16), torch.nan)), "holds NaN or infinity in attn_shift$"),
    "infinity": ("live", put(ffn_shift_scale=torch.full((3,), torch.inf)), "NaN or infinity in ffn_shift_scale$"),
    # As many numbers as there should be, in another shape.
    "vector [l d h]": ("mimic", put(attn_shift=torch.ones(3, 16, 4)), "vector"),
    "vector [l d h], no gate": ("mimic_vector_only", put(attn_shift=torch.ones(3, 16, 4)), "vector"),
    "vector [l 2h d/2]": ("mimic_vector_only", put(attn_shift=torch.ones(3, 8, 8)), "vector"),
    "gate [d h]": ("mimic", put(log_Z1_lin__0__weight=torch.ones(16, 4)), "gate_weight|log_Z1_lin"),
    "gate bias [1 h]": ("mimic", put(log_Z1_lin__0__bias=torch.ones(1, 4)), "gate_bias|log_Z1_lin"),
    "gate bias [h 1]": ("mimic", put(log_Z1_lin__0__bias=torch.ones(4, 1)), "gate_bias|log_Z1_lin"),
    "shared gate [c 1]": ("mimic_singlehead", put(log_Z1_lin__0__weight=torch.ones(64, 1)), "gate_weight|log_Z1_lin"),
    "shared gate [h d]": ("mimic_singlehead", put(log_Z1_lin__0__weight=torch.ones(4, 16)), "gate_weight|log_Z1_lin"),
    "MLP vector [l h d]": ("mimic_ffn_shift", put(ffn_shift=torch.ones(3, 4, 16)), "mlp_vector|ffn_shift"),
    "LIVE vector [l h d]": ("live", put(ffn_shift=torch.ones(3, 4, 16)), "vector|ffn_shift"),
    "fixed scale's vector [l h d]": ("attnffn_attn_vector", put(attn_shift=torch.ones(3, 4, 16)), "vector|attn_shift"),
    # One dimension too few or too many.
    "vector [c]": ("mimic", put(attn_shift=torch.ones(192)), "attn_shift"),
    "vector [l 1 h d]": ("mimic", put(attn_shift=torch.ones(3, 1, 4, 16)), "attn_shift"),
    "vector []": ("mimic", put(attn_shift=ONE), "attn_shift"),
    "LIVE vector []": ("live", put(ffn_shift=ONE), "ffn_shift"),
    "scale []": ("live", put(ffn_shift_scale=ONE), "ffn_shift_scale"),
    "MLP vector []": ("mimic_ffn_shift", put(ffn_shift=ONE), "ffn_shift"),
}


@pytest.mark.parametrize(("variant", "change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(variant: str, change: Change, message: str) -> None:
    state = state_of(variant)
    change(state)
    with pytest.raises(mc.CheckpointError, match=message):
        mc.shifts_from_reference(state, golden_model("idefics2", "sdpa"))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("idefics", "no attn_shift for layer 3"),
        ("llava_gqa", "for 3 layers, the model has 2"),
    ],
)
def test_another_model_is_refused(case: str, message: str) -> None:
    with pytest.raises(mc.CheckpointError, match=message):
        mc.shifts_from_reference(state_of("mimic_vector_only", "llava"), golden_model(case, "sdpa"))


def test_a_model_of_other_widths_is_refused() -> None:
    llama = model_of(next(case for case in CASES if case.name == "llama"))
    with pytest.raises(mc.CheckpointError, match="4 attention heads of 24, hidden size 32"):
        mc.shifts_from_reference(state_of("mimic"), llama)


@pytest.mark.parametrize("variant", [*GATED, "mimic_vector_only"])
@pytest.mark.parametrize("log_z2", ["masked", "", None])
def test_a_wrong_log_z2_is_refused(variant: str, log_z2: object, no_shape_checks: None) -> None:
    with pytest.raises(mc.UnknownNameError, match=rf"'attended' or 'all_keys', found {log_z2!r}"):
        mc.shifts_from_reference(state_of(variant), golden_model("idefics2", "sdpa"), log_z2=log_z2)


def test_a_model_without_an_adapter_is_refused() -> None:
    with pytest.raises(mc.UnsupportedModelError, match=r"no adapter is registered for torch\S+Linear"):
        mc.shifts_from_reference(state_of("live"), nn.Linear(1, 1))
