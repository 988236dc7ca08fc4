"""The second forward of a kind is read at torch's names of products and softmaxes, if these tell enough of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import mimic_core as mc
from mimic_core.edits import paths
from tests.support import path_models
from tests.support.cases import random_shifts
from tests.support.eager_models import SCALE, STYLES, layer_of
from tests.support.path_models import (
    Asks,
    Before,
    Busy,
    ByFile,
    ByFunctional,
    BySize,
    Counts,
    Elsewhere,
    HalfHidden,
    Hidden,
    HiddenSoftmax,
    InContext,
    Learned,
    Lowers,
    Multiplies,
)
from tests.support.plain_models import NanoGPT, empty_cache
from tests.zoo.tiny import tiny

pytestmark = pytest.mark.usefixtures("no_shape_checks")
IDS = torch.arange(14).view(2, 7) % 61
BUILT_IN = {name: getattr(torch, name) for name in ("matmul", "bmm", "baddbmm", "einsum", "softmax")}
METHODS = ("matmul", "bmm", "baddbmm", "__matmul__", "softmax")


def number_of_modes() -> int:
    return torch._C._len_torch_function_stack()


# Whether the second forward is read at its names.
WAYS = {Multiplies: True, Busy: True, ByFile: True, ByFunctional: True, InContext: True, Before: True}
WAYS |= {Learned: False, Hidden: False, HalfHidden: False, HiddenSoftmax: False, Lowers: False}


def made(kind: type[nn.Module] | None = None, style: str = "after") -> Any:
    torch.manual_seed(0)
    model = NanoGPT(layer_of(style)).double().eval().requires_grad_(False)
    for layer in model.transformer["h"] if kind is not None else ():
        layer.attn.__class__ = kind
    return model


def test_what_an_edit_is_told() -> None:
    """A softcap and the scale, which may be multiplied in two steps, are known from the first forward."""
    for style, logits in (("einsum", ("softcap",)), ("before", ())):
        model, told = made(style=style), []

        def tell(value: Tensor, at: mc.At, told: list[Any] = told) -> None:
            told.append((at.logits, at.scale))

        with torch.no_grad(), mc.hook(model, "attn_heads", tell, layers=[0]):
            for _ in range(2):
                model(IDS)
        assert told == [(logits, pytest.approx(SCALE))] * 2


class Followed:
    """Which forwards of the first layer's attention have been followed."""

    def __init__(self, model: Any) -> None:
        self.was: list[bool] = []
        attention = model.transformer["h"][0].attn
        attention.c_attn.register_forward_pre_hook(lambda module, args: self.was.append(number_of_modes() > 0))

    def next(self) -> list[bool]:
        """Those since the last time."""
        was, self.was = self.was, []
        return was


@pytest.mark.parametrize("way", WAYS)
def test_by_names_or_followed(way: type[nn.Module]) -> None:
    model, usual = made(way), made()
    followed = Followed(model)
    shifts = random_shifts(model, "mimic").double()
    found: list[tuple[Tensor, ...]] = []
    for one in (usual, model, model):
        mine = copy.deepcopy(shifts)
        with mc.patch(one, mine), mc.hook(one, "value", lambda value, at: 2 * value):
            followed.was.clear()
            if len(found) == 2:
                one(IDS)  # the patch is a new one
            out = one(IDS)[0]
        out.square().mean().backward()
        found.append((out, *[p.grad for p in mine.parameters()]))  # pyright: ignore[reportArgumentType]
        assert number_of_modes() == 0
        assert followed.next() == [[], [True], [True, not WAYS[way]]][len(found) - 1]
    assert len(found[0]) > 1
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            torch.testing.assert_close(b, a)
    assert not torch.allclose(model(IDS)[0], found[1][0])


@pytest.mark.parametrize("style", STYLES)
def test_which_styles_are_read_at_names(style: str) -> None:
    """What takes something away from its scores that is in the LSE, or adds a column, is followed each time."""
    model = made(style=style)
    followed = Followed(model)
    with torch.no_grad(), mc.hook(model, "attn_heads", lambda value, at: None):
        followed.was.clear()
        for _ in range(3):
            model(IDS)
        assert followed.next() == [True, *[style not in ("before", "in", "einsum")] * 2]
        cache = [(x.double(), y.double()) for x, y in empty_cache(2)]
        for token in IDS.split(1, 1):
            model(token, past=cache)
        # A bias that counts from the last key is none at the only query. The kind is new at powers of two, if ever.
        assert len(followed.next()) == 7


