"""The row kernels around an attention: gate and shift after it, what its backward needs, the norm-preserving add."""

from __future__ import annotations

import functools
from typing import Any

import oracles
import pytest
import torch
from op_cases import HALF, Case, assert_near, attending_inputs, check, inputs_of, poisoned_empty, results
from torch import Tensor
from triton_kernels import DEVICE, INTERPRETED, on_kernels

from mimic_core.ops import _triton_blocks

pytestmark = on_kernels

DTYPES = [torch.float32, *HALF]
# More rows than one program takes, and all kinds of widths.
SHAPES = [Case(d=8), Case(t=70, d=64, b=1), Case(t=33, d=80, b=1), Case(t=1, d=96), Case(t=40, d=128, h=3, g=1)]


def kernels() -> Any:
    from mimic_core.ops import _triton_epilogue

    return _triton_epilogue


def moved(*tensors: Tensor) -> list[Tensor]:
    return [x.to(DEVICE) for x in tensors]


def lse_of(case: Case) -> Tensor:
    """[b h t] in the memory order torch's kernels have; one row attends to nothing."""
    lse = torch.randn(case.b, case.t, case.h, generator=torch.Generator().manual_seed(1)).transpose(1, 2)
    lse[0, 0, 0] = -torch.inf
    return lse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("attends", [None, "bht", "b1t", "11t"])
def test_shift_in_place_is_the_oracle(attends: str | None, case: Case, dtype: torch.dtype):
    inputs = inputs_of(case)
    x, lse = inputs.tensors, lse_of(case)
    rows = None
    if attends is not None:
        shape = [1 if axis == "1" else getattr(case, axis) for axis in attends]
        rows = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.7
    parameters = (x["vector"], x["gate_weight"], x["gate_bias"])
    # [b h t d] in memory, as some kernels leave it.
    before = inputs.incoming["out"].to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    seen = lse if rows is None else lse.masked_fill(~rows, -torch.inf)
    q = x["q"].to(dtype)
    want = oracles.gated_shift(before, q, seen, *parameters)
    out = before.clone(memory_format=torch.preserve_format).to(DEVICE)
    with poisoned_empty():
        on_device = moved(q, lse)
        mu = kernels().gated_shift_(out, *on_device, None if rows is None else rows.to(DEVICE), *moved(*parameters))
    assert_near("out", out.cpu(), want, dtype)
    exact = torch.sigmoid(
        (q.double() * parameters[1].double()[:, None]).sum(-1) + parameters[2].double()[:, None] - lse.double()
    )
    assert_near("out mu", mu.cpu(), exact.masked_fill(seen == -torch.inf, 0.0), torch.float32)
    empty = (seen == -torch.inf).transpose(1, 2)
    assert torch.equal(out.cpu()[empty], before[empty]), "a row that attends to nothing is left as it is"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_folded_gradients_are_autograds(case: Case, dtype: torch.dtype):
    """Of grad . (out + mu vector), by autograd in fp64: delta is rowsum(grad out) - d lse, and so on."""
    inputs = inputs_of(case)
    q, grad = inputs.tensors["q"].to(dtype), inputs.incoming["out"].to(dtype)
    out = torch.randn(grad.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    leaves = [inputs.tensors[name].double().requires_grad_() for name in ("vector", "gate_weight", "gate_bias")]
    vector, weight, bias = leaves
    wide_q, lse = q.double().requires_grad_(), lse_of(case).double().nan_to_num(neginf=0.0).requires_grad_()
    mu = torch.sigmoid((wide_q * weight[:, None]).sum(-1) + bias[:, None] - lse)
    shifted = out.double() + mu.transpose(1, 2)[..., None] * vector
    dq, d_lse, *parameters = torch.autograd.grad((shifted * grad.double()).sum(), [wide_q, lse, *leaves])

    given = moved(grad, shifted.detach().to(dtype), q, mu.detach().float(), vector.detach().float())
    weight = weight.detach().float().to(DEVICE)
    with poisoned_empty():
        hat, df, *sums = kernels().folded_gradients(*given, weight)
    assert (hat.dtype, df.dtype) == (dtype, torch.float32)
    delta = (grad.double() * out.double()).sum(-1).transpose(1, 2) - d_lse
    got = (grad.double() * hat.cpu().double()).sum(-1).transpose(1, 2)
    # What is rounded is shifted, on the way in, and hat, on the way out.
    eps = torch.finfo(dtype).eps if dtype in HALF else 0.0
    rounding = 2 * eps * (grad.double() * out.double()).abs().sum(-1).max().item()
    assert_near("grad delta", got, delta, torch.float32, rounding)
    assert_near("grad df", df.cpu(), -d_lse, torch.float32)
    for name, mine, exact in zip(("vector", "weight", "bias"), sums, parameters, strict=True):
        assert_near(f"grad {name}", mine.cpu(), exact, torch.float32)
    assert kernels().folded_gradients(*given, weight, False)[0] is None

    before = torch.randn(q.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    sum_ = before.clone().to(DEVICE)
    kernels().add_to_dq_(sum_, df, weight)
    assert_near("grad q", sum_.cpu(), before.double() + dq, dtype)


class AroundFlash:
    """Attention by torch's CPU kernel, with these kernels before and after: what a CUDA backend does with its own."""

    @staticmethod
    def shifted_attention(*tensors: Tensor, mask: None, scale: float | None, is_causal: bool) -> Tensor:
        return _AroundFlash.apply(*tensors, scale, is_causal)


class _AroundFlash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        *parameters, ctx.scale, ctx.is_causal = rest
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(q, k, v, 0.0, ctx.is_causal, scale=ctx.scale)
        out = out.transpose(1, 2)
        mu = kernels().gated_shift_(out, q, lse, None, *parameters)
        ctx.save_for_backward(q, k, v, out, lse, mu, *parameters[:2])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grads
        q, k, v, shifted, lse, mu, vector, weight = ctx.saved_tensors
        hat, df, *sums = kernels().folded_gradients(grad, shifted, q, mu, vector, weight)
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        given = (grad.transpose(1, 2), q, k, v, hat.transpose(1, 2), lse, 0.0, ctx.is_causal)
        dq, dk, dv = backward(*given, scale=ctx.scale)
        kernels().add_to_dq_(dq, df, weight)
        return dq, dk, dv, *sums, None, None


@pytest.mark.skipif(not INTERPRETED, reason="torch's kernel is the CPU's")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [Case(g=4, d=16), Case(g=4, d=80, t=40, s=40, is_causal=True, b=1)], ids=str)
def test_around_an_attention_that_ran_elsewhere(case: Case, dtype: torch.dtype):
    case = Case(**{**vars(case), "dtype": dtype})
    check("shifted", case, results("shifted", AroundFlash, attending_inputs(case)))


# --- norm_preserving_add


def norm_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    random = torch.Generator().manual_seed(0)
    normal = functools.partial(torch.randn, generator=random, dtype=torch.float64)
    x, vector, incoming = normal(shape).to(dtype), normal(shape[-1]).float(), normal(shape).to(dtype)
    return (x, vector, torch.tensor(0.7)), incoming


def with_grads(fn: Any, arguments: tuple[Tensor, ...], incoming: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in arguments]
    with poisoned_empty():
        out = fn(*leaves)
        grads = torch.autograd.grad(out, leaves, incoming.to(out))
    return [x.detach().cpu() for x in (out, *grads)]


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 4, 1), (3, 1000), (2, 4096)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_preserving_add_is_the_oracle(dtype: torch.dtype, shape: tuple[int, ...]):
    arguments, incoming = norm_inputs(shape, dtype)
    got = with_grads(kernels().norm_preserving_add, tuple(moved(*arguments)), incoming)
    want = with_grads(oracles.norm_preserving_add, arguments, incoming)
    assert got[0].dtype == dtype
    for name, mine, exact in zip(("out", "grad x", "grad vector", "grad scale"), got, want, strict=True):
        assert_near(name, mine, exact, dtype)
    x, vector, _ = moved(*arguments)
    assert torch.equal(kernels().norm_preserving_add(x, vector, 0.7).cpu(), got[0]), "a plain number as scale"
    strided = x.repeat_interleave(2, dim=-1)[..., ::2]
    assert torch.equal(kernels().norm_preserving_add(strided, vector, 0.7).cpu(), got[0]), "rows with gaps"


