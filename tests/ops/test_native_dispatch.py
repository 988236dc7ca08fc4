"""The ops as torch's dispatcher knows them: for graphs, for fake tensors, and called as torch.ops.mimic_core."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mimic_core import ops
from tests.support.op_cases import CASES as OP_CASES
from tests.support.op_cases import Case as OpCase
from tests.support.op_cases import attending_inputs, leaves_of

CALLS: dict[str, tuple[Any, ...]] = {
    "causal": (None, None, True),
    "mask": (torch.rand(2, 1, 6, 6) < 0.7, 0.3, False),
    "plain": (None, None, False),
}


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("g", [4, 2])
def test_opcheck(g: int, options: tuple[Any, ...]) -> None:
    leaves = leaves_of(OpCase(t=6, s=6, g=g))
    torch.library.opcheck(torch.ops.mimic_core.shifted_attention.default, (*leaves, *options))
    torch.library.opcheck(torch.ops.mimic_core.attention_with_lse.default, (*leaves[:3], *options))


def test_opcheck_of_the_norm_preserving_add() -> None:
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((3, 5, 8), (8,), ())]
    torch.library.opcheck(torch.ops.mimic_core.norm_preserving_add.default, tuple(leaves))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_are_those_a_compiler_is_told(grad: bool, by_token: bool, dtype: torch.dtype) -> None:
    """Inductor's code reads results by the strides of fake tensors, whatever the layout of the inputs."""
    leaves = leaves_of(OpCase(b=2, h=4, g=2, t=5, s=7, d=8, dtype=dtype))
    if by_token:
        leaves[:3] = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in leaves[:3]]
    states = torch.randn(2, 8, 5).mT.to(dtype).requires_grad_()
    calls = [
        (torch.ops.mimic_core.shifted_attention, leaves),
        (torch.ops.mimic_core.attention_with_lse, leaves[:3]),
        (torch.ops.mimic_core.norm_preserving_add, [states, torch.randn(8), torch.tensor(0.1)]),
    ]
    for op, arguments in calls:
        with torch.set_grad_enabled(grad):
            found, told = op(*arguments), op(*[torch.empty_like(x, device="meta") for x in arguments])
        for real, fake in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, told)), strict=True):
            assert real.stride() == fake.stride()
            assert (real.shape, real.dtype) == (fake.shape, fake.dtype)


@pytest.mark.parametrize("case", [case for case in OP_CASES if case.e is None and case.mask.count(" ") <= 2], ids=str)
def test_the_graphs_ops_are_the_others(case: OpCase) -> None:
    """Forward and backward as nodes of a graph: every mask, length and scale."""
    inputs = attending_inputs(case)
    options = inputs.options["mask"], inputs.options["scale"], inputs.options["is_causal"]
    grads = inputs.incoming["out"].to(case.dtype)
    leaves = leaves_of(case)
    out = ops.shifted_attention(*leaves, *options)
    wanted = torch.autograd.grad(out, leaves, grads)
    plain = [x.detach() for x in leaves]
    found, lse, mu = torch.ops.mimic_core._shifted_attention(*plain, *options)
    assert torch.equal(found, out)
    made = torch.ops.mimic_core._shifted_attention_backward(grads, *plain, *options, found, lse, mu)
    for mine, exact in zip(made, wanted, strict=True):
        torch.testing.assert_close(mine, exact)
    out, lse = ops.attention_with_lse(*leaves[:3], *options)
    of_lse = inputs.incoming["lse"].to(lse.dtype)
    wanted = torch.autograd.grad([out, lse], leaves[:3], [grads, of_lse])
    found, lse = torch.ops.mimic_core._attention_with_lse(*plain[:3], *options)
    made = torch.ops.mimic_core._attention_with_lse_backward(grads, of_lse, *plain[:3], *options, found, lse)
    for mine, exact in zip(made, wanted, strict=True):
        torch.testing.assert_close(mine, exact)


def test_a_bad_argument_of_torchs_own_way_is_said() -> None:
    x = [y.detach() for y in leaves_of(OpCase())]
    with pytest.raises(ValueError, match="mimic_core::shifted_attention does not take these arguments as they are"):
        torch.ops.mimic_core.shifted_attention(x[0], x[1][..., :4], *x[2:])
    mask = torch.zeros(5, 7, requires_grad=True)
    with pytest.raises(ValueError, match="passes no gradient to its mask"):
        torch.ops.mimic_core.attention_with_lse(*leaves_of(OpCase())[:3], mask)
