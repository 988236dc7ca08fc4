"""The parameters of many stacks are never old ones, whatever has changed them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import mimic_core as mc
from tests.support.cases import BY_NAME, logits_of, model_of, random_shifts

LLAMA = BY_NAME["llama"]


def halved(stack: mc.ShiftStack) -> dict[str, Tensor]:
    return {name: x * 0.5 for name, x in stack.state_dict().items()}


def by_an_optimizer(stack: mc.ShiftStack) -> None:
    for p in stack.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(stack.parameters(), lr=0.3).step()
    stack.zero_grad()


def by_copy(stack: mc.ShiftStack) -> None:
    for name, p in stack.named_parameters():
        p.copy_(halved(stack)[name])


def by_data(stack: mc.ShiftStack) -> None:
    """As DistributedDataParallel and some optimizers do: torch counts no change of the parameter."""
    before = [p._version for p in stack.parameters()]
    for p in stack.parameters():
        p.data.mul_(0.5)
    assert [p._version for p in stack.parameters()] == before


def by_other_memory(stack: mc.ShiftStack) -> None:
    for p in stack.parameters():
        p.data = p.data * 0.5


def by_numpy(stack: mc.ShiftStack) -> None:
    for p in stack.parameters():
        x = p.detach().numpy()
        x *= 0.5


def by_new_parameters(stack: mc.ShiftStack) -> None:
    for head in stack:
        head.vector = nn.Parameter(head.vector * 0.5)


def by_assignment(stack: mc.ShiftStack) -> None:
    stack.load_state_dict(halved(stack), assign=True)


def by_a_parametrization(stack: mc.ShiftStack) -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 0.5

    for head in stack:
        parametrize.register_parametrization(head, "vector", Half())


def by_inference_tensors(stack: mc.ShiftStack) -> None:
    with torch.inference_mode():
        by_new_parameters(stack)
        for head in stack:
            head.vector.mul_(0.5)


CHANGES: list[Callable[[mc.ShiftStack], Any]] = [
    by_an_optimizer,
    by_copy,
    by_data,
    by_other_memory,
    by_numpy,
    by_new_parameters,
    by_assignment,
    by_a_parametrization,
    by_inference_tensors,
    lambda stack: stack.load_state_dict(halved(stack)),
    lambda stack: stack.to(torch.bfloat16),
]


@torch.no_grad()
@pytest.mark.parametrize("which", ["a", "b"])
def test_whatever_changes_a_stack(which: str) -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True, "input_ids": inputs["input_ids"][:, :8]}
    for change in CHANGES:
        stacks = {name: random_shifts(model, "mimic") for name in "ab"}
        with mc.patch(model, mc.StackSet(stacks)) as handle, handle.using(["a", "b"]):
            before = logits_of(model, inputs)
            made = torch.stack(model.generate(**options).logits)
            change(stacks[which])
            found, made_now = logits_of(model, inputs), torch.stack(model.generate(**options).logits)
        for i, name in enumerate("ab"):
            with mc.patch(model, stacks[name]):
                wanted = logits_of(model, inputs)[i]
                wanted_now = torch.stack(model.generate(**options).logits)[:, i]
            torch.testing.assert_close(found[i], wanted, atol=2e-5, rtol=1e-4, msg=change.__name__)
            torch.testing.assert_close(made_now[:, i], wanted_now, atol=2e-5, rtol=1e-4, msg=change.__name__)
            moved = (found[i] - before[i])[:8].abs().max(), (made_now - made)[:, i].abs().max()
            assert all((x > 1e-3) == (name == which) for x in moved), change.__name__


@torch.no_grad()
def test_a_change_during_generate_is_told() -> None:
    model = model_of(LLAMA)
    stacks = mc.StackSet({name: random_shifts(model, "mimic") for name in "ab"})
    ids = LLAMA.inputs()["input_ids"][:, :8]

    def run(change: Callable[[], Any], names: list[str]) -> Tensor:
        steps = iter([change])
        process = [lambda ids, scores: [next(steps, bool)(), scores][1]]
        with handle.using(names):
            return model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, logits_processor=process)

    with mc.patch(model, stacks) as handle:
        wanted = run(bool, ["a", "b"])
        other = random_shifts(model, "mimic", 2.0)
        assert torch.equal(run(lambda: stacks.__setitem__("a", other), ["a", "b"]), wanted)
        for change in (by_data, by_a_parametrization):
            with pytest.raises(mc.PatchStateError, match="changed while `generate` ran"):
                run(lambda change=change: change(stacks["b"]), ["a", "b"])
        stacks["b"] = random_shifts(model, "mimic")
        stacks["b"][0].vector[0] = torch.nan
        run(bool, ["a", "b"])
        with pytest.raises(mc.PatchStateError, match="changed while `generate` ran"):
            run(lambda: stacks.to(torch.bfloat16), ["a", "b"])


def test_gradients_inside_generate() -> None:
    """What is kept for its tokens has no gradient."""
    model, ids = model_of(LLAMA), LLAMA.inputs()["input_ids"][:, :8]
    stacks = {name: random_shifts(model, "live") for name in "ab"}

    def backward(_: Tensor, scores: Tensor) -> Tensor:
        with torch.enable_grad():
            model(ids).logits.square().sum().backward()
        return scores

    with mc.patch(model, mc.StackSet(stacks)) as handle, handle.using(["a", "b"]):
        model.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False, logits_processor=[backward])
    assert all(p.grad is not None and p.grad.any() for stack in stacks.values() for p in stack.parameters())
