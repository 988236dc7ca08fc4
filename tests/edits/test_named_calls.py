"""What a call of an attention function by its name may be: packed rows, caches, masks and biases."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mimic_core as mc
from mimic_core.edits.packages import FlashCall
from tests.support import flash_stand_ins, named_models
from tests.support.cases import random_shifts
from tests.support.flash_stand_ins import logits_of
from tests.support.named_models import PACKED, Flash, calling, made, usual

pytestmark = pytest.mark.usefixtures("no_shape_checks")
IDS = torch.arange(14).view(2, 7) % 61
SITES = ("query", "key", "value", "attn_heads", "lse")


@pytest.fixture(autouse=True)
def _packages(monkeypatch: pytest.MonkeyPatch) -> None:
    named_models.put_packages(monkeypatch)


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
    for function in (named_models.flex_attention, torch.compile(named_models.flex_attention, backend="eager")):
        monkeypatch.setattr(named_models, "flex_attention", function)
        with torch.no_grad(), mc.patch(other := made("flex"), shifts):
            torch.testing.assert_close(other(IDS)[0], wanted)
            assert not torch.equal(other(IDS)[0], model(IDS)[0])


@pytest.mark.parametrize(
    "style", ["flash", "packed", "together", "packed-together", "packed-whole", "kept", "xformers", "blocks"]
)
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
    assert told == ([style != "blocks"] * 3 if style in PACKED else [style != "kept"] * 3 + [False] * 3)


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
