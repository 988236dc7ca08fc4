"""Attention by products and a softmax is followed from the product of query and key on, which a replaced name shows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, matmul, nn
from torch.overrides import TorchFunctionMode

import mimic_core as mc
from mimic_core.edits.eager import Recipe
from tests.support.cases import random_shifts
from tests.support.eager_models import STYLES, Computed, layer_of
from tests.support.plain_models import NanoGPT
from tests.zoo.tiny import tiny

pytestmark = pytest.mark.usefixtures("no_shape_checks")
IDS = torch.arange(14).view(2, 7) % 61
BUILT_IN = {name: getattr(torch, name) for name in ("matmul", "bmm", "baddbmm", "einsum")}
METHODS = ("matmul", "bmm", "baddbmm", "__matmul__")


def number_of_modes() -> int:
    return torch._C._len_torch_function_stack()


class Multiplies(Computed):
    """Attention with a product of one's own; what is around it is as in `after`."""

    times: ClassVar[Callable[..., Tensor]] = staticmethod(matmul)

    def forward(self, x: Tensor, past: Any) -> Tensor:
        q, k, v = self.c_attn(x).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        barred = ~torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        return self.c_proj(self.attend(q, k, v, barred).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, barred: Tensor) -> Tensor:
        scores = self.multiply(q, k.mT) / q.shape[-1] ** 0.5
        return self.multiply(self.drop(scores.masked_fill(barred, -torch.inf).softmax(-1)), v)

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


class ByFile(Multiplies):
    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        return matmul(a, b)


class Hidden(Multiplies):
    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        return type(self).times(a, b)


class HalfHidden(Multiplies):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, barred: Tensor) -> Tensor:
        scores = q @ k.mT / q.shape[-1] ** 0.5
        return type(self).times(self.drop(scores.masked_fill(barred, -torch.inf).softmax(-1)), v)


