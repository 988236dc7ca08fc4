"""Attention by functions of packages that a file has names for: exact, or refused with what was found."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable
from functools import partial, wraps
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import mimic_core as mc
from mimic_core.edits import named
from mimic_core.edits.biased import FlexCall, XformersCall
from mimic_core.edits.packages import FlashCall
from tests.support import flash_stand_ins, named_models, xformers_stand_in
from tests.support.cases import random_shifts
from tests.support.flash_stand_ins import logits_of
from tests.support.named_models import PACKED, STYLES, Flash, decode, made
from tests.support.plain_models import pad_right

pytestmark = pytest.mark.usefixtures("no_shape_checks")
IDS = torch.arange(14).view(2, 7) % 61
in_a_moment = partial(flash_stand_ins.flash_attn_func, causal=True)
SITES = ("query", "key", "value", "attn_heads", "lse")


@pytest.fixture(autouse=True)
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return named_models.put_packages(monkeypatch)


def calling(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Any:
    """A decoder whose attention is `attend`, of [b t h d]."""
    return made(type("Own", (Flash,), {"attend": lambda self, q, k, v, old: attend(q, k, v)}))


def usual(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
    return named_models.flash_attn_func(q, k, v, causal=True, **more)


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


def before_rope(monkeypatch: pytest.MonkeyPatch) -> None:
    init = FlashCall.__init__

    def wrong(self: FlashCall, function: Any, *args: Any) -> None:
        init(self, function, *args)
        self.query = self.query.roll(1, -1)
        self._function = wraps(function)(lambda q, **rest: function(q=q.roll(-1, -1), **rest))

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
    model, other = made("flash"), made("flash")
    q, found = torch.randn(2, 6, 4, 8), []
    wanted, plain = usual(q, q, q), model(IDS)[0]

    def elsewhere(value: Tensor, at: mc.At) -> Tensor:
        thread = threading.Thread(target=lambda: found.append(usual(q, q, q)))
        thread.start()
        thread.join()
        found.append(usual(q, q, q))
        assert torch.equal(other(IDS)[0], plain)
        return value * 2

    with mc.hook(model, "attn_heads", elsewhere, layers=[1]):
        assert not torch.equal(model(IDS)[0], plain)
    assert len(found) == 2
    assert all(torch.equal(one, wanted) for one in found)


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
            return in_a_moment(q, k, v)
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


# --- what a call may be


class Unpadded(Flash):
    """Real tokens alone, in one row."""

    real = torch.ones(2, 7, dtype=torch.bool)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, old: Any) -> Tensor:
        real = self.real if len(q) == 2 else torch.ones(q.shape[:2], dtype=torch.bool)
        starts = nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).int()
        longest = int(real.sum(1).max())
        out = named_models.flash_attn_unpadded_func(
            q[real], k[real], v[real], starts, starts, longest, longest, causal=True
        )
        return torch.zeros_like(q).index_put((real,), out)


def test_packed_rows_of_several_samples() -> None:
    model = made(Unpadded)
    shifts = random_shifts(model, "mimic")
    lengths = (7, 4)
    Unpadded.real = torch.arange(7) < torch.tensor(lengths)[:, None]
    rows = [IDS[i : i + 1, :n] for i, n in enumerate(lengths)]
    gradients = []
    with mc.patch(model, shifts):
        for batch in (True, False):
            together = [model(IDS)[0][i : i + 1, :n] for i, n in enumerate(lengths)] if batch else []
            found = together or [model(row)[0] for row in rows]
            gradients.append(
                (found, torch.autograd.grad(sum(x.square().sum() for x in found), list(shifts.parameters())))
            )
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)
        with (
            pytest.raises(mc.ShapeError, match="2 rows|rows"),
            mc.handles(model)[0].using(strength=torch.tensor([1.0, 0.5])),
        ):
            model(IDS)
    with torch.no_grad(), mc.capture(model, SITES) as seen:
        model(IDS)
    q, k, lse = (seen[site][1] for site in ("query", "key", "lse"))
    assert (q.shape, k.shape, lse.shape) == ((1, 4, 11, 8), (1, 2, 11, 8), (1, 4, 11))
    for a, b in ((0, 7), (7, 11)):
        scores = logits_of(q[0, :, a:b].transpose(0, 1), k[0, :, a:b].transpose(0, 1), None, True, (-1, -1), 0.0)
        torch.testing.assert_close(lse[0, :, a:b], scores.logsumexp(-1))


@pytest.mark.parametrize("shape", ["[h n]", "[b h t]"])
def test_the_lse_of_the_function_in_packed_rows(shape: str) -> None:
    """That of tokens after the last sequence is no number; older packages have another layout, which is not used."""

    def function(q: Tensor, *rest: Any, **more: Any) -> Any:
        lse = torch.full((4, 9), torch.nan) if shape == "[h n]" else torch.zeros(2, 4, 5)
        lse[:, :7] = 3.0 if shape == "[h n]" else 0.0
        return q, lse, None

    wrapped = wraps(flash_stand_ins.flash_attn_varlen_func)(function)
    q, starts = torch.randn(9, 4, 8), torch.tensor([0, 5, 7], dtype=torch.int32)
    call = FlashCall(wrapped, nn.Module(), (q, q, q, starts, starts, 5, 5), {"causal": True}, None)
    call.attend(reads_lse=True)
    assert (call.lse[..., 7:] == -torch.inf).all()
    if shape == "[h n]":
        assert (call.lse[..., :7] == 3.0).all()
    else:
        scores = logits_of(q[5:7], q[5:7], None, True, (-1, -1), 0.0)
        torch.testing.assert_close(call.lse[0, :, 5:7], scores.logsumexp(-1))


def test_a_cache_that_the_function_writes() -> None:
    """Samples of several lengths, three new tokens, edits of key and value, and a read of them."""
    generator = torch.Generator().manual_seed(2)
    caches = [torch.randn(2, 16, 2, 8, generator=generator) for _ in range(2)]
    held = torch.tensor([5, 2], dtype=torch.int32)
    mine: list[Tensor] = []
    early: list[Tensor] = []
    calls: list[int] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(1)
        if not mine or len(calls) > 1:  # the first layer alone has a cache
            return usual(q, k, v)
        return named_models.flash_attn_with_kvcache(q, *mine, k, v, cache_seqlens=held, causal=True)

    model, ids = calling(attend), IDS[:, :3]
    found: dict[str, Any] = {}

    def formula(seen: dict[str, Any], edit: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, Tensor]]:
        parts = []
        for row, start in enumerate(held.tolist()):
            k, v = (seen[site][row, :, : start + 3].transpose(0, 1) for site in ("key", "value"))
            scores = logits_of(seen["query"][row].transpose(0, 1), edit(k), None, True, (-1, -1), 0.0)
            values = v.repeat_interleave(2, 1)
            parts.append((torch.einsum("hts,shd->thd", scores.softmax(-1), values), scores.logsumexp(-1)))
        return parts

    def before(value: Tensor, at: mc.At) -> None:
        early.append(at.lse)

    mc.adapter_for(model)
    calls.clear()
    mine[:] = [x.clone() for x in caches]
    with torch.no_grad():
        model(ids)
    alone = [x.clone() for x in mine]
    for edited in (False, True):
        calls.clear()
        mine[:] = [x.clone() for x in caches]
        handles = [mc.hook(model, "key", lambda x, at: x * 1.5, layers=[0])] if edited else []
        with torch.no_grad(), mc.capture(model, SITES, layers=[0]) as captured:
            with mc.hook(model, "query", before, layers=[0]):
                model(ids)
        for handle in handles:
            handle.remove()
        seen = {site: captured[site][0] for site in SITES}
        assert seen["key"].shape == (2, 2, 8, 8)
        assert (seen["key"][1, :, 5:] == 0).all(), "this sample has no more keys"
        for row, (out, lse) in enumerate(formula(seen, lambda k: k)):
            torch.testing.assert_close(seen["attn_heads"][row], out)
            torch.testing.assert_close(seen["lse"][row], lse)
        found["edited" if edited else "plain"] = seen, [x.clone() for x in mine]
    plain, kept = found["plain"]
    torch.testing.assert_close(early[0], plain["lse"])
    torch.testing.assert_close(found["edited"][0]["key"], plain["key"] * 1.5)
    for changed in (kept, found["edited"][1]):
        assert all(torch.equal(one, other) for one, other in zip(changed, alone, strict=True))
    assert not torch.equal(alone[0], caches[0])
    calls.clear()
    with pytest.raises(mc.UnsupportedModelError, match="flash_attn_with_kvcache gives no gradient"):
        with mc.patch(model.requires_grad_(), random_shifts(model, "mimic")):
            model(ids)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"alibi_slopes": torch.ones(4)}, "flash_attn_func got alibi_slopes, which is not understood"),
        ({"window_size": (3, 1)}, None),
    ],
)
def test_what_is_not_understood_is_refused(more: dict[str, Any], message: str | None) -> None:
    given: dict[str, Any] = {}
    model = calling(lambda q, k, v: named_models.flash_attn_func(q, k, v, **given))
    with mc.patch(model, random_shifts(model, "mimic")):
        given |= more
        with pytest.raises(mc.UnsupportedModelError, match=message or "a window of 3 keys before and 1 after"):
            model(IDS)
    seen = calling(lambda q, k, v: named_models.flash_attn_func(q, k, v, **given))
    missing = mc.adapter_for(seen).spec(seen).layers[0].missing
    assert ("alibi_slopes" in missing) == (message is not None)


def test_attention_that_is_called_twice_is_refused() -> None:
    twice: list[int] = []
    model = calling(lambda q, k, v: usual(q, k, v) + sum(usual(q, k, v) for _ in twice))
    with mc.patch(model, random_shifts(model, "mimic")):
        twice.append(1)
        with pytest.raises(mc.UnsupportedModelError, match="flash_attn_func is called several times"):
            model(IDS)


def test_torchs_flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no backward on a CPU, so the laws are checked on a stand-in."""
    model = made("flex")
    with torch.no_grad(), mc.patch(model, shifts := random_shifts(model, "mimic")):
        wanted = model(IDS)[0]
    monkeypatch.undo()
    with torch.no_grad(), mc.patch(other := made("flex"), shifts):
        torch.testing.assert_close(other(IDS)[0], wanted)
        assert not torch.equal(other(IDS)[0], model(IDS)[0])


