"""transformers' flash function, called by its name: padding, packed rows, dtypes, and what is refused."""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as flash

import mimic_core as mc
from tests.support import named_models
from tests.support.cases import random_shifts
from tests.support.flash_stand_ins import logits_of
from tests.support.named_models import Transformers, calling, made

pytestmark = pytest.mark.usefixtures("no_shape_checks")
IDS = torch.arange(14).view(2, 7) % 61
LENGTHS = (7, 4)


@pytest.fixture(autouse=True)
def _packages(monkeypatch: pytest.MonkeyPatch) -> None:
    named_models.put_packages(monkeypatch)


def called(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
    given = {"attn_implementation": "flash_attention_2", "is_causal": True, "query_length": q.shape[1], **more}
    return named_models._flash_attention_forward(q, k, v, mask, **given)


def formula(q: Tensor, k: Tensor, scale: float | None = None, window: int = -1, softcap: float = 0.0) -> Tensor:
    """The LSE [h t] of one sequence: q [h t d], k [g s d]."""
    scores = logits_of(
        q.transpose(0, 1), k.transpose(0, 1), scale, True, (window - 1 if window > 0 else -1, 0), softcap
    )
    return scores.logsumexp(-1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("transformers")
    mc.adapter_for(model)
    real = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    real = real if side == "right" else real.flip(1)
    monkeypatch.setattr(Transformers, "padding", real.long())
    with torch.no_grad(), mc.capture(model, ("query", "key", "lse")) as seen:
        model(IDS)
    for layer in range(3):
        q, k, lse = (seen[site][layer] for site in ("query", "key", "lse"))
        for row, is_real in enumerate(real):
            torch.testing.assert_close(
                lse[row, :, is_real], formula(q[row, :, is_real], k[row, :, is_real], 0.3, 4, 2.0)
            )
            assert (lse[row, :, ~is_real] == -torch.inf).all()


def test_a_padded_batch_is_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients."""
    model = made("transformers")
    shifts = random_shifts(model, "mimic")
    rows = [IDS[i : i + 1, :n] for i, n in enumerate(LENGTHS)]
    found = []
    with mc.patch(model, shifts):
        alone = [model(row)[0] for row in rows]
        monkeypatch.setattr(Transformers, "padding", (torch.arange(7) < torch.tensor(LENGTHS)[:, None]).long())
        together = model(IDS)[0]
        for logits in (alone, [together[i : i + 1, :n] for i, n in enumerate(LENGTHS)]):
            gradients = torch.autograd.grad(sum(x.square().sum() for x in logits), list(shifts.parameters()))
            found.append((logits, gradients))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("by", ["starts", "positions"])
def test_several_sequences_in_a_row(by: str) -> None:
    given: dict[str, Any] = {}
    mc.adapter_for(model := calling(lambda q, k, v: called(q, k, v, **given)))
    starts = torch.tensor([0, 3, 7], dtype=torch.int32)
    if by == "starts":
        given |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 4, "max_length_k": 4}
    else:
        given["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    with torch.no_grad(), mc.capture(model, ("query", "key", "lse"), layers=[1]) as seen:
        model(IDS[:1])
    q, k, lse = (seen[site][1][0] for site in ("query", "key", "lse"))
    for a, b in pairwise(starts.tolist()):
        torch.testing.assert_close(lse[:, a:b], formula(q[:, a:b], k[:, a:b]))


def test_states_that_the_function_casts() -> None:
    given: dict[str, Any] = {}
    mc.adapter_for(model := calling(lambda q, k, v: called(q, k, v, **given).to(q.dtype)))
    given["target_dtype"] = torch.bfloat16
    with torch.no_grad(), mc.capture(model, ("query", "key", "lse"), layers=[0]) as seen:
        model(IDS)
    q, k, lse = (seen[site][0] for site in ("query", "key", "lse"))
    rounded = torch.stack([formula(*(x[row].bfloat16().float() for x in (q, k))) for row in range(2)])
    torch.testing.assert_close(lse, rounded)
    assert not torch.allclose(lse, torch.stack([formula(q[row], k[row]) for row in range(2)]), atol=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"of_tomorrow": True}, "_flash_attention_forward got of_tomorrow, which is not understood"),
        ({"query_length": 3}, r"got queries \[2, 7, 4, 8\] and query_length 3"),
        ({"block_table": torch.zeros(2, 1).int()}, r"works on a paged cache \(block_table\)"),
        ({"mask": torch.ones(2, 1, 7, 7)}, r"was given a mask that is not \[batch, keys\]"),
    ],
)
def test_what_is_refused(more: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {}
    model = calling(lambda q, k, v: called(q, k, v, **given))
    with mc.patch(model, random_shifts(model, "mimic")):
        given |= more
        with pytest.raises(mc.UnsupportedModelError, match=message):
            model(IDS)


def test_a_kernel_without_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers drops the window without a word."""
    monkeypatch.undo()
    named_models.flash_stand_ins.install(monkeypatch, "window_size")
    given: dict[str, Any] = {}
    model = calling(lambda q, k, v: called(q, k, v, **given))
    with mc.patch(model, random_shifts(model, "mimic")):
        given["sliding_window"] = 7
        model(IDS)
        given["sliding_window"] = 4
        with pytest.raises(mc.UnsupportedModelError, match="does not support sliding_window, so it drops"):
            model(IDS)


def test_the_package_is_loaded_while_a_patch_is_in_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers then keeps the function under the name that the patch has replaced."""
    model = made("transformers")
    shifts = random_shifts(model, "mimic")
    with torch.no_grad():
        plain = model(IDS)[0]
        with mc.patch(model, shifts):
            wanted = model(IDS)[0]
        functions, package = flash._lazy_imports(None), sys.modules["flash_attn"]
        loaded: list[Any] = []

        def late(*args: Any, **kwargs: Any) -> Any:
            loaded.extend((package.flash_attn_func, package.flash_attn_varlen_func))
            return (*loaded, *functions[2:])

        monkeypatch.setattr(flash, "_lazy_imports", late)
        monkeypatch.setattr(flash, "_loaded_implementation", None)
        with mc.patch(model, shifts):
            assert torch.equal(model(IDS)[0], wanted)
        assert torch.equal(model(IDS)[0], plain)
    assert len(loaded) == 2
