"""Every op of every backend against the slow oracles, outputs and each gradient; which backend "auto" takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimic_core import BackendUnavailableError, ops
from tests.support import oracles
from tests.support.op_cases import (
    BACKENDS,
    CASES,
    DRAWN,
    HALF,
    HALF_CASES,
    LEAVES,
    WIDE_VALUES,
    Case,
    assert_near,
    attending_inputs,
    check,
    drawn_cases,
    inputs_of,
    poisoned_empty,
    results,
    wanted,
)


@pytest.mark.parametrize("case", CASES + HALF_CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", LEAVES)
def test_op_is_the_oracle(op: str, backend: str, case: Case):
    check(op, case, results(op, ops, attending_inputs(case), backend=backend))


@pytest.mark.parametrize("case", WIDE_VALUES, ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa"])
@pytest.mark.parametrize("op", ["attention", "shifted"])
def test_values_of_another_width(op: str, backend: str, case: Case):
    check(op, case, results(op, ops, attending_inputs(case), backend=backend))


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("op", ["attention", "shifted"])
@DRAWN
@given(case=drawn_cases())
def test_drawn_case_is_the_oracle(op: str, backend: str, case: Case):
    check(op, case, results(op, ops, attending_inputs(case), backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_result_dtypes(backend: str):
    for dtype in (torch.float64, torch.float32, *HALF):
        inputs = inputs_of(Case("min32 b1ts", dtype=dtype))
        got = results("attention", ops, inputs, backend=backend)
        assert got.outputs["out"].dtype == dtype
        assert got.outputs["lse"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        shifted = results("shifted", ops, inputs, backend=backend)
        assert shifted.outputs["out"].dtype == dtype
        assert {name: x.dtype for name, x in shifted.grads.items()} == {
            name: x.dtype for name, x in inputs.tensors.items()
        }


def test_poison_reaches_an_op():
    with poisoned_empty():
        made = torch.empty(3), torch.empty_like(torch.ones(2)), torch.ones(1).new_empty(2)
        assert all(x.isnan().all() for x in made)
    assert torch.empty(3, dtype=torch.int64).dtype == torch.int64


# --- gated_shift and norm_preserving_add, which have no backends


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("value_width", [8, 3, 1])
def test_gated_shift_is_the_oracle(value_width: int, dtype: torch.dtype):
    inputs = inputs_of(Case("bool b1ts empty", e=value_width, dtype=dtype))
    out, lse = (wanted("attention", Case("bool b1ts empty", e=value_width)).outputs[name] for name in ("out", "lse"))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = inputs.tensors
    arguments = (out.to(dtype), x["q"], lse.to(wide), x["vector"], x["gate_weight"], x["gate_bias"])
    got, want = (_with_grads(source.gated_shift, arguments, inputs.incoming["out"]) for source in (ops, oracles))
    assert got[0].dtype == dtype
    empty = (lse == -torch.inf).transpose(1, 2)
    assert empty.any()
    assert torch.equal(got[0][empty], arguments[0][empty]), "a row that attends to nothing is left as it is"
    for name, mine, exact in zip(("out", *(f"grad {i}" for i in range(6))), got, want, strict=True):
        assert_near(name, mine, exact, dtype)


@pytest.mark.parametrize(("lse", "mu"), [(-1e4, 1.0), (1e4, 0.0), (-3e38, 1.0), (3e38, 0.0)])
def test_saturated_gate_is_finite(lse: float, mu: float):
    x = inputs_of(Case()).tensors
    arguments = (torch.zeros(2, 5, 4, 8), x["q"], torch.full((2, 4, 5), lse))
    parameters = (x["vector"], x["gate_weight"], x["gate_bias"])
    out, *grads = _with_grads(ops.gated_shift, (*arguments, *parameters), torch.ones(2, 5, 4, 8))
    assert torch.equal(out, (mu * x["vector"]).expand(2, 5, 4, 8))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6), (2, 5, 4, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_norm_preserving_add_is_the_oracle(dtype: torch.dtype, shape: tuple[int, ...]):
    random = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)
    vector = torch.randn(shape[-1], generator=random, dtype=torch.float64).to(wide)
    incoming = torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)
    arguments = (x, vector, torch.tensor(0.7, dtype=wide))
    got, want = (_with_grads(source.norm_preserving_add, arguments, incoming) for source in (ops, oracles))
    assert got[0].dtype == dtype
    for name, mine, exact in zip(("out", "grad x", "grad vector", "grad scale"), got, want, strict=True):
        assert_near(name, mine, exact, dtype)
    assert torch.equal(ops.norm_preserving_add(x, vector, 0.7), got[0]), "a plain number as scale"


@pytest.mark.parametrize("op", ["gated_shift", "norm_preserving_add"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("t", [1, 5])
def test_parameters_for_each_sample_are_the_oracle(op: str, dtype: torch.dtype, t: int):
    random = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = {
        "gated_shift": [(2, t, 4, 6), (2, 4, t, 8), (2, 4, t), (2, 4, 6), (2, 4, 8), (2, 4)],
        "norm_preserving_add": [(2, t, 6), (2, 6), (2,)],
    }[op]
    states = 2 if op == "gated_shift" else 1
    arguments = tuple(
        torch.randn(shape, generator=random, dtype=torch.float64).to(dtype if i < states else wide)
        for i, shape in enumerate(shapes)
    )
    incoming = torch.randn(shapes[0], generator=random, dtype=torch.float64).to(dtype)

    def one_by_one(*x: torch.Tensor) -> torch.Tensor:
        own = len(x) if op == "norm_preserving_add" else 3
        parts = ([y[i : i + 1] if k < own and y.ndim > 2 else y[i] for k, y in enumerate(x)] for i in range(2))
        return torch.cat([getattr(oracles, op)(*part) for part in parts])

    got, want = (_with_grads(fn, arguments, incoming) for fn in (getattr(ops, op), one_by_one))
    assert got[0].dtype == dtype
    for i, (mine, exact) in enumerate(zip(got, want, strict=True)):
        assert_near(f"{op} {i}", mine, exact, dtype)
    with torch.no_grad():  # in C++ this is code of its own
        turned = (arguments[0].mT.contiguous().mT, *arguments[1:])
        assert_near(op, getattr(ops, op)(*turned), want[0], dtype)


@DRAWN
@given(width=st.integers(1, 20), scale=st.floats(-4, 4), seed=st.integers(0, 99))
def test_norm_preserving_add_keeps_the_norm(width: int, scale: float, seed: int):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(3, width, generator=random, dtype=torch.float64)
    vector = torch.randn(width, generator=random, dtype=torch.float64)
    moved = ops.norm_preserving_add(x, vector, scale)
    torch.testing.assert_close(moved.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(
        torch.nn.functional.cosine_similarity(moved, x + scale * vector), torch.ones(3, dtype=torch.float64)
    )


def test_norm_preserving_add_of_nothing_is_finite():
    vector = torch.tensor([3.0, 4.0])
    x = torch.stack([-0.5 * vector, torch.zeros(2), vector])  # the sum is zero; x is zero; neither is
    out, *grads = _with_grads(ops.norm_preserving_add, (x, vector, torch.tensor(0.5)), torch.ones(3, 2))
    torch.testing.assert_close(out, torch.stack([torch.zeros(2), torch.zeros(2), vector]))
    assert all(grad.isfinite().all() for grad in grads)


def _with_grads(fn, arguments: tuple[torch.Tensor, ...], incoming: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in arguments]
    with poisoned_empty():
        out = fn(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, incoming.to(out.dtype))


# --- which backend


@pytest.mark.parametrize("op", LEAVES)
def test_auto_is_the_backend_it_says(op: str):
    for case in (Case(), Case("bool b1ts empty"), Case(e=5)):
        if case.e and op == "attention_lse":
            continue  # takes no values
        inputs = inputs_of(case)
        q, k, v = (inputs.tensors[name] for name in "qkv")
        said = ops.resolve_backend(q, k, v, inputs.options["mask"])
        assert said.name == ("sdpa" if case.e else "cpu")
        auto, named = (results(op, ops, inputs, backend=backend) for backend in ("auto", said.name))
        for name, x in (auto.outputs | auto.grads).items():
            assert torch.equal(x, (named.outputs | named.grads)[name])


def test_auto_says_why():
    x = inputs_of(Case()).tensors
    q, k, v = x["q"], x["k"], x["v"]
    assert ops.resolve_backend(q, k, v) == ("cpu", "the first choice; in C++")
    assert ops.resolve_backend(q, k, v, backend="sdpa") == ("sdpa", "asked for by name")
    wide = ops.resolve_backend(q, k, v[..., :5])
    assert wide.name == "sdpa"
    assert wide.why == "not cpu: the kernel needs values as wide as queries, found 5 and 8"
    with pytest.raises(
        BackendUnavailableError, match=r"backend 'cpu' was asked for.*as wide as queries, found 5 and 8"
    ):
        ops.attention_with_lse(q, k, v[..., :5], backend="cpu")


def test_gradient_of_a_mask_is_the_oracle():
    inputs = inputs_of(Case("bias bhts"))
    x, mask = inputs.tensors, inputs.options["mask"]
    masks = [mask.detach().requires_grad_() for _ in range(2)]
    said = ops.resolve_backend(x["q"], x["k"], x["v"], masks[0])
    assert said.name == "reference"
    assert "not cpu: the mask requires a gradient" in said.why
    assert "not sdpa: the mask requires a gradient" in said.why
    for source, leaf in zip((ops, oracles), masks, strict=True):
        out, lse = source.attention_with_lse(x["q"], x["k"], x["v"], leaf)
        torch.autograd.backward([out, lse], [inputs.incoming[n].to(y.dtype) for n, y in (("out", out), ("lse", lse))])
    got, want = (leaf.grad for leaf in masks)
    assert got is not None
    assert want is not None
    assert_near("grad mask", got, want.double(), torch.float32)


@pytest.mark.parametrize(("b", "t", "s"), [(0, 3, 3), (2, 0, 3), (2, 3, 0), (2, 0, 0)])
@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa"])
def test_empty_batch_or_sequence(backend: str, b: int, t: int, s: int):
    inputs = inputs_of(Case("bool b1ts" if s else "none", b=b, t=t, s=s))
    got = results("shifted", ops, inputs, backend=backend)
    assert got.outputs["out"].shape == (b, t, 4, 8)
    assert all(grad.isfinite().all() for grad in got.grads.values())
    lse = results("attention_lse", ops, inputs, backend=backend).outputs["lse"]
    assert lse.shape == (b, 4, t)
    assert s or (lse == -torch.inf).all()