class InContext(Multiplies):
    """It enters a context between the beginning and the products, and leaves it between the two products."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, barred: Tensor) -> Tensor:
        with torch.device("cpu"):
            scores = q @ k.mT / q.shape[-1] ** 0.5
        return self.drop(scores.masked_fill(barred, -torch.inf).softmax(-1)) @ v


WAYS = {Multiplies: True, ByFile: True, Hidden: False, HalfHidden: False, InContext: False}


def made(kind: type[nn.Module] | None = None, style: str = "after") -> Any:
    torch.manual_seed(0)
    model = NanoGPT(layer_of(style)).double().eval().requires_grad_(False)
    for layer in model.transformer["h"] if kind is not None else ():
        layer.attn.__class__ = kind
    return model


def recipes(model: nn.Module) -> list[Recipe]:
    return [one for one in mc.adapters.locate(model).own.values() if isinstance(one, Recipe)]


@pytest.mark.parametrize("way", WAYS)
def test_by_a_name_or_otherwise(way: type[nn.Module]) -> None:
    model, usual = made(way), made()
    assert [one.files is not None for one in recipes(model)] == [WAYS[way]] * 3
    shifts = random_shifts(model, "mimic").double()
    for parameter in shifts.parameters():
        parameter.requires_grad_(True)
    found = []
    for one in (usual, model):
        with mc.patch(one, mine := copy.deepcopy(shifts)), mc.hook(one, "value", lambda value, at: 2 * value):
            out = one(IDS)[0]
            out.square().mean().backward()
            found.append((out, *[p.grad for p in mine.parameters()]))
        assert number_of_modes() == 0
    assert len(found[0]) > 1
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a)
    assert not torch.allclose(model(IDS)[0], found[1][0])


@pytest.mark.parametrize("style", STYLES)
def test_what_is_before_and_after_is_not_followed(style: str) -> None:
    model = made(style=style)
    assert {one.is_scaled for one in recipes(model)} == {style == "before"}
    seen: dict[str, int] = {}
    attention = model.transformer["h"][0].attn
    for name in ("c_attn", "drop", "c_proj"):
        attention.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: number_of_modes()})
        )
    with mc.hook(model, "attn_heads", lambda value, at: None):
        model(IDS)
    assert seen.pop("drop", 1) == 1
    assert seen == {"c_attn": int(style == "before"), "c_proj": 0}


def test_names_are_replaced_while_an_edit_needs_them() -> None:
    def replaced() -> set[bool]:
        names = {getattr(torch, name) is not function for name, function in BUILT_IN.items()}
        return names | {name in vars(Tensor) for name in METHODS} | {matmul is not BUILT_IN["matmul"]}

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


@pytest.mark.parametrize("style", ["after", "before", "einsum"])
def test_edits_that_multiply_themselves(style: str) -> None:
    model = made(style=style)

    def product(value: Tensor, at: mc.At) -> Tensor:
        return torch.matmul(value, torch.eye(value.shape[-1]).to(value) * 1.5)

    found = []
    for edit in (product, lambda value, at: value * 1.5):
        with mc.hook(model, "query", edit), mc.hook(model, "value", edit), mc.hook(model, "attn_heads", edit):
            found.append(model(IDS)[0])
    torch.testing.assert_close(*found)


def test_a_query_in_less_than_the_values() -> None:
    """GPT-Neo multiplies in fp32. What reads the query computes in fp64, whether or not it was read before that."""
    case = tiny("gpt_neo")
    model, found = case.model.double(), []
    with torch.no_grad(), mc.patch(model, random_shifts(model, "mimic").double()):
        found.append(model(**case.inputs()).logits)
        with mc.hook(model, "query", lambda value, at: None):
            found.append(model(**case.inputs()).logits)
    assert torch.equal(*found)


def test_a_context_that_was_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(Multiplies)
    plain = model(IDS)[0]
    with mc.patch(model, random_shifts(model, "mimic").double()):
        with torch.device("cpu"):
            wanted = model(IDS)[0]
        with monkeypatch.context() as patched:
            patched.setattr(Multiplies, "attend", InContext.attend)
            with pytest.raises(mc.PatchStateError, match="it multiplies inside a context of torch"):
                model(IDS)
        assert number_of_modes() == 0
        assert torch.equal(model(IDS)[0], wanted)
    assert torch.equal(model(IDS)[0], plain)


class Enters(Multiplies):
    """It enters a context between its products and leaves it after them."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, barred: Tensor) -> Tensor:
        scores = q @ k.mT / q.shape[-1] ** 0.5
        with Passes() as mode:
            out = self.drop(scores.masked_fill(barred, -torch.inf).softmax(-1)) @ v
            assert mode.calls > 3, "it is the innermost one until here"
        return out


class Passes(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_a_context_entered_in_between() -> None:
    model, usual = made(Enters), made(Multiplies)
    shifts = random_shifts(model, "mimic").double()
    with mc.patch(model, shifts), mc.patch(usual, copy.deepcopy(shifts)):
        assert torch.equal(model(IDS)[0], usual(IDS)[0])
    assert number_of_modes() == 0


def test_a_query_multiplied_only_later_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is followed from the product on, so what multiplied the query before is not seen."""
    model = made(Multiplies)

    def attend(self: Any, q: Tensor, k: Tensor, v: Tensor, barred: Tensor) -> Tensor:
        scores = (q / q.shape[-1] ** 0.5) @ k.mT
        return (scores.masked_fill(barred, -torch.inf).softmax(-1)) @ v

    with mc.patch(model, random_shifts(model, "mimic").double()):
        monkeypatch.setattr(Multiplies, "attend", attend)
        with pytest.raises(mc.PatchStateError, match="it attends another way than when it was looked at"):
            model(IDS)


@pytest.mark.newest
def test_other_models_are_compiled_whole_meanwhile() -> None:
    def multiplies(a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("bij,bjk->bik", a, b) + a.matmul(b) + a @ b + torch.baddbmm(a, a, b) + torch.bmm(a, b)

    torch._dynamo.reset()
    x = torch.randn(2, 3, 3)
    wanted = multiplies(x, x)
    compiled = torch.compile(multiplies, backend="eager", fullgraph=True)
    with mc.hook(made(), "query", lambda value, at: None):
        assert torch.equal(compiled(x, x), wanted)
    assert torch.equal(compiled(x, x), wanted)
