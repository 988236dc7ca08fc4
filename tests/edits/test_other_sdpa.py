"""Somebody else's function in place of torch's scaled_dot_product_attention: used, or refused where its LSE is read."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn import functional

import mimic_core as mc
from mimic_core.errors import UnsupportedModelError
from tests.support.cases import BY_NAME, HEADS, fresh_model, logits_of, random_shifts
from tests.support.sequence_models import GATED

LLAMA = BY_NAME["llama"]
SDPA = functional.scaled_dot_product_attention
REFUSED = (
    r"scaled_dot_product_attention was replaced by .*; leave it as it was, or use a head that doesn't read the LSE"
)


def halved(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return SDPA(query, key, 0.5 * value, *args, **kwargs)


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "scaled_dot_product_attention", halved)


@pytest.mark.parametrize("head", HEADS)
def test_a_head_uses_it_or_refuses(head: str, replaced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh_model(LLAMA)
    inputs = LLAMA.inputs()
    plain = logits_of(model, inputs)
    shifts = random_shifts(model, head)
    with mc.patch(model, shifts):
        if head in GATED:
            with pytest.raises(UnsupportedModelError, match=REFUSED):
                logits_of(model, inputs)
        else:
            shifted = logits_of(model, inputs)
            assert not torch.equal(shifted, plain)
            monkeypatch.setattr(functional, "scaled_dot_product_attention", SDPA)
            assert not torch.equal(shifted, logits_of(model, inputs))
    monkeypatch.setattr(functional, "scaled_dot_product_attention", halved)
    assert torch.equal(logits_of(model, inputs), plain)


def test_a_capture_of_the_lse_refuses(replaced: None) -> None:
    model = fresh_model(LLAMA)
    with pytest.raises(UnsupportedModelError, match=REFUSED), mc.capture(model, ["lse"]):
        logits_of(model, LLAMA.inputs())
    model.set_attn_implementation("eager")  # pyright: ignore[reportCallIssue]
    with mc.capture(model, ["lse"]) as captured:
        logits_of(model, LLAMA.inputs())
    assert len(captured["lse"]) == 3


def test_a_wrapper_is_no_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it does besides is not known."""
    monkeypatch.setattr(functional, "scaled_dot_product_attention", functools.partial(SDPA))
    model = fresh_model(LLAMA)
    with mc.patch(model, random_shifts(model, "mimic")), pytest.raises(UnsupportedModelError, match=REFUSED):
        logits_of(model, LLAMA.inputs())


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    destroy_process_group()


def test_context_parallel_refuses_a_gate(one_process: None) -> None:
    """Each process has only some keys, so the LSE would be that of a part of the text."""
    model = fresh_model(LLAMA)
    handle = mc.patch(model, random_shifts(model, "mimic"))
    before = logits_of(model, LLAMA.inputs())
    with context_parallel(init_device_mesh("cpu", (1,)), buffers=[torch.zeros(2, 8)], buffer_seq_dims=[1]):
        with pytest.raises(UnsupportedModelError, match=REFUSED):
            logits_of(model, LLAMA.inputs())
        handle.remove()
    with mc.patch(model, random_shifts(model, "mimic")):
        assert torch.equal(logits_of(model, LLAMA.inputs()), before)