@pytest.mark.parametrize("style", ["flash", "packed", "kept", "xformers", "blocks"])
def test_an_edit_is_told_the_mask(style: str) -> None:
    """And the LSE over all keys, in a prompt and in two tokens after it."""
    model, told = made(style), []

    def check(value: Tensor, at: mc.At) -> None:
        t, key = at.query.shape[2], at.key.repeat_interleave(4 // at.key.shape[1], 1)
        scores = at.query @ key.mT * at.scale
        if style != "blocks":
            torch.testing.assert_close(at.lse_all_keys, scores.logsumexp(-1))
        mask = torch.ones(t, t, dtype=torch.bool).tril() if at.is_causal else at.mask
        told.append(at.is_causal)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        torch.testing.assert_close(at.lse, scores.logsumexp(-1))

    # It reads the LSE before attention has run.
    with torch.no_grad(), mc.hook(model, "query", check):
        if style in PACKED:
            model(IDS)
        else:
            past = named_models.empty_cache(model, 2)
            for step in IDS.split((5, 2), 1):
                model(step, past=past)
    assert told == ([style == "packed"] * 3 if style in PACKED else [style != "kept"] * 3 + [False] * 3)


def test_a_bias_of_xformers() -> None:
    bias = torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(1))
    given: dict[str, Any] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(2, 2) for x in (k, v))
        return named_models.memory_efficient_attention(q, k, v, **given)

    mc.adapter_for(model := calling(attend))
    given["attn_bias"] = bias
    with torch.no_grad(), mc.capture(model, ("query", "key", "lse"), layers=[0]) as seen:
        model(IDS)
    q, k, lse = (seen[site][0] for site in ("query", "key", "lse"))
    torch.testing.assert_close(lse, (q @ k.mT * 8**-0.5 + bias).logsumexp(-1))
    for wrong, message in (
        ({"attn_bias": bias.clone().requires_grad_()}, "its attn_bias requires a gradient"),
        ({"attn_bias": None, "output_dtype": torch.float32}, "got output_dtype, which is not understood"),
    ):
        with mc.patch(model, random_shifts(model, "mimic")):
            given.clear()
            given |= wrong
            with pytest.raises(mc.UnsupportedModelError, match=message):
                model(IDS)
        given.clear()


def test_half_precision() -> None:
    model, exact = made("flash").bfloat16(), made("flash")
    shifts = random_shifts(exact, "mimic")
    with torch.no_grad():
        with mc.patch(exact, shifts):
            wanted = exact(IDS)[0]
        with mc.patch(model, shifts), mc.capture(model, "lse") as seen:
            found = model(IDS)[0]
    assert seen["lse"][0].dtype == torch.float32
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()
