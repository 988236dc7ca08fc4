"""`mc.estimate`: heads filled from activations, against sums over single samples in numpy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mimic_core as mc
from mimic_core.estimate import _Component
from tests.support.cases import BY_NAME, CASES, Case, logits_of, model_of

LLAMA = BY_NAME["llama"]
METHODS = {"task_vector": False, "i2cl": False, "caa": True, "icv": True, "mtv": False}
"""Whether a method takes differences."""


def changed(case: Case, inputs: dict[str, Tensor], by: int) -> dict[str, Tensor]:
    """The same with other words, and images and padding where they are."""
    ids = inputs["input_ids"]
    words = (ids >= 3) & (ids < 120)
    return inputs | {"input_ids": torch.where(words, 3 + (ids - 3 + by) % 117, ids)}


def batches(case: Case, pairs: bool) -> list[Any]:
    """Padded on the left and on the right."""
    found = []
    for by, padding in ((0, "right"), (20, "left"), (41, "left")):
        x = changed(case, case.inputs(padding), by)
        found.append((x, changed(case, x, by + 7)) if pairs else x)
    return found


def singles(case: Case, pairs: bool) -> Iterator[Any]:
    for by in (0, 20, 41):
        for i in range(2):
            x = changed(case, case.sample(i), by)
            yield (x, changed(case, x, by + 7)) if pairs else (x,)


def states(model: nn.Module, inputs: dict[str, Tensor], site: str, whole: bool = False) -> np.ndarray:
    """Of one sample: layers, width."""
    with mc.capture(model, site) as seen, torch.no_grad():
        logits_of(model, inputs)
    return np.stack([(x[0].mean(0) if whole else x[0, -1]).double().numpy() for x in seen.states.values()])


def differences(model: nn.Module, case: Case, site: str, pairs: bool, whole: bool = False) -> np.ndarray:
    """Samples, layers, width."""
    rows = [[states(model, x, site, whole) for x in parts] for parts in singles(case, pairs)]
    return np.stack([row[-1] - row[0] if pairs else row[0] for row in rows])


def close(found: Tensor, wanted: np.ndarray) -> None:
    torch.testing.assert_close(found.detach().double(), torch.from_numpy(wanted), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("case", "method"), [(c, m) for i, c in enumerate(CASES) for m in list(METHODS)[i % 2 :: 2]])
def test_what_is_taken(case: Case, method: str) -> None:
    model, pairs = model_of(case), METHODS[method]
    shifts = mc.build_shifts(model, method)
    mc.estimate(model, shifts, iter(batches(case, pairs)))
    for name in ("attn", "mlp") if method == "i2cl" else ("",):
        site = "attn_heads" if method == "mtv" else f"{name or 'layer'}_out"
        rows = differences(model, case, site, pairs)
        if method == "icv":
            wanted = np.linalg.svd(rows.reshape(len(rows), -1))[2][0].reshape(rows.shape[1:])
            wanted *= np.sign((wanted * rows.mean(0)).sum())
        else:
            wanted = rows.mean(0)
        close(torch.stack([getattr(head, f"{name}_vector" if name else "vector") for head in shifts]), wanted)
    if method in ("task_vector", "mtv"):
        assert all(head.weight.eq(1).all() for head in shifts)
    plain = logits_of(model, case.inputs())
    with mc.patch(model, shifts):
        assert not torch.allclose(logits_of(model, case.inputs()), plain, atol=1e-4)


def test_other_positions_and_some_layers() -> None:
    model = model_of(LLAMA)
    shifts = mc.build_shifts(model, "caa", layers=(0, 2))
    mc.estimate(model, shifts, batches(LLAMA, True), positions="prompt")
    close(
        torch.stack([head.vector for head in shifts]),
        differences(model, LLAMA, "layer_out", True, whole=True).mean(0)[[0, 2]],
    )


def test_a_first_component_of_many_rows() -> None:
    """Batches of any size, and no more rows kept than said."""
    draw = np.random.default_rng(1)
    rows = draw.normal(size=(400, 50)) * np.r_[30, 3, np.ones(48)] + 2 * draw.normal(size=50)
    found = _Component(rank=8)
    for some in np.split(rows, [1, 5, 60, 61, 300]):
        found.add(torch.from_numpy(some))
        assert len(found._rows) <= 16
    wanted = np.linalg.svd(rows)[2][0]
    assert abs(found.value() @ torch.from_numpy(wanted)) > np.cos(0.01)
    assert found.value() @ torch.from_numpy(rows.mean(0)) > 0
    exact = _Component(rank=200)
    exact.add(torch.from_numpy(rows))
    assert abs(exact.value() @ torch.from_numpy(wanted)) == pytest.approx(1, abs=1e-12)
    for flat, why in ((draw.normal(size=(400, 50)), "larger rank"), (np.eye(50), "no first principal component")):
        none = _Component(rank=8 if len(flat) == 400 else 64)
        none.add(torch.from_numpy(flat))
        with pytest.raises(mc.ShapeError, match=why):
            none.value()


def test_what_is_refused(no_shape_checks: None) -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    padding = inputs | {"attention_mask": inputs["attention_mask"] * torch.tensor([[1], [0]])}
    bad = copy.deepcopy(model)
    bad.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    pair = (inputs, inputs)
    for head, given, options, error, message in [
        ("mimic", [inputs], {}, mc.UnknownNameError, "MimICHead takes nothing from activations"),
        ("i2cl", [], {}, mc.ShapeError, "there was no batch"),
        ("i2cl", [pair], {}, mc.WrongTypeError, "batch 0 should be a mapping of"),
        ("caa", [pair, inputs], {}, mc.WrongTypeError, "batch 1 should be a pair of mappings, .* found dict"),
        ("caa", [(inputs, LLAMA.sample(0))], {}, mc.ShapeError, "the texts of pair 0 have 2 and 1 samples"),
        ("icv", [pair], {}, mc.ShapeError, "no first principal component"),
        ("i2cl", [inputs, padding], {}, mc.ShapeError, r"batch 1: samples \[1\] have no token at positions 'prompt_e"),
        ("i2cl", [inputs], {"positions": "all"}, mc.UnknownNameError, "'all' has padding too"),
        ("i2cl", [inputs], {"positions": "generated"}, mc.PatchStateError, "after the prompt"),
        ("i2cl", [inputs | {"labels": inputs["input_ids"]}], {}, mc.PatchStateError, "was given labels"),
    ]:
        shifts = mc.build_shifts(model, head)
        before = copy.deepcopy(shifts.state_dict())
        with pytest.raises(error, match=message):
            mc.estimate(model, shifts, given, **options)
        assert all(torch.equal(x, before[name]) for name, x in shifts.state_dict().items())
    with pytest.raises(mc.ShapeError, match="batch 0: .*_out of layer . is NaN or infinite"):
        mc.estimate(bad, mc.build_shifts(bad, "i2cl"), [inputs])
    with pytest.raises(mc.WrongTypeError, match="a ShiftStack is needed"):
        mc.estimate(model, model, [inputs])
    shifts = mc.build_shifts(model, "i2cl")
    with mc.patch(model, shifts), pytest.raises(mc.PatchStateError, match="already in this model"):
        mc.estimate(model, shifts, [inputs])


def test_heads_are_chosen_by_a_loss(no_shape_checks: None) -> None:
    """A loss that says of each attention head whether it helps: those that do are left at 1."""
    model = model_of(LLAMA)
    shifts = mc.build_shifts(model, "mtv")
    mc.estimate(model, shifts, [LLAMA.inputs()])
    draw = torch.Generator().manual_seed(3)
    cost = [torch.where(torch.rand(4, generator=draw) < 0.5, 1.0, -1.0) for _ in shifts]
    asked = []

    def loss() -> Tensor:
        asked.append(torch.cat([head.weight.detach().clone() for head in shifts]))
        return sum((head.weight * x).sum() for head, x in zip(shifts, cost, strict=True)) + 100

    mc.choose_heads(shifts, loss, steps=60, samples=6, generator=draw)
    assert len(asked) == 360
    assert torch.stack(asked).unique().tolist() == [0, 1]
    assert [head.weight.tolist() for head in shifts] == [x.lt(0).float().tolist() for x in cost]
    assert all(head.weight.requires_grad for head in shifts)
    before = copy.deepcopy(shifts.state_dict())
    for stack, given, options, error, message in [
        (
            mc.build_shifts(model, "live"),
            loss,
            {},
            mc.UnknownNameError,
            "the heads of 'live' have no parameter `weight`",
        ),
        (shifts, loss, {"samples": 1}, mc.ShapeError, "samples should be 2 or more"),
        (shifts, lambda: torch.nan, {}, mc.ShapeError, "the loss of a choice of heads is nan"),
        (model, loss, {}, mc.WrongTypeError, "a ShiftStack is needed"),
    ]:
        with pytest.raises(error, match=message):
            mc.choose_heads(stack, given, **options)
    assert all(torch.equal(x, before[name]) for name, x in shifts.state_dict().items())
