"""Attention by functions of packages that a file has names for: exact, or refused with what was found."""

from __future__ import annotations

import inspect
import sys
from functools import partial, wraps
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import mimic_core as mc
from mimic_core import ops
from mimic_core.edits import named
from mimic_core.edits.biased import FlexCall, XformersCall
from mimic_core.edits.packages import FlashCall
from tests.support import flash_stand_ins, named_models, xformers_stand_in
from tests.support.cases import random_shifts
from tests.support.named_models import PACKED, STYLES, calling, decode, made, usual
from tests.support.plain_models import check_only_own_calls_are_edited, pad_right

pytestmark = pytest.mark.usefixtures("no_shape_checks")
IDS = torch.arange(14).view(2, 7) % 61
in_a_moment = partial(flash_stand_ins.flash_attn_func, causal=True)
SITES = ("query", "key", "value", "attn_heads", "lse")


@pytest.fixture(autouse=True)
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return named_models.put_packages(monkeypatch)


# --- every law


@pytest.mark.parametrize("style", STYLES)
def test_every_law(style: str) -> None:
    report = mc.testing.check_adapter(made(style), decode=None if style in PACKED else decode, pad=pad_right)
    report.raise_for_failures()
    laws = {*SITES, "MimIC", "padding", "removal"} | ({"cached decoding"} if style not in PACKED else set())
    assert {law for law in laws if report[law].verdict != "passed"} == set()


def mask_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    def lse(self: FlashCall) -> Tensor:
        key = self.key.repeat_interleave(4 // self.key.shape[1], 1)
        return (self.query @ key.mT * self.scale).logsumexp(-1)

    monkeypatch.setattr(FlashCall, "_lse_is_the_functions", lambda self: False)
    for kind in (FlashCall, XformersCall):
        monkeypatch.setattr(kind, "compute_lse", lse)

    def of_transformers(module: nn.Module, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]) -> Tensor:
        return ops.attention_lse(query, key, None, options["scaling"], is_causal=False, softcap=options["softcap"])

    monkeypatch.setattr("mimic_core.edits.call.flash_lse", of_transformers)


def before_rope(monkeypatch: pytest.MonkeyPatch) -> None:
    init = FlashCall.__init__

    def wrong(self: FlashCall, function: Any, *args: Any) -> None:
        init(self, function, *args)
        self.query = self.query.roll(1, -1)
        self._call = wraps(function)(lambda q, **rest: function(q=q.roll(-1, -1), **rest))

    monkeypatch.setattr(FlashCall, "_lse_is_the_functions", lambda self: False)
    monkeypatch.setattr(FlashCall, "__init__", wrong)


def bias_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    def lse(self: FlexCall) -> tuple[Tensor, Tensor]:
        return self._call(), self._call(score_mod=None, return_lse=True)[1]

    monkeypatch.setattr(FlexCall, "_with_lse", lse)


def without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlashCall, "_lse_is_the_functions", lambda self: True)


class Shifted(mc.PathAdapter):
    layers, attention, mlp = "transformer.h", "attn", "mlp"

    def module(self, model: nn.Module, layer: int, site: Any) -> nn.Module:
        return super().module(model, (layer + 1) % 3 if site == "query" else layer, site)


@pytest.mark.parametrize(
    ("style", "wrong", "adapter", "expected"),
    [
        ("flash", mask_forgotten, None, {"lse", "MimIC"}),
        ("xformers", mask_forgotten, None, {"lse", "MimIC"}),
        ("transformers", mask_forgotten, None, {"lse", "MimIC"}),
        ("flex", bias_forgotten, None, {"lse", "MimIC"}),
        ("flash", before_rope, None, {"query", "MimIC"}),
        ("flash", without_gradient, None, {"MimIC"}),
        ("flash", lambda monkeypatch: None, Shifted, {"own layer", "query"}),
    ],
)
def test_the_kit_sees_a_wrong_call(
    style: str, wrong: Any, adapter: Any, expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong(monkeypatch)
    failed = {row.law for row in mc.testing.check_adapter(made(style), adapter=adapter).failures}
    assert failed >= expected


# --- by which name


def test_names_are_back_when_the_last_patch_is_gone() -> None:
    model, function = made("flash"), named_models.flash_attn_func
    plain = model(IDS)[0]
    handles = [mc.patch(one, random_shifts(one, "mimic")) for one in (model, made("flash"))]
    assert not torch.equal(model(IDS)[0], plain)
    for handle in handles:
        assert named_models.flash_attn_func is not function
        assert inspect.signature(named_models.flash_attn_func) == inspect.signature(function)
        handle.remove()
    assert (named_models.flash_attn_func, named.is_replaced()) == (function, False)
    assert torch.equal(model(IDS)[0], plain)


def test_a_file_that_is_loaded_under_two_names() -> None:
    names = ("xformers.ops", xformers_stand_in.__name__)
    function = xformers_stand_in.memory_efficient_attention
    holders = [nn.Module(), nn.Module()]
    releases = [named.Named((name,)).retain(holder) for name, holder in zip(names, holders, strict=True)]
    for release in releases:
        assert xformers_stand_in.memory_efficient_attention is not function
        release()
    assert xformers_stand_in.memory_efficient_attention is function


def test_only_the_modules_own_calls_are_edited() -> None:
    q = torch.randn(2, 6, 4, 8)
    check_only_own_calls_are_edited(made("flash"), made("flash"), IDS, lambda: usual(q, q, q))


def test_by_attribute_and_by_a_partial_and_in_a_file_that_comes_later(flash_attn: ModuleType) -> None:
    wanted, found = None, []
    late = ModuleType("late")
    names = (
        lambda q, k, v: flash_attn.flash_attn_func(q, k, v, causal=True),
        lambda q, k, v: in_a_moment(q, k, v),
        lambda q, k, v: late.attend(q, k, v, causal=True),
    )
    with mc.patch(made("flash"), random_shifts(made("flash"), "mimic")):
        with mc.patch(first := calling(names[0]), random_shifts(first, "mimic")):
            # It gets what stands at the package while a patch is in another model.
            late.attend = flash_attn.flash_attn_func
            sys.modules["late"] = late
        try:
            for attend in names:
                model = calling(attend)
                with mc.patch(model, random_shifts(model, "mimic")):
                    found.append(model(IDS)[0])
        finally:
            del sys.modules["late"]
    model = calling(usual)
    with mc.patch(model, random_shifts(model, "mimic")):
        wanted = model(IDS)[0]
    assert [torch.equal(one, wanted) for one in found] == [True] * 3
    assert not torch.equal(wanted, model(IDS)[0])


def test_another_function_than_when_it_was_looked_at() -> None:
    """Torch's SDPA in the small forward, and a function that the file of the class has a name for later."""
    later: list[int] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if later:
            return usual(q, k, v)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    model = calling(attend)
    with torch.no_grad(), mc.patch(model, random_shifts(model, "mimic")):
        wanted = model(IDS)[0]
        later.append(1)
        torch.testing.assert_close(model(IDS)[0], wanted)
    assert not torch.allclose(model(IDS)[0], wanted)


def test_a_function_that_no_file_has_a_name_for_has_no_sites() -> None:
    kept = [flash_stand_ins.flash_attn_func]
    model = calling(lambda q, k, v: kept[0](q, k, v, causal=True))
    with mc.patch(made("flash"), random_shifts(made("flash"), "mimic")):
        missing = mc.adapter_for(model).spec(model).layers[0].missing
    assert missing.startswith("no softmax attention (Own)")