@pytest.mark.parametrize("width", [1, 64, 576, 1000, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_preserving_add_of_zero_changes_no_bit(dtype: torch.dtype, width: int):
    x = torch.randn(9, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    vector, scale = moved(torch.zeros(width), torch.tensor(0.1))
    assert torch.equal(kernels().norm_preserving_add(x.to(DEVICE), vector, scale).cpu(), x)


def test_norm_preserving_add_of_more_rows_than_programs():
    arguments, incoming = norm_inputs((2, 2 * _triton_blocks.processors(torch.device(DEVICE)) - 100, 6), torch.float32)
    got = with_grads(kernels().norm_preserving_add, tuple(moved(*arguments)), incoming)
    want = with_grads(oracles.norm_preserving_add, arguments, incoming)
    for name, mine, exact in zip(("out", "grad x", "grad vector", "grad scale"), got, want, strict=True):
        assert_near(name, mine, exact, torch.float32)


@pytest.mark.parametrize("frozen", [("x",), ("vector", "scale"), ("x", "scale")])
def test_norm_preserving_add_of_frozen_arguments(frozen: tuple[str, ...]):
    arguments, incoming = norm_inputs((5, 40), torch.float32)
    _, *want = with_grads(oracles.norm_preserving_add, arguments, incoming)
    leaves = [
        x.to(DEVICE).requires_grad_(name not in frozen)
        for name, x in zip(("x", "vector", "scale"), arguments, strict=True)
    ]
    kernels().norm_preserving_add(*leaves).backward(incoming.to(DEVICE))
    for leaf, exact in zip(leaves, want, strict=True):
        assert (leaf.grad is not None) == leaf.requires_grad
        if leaf.grad is not None:
            assert_near("grad", leaf.grad.cpu(), exact, torch.float32)


def test_norm_preserving_add_of_nothing_stays_zero():
    vector = torch.tensor([3.0, 4.0])
    x = torch.stack([-0.5 * vector, torch.zeros(2), vector])  # the sum is zero; x is zero; neither is
    arguments = tuple(moved(x, vector, torch.tensor(0.5)))
    out, *grads = with_grads(kernels().norm_preserving_add, arguments, torch.ones(3, 2))
    assert not out[:2].any()
    assert_near("out", out[2], vector.double(), x.dtype)
    assert all(grad.isfinite().all() for grad in grads)
