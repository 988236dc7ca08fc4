"""torch's multi-head attention, with and without its weights, and where torch runs it as one kernel."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import mimic_core as mc
from mimic_core.edits.scores import Scores
from tests.support.cases import random_shifts
from tests.support.plain_models import Captioner, NanoGPT, caption_inputs, multi_head, pad_right

pytestmark = pytest.mark.usefixtures("no_shape_checks", "functions_made_in_functions_unchecked")
IDS = torch.arange(14).view(2, 7) % 61


@pytest.fixture
def without_kernel() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def made(**options: bool) -> Any:
    torch.manual_seed(0)
    return NanoGPT(partial(multi_head, **options)).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]


@pytest.mark.usefixtures("without_kernel")
def test_every_law_with_weights() -> None:
    report = mc.testing.check_adapter(made(), pad=pad_right)
    report.raise_for_failures()
    laws = ("query", "key", "value", "attn_heads", "lse", "MimIC", "attn_out", "padding", "removal")
    assert {report[law].verdict for law in laws} == {"passed"}


def run(model: Any, shifts: mc.ShiftStack) -> tuple[Tensor, ...]:
    with mc.patch(model, shifts):
        logits = model(IDS)[0]
        return logits, *torch.autograd.grad(logits.square().mean(), list(shifts.parameters()))


@pytest.mark.usefixtures("without_kernel")
def test_all_forms_give_the_same() -> None:
    """Its weights, where the samples are, the kind of mask, and training mode change nothing."""
    model = made(needs_weights=False)
    shifts = random_shifts(model, "mimic")
    wanted = run(model, shifts)
    assert not torch.allclose(wanted[0], model(IDS)[0])
    forms: list[dict[str, bool]] = [
        {},
        {"batch_first": False},
        {"numbers": False},
        {"batch_first": False, "needs_weights": False},
        {"numbers": False, "needs_weights": False},
    ]
    for form in forms:
        for training in (False, True):
            for found, exact in zip(run(made(**form).train(training), shifts), wanted, strict=True):
                torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("without_kernel")
def test_the_kit_sees_a_forgotten_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scores, "lse", lambda self, dtype: (self.query @ self.key.mT * self.scale).logsumexp(-1))
    failed = {row.law for row in mc.testing.check_adapter(made()).failures}
    assert failed >= {"lse", "MimIC"}


def test_what_torch_runs_as_one_kernel_is_refused() -> None:
    """It runs so without gradients, and of masks only with those of truths. With them it gives other bits."""
    message = r"of MultiheadAttention can't be made: .* one kernel, .*set_fastpath_enabled\(False\) first"
    for form in ({"needs_weights": False, "numbers": False}, {}):
        model = made(**form)
        plain = model(IDS)[0]
        with torch.no_grad(), mc.patch(model, random_shifts(model, "mimic")):
            with mc.hook(model, "query", lambda value, at: None), pytest.raises(mc.PatchStateError, match=message):
                model(IDS)
            with mc.handles(model)[0].disabled():
                assert torch.equal(model(IDS)[0], plain)
    model = made(needs_weights=False)
    with torch.no_grad(), mc.patch(model, random_shifts(model, "mimic")):
        with mc.capture(model, "attn_heads") as seen:
            model(IDS)
    assert len(seen["attn_heads"]) == 3


class Masked(Captioner):
    def forward(self, tokens: Tensor, image: Tensor) -> Tensor:
        mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        return self.head(self.decoder(self.words(tokens), image, tgt_mask=mask))


def test_torchs_decoder_with_a_mask_of_truths() -> None:
    """Its cross-attention is no site, and is not shifted."""
    inputs, models = caption_inputs(), []
    for kind in (Captioner, Masked):
        torch.manual_seed(0)
        models.append(kind().eval().requires_grad_(False))
    adapter = mc.GenericAdapter(example=inputs)
    for model in models:
        found, spec = mc.adapter_for(model, adapter), mc.adapter_for(model, adapter).spec(model)
        layer = model.decoder.layers[1]
        assert [found.module(model, 1, site) for site in ("query", "lse")] == [layer.self_attn] * 2
        assert spec.layers[1].sites == mc.types.SITES
    shifts = random_shifts(models[0], "mimic")
    with torch.no_grad():
        with mc.patch(models[0], shifts):
            wanted = models[0](**inputs)
        with mc.patch(models[1], shifts):
            with pytest.raises(mc.PatchStateError, match="one kernel"):
                models[1](**inputs)
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                torch.testing.assert_close(models[1](**inputs), wanted)
            finally:
                torch.backends.mha.set_fastpath_enabled(True)
