"""Every registered head in a dozen architectures: what is done with a head, from training to LoRA beside it.

The conformance kit runs its laws with MimIC and LIVE, over every model type. Here every other head runs those laws too,
and all heads run what the kit does not have: a step of training, copies, half precision, LoRA.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import mimic_core as mc
from mimic_core.heads.base import _HEADS
from mimic_core.testing import laws_patch, laws_training
from mimic_core.testing.state import Snapshot, as_it_was
from mimic_core.testing.subject import Subject, same_bits
from mimic_core.testing.verdicts import NotApplicable
from tests.support.cases import zero_vectors
from tests.zoo.tiny import tiny

pytestmark = pytest.mark.newest

# Chosen for variety: images in the text or beside it, fused projections, no MLP module, experts, linear attention.
ARCHITECTURES = (
    "qwen2_5_vl",
    "paligemma",
    "llava_next",
    "mllama",
    "gemma3_text",
    "gpt2",
    "opt",
    "gpt_neox",
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
    "qwen3_5_text",
)
ONLY_EXPERTS = ("mixtral", "gpt_oss")
OF_THE_KIT = ("mimic", "live")


class OneHead(Subject):
    """A subject of the conformance kit with stacks of one head alone."""

    head: str
    neutral = False

    def _fresh_stacks(self, model: nn.Module) -> dict[str, mc.ShiftStack]:
        return {self.head: random_stack(model, self.head, self.neutral)}


def random_stack(model: nn.Module, head: str, neutral: bool = False) -> mc.ShiftStack:
    """A stack with random numbers; a neutral one changes nothing."""
    shifts = mc.build_shifts(model, head)
    draw = torch.Generator().manual_seed(3)
    for p in [*shifts.parameters(), *(x for name, x in shifts.named_buffers() if name.endswith("vector"))]:
        p.data = 0.5 * torch.randn(p.shape, generator=draw)
    return zero_vectors(shifts) if neutral else shifts


@lru_cache(maxsize=1)
def _made(architecture: str) -> tuple[nn.Module, dict[str, Tensor]]:
    made = tiny(architecture)
    return made.model, made.inputs(images=made.has_images)


def subject(architecture: str, head: str, neutral: bool = False) -> OneHead:
    try:
        found = OneHead(*_made(architecture))
    except mc.UnknownNameError:
        pytest.skip(f"this transformers has no {architecture}")
    found.head, found.neutral = head, neutral
    assert found.logits.ndim == 3, "the unpatched model's, kept before anything is put in"
    return found


def loss_of(logits: Tensor) -> Tensor:
    return logits.where(logits.abs() < 1e9, 0).float().square().mean()


def trains(s: OneHead) -> None:
    """A step of training changes the head, and nothing else has a gradient or changes."""
    before, shifts = Snapshot(s.model), s.stacks()[s.head]
    numbers = copy.deepcopy(shifts.state_dict())
    optimizer = torch.optim.SGD(shifts.parameters(), lr=0.1)
    with mc.patch(s.model, shifts):
        first = s.run()
        loss_of(first).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in shifts.parameters())
        assert all(h for h in [any(p.grad.any() for p in head.parameters()) for head in shifts])
        assert [name for name, p in s.model.named_parameters() if p.grad is not None] == []
        optimizer.step()
        assert any(not torch.equal(x, numbers[name]) for name, x in shifts.state_dict().items())
        assert not same_bits(s.run().detach(), first.detach())
    assert before.differences() == []
    with torch.no_grad():
        assert same_bits(s.run(), s.logits)


def copies(s: OneHead) -> None:
    """A deep copy is patched by a stack of its own, and unpatched by its own handles."""
    shifts = s.stacks()[s.head]
    with torch.no_grad(), mc.patch(s.model, shifts):
        twin, wanted = copy.deepcopy(s.model), s.run()
    with torch.no_grad():
        assert same_bits(s.run(), s.logits)
        assert same_bits(s.run(model=twin), wanted)
        assert not same_bits(wanted, s.logits)
        for handle in mc.handles(twin):
            handle.remove()
        assert same_bits(s.run(model=twin), s.logits)


def half_precision(s: OneHead) -> None:
    """In half precision, a neutral head changes no bit, and one with effect gives finite logits of the same dtype."""
    for dtype in (torch.bfloat16, torch.float16):
        model = copy.deepcopy(s.model).to(dtype)
        inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in s.inputs.items()}
        with torch.no_grad():
            plain = s.run(inputs, model)
            with mc.patch(model, random_stack(model, s.head, neutral=True)):
                assert same_bits(s.run(inputs, model), plain)
            shifts = s.stacks()[s.head]
            with mc.patch(model, shifts):
                found = s.run(inputs, model)
        assert found.dtype == plain.dtype
        assert torch.equal(found.isfinite(), plain.isfinite())
        assert not same_bits(found, plain)
        assert {p.dtype for p in shifts.parameters()} == {torch.float32}


def lora_beside(s: OneHead) -> None:
    """LoRA and a head train together, LoRA can be switched off and unloaded, and the head is removed exactly."""
    model = copy.deepcopy(s.model)
    shifts = random_stack(model, s.head)
    with torch.no_grad(), mc.patch(model, shifts):
        head_alone = s.run(model=model)
    lora: Any = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    with torch.no_grad():
        lora_alone = s.run(model=lora)
    assert not same_bits(lora_alone, s.logits)
    with mc.patch(lora, shifts) as handle:
        both = s.run(model=lora)
        loss_of(both).backward()
        assert all(p.grad is not None for p in shifts.parameters())
        trained = {name for name, p in lora.named_parameters() if p.grad is not None}
        assert trained
        assert all("lora_" in name for name in trained)
        with torch.no_grad():
            assert not any(same_bits(both.detach(), x) for x in (s.logits, head_alone, lora_alone))
            with lora.disable_adapter():
                assert same_bits(s.run(model=lora), head_alone)
            with handle.disabled():
                assert same_bits(s.run(model=lora), lora_alone)
    with torch.no_grad():
        assert same_bits(s.run(model=lora), lora_alone)
        assert same_bits(s.run(model=lora.unload()), s.logits)


def _law(law: Callable[[Any], str], s: OneHead) -> None:
    with as_it_was(s.model):
        try:
            law(s)
        except NotApplicable as error:
            pytest.skip(str(error))
        except mc.PatchStateError as error:
            # It acts at some positions inside a layer, which are not known where the layer runs again.
            assert s.head == "mtv"
            assert "gradient checkpointing runs layers again" in str(error)  # noqa: PT017 - a right answer


CHECKS: dict[str, Callable[[OneHead], None]] = {
    "trains": trains,
    "copies": copies,
    "half precision": half_precision,
    "LoRA beside": lora_beside,
}
LAWS: dict[str, tuple[Callable[[Any], str], bool]] = {
    "zero shift": (laws_patch.zero_shift, True),
    "zero shift generates": (laws_patch.zero_shift_generates, True),
    "removal": (laws_patch.removal, False),
    "all or nothing": (laws_patch.all_or_nothing, False),
    "exception in forward": (laws_patch.exception_in_forward, True),
    "saved and loaded": (laws_patch.saved_and_loaded, False),
    "checkpointing": (laws_training.checkpointing_non_reentrant, False),
    "checkpointing reentrant": (laws_training.checkpointing_reentrant, False),
}
CHECKS |= {name: partial(_law, law) for name, (law, _) in LAWS.items()}


def _cases() -> list[Any]:
    """One pair of architecture and head in eight runs in CI, the others with `-m exhaustive`."""
    found = []
    for i, architecture in enumerate(ARCHITECTURES):
        for j, head in enumerate(_HEADS):
            if head == "ia3" and architecture in ONLY_EXPERTS:
                continue  # refused, as tests/adapters/test_generic.py has it
            names = [name for name in CHECKS if name not in LAWS or head not in OF_THE_KIT]
            marks = () if (i + 2 * j) % 8 == 0 else (pytest.mark.exhaustive,)
            found += [pytest.param(architecture, head, name, marks=marks) for name in names]
    return found


@pytest.mark.parametrize(("architecture", "head", "check"), _cases())
def test_every_head(architecture: str, head: str, check: str, no_shape_checks: None) -> None:
    CHECKS[check](subject(architecture, head, neutral=check in LAWS and LAWS[check][1]))
