"""Gradients looked at by themselves: numerically, through LSE, for any incoming gradient; and what leaves no trace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mimic_core import ops
from mimic_core.ops import _lse
from tests.support.op_cases import (
    BACKENDS,
    CASES,
    DRAWN,
    HALF,
    HALF_CASES,
    LEAVES,
    Case,
    attending_inputs,
    call,
    check,
    inputs_of,
    results,
)

EMPTY = [case for case in CASES + HALF_CASES if "empty" in case.mask]


@pytest.mark.parametrize("g", [1, 2])
@pytest.mark.parametrize("mask", ["none", "causal", "bool b11s", "inf b1ts"])
@pytest.mark.parametrize(("op", "backend"), [("shifted", b) for b in BACKENDS] + [("attention", "cpu")])
def test_gradcheck(op: str, backend: str, mask: str, g: int):
    is_causal = mask == "causal"
    case = Case("none" if is_causal else mask, h=2, g=g, t=3, s=4, d=2, is_causal=is_causal, dtype=torch.float64)
    inputs = inputs_of(case)
    leaves = [inputs.tensors[name].clone().requires_grad_() for name in LEAVES[op]]

    def run(*x: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(LEAVES[op], x, strict=True))
        return tuple(call(op, ops, named, {**inputs.options, "backend": backend}).values())

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("length", [0.1, 1.0])
def test_a_dropped_lse_gradient_would_show(length: float):
    """What torch's ops do by themselves: no error, and gradients that are wrong by more than any tolerance here."""
    inputs = inputs_of(Case(t=16, s=16, is_causal=True))
    grads = []
    for keep in (True, False):
        x = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors.items()}
        out, lse = ops.attention_with_lse(x["q"], x["k"], x["v"], is_causal=True)
        shift = (x["vector"] * length, x["gate_weight"], x["gate_bias"])
        shifted = ops.gated_shift(out, x["q"], lse if keep else lse.detach(), *shift)
        grads.append(torch.autograd.grad(shifted, [x["q"], x["k"]], inputs.incoming["out"]))
    for right, wrong in zip(*grads, strict=True):
        assert (right - wrong).norm() > 0.01 * right.norm()


