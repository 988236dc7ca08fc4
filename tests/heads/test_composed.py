"""Several heads in one stack. The laws of tests/edits run over one of MimIC and LIVE; here is what is its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mimic_core as mc
from mimic_core.checkpoint import hub
from tests.support.cases import BY_NAME, fresh_model, logits_of, model_of

LLAMA = BY_NAME["llama"]
# At one site, in an order that matters; the third is of the kind of the first.
THREE = [mc.CAAConfig(scale=2.0), mc.LIVEConfig(site="layer_out", layers=(1,)), mc.CAAConfig(scale=2.0)]


def filled(model: nn.Module, heads: Any, seed: int = 5) -> mc.ShiftStack:
    shifts = mc.build_shifts(model, heads)
    draw = torch.Generator().manual_seed(seed)
    for p in shifts.parameters():
        p.data = 0.5 * torch.randn(p.shape, generator=draw)
    return shifts


def one_by_one(
    model: nn.Module, parts: list[mc.ShiftStack], inputs: dict[str, Tensor], strength: float = 1.0
) -> Tensor:
    handles = [mc.patch(model, part, strength) for part in parts]
    found = logits_of(model, inputs)
    for handle in handles:
        handle.remove()
    return found


def test_it_is_its_parts_in_their_order() -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    shifts = filled(model, [*THREE, mc.MimICConfig(positions=("first", 2))])
    assert [part.name for part in shifts.parts] == ["caa", "live", "caa", "mimic"]
    assert shifts.layers == (0, 1, 2)
    assert len(shifts) == len(list(shifts)) == 10
    parts = list(shifts.parts)
    apart = logits_of(model, inputs)
    with mc.patch(model, shifts) as handle:
        assert torch.equal(logits_of(model, inputs), wanted := one_by_one(fresh_model(LLAMA), parts, inputs))
        handle.strength = 0.3
        found = logits_of(model, inputs)
        with handle.disabled():
            assert torch.equal(logits_of(model, inputs), apart)
        with pytest.raises(mc.PatchStateError, match="already in this model"):
            mc.patch(model, shifts.parts[1])
    assert torch.equal(found, one_by_one(model, parts, inputs, 0.3))
    assert not torch.allclose(one_by_one(model, parts[::-1], inputs), wanted, atol=1e-3)
    with mc.patch(model, parts[1]), pytest.raises(mc.PatchStateError, match="already in this model"):
        mc.patch(model, shifts)
    assert torch.equal(logits_of(model, inputs), apart)


def test_each_sample_of_a_set_has_its_own() -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    a, b = filled(model, THREE), filled(model, [THREE[1], THREE[0]][::-1], seed=6)
    wanted = [one_by_one(model, list(stack.parts), inputs) for stack in (a, b)]
    stacks = mc.StackSet({"a": a, "b": b})
    with mc.patch(model, stacks) as handle:
        for names in (["a", "b"], ["b", "a"], ["b", None], ["a", "a"]):
            with handle.using(names):
                found = logits_of(model, inputs)
            for i, name in enumerate(names):
                alone = logits_of(fresh_model(LLAMA), inputs) if name is None else wanted["ab".index(name)]
                real = inputs["attention_mask"][i].bool()
                torch.testing.assert_close(found[i][real], alone[i][real], atol=2e-5, rtol=1e-4)
        stacks["c"] = filled(model, [THREE[1], THREE[0]])
        with pytest.raises(mc.PatchStateError, match="compose the same heads in different orders"):
            with handle.using("c"):
                pass
        del stacks["a"], stacks["b"]
        with handle.using("c"):  # the order of the patch was another one
            found = logits_of(model, inputs)
    torch.testing.assert_close(found, one_by_one(model, list(stacks["c"].parts), inputs), atol=2e-5, rtol=1e-4)


def test_it_is_saved_as_one(tmp_path: Path) -> None:
    model = model_of(LLAMA)
    shifts = filled(model, THREE)
    shifts.parts[2].heads["0"].vector = shifts.parts[0].heads["0"].vector
    shifts.save_pretrained(tmp_path)
    description = json.loads((tmp_path / "shifts.json").read_text())
    assert description["head"] == ["caa", "live", "caa"]
    assert [x["positions"] for x in description["config"]] == ["all"] * 3
    assert description["shared"] == {"stacks.2.heads.0.vector": "stacks.0.heads.0.vector"}
    loaded = mc.ShiftStack.from_pretrained(tmp_path, model)
    assert (loaded.name, loaded.config, loaded.layers) == (shifts.name, shifts.config, shifts.layers)
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in shifts.state_dict().items())
    assert "| sites | `layer_out` |" in (tmp_path / hub.CARD).read_text()
    assert "`scale=2.0`, `layers=[1]`" in (tmp_path / hub.CARD).read_text()
    for changes in ({"head": ["caa"] * 40, "config": [{}] * 40}, {"config": description["config"][:2]}, {"head": []}):
        (tmp_path / "shifts.json").write_text(json.dumps(description | changes))
        with pytest.raises(mc.CheckpointError, match="does not describe shifts that this version can build"):
            mc.load_shifts(tmp_path, model)


def test_what_is_for_one_head_is_refused(no_shape_checks: None) -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    shifts = mc.build_shifts(model, ["attn_bias", "mlp_bias"])
    for refused, error, message in [
        (lambda: mc.merge(model, shifts), mc.WrongTypeError, "mimic_core.merge takes a stack of one head"),
        (lambda: mc.estimate(model, shifts, [inputs]), mc.WrongTypeError, "mimic_core.estimate takes a stack of one"),
        (lambda: shifts[0], mc.WrongTypeError, r"these shifts are 2 stacks: choose one, as in shifts.parts\[0\]\[0\]"),
        (lambda: mc.build_shifts(model, []), mc.ShapeError, "1 to 16 heads can be composed, found 0"),
        (lambda: mc.build_shifts(model, ["mimic", 3]), mc.WrongTypeError, "found int"),
        (
            lambda: mc.build_shifts(model, ["mimic"], gate=False),
            mc.UnknownNameError,
            "with a list: gate; put them into",
        ),
    ]:
        with pytest.raises(error, match=message):
            refused()
