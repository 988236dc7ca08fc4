"""The conformance kit on a device that an index out of range ends: a stand-in for CUDA and its asserts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import mimic_core.testing
from mimic_core.testing import rehearsal
from mimic_core.testing.batches import Batches
from mimic_core.testing.verdicts import DeviceEnded, Raised, attempt
from tests.support.cases import TEXT
from tests.zoo.tiny import tiny

ASSERT = "CUDA error: device-side assert triggered"

pytestmark = pytest.mark.usefixtures("no_shape_checks")


class OnADevice(LlamaForCausalLM):
    """It picks the rows of `tiles` by position, as Mllama of some versions does of its mask from text to images.

    The kit does not know that `tiles` is of tokens, and leaves it as it is when it makes the text longer. After an
    index out of range `asserts` holds the error, and every later call raises. It is a list, because the kit puts an
    attribute back.
    """

    on_a_cpu = False

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.asserts: list[str] = []

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Any = None, position_ids: Any = None, tiles: Any = None, **options: Any
    ) -> Any:
        try:
            if self.asserts:
                raise RuntimeError(ASSERT)
            if tiles is not None:
                _ = tiles[:, torch.arange(input_ids.shape[1])]
        except IndexError as error:
            if self.on_a_cpu:
                raise
            self.asserts.append(str(error))
            raise RuntimeError(ASSERT) from error
        return super().forward(input_ids=input_ids, position_ids=position_ids, **options)

    def cpu(self) -> OnADevice:
        self.on_a_cpu = True
        return self


def made() -> tuple[OnADevice, dict[str, Tensor]]:
    torch.manual_seed(11)
    model = OnADevice(LlamaConfig(**TEXT)).eval().requires_grad_(False)
    ids = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(7))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "tiles": torch.ones(2, 12, 1, 4)}


def test_an_index_out_of_range_costs_one_law(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "needs_rehearsal", lambda model: True)
    model, inputs = made()
    report = mimic_core.testing.check_adapter(model, inputs)
    report.raise_for_failures()
    assert not model.asserts
    (other,) = [row for row in report.rows if row.verdict != "passed"]
    assert other.law == "cached decoding"
    assert "IndexError: on a CPU: IndexError: index 12 is out of bounds" in other.detail


def test_where_no_copy_is_made_the_law_that_ended_the_device_is_named() -> None:
    model, inputs = made()
    report = mimic_core.testing.check_adapter(model, inputs)
    assert model.asserts
    assert [row.law for row in report.failures] == ["cached decoding"]
    assert ASSERT in report["cached decoding"].detail
    names = [row.law for row in report.rows]
    for law in names[names.index("cached decoding") + 1 :]:
        assert report[law].verdict == "not applicable"
        assert "since the law 'cached decoding'" in report[law].detail


def test_what_else_a_cpu_raises_says_nothing_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "needs_rehearsal", lambda model: True)
    subject = mimic_core.testing.check.Subject(*made())
    monkeypatch.setattr(OnADevice, "forward", lambda self, **inputs: 1 / 0)
    rehearsal.rehearse(subject, subject.inputs)
    assert isinstance(attempt(lambda: subject.run()), Raised)


def test_a_device_that_has_ended_is_no_finding_of_an_attempt() -> None:
    def asserts() -> None:
        raise RuntimeError(f"{ASSERT}\nCUDA kernel errors might be reported later")

    with pytest.raises(DeviceEnded, match=ASSERT):
        attempt(lambda: attempt(asserts))


def test_a_model_on_a_cpu_is_not_copied() -> None:
    assert not rehearsal.needs_rehearsal(made()[0])


def test_a_mask_from_text_to_images_follows_the_text() -> None:
    """Mllama's has four axes. Left as long as before, it was indexed out of range where the text is longer."""
    made = tiny("mllama")
    batches = Batches(made.model, made.inputs(images=True))
    longer = batches.longer(batches.given, torch.full((2, 3), 9))
    alone = batches.samples(batches.given)
    together = batches.together(alone, "left", positions=False)
    for inputs in (longer, *alone, together):
        assert inputs["cross_attention_mask"].shape[:2] == inputs["input_ids"].shape
        assert inputs["pixel_values"].shape[1:] == batches.given["pixel_values"].shape[1:]
    assert not together["cross_attention_mask"][1, :3].any()
