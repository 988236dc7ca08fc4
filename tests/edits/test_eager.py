"""Attention that a module computes by products and a softmax: its sites, compared with the formula written by hand."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import mimic_core as mc
from mimic_core.edits.eager import EagerView
from tests.support import named_sdpa
from tests.support.cases import random_shifts
from tests.support.eager_models import SCALE, STYLES, Computed, Written, formula, layer_of
from tests.support.plain_models import NanoGPT, decode, pad_right
from tests.zoo.tiny import tiny

pytestmark = pytest.mark.usefixtures("no_shape_checks")
IDS = torch.arange(14).view(2, 7) % 61


def made(style: str) -> Any:
    torch.manual_seed(0)
    return NanoGPT(layer_of(style)).double().eval().requires_grad_(False)


def written(model: nn.Module, edits: Callable[[int], dict]) -> Any:
    """A copy of the model in which attention is the formula."""
    twin: Any = copy.deepcopy(model)
    for n, layer in enumerate(twin.transformer["h"]):
        layer.attn = Written(layer.attn, edits(n))
    return twin


# --- what is there, compared with the formula


@pytest.mark.parametrize("style", STYLES)
def test_mimic_and_its_gradients(style: str) -> None:
    model = made(style)
    shifts = random_shifts(model, "mimic").double()
    leaves = [{n: p.detach().clone().requires_grad_() for n, p in head.named_parameters()} for head in shifts]

    def shift(n: int) -> dict:
        p = leaves[n]

        def heads(out: Tensor, q: Tensor, lse: Tensor) -> Tensor:
            log_z1 = (q * p["gate_weight"][:, None]).sum(-1) + p["gate_bias"][:, None]
            return out + torch.sigmoid(log_z1 - lse).transpose(1, 2)[..., None] * p["vector"]

        return {"attn_heads": heads}

    wanted = written(model, shift)(IDS)[0]
    wanted.square().mean().backward()
    with mc.patch(model, shifts):
        for _ in range(2):  # followed, and then by names
            shifts.zero_grad()
            found = model(IDS)[0]
            found.square().mean().backward()
            torch.testing.assert_close(found, wanted)
            for head, leaf in zip(shifts, leaves, strict=True):
                for name, p in head.named_parameters():
                    torch.testing.assert_close(p.grad, leaf[name].grad)
    assert not torch.allclose(wanted, model(IDS)[0])


@pytest.mark.parametrize("style", STYLES)
def test_reads_and_edits(style: str) -> None:
    model = made(style)
    sites = ("query", "key", "value")
    plain = model(IDS)[0]
    with torch.no_grad(), mc.hook(model, "query", lambda value, at: None):
        for _ in range(2):  # followed, and then by names
            with mc.capture(model, [*sites, "lse", "attn_heads"]) as seen:
                assert torch.equal(model(IDS)[0], plain)
            for n, layer in enumerate(model.transformer["h"]):
                out, lse = formula(layer.attn, *(seen[site][n] for site in sites))
                torch.testing.assert_close(seen["lse"][n], lse)
                torch.testing.assert_close(seen["attn_heads"][n], out)
    for site in sites:
        factor = torch.rand(plain.shape[0], 4, 1, 8, dtype=plain.dtype)[:1]

        def edit(value: Tensor, at: Any = None, factor: Tensor = factor) -> Tensor:
            return value * factor

        wanted = written(model, lambda n, site=site, edit=edit: {site: edit} if n == 1 else {})(IDS)[0]
        with torch.no_grad(), mc.hook(model, site, edit, layers=[1]):
            for _ in range(2):
                torch.testing.assert_close(model(IDS)[0], wanted)
        assert not torch.allclose(wanted, plain)


@pytest.mark.parametrize("style", ["before", "sinks", pytest.param("einsum", marks=pytest.mark.exhaustive)])
def test_every_law(style: str) -> None:
    torch.manual_seed(0)
    model = NanoGPT(layer_of(style)).eval().requires_grad_(False)
    report = mc.testing.check_adapter(model, decode=decode, pad=pad_right)
    report.raise_for_failures()
    for law in ("query", "key", "value", "attn_heads", "lse", "MimIC", "cached decoding", "padding", "removal"):
        assert report[law].verdict == "passed"


def test_what_is_computed_stays_bit_for_bit() -> None:
    """A read changes nothing, also where the query is scaled before the product."""
    for kind in ("bloom", "xglm", "gpt_neo"):
        case = tiny(kind)
        inputs = case.inputs(padding="left")
        with torch.no_grad():
            plain = case.model(**inputs).logits
            with mc.capture(case.model, ["query", "key", "value", "lse", "attn_heads"]):
                assert torch.equal(case.model(**inputs).logits, plain)


# --- torch's SDPA under another name


def test_sdpa_by_a_name_of_its_own() -> None:
    model = NanoGPT(named_sdpa.NamedBlock).eval().requires_grad_(False)
    usual = NanoGPT().eval().requires_grad_(False)
    usual.load_state_dict(model.state_dict())
    plain = model(IDS)[0]
    shifts = random_shifts(model, "mimic")
    with mc.patch(usual, copy.deepcopy(shifts)):
        wanted = usual(IDS)[0]
    with mc.patch(model, shifts):
        assert torch.equal(model(IDS)[0], wanted)
        assert named_sdpa.attend is not functional.scaled_dot_product_attention
    assert named_sdpa.attend is functional.scaled_dot_product_attention
    assert torch.equal(model(IDS)[0], plain)
    report = mc.testing.check_adapter(model, pad=pad_right)
    report.raise_for_failures()
    assert {report[law].verdict for law in ("query", "attn_heads", "lse", "MimIC", "removal")} == {"passed"}


# --- broken on purpose


def query_as_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    right = EagerView.__init__
    monkeypatch.setattr(EagerView, "__init__", lambda self, *args: right(self, *args[:3], 1, *args[4:]))


def mask_and_bias_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    def lse(self: EagerView) -> Tensor:
        return (self.query @ self.key.mT * self.scale).logsumexp(-1)

    monkeypatch.setattr(EagerView, "lse", property(lse))


def bias_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    def lse(self: EagerView) -> Tensor:
        logits, scores = self.query @ self.key.mT * self.scale, self.scores
        assert scores is not None
        barred = scores.given.reshape(logits.shape) < torch.finfo(logits.dtype).min / 2
        return logits.masked_fill(barred, -torch.inf).logsumexp(-1)

    monkeypatch.setattr(EagerView, "lse", property(lse))


def call_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    right = mc.GenericAdapter.module

    def module(self: Any, model: nn.Module, layer: int, site: Any) -> nn.Module:
        return right(self, model, (layer + 1) % 4 if site in ("query", "lse", "attn_heads") else layer, site)

    monkeypatch.setattr(mc.GenericAdapter, "module", module)


BROKEN = {
    "query taken scaled": (query_as_scaled, "xglm", {"query", "MimIC"}),
    "mask forgotten in the LSE": (mask_and_bias_forgotten, "gpt_neo", {"lse", "MimIC"}),
    "bias forgotten in the LSE": (bias_forgotten, "bloom", {"lse", "MimIC"}),
    "another module's call": (call_of_another, "bloom", {"own layer", "query", "attn_heads", "lse", "MimIC"}),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_red(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage, kind, expected = BROKEN[what]
    case = tiny(kind)
    sabotage(monkeypatch)
    report = mc.testing.check_adapter(case.model, case.inputs())
    assert expected <= {row.law for row in report.failures}
    assert {report[law].verdict for law in ("forward", "value", "mlp_out", "LIVE")} == {"passed"}


# --- refused


def test_what_is_not_known_at_a_site_is_refused() -> None:
    model = made("after")
    for site, name, message in (
        ("query", "value", "`at.value` is not known here: .*this comes later"),
        ("query", "lse", "`at.lse` is not known before the values meet the weights"),
        ("attn_heads", "mask", "`at.mask` is not known here: Computed computes its attention by itself"),
        ("attn_heads", "lse_all_keys", "the LSE over all keys is only for attention like in the published models"),
    ):
        with mc.hook(model, site, lambda value, at, name=name: getattr(at, name) and None, layers=[0]):  # pyright: ignore[reportArgumentType]
            with pytest.raises(mc.UnsupportedModelError, match=message):
                model(IDS)


class Odd(Computed):
    """It attends in another way than when it was looked at."""

    way = ""

    def forward(self, x: Tensor, past: Any) -> Tensor:
        if self.way == "more products":
            torch.matmul(x, x.mT)
        if self.way == "twice":
            super().forward(x, past)
        if self.way == "two products":
            q, k, v = self.c_attn(x).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
            return self.c_proj(((q @ k.mT + q @ v.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))
        if self.way == "mixed heads":
            q, k, v = self.c_attn(x).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
            scores = torch.einsum("hg,bgts->bhts", torch.eye(4).to(x), q @ k.mT)
            return self.c_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return super().forward(x, past)


@pytest.mark.parametrize("way", ["more products", "twice", "mixed heads", "two products"])
def test_another_way_than_seen_is_refused(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("after")
    for layer in model.transformer["h"]:
        layer.attn.__class__ = Odd
    before = [sorted(vars(m)) for m in model.modules()]
    with mc.patch(model, random_shifts(model, "mimic")):
        monkeypatch.setattr(Odd, "way", way)
        with pytest.raises(mc.PatchStateError, match="inside the attention of Odd can't be made"):
            model(IDS)
    assert [sorted(vars(m)) for m in model.modules()] == before
    assert torch._C._len_torch_function_stack() == 0
    if way != "more products":
        model = copy.deepcopy(model)
        of = "several products together" if way == "two products" else "what is no product"
        why = "attends 2 times" if way == "twice" else f"can be followed: a softmax of {of}"
        with pytest.raises(mc.UnsupportedModelError, match=why):
            mc.hook(model, "query", lambda value, at: None)


class HeadsFirst(Computed):
    """As in code that cuts the heads apart and joins them along the samples."""

    def forward(self, x: Tensor, past: Any) -> Tensor:
        q, k, v = (torch.cat(y.split(8, 2)) for y in self.c_attn(x).chunk(3, 2))
        out = (q @ k.mT).softmax(-1) @ v
        return self.c_proj(torch.cat(out.chunk(4), 2))


def test_heads_before_samples_are_refused() -> None:
    """Read as samples before heads, they would be those of others as soon as there are two samples."""
    model = made("after")
    for layer in model.transformer["h"]:
        layer.attn.__class__ = HeadsFirst
    with pytest.raises(mc.UnsupportedModelError, match="samples and heads in one axis, and it is not known which"):
        mc.hook(model, "query", lambda value, at: None)


# --- around it


def test_other_threads_models_and_modules_see_nothing() -> None:
    model, other = made("after"), made("after")
    plain = model(IDS)[0]
    results: dict[str, Tensor] = {}
    inside, done = threading.Event(), threading.Event()

    def wait(value: Tensor, at: mc.At) -> None:
        if not inside.is_set():
            inside.set()
            done.wait(20)

    def run() -> None:
        with torch.no_grad():
            results["shifted"] = model(IDS)[0]

    one, two = random_shifts(model, "mimic").double(), random_shifts(other, "mimic").double()
    with mc.patch(model, one), mc.hook(model, "query", wait, layers=[1]), mc.patch(other, two):
        thread = threading.Thread(target=run)
        thread.start()
        assert inside.wait(20)
        depth = torch._C._len_torch_function_stack()
        results["other"] = other(IDS)[0]
        done.set()
        thread.join()
        assert torch.equal(model(IDS)[0], results["shifted"])
        assert torch.equal(copy.deepcopy(model)(IDS)[0], results["shifted"]), "a copy is patched too"
    assert depth == 0
    assert torch.equal(results["other"], results["shifted"]), "both have the same stack"
    assert torch.equal(model(IDS)[0], plain)


def test_a_patched_model_is_located_as_before() -> None:
    model = made("in")
    before = mc.adapters.locate(model).own
    with mc.patch(model, random_shifts(model, "mimic").double()):
        model.extra = nn.Identity()  # what was found before does not hold any more
        assert mc.adapters.locate(model).own == before
    assert len(before) == 3


def test_an_error_inside_leaves_nothing() -> None:
    model = made("in")
    attention = model.transformer["h"][1].attn
    with mc.patch(model, random_shifts(model, "mimic").double()):
        wanted = model(IDS)[0]
        hook = attention.c_attn.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(IDS)
        hook.remove()
        assert torch._C._len_torch_function_stack() == 0
        assert torch.equal(model(IDS)[0], wanted)


def interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.newest
def test_compiled() -> None:
    """torch.compile runs such a module uncompiled, as one that calls SDPA by itself."""
    torch._dynamo.reset()
    model = made("before")
    shifts = random_shifts(model, "mimic").double()
    with torch.no_grad(), mc.patch(model, shifts):
        wanted = model(IDS)[0]
        torch.testing.assert_close(torch.compile(model, backend="eager")(IDS)[0], wanted)
        with pytest.raises(mc.PatchStateError, match="Computed attends without .*, which can't be exported"):
            torch.export.export(model, (IDS,), strict=False)


def test_the_scale_is_known() -> None:
    """Before the module has multiplied by it too."""
    for style in STYLES:
        model, scales = made(style), []
        for site in ("query", "attn_heads"):
            with mc.hook(model, site, lambda value, at, scales=scales: scales.append(at.scale), layers=[0]):  # pyright: ignore[reportArgumentType]
                model(IDS)
        assert scales == [pytest.approx(SCALE)] * 2