@pytest.mark.parametrize("case", EMPTY, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", LEAVES)
def test_rows_that_attend_to_nothing_are_finite(op: str, backend: str, case: Case):
    """With a gradient coming into those rows too."""
    inputs = inputs_of(case)
    got = results(op, ops, inputs, backend=backend)
    for name, x in (got.outputs | got.grads).items():
        assert not x.isnan().any(), name
        assert name == "lse" or x.isfinite().all(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_attend_to_nothing_are_not_shifted(backend: str):
    """mu = 0: no shift, and nothing of these rows in the gradients of the shift's parameters."""
    case = Case("bool b11s empty", b=1)  # the only sample attends to nothing
    got = results("shifted", ops, inputs_of(case), backend=backend)
    plain = results("out", ops, inputs_of(case), backend=backend)
    assert torch.equal(got.outputs["out"], plain.outputs["out"])
    for name in ("vector", "gate_weight", "gate_bias"):
        assert not got.grads[name].any(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["attention", "shifted"])
@pytest.mark.parametrize("layout", ["expanded", "permuted", "strided"])
def test_incoming_gradient_in_any_layout(layout: str, op: str, backend: str):
    def laid_out(grad: Tensor) -> Tensor:
        if layout == "expanded":  # what .sum() and .mean() send back
            return grad.flatten()[0].expand(grad.shape)
        if layout == "strided":
            return grad.repeat_interleave(2, dim=-1)[..., ::2]
        axes = tuple(reversed(range(grad.ndim)))
        return grad.permute(axes).contiguous().permute(axes)

    inputs = inputs_of(Case(is_causal=True))
    odd = {name: laid_out(grad) for name, grad in inputs.incoming.items()}
    even = {name: grad.contiguous() for name, grad in odd.items()}
    got, want = (results(op, ops, inputs._replace(incoming=grads), backend=backend) for grads in (odd, even))
    for name, grad in got.grads.items():
        torch.testing.assert_close(grad, want.grads[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", LEAVES)
def test_no_grad_changes_no_bit(op: str, backend: str):
    for case in (Case(), Case(is_causal=True, t=6, s=6), Case("bool b1ts empty"), HALF_CASES[0], HALF_CASES[3]):
        inputs = inputs_of(case)
        with torch.no_grad():
            silent = call(op, ops, inputs.tensors, {**inputs.options, "backend": backend})
        for name, y in results(op, ops, inputs, backend=backend).outputs.items():
            assert torch.equal(silent[name], y), f"{case}: {name}"


@pytest.mark.parametrize("frozen", ["q k v", "vector gate_weight gate_bias", "q k v gate_weight gate_bias", "k"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_some_arguments_alone(backend: str, frozen: str):
    inputs = inputs_of(Case(is_causal=True))
    every = results("shifted", ops, inputs, backend=backend).grads
    x = {name: t if name in frozen.split() else t.detach().requires_grad_() for name, t in inputs.tensors.items()}
    out = call("shifted", ops, x, {**inputs.options, "backend": backend})["out"]
    trained = [name for name in x if name not in frozen.split()]
    for name, grad in zip(
        trained, torch.autograd.grad(out, [x[name] for name in trained], inputs.incoming["out"]), strict=True
    ):
        torch.testing.assert_close(grad, every[name])


@pytest.mark.parametrize("op", ["attention", "shifted", "attention_lse"])
def test_second_derivatives_are_refused(op: str):
    inputs = inputs_of(Case())
    x = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors.items()}
    total = sum(y.square().sum() for y in call(op, ops, x, {"backend": "cpu"}).values())
    assert isinstance(total, Tensor)
    (grad,) = torch.autograd.grad(total, x["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(
    "case", [Case(), Case(t=6, s=6, g=4, is_causal=True), Case("bool b1ts empty"), Case("inf b11s", t=1)], ids=str
)
def test_zero_vector_is_plain_attention_bit_for_bit(case: Case, dtype: torch.dtype):
    inputs = inputs_of(replace(case, dtype=dtype))
    x = inputs.tensors | {"vector": torch.zeros(4, 8)}
    k, v = (x[name].repeat_interleave(4 // case.g, dim=1) for name in "kv")
    mask, scale, is_causal = inputs.options.values()
    plain = F.scaled_dot_product_attention(x["q"], k, v, attn_mask=mask, scale=scale, is_causal=is_causal)
    for trained in (False, True):
        x["vector"].requires_grad_(trained)
        shifted = call("shifted", ops, x, {**inputs.options, "backend": "cpu"})["out"]
        assert torch.equal(shifted, plain.transpose(1, 2))


# --- the identity the method comes from


@pytest.mark.parametrize("backend", ["reference", "cpu", "sdpa"])
@DRAWN
@given(
    sizes=st.tuples(*[st.integers(1, 6)] * 3), heads=st.sampled_from([(1, 1), (2, 1), (2, 2), (6, 3)]),
    seed=st.integers(0, 99), causal=st.booleans(),
)  # fmt: skip
def test_attention_over_demonstrations_decomposes(
    backend: str, sizes: tuple[int, int, int], heads: tuple[int, int], seed: int, causal: bool
):
    """SA(q, [K_D; K], [V_D; V]) = SA + mu (SA_D - SA), mu = sigmoid(LSE_D - LSE), causal or not among own tokens."""
    (t, demonstrations, d), (h, g) = sizes, heads
    s = t if causal else t + 1
    random = torch.Generator().manual_seed(seed)
    q, k_d, v_d, k, v = (
        torch.randn(2, n, length, d, generator=random, dtype=torch.float64)
        for n, length in ((h, t), (g, demonstrations), (g, demonstrations), (g, s), (g, s))
    )
    own = torch.ones(t, s, dtype=torch.bool).tril() if causal else torch.ones(t, s, dtype=torch.bool)
    mask = torch.cat([torch.ones(t, demonstrations, dtype=torch.bool), own], dim=1)
    keys, values = torch.cat([k_d, k], dim=2), torch.cat([v_d, v], dim=2)
    whole, lse_whole = ops.attention_with_lse(q, keys, values, mask, backend=backend)
    shown, lse_shown = ops.attention_with_lse(q, k_d, v_d, backend=backend)
    alone, lse_alone = ops.attention_with_lse(q, k, v, is_causal=causal, backend=backend)
    mu = ops.gate(lse_shown, lse_alone)
    assert (whole - (alone + mu.transpose(1, 2)[..., None] * (shown - alone))).abs().max() < 1e-10
    assert (lse_whole - torch.logaddexp(lse_shown, lse_alone)).abs().max() < 1e-10


# --- LSE in chunks of queries


CHUNKED = [
    Case(t=9),
    Case(t=9, g=1, is_causal=True),
    Case(t=9, s=4, is_causal=True),
    *(Case(f"bool {rest}", t=9) for rest in ("b1ts empty", "b11s", "11ts")),
    *(Case(mask, t=9) for mask in ("inf bhts empty", "bias ts", "bias 1hts")),
    Case("min32 b1ts empty", t=9, dtype=torch.bfloat16),
]


@pytest.mark.parametrize("case", CHUNKED, ids=str)
@pytest.mark.parametrize("elements", [1, 120])  # a row at a time; two, and a last one that is shorter
def test_chunks_change_nothing(elements: int, case: Case, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_lse, "_CHUNK_ELEMENTS", elements)
    inputs = attending_inputs(case)
    chunks = _lse._chunks(inputs.tensors["q"], inputs.tensors["k"])
    assert len(chunks) == 9 if elements == 1 else 1 < len(chunks) < 9
    for op in ("lse", "attention_lse", "shifted"):
        check(op, case, results(op, ops, inputs, backend="sdpa"))


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize(
    ("backend", "mask"), [(b, m) for b in ("cpu", "sdpa") for m in ("none", "causal", "bool b11s")]
)
@pytest.mark.parametrize("op", ["attention", "attention_lse", "shifted"])
def test_no_tensor_of_all_scores(op: str, backend: str, mask: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_lse, "_CHUNK_ELEMENTS", 1 << 14)
    causal = mask == "causal"
    inputs = inputs_of(Case("none" if causal else mask, b=1, h=2, g=2, t=512, s=512, is_causal=causal))
    with _Largest() as largest:
        results(op, ops, inputs, backend=backend)
    assert 512 * 8 <= largest.numel < 512 * 512 / 8


def test_the_reference_does_make_all_scores():
    """So the test above would notice."""
    with _Largest() as largest:
        results("lse", ops, inputs_of(Case(b=1, h=2, g=2, t=512, s=512)), backend="reference")
    assert largest.numel >= 512 * 512