@contextmanager
def kept(model: Any) -> Iterator[Followed]:
    """Inside the `with`, what is known of the model is kept, whatever else is put in and removed."""
    followed = Followed(model)
    with mc.hook(model, "query", lambda value, at: None):
        followed.was.clear()
        yield followed


def seen_in(model: Any, ids: Tensor = IDS) -> dict[str, Tensor]:
    """What is seen in the first layer."""
    with mc.capture(model, ["query", "lse", "attn_heads"]) as seen:
        model(ids)
    return {site: seen[site][0] for site in ("query", "lse", "attn_heads")}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    for site, value in wanted.items():
        torch.testing.assert_close(found[site], value)
    return True


@pytest.mark.parametrize("how", ["bool", "item", "nonzero", "index", "where", "tolist", "numpy"])
def test_numbers_that_decide(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, wanted = made(Lowers), seen_in(made())
    monkeypatch.setattr(Lowers, "how", how)
    with kept(model):
        for limit in (1e9, -1e9, 1e9):
            monkeypatch.setattr(Lowers, "limit", limit)
            assert same(seen_in(model), wanted)


def test_other_kinds_are_followed() -> None:
    model, usual = made(Asks), made()
    attention = model.transformer["h"][0].attn
    attention.lowers = False
    with kept(model) as followed:

        def was(ids: Tensor = IDS) -> list[bool]:
            assert same(seen_in(model, ids), seen_in(usual, ids))
            return followed.next()

        with torch.no_grad():
            assert [*was(), *was()] == [True, False]
            attention.lowers = True
            assert [*was(), *was()] == [True, True]
            attention.lowers = False
            assert was() == [False]
        assert was() == [True]
        with torch.no_grad():
            for ids in (IDS[:1, :1], torch.arange(40)[None] % 61, IDS[:, :1]):
                assert was(ids) == [True]
            assert [*was(IDS[:1]), *was(IDS[:1]), *was(IDS[:1, :5]), *was(IDS[:1, :6])] == [True, False, True, False]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert was() == [True]
            attention.train()
            attention.drop.eval()
            assert was() == [True]
            attention.eval()
            for one in (model, usual):
                one.float()
            assert was() == [True]
            for one in (model, usual):
                one.double()
            assert was() == [False]


def test_a_number_that_changes_fills_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(Counts)
    monkeypatch.setattr(paths, "_MOST", 4)
    with mc.hook(model, "query", lambda value, at: None):
        slot = next(x for x in vars(model.transformer["h"][0].attn).values() if hasattr(x, "paths"))
        followed, sizes = Followed(model), []
        followed.was.clear()
        for _ in range(7):
            model(IDS)
            sizes.append(len(slot.paths))
    assert all(followed.next())
    assert sizes == [1, 2, 3, 4, 1, 2, 3]


def test_a_number_computed_of_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of one size says nothing of a number in another one, although these are of one kind."""
    model, usual = made(BySize), made()
    with kept(model) as followed, torch.no_grad():
        for t in (7, 7, 6, 6, 5, 6):
            assert same(seen_in(model, IDS[:, :t]), seen_in(usual, IDS[:, :t]))
        assert followed.next() == [True, False, True, False, True, True]
    model = made(BySize)
    with kept(model) as followed, torch.no_grad():
        monkeypatch.setattr(BySize, "divides", False)
        for _ in range(2):
            assert same(seen_in(model), seen_in(usual))
        with pytest.raises(mc.PatchStateError, match="it attends another way than when it was looked at"):
            model(IDS[:, :6])
        assert same(seen_in(model), seen_in(usual))
        assert followed.next() == [True, False, True, False]


WHAT = ("product before", "softmax before", "no attention", "other axis", "no softmax", "other product")
WHAT += ("in the product", "product after", "softmax after")


@pytest.mark.parametrize("what", WHAT)
def test_another_path_than_that_of_its_kind(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(Elsewhere)
    plain = model(IDS)[0]
    followed = Followed(model)
    shifts = random_shifts(model, "mimic").double()
    with mc.patch(model, shifts):
        followed.was.clear()
        wanted = [model(IDS)[0] for _ in range(2)][1]
        with monkeypatch.context() as patched:
            patched.setattr(Elsewhere, "what", what)
            with pytest.raises(mc.PatchStateError, match="it attends another way than when it was looked at"):
                model(IDS)
        assert number_of_modes() == 0
        assert torch.equal(model(IDS)[0], wanted)
    assert followed.next()[:4] == [True, False, False, True]
    assert torch.equal(model(IDS)[0], plain)


def test_an_error_in_between_is_not_the_last_word() -> None:
    """What a forward that was stopped in its edit leaves behind does not matter to the next."""
    model, fails = made(Multiplies), []

    def edit(value: Tensor, at: mc.At) -> None:
        if fails:
            raise KeyboardInterrupt

    with mc.hook(model, "query", edit), torch.no_grad():
        wanted = model(IDS)[0]
        for _ in range(2):  # followed, and by names
            fails.append(1)
            with pytest.raises(KeyboardInterrupt):
                model(IDS)
            fails.clear()
            assert number_of_modes() == 0
            assert torch.equal(model(IDS)[0], wanted)


def test_copies_have_paths_of_their_own() -> None:
    model = made(Multiplies)
    with mc.patch(model, random_shifts(model, "mimic").double()), torch.no_grad():
        wanted = [model(IDS)[0] for _ in range(2)][1]
        twin = copy.deepcopy(model)
    followed = Followed(twin)
    with torch.no_grad():
        assert torch.equal(twin(IDS)[0], wanted)
        assert torch.equal(twin(IDS)[0], wanted)
    assert followed.next() == [True, False]


def test_names_are_replaced_while_an_edit_needs_them() -> None:
    def replaced() -> set[bool]:
        names = {getattr(torch, name) is not function for name, function in BUILT_IN.items()}
        own = {getattr(path_models, name) is not BUILT_IN[name] for name in ("matmul", "softmax")}
        return names | {name in vars(Tensor) for name in METHODS} | own

    model, other = made(), made(ByFile)
    assert replaced() == {False}
    one = mc.hook(model, "query", lambda value, at: None)
    two = mc.hook(other, "query", lambda value, at: None)
    assert replaced() == {True}
    one.remove()
    assert replaced() == {True}
    two.remove()
    assert replaced() == {False}
    x = torch.randn(2, 3, 3)
    assert torch.equal(0.5 * x @ x, torch.bmm(0.5 * x, x))
    assert torch.equal(x.softmax(-1), functional.softmax(x, -1))


@pytest.mark.parametrize("way", [Multiplies, Before, Hidden])
@pytest.mark.parametrize("weighs", [False, True])
def test_edits_that_multiply_themselves(way: type[nn.Module], weighs: bool) -> None:
    model = made(way)

    def product(value: Tensor, at: mc.At) -> Tensor:
        ones = torch.softmax(value, -1).sum(-1, keepdim=True) if weighs else 1
        return torch.matmul(value, 1.5 * torch.eye(value.shape[-1]).to(value).expand(*value.shape[:2], -1, -1)) * ones

    found = []
    for edit in (product, lambda value, at: value * 1.5):
        with ExitStack() as hooks:
            for site in ("query", "attn_heads", *["value"] * weighs):
                hooks.enter_context(mc.hook(model, site, edit))
            found += [model(IDS)[0], model(IDS)[0]]
    for one in found[1:]:
        torch.testing.assert_close(one, found[0])


def test_a_query_in_less_than_the_values() -> None:
    """GPT-Neo multiplies in fp32. What reads the query computes in fp64, whether or not it was read before that."""
    case = tiny("gpt_neo")
    model, found = case.model.double(), []
    with torch.no_grad(), mc.patch(model, random_shifts(model, "mimic").double()):
        found.append(model(**case.inputs()).logits)
        with mc.hook(model, "query", lambda value, at: None):
            found.append(model(**case.inputs()).logits)
    assert torch.equal(*found)


@pytest.mark.newest
def test_other_models_are_compiled_whole_meanwhile() -> None:
    def multiplies(a: Tensor, b: Tensor) -> Tensor:
        return (
            torch.einsum("bij,bjk->bik", a, b)
            + a.matmul(b)
            + a @ b
            + torch.baddbmm(a, a, b)
            + torch.softmax(torch.bmm(a, b).softmax(1), 2)
        )

    torch._dynamo.reset()
    x = torch.randn(2, 3, 3)
    wanted = multiplies(x, x)
    compiled = torch.compile(multiplies, backend="eager", fullgraph=True)
    with mc.hook(made(), "query", lambda value, at: None):
        assert torch.equal(compiled(x, x), wanted)
    assert torch.equal(compiled(x, x), wanted)
