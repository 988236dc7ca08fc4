"""Under autocast the maths of a shift stays fp32, forward and backward, and training goes through."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mimic_core as mc
from tests.support.cases import CASES, HEADS, Case, logits_of, model_of, random_shifts, zero_vectors


def tensors() -> dict[str, Tensor]:
    shapes = {"q": (2, 4, 7, 8), "k": (2, 2, 7, 8), "v": (2, 2, 7, 8), "vector": (4, 8), "weight": (4, 8), "bias": (4,)}
    return {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}


@pytest.mark.parametrize("backend", ["reference", "cpu", "native", "sdpa"])
def test_ops_are_the_same_inside_autocast(backend: str) -> None:
    args, name = tensors(), "cpu" if backend == "native" else backend

    def run(autocast: bool) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            shifted = mc.ops.shifted_attention(*args.values(), is_causal=True, backend=name)
            lse = mc.ops.attention_lse(args["q"], args["k"], is_causal=True, backend=name)
        loss = shifted.square().sum() + lse.square().sum()
        return [shifted, lse, *torch.autograd.grad(loss, list(args.values()))]

    outside, inside = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_patched_model_trains_under_autocast(case: Case, head: str) -> None:
    model, inputs = model_of(case), case.inputs()
    shifts = random_shifts(model, head)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = logits_of(model, inputs)
        with mc.patch(model, shifts):
            logits = logits_of(model, inputs)
            real = inputs["attention_mask"].bool()
            # The last token predicts no label, and is all that some heads shift.
            (mc.losses.lm(logits, inputs["input_ids"], real) + logits[real].float().square().mean()).backward()
        with mc.patch(model, zero_vectors(random_shifts(model, head))):
            assert torch.equal(logits_of(model, inputs), plain)
    assert not torch.equal(logits, plain)
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in shifts.parameters())
