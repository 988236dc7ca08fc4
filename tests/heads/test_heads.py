"""Configs, initial values and parameters of the shift heads, and a head of one's own."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mimic_core as mc
from mimic_core.heads.loreft import orthonormal
from mimic_core.types import Site
from tests.support.cases import CASES, HEADS, fresh_model, logits_of, model_of, random_shifts

LLAMA = next(case for case in CASES if case.name == "llama")
H, D, C = 4, 24, 32
SHAPES = {
    "mimic": {"vector": (H, D), "gate_weight": (H, D), "gate_bias": (H,)},
    "mimic-all-keys": {"vector": (H, D), "gate_weight": (H, D), "gate_bias": (H,)},
    "mimic-shared": {"vector": (H * D,), "gate_weight": (H * D,), "gate_bias": ()},
    "mimic-vector-only": {"vector": (H, D)},
    "mimic-shared-vector-only": {"vector": (H * D,)},
    "mimic-and-mlp": {"vector": (H, D), "gate_weight": (H, D), "gate_bias": (H,), "mlp_vector": (C,)},
    "mimic-one-layer": {"vector": (H, D), "gate_weight": (H, D), "gate_bias": (H,)},
    "live": {"vector": (C,), "scale": ()},
    "live-layer-out": {"vector": (C,), "scale": ()},
    "live-attn-out": {"vector": (C,)},
    "task-vector": {"vector": (C,), "weight": ()},
    "function-vector": {"vector": (C,)},
    "attn-bias": {"vector": (C,)},
    "mlp-bias": {"vector": (C,)},
    "icv": {"vector": (C,)},
    "caa": {"vector": (C,)},
    "i2cl": {"attn_scales": (2,), "mlp_scales": (2,)},
    "m2iv": {"attn_vector": (C,), "mlp_vector": (C,)},
    "virtual-kv": {"key": (H, 3, D), "value": (H, 3, D)},
    "virtual-kv-low-rank": {
        **dict.fromkeys(("key_left", "value_left"), (H, 3, 2)),
        **dict.fromkeys(("key_right", "value_right"), (H, 2, D)),
        "weight": (1,),
    },
    "ia3": {"key_scale": (2, D), "value_scale": (2, D), "mlp_scale": (48,)},
    "loreft": {"rotation": (2, C), "weight": (2, C), "bias": (2,)},
    "mtv": {"vector": (H, D), "weight": (H,)},
    "hyper-icl": {"u_q": (H, D, 2), "u_k": (H, D, 2), "gate_weight": (H, D), "gate_bias": (H,)},
}


@pytest.mark.parametrize("head", HEADS)
def test_parameters_are_the_learnable_ones_in_fp32(head: str) -> None:
    model = fresh_model(LLAMA, dtype=torch.bfloat16)
    shifts = mc.build_shifts(model, HEADS[head])
    layers = [1] if head in ("mimic-one-layer", "task-vector") else [0, 1, 2]
    wanted = {f"heads.{i}.{name}": shape for i in layers for name, shape in SHAPES[head].items()}
    assert {name: tuple(p.shape) for name, p in shifts.named_parameters()} == wanted
    assert all(p.requires_grad and p.dtype == torch.float32 for p in shifts.parameters())
    assert list(shifts.layers) == layers
    assert [h.layer.index for h in shifts] == layers == [int(i) for i in shifts.heads]
    assert len(shifts) == len(layers)
    before = logits_of(model, LLAMA.inputs())
    assert before.dtype == torch.bfloat16
    with mc.patch(model, random_shifts(model, head)):
        after = logits_of(model, LLAMA.inputs())
    assert after.dtype == torch.bfloat16
    assert not torch.equal(after, before)


def test_initial_values_are_the_papers() -> None:
    with torch.device("meta"):
        from transformers import IdeficsConfig, IdeficsForVisionText2Text

        model = IdeficsForVisionText2Text(IdeficsConfig())

    def of(name: str, **options: object) -> dict[str, Tensor]:
        shifts = mc.build_shifts(model, name, **options)
        parts: dict[str, list[Tensor]] = {}
        for p_name, p in shifts.named_parameters():
            parts.setdefault(p_name.rpartition(".")[2], []).append(p.detach())
        return {p_name: torch.stack(ps) for p_name, ps in parts.items()}

    mimic = of("mimic", mlp_vector=True)
    for name, std in (("vector", 0.001), ("gate_weight", 0.02), ("mlp_vector", 0.001)):
        assert abs(mimic[name].mean().item()) < std / 50
        assert mimic[name].std().item() == pytest.approx(std, rel=0.02)
    assert not mimic["gate_bias"].any()
    shared = of("mimic", shared=True)
    assert shared["vector"].std().item() == pytest.approx(0.001, rel=0.02)
    assert shared["gate_weight"].abs().max().item() == pytest.approx(4096**-0.5, rel=0.01)
    live = of("live")
    assert live["vector"].std().item() == pytest.approx(0.01, rel=0.02)
    assert (live["scale"] == 0.1).all()
    assert mc.ICVConfig().scale == 0.1
    i2cl = of("i2cl")
    for name in ("attn_scales", "mlp_scales"):
        assert torch.equal(i2cl[name], torch.tensor([[1, 0.1]]).expand(32, 2))
    for name in ("attn_bias", "mlp_bias", "icv", "caa", "m2iv", "mtv"):
        assert not any(x.any() for x in of(name).values())
    assert all((x == 1).all() for x in of("ia3").values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["ia3", "loreft", "mtv"])
def test_a_new_stack_changes_nothing(name: str, dtype: torch.dtype) -> None:
    model, inputs = model_of(LLAMA, dtype=dtype), LLAMA.inputs()
    plain = logits_of(model, inputs)
    with mc.patch(model, mc.build_shifts(model, name)):
        assert torch.equal(logits_of(model, inputs), plain)


def test_the_rows_of_loreft_stay_orthonormal() -> None:
    """Also of numbers that are nearly along each other, and for each sample of a set."""
    draw = torch.Generator().manual_seed(1)
    rows = torch.randn(32, generator=draw) + 1e-3 * torch.randn(5, 4, 32, generator=draw)
    found = orthonormal(rows)
    torch.testing.assert_close(found @ found.mT, torch.eye(4).expand(5, 4, 4), atol=1e-6, rtol=0)
    torch.testing.assert_close(orthonormal(found), found, atol=1e-6, rtol=0)
    assert (found * rows).sum(-1).min() > 0, "a sign that jumps while numbers move would be another function"
    with pytest.raises(mc.ShapeError, match="rank should be 1 or more, found 0"):
        mc.LoReFTConfig(rank=0)
    with pytest.raises(mc.ShapeError, match="rank 33 is more than the hidden size 32"):
        mc.build_shifts(model_of(LLAMA), "loreft", rank=33)
    with pytest.raises(mc.PatchStateError, match="an edit at site 'key' cannot be limited to positions"):
        mc.patch(model_of(LLAMA), mc.build_shifts(model_of(LLAMA), "ia3", positions="prompt"))


def test_initial_values_follow_the_seed() -> None:
    model = model_of(LLAMA)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(torch.cat([p.flatten() for p in mc.build_shifts(model).parameters()]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_a_fresh_stack_is_close_to_the_unpatched_model_but_not_it() -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    plain = logits_of(model, inputs)
    with mc.patch(model, mc.build_shifts(model, "mimic")):
        shifted = logits_of(model, inputs)
    assert 0 < (shifted - plain).abs().max() < 0.05 * plain.std()


def test_norm_is_kept_by_live() -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    for head, site in (("live", "mlp_out"), ("live-layer-out", "layer_out"), ("live-attn-out", "attn_out")):
        with mc.capture(model, site, layers=[0]) as before, mc.patch(model, random_shifts(model, head)):
            with mc.capture(model, site, layers=[0]) as after:
                logits_of(model, inputs)
        a, b = before.states[0], after.states[0]
        assert not torch.allclose(a, b, atol=1e-3)
        torch.testing.assert_close(a.norm(dim=-1), b.norm(dim=-1))


def test_options_are_checked(no_shape_checks: None) -> None:
    model = model_of(LLAMA)
    with pytest.raises(
        mc.UnknownNameError, match="no shift head is called 'mimick'; known: attn_bias, caa, function_vector, hyper"
    ):
        mc.build_shifts(model, "mimick")
    with pytest.raises(
        mc.UnknownNameError, match=r"shift head 'live' has no option gate; it has layers, positions, site"
    ):
        mc.build_shifts(model, "live", gate=False)
    with pytest.raises(mc.UnknownNameError, match="log_z2 should be 'attended' or 'all_keys', found 'none'"):
        mc.MimICConfig(log_z2="none")
    with pytest.raises(mc.UnknownNameError, match="LIVE can shift 'mlp_out', 'layer_out' or 'attn_out', not 'query'"):
        mc.LIVEConfig(site="query")
    for scale in (float("nan"), "1", True):
        for config in (mc.ICVConfig, mc.CAAConfig):
            with pytest.raises(mc.ShapeError, match="scale should be a finite number, found"):
                config(scale=scale)
    with pytest.raises(mc.UnknownNameError, match="options were given together with a config: "):
        mc.build_shifts(model, mc.LIVEConfig(), site="attn_out")
    with pytest.raises(mc.UnknownNameError, match="no registered shift head has HeadConfig as its own config class"):
        mc.build_shifts(model, mc.HeadConfig())
    for layers in ((3,), (-1,), (0, 0), ()):
        with pytest.raises(mc.ShapeError, match=r"distinct indices from 0 to 2 \(llama has 3 decoder layers\)"):
            mc.build_shifts(model, "mimic", layers=layers)
    with pytest.raises(FrozenInstanceError):
        mc.MimICConfig().shared = True
    assert mc.MimICConfig(layers=[0, 2]).layers == (0, 2)


@pytest.mark.parametrize("head", HEADS)
def test_configs_survive_json(head: str) -> None:
    config = HEADS[head]
    assert type(config).from_dict(config.to_dict()) == config


@dataclass(frozen=True)
class TwoSitesConfig(mc.HeadConfig):
    strength: float = 2.0


def test_a_head_of_ones_own() -> None:
    """Registered, built by name and by config, at two sites, reading the LSE."""

    @mc.register_head("two-sites-for-test")
    class TwoSites(mc.ShiftHead):
        site: Site = "attn_heads"
        config_class = TwoSitesConfig
        needs_lse = True

        def __init__(self, config: TwoSitesConfig, layer: mc.LayerSpec) -> None:
            super().__init__(config, layer)
            self.strength = config.strength
            self.bias = nn.Parameter(torch.ones(layer.hidden_size))

        def forward(self, value: Tensor, at: mc.At) -> Tensor:
            return value * (1 + self.strength * torch.sigmoid(at.lse).transpose(1, 2)[..., None])

        def edits(self) -> dict[Site, Any]:
            return {"attn_heads": self, "mlp_out": lambda value, at: value + self.bias}

    model, inputs = model_of(LLAMA), LLAMA.inputs()
    plain = logits_of(model, inputs)
    by_name, by_config = (
        mc.build_shifts(model, "two-sites-for-test", strength=3.0),
        mc.build_shifts(model, TwoSitesConfig(strength=3.0)),
    )
    results = []
    for shifts in (by_name, by_config):
        with mc.patch(model, shifts):
            results.append(logits_of(model, inputs))
            results[-1][inputs["attention_mask"].bool()].square().sum().backward()
        assert all(h.bias.grad is not None for h in shifts)
    assert torch.equal(*results)
    assert not torch.allclose(results[0], plain, atol=1e-2)


@pytest.mark.parametrize(("name", "site"), [("live", "mlp_out"), ("mimic", "attn_heads")])
def test_a_subclass_with_another_formula_is_asked(name: str, site: Site) -> None:
    """The fast paths of the two heads are for their own formulas."""
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    shifts = mc.build_shifts(model, name)

    class Louder(type(shifts[0])):
        def forward(self, value: Tensor, at: mc.At) -> Tensor:
            return value * 1.5

    for layer in shifts.layers:
        shifts.heads[str(layer)] = Louder(shifts.config, shifts[layer].layer)
    with torch.no_grad(), mc.patch(model, shifts):
        found = logits_of(model, inputs)
    with torch.no_grad(), mc.hook(model, site, lambda value, at: value * 1.5):
        assert torch.equal(found, logits_of(model, inputs))


def test_a_head_without_forward_says_so() -> None:
    @mc.register_head("unfinished-for-test")
    class Unfinished(mc.ShiftHead):
        site: Site = "mlp_out"

    model = model_of(LLAMA)
    with mc.patch(model, mc.build_shifts(model, "unfinished-for-test")):
        with pytest.raises(NotImplementedError, match="Unfinished must define forward"):
            logits_of(model, LLAMA.inputs())
