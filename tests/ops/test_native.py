"""The ops in C++: what the backends' tests don't ask of them, beside the route in plain torch, and in a model."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import mimic_core as mc
from mimic_core import losses, ops
from mimic_core.ops import native
from tests.support import oracles
from tests.support.cases import CASES, Case, logits_of, model_of, random_shifts
from tests.support.op_cases import CASES as OP_CASES
from tests.support.op_cases import DRAWN, HALF, LEAVES, assert_near, attending_inputs, inputs_of, leaves_of
from tests.support.op_cases import Case as OpCase

HEADS = ["mimic", "live"]
ROUTES = ["C++", pytest.param("plain", marks=pytest.mark.plain)]


# --- arguments of every kind


@pytest.mark.parametrize("case", [case for case in OP_CASES if case.e is None], ids=str)
def test_without_gradients_it_is_the_same_to_the_bit(case: OpCase) -> None:
    arguments = leaves_of(case)
    with torch.no_grad():
        quick = ops.shifted_attention(*arguments, **inputs_of(case).options)
    assert torch.equal(quick, ops.shifted_attention(*arguments, **inputs_of(case).options))


def test_it_is_the_op_in_cpp_that_runs(native_ops: ModuleType) -> None:
    x = leaves_of(OpCase())
    node = ops.shifted_attention(*x).grad_fn
    assert node is not None
    assert "ShiftedAttention" in node.name()
    assert "mimic_core" in node.name()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("route", ROUTES)
def test_parameters_of_another_dtype_get_gradients_of_it(route: str, dtype: torch.dtype) -> None:
    q, k, v, *shift = leaves_of(OpCase())
    shift = [x.detach().to(dtype).requires_grad_() for x in shift]
    found = torch.autograd.grad(ops.shifted_attention(q, k, v, *shift).square().sum(), [q, *shift])
    wide = [x.detach().double().requires_grad_() for x in (q, k, v, *shift)]
    wanted = torch.autograd.grad(ops.shifted_attention(*wide, backend="reference").square().sum(), [wide[0], *wide[3:]])
    assert [x.dtype for x in found] == [torch.float32, *[dtype] * 3]
    for i, (mine, exact) in enumerate(zip(found, wanted, strict=True)):
        # The maths is fp32, whatever the parameters are.
        assert_near(
            f"grad {i}",
            mine.float() if dtype == torch.float64 else mine,
            exact,
            mine.dtype if dtype in HALF else torch.float32,
        )


@pytest.mark.parametrize("value_width", [8, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("route", ROUTES)
def test_gated_shift_of_an_output_that_stays(route: str, dtype: torch.dtype, value_width: int) -> None:
    inputs = inputs_of(OpCase(e=value_width, dtype=dtype))
    x, out = inputs.tensors, inputs.incoming["out"]
    lse = torch.randn(2, 4, 5, dtype=inputs.incoming["lse"].dtype)
    lse[0, 1] = -torch.inf
    before = out.clone()
    arguments = (out, x["q"], lse, x["vector"], x["gate_weight"], x["gate_bias"])
    got = ops.gated_shift(*arguments)
    assert torch.equal(out, before)
    assert torch.equal(got[0, :, 1], out[0, :, 1]), "a row that attends to nothing is left as it is"
    assert_near("out", got, oracles.gated_shift(*arguments), dtype)


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 130, 33), (3, 0), (0, 6), (70, 513)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("route", ROUTES)
def test_norm_preserving_add(route: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    vector, scale = torch.randn(shape[-1], dtype=wide), torch.tensor(0.7, dtype=wide)
    incoming = torch.randn(shape, dtype=torch.float64).to(dtype)
    made = []
    for source in (ops, oracles) if x.numel() else (ops,):
        leaves = [y.detach().requires_grad_() for y in (x, vector, scale)]
        out = source.norm_preserving_add(*leaves)
        made.append((out.detach(), *torch.autograd.grad(out, leaves, incoming.to(out.dtype))))
    if not x.numel():
        assert made[0][0].shape == shape
        return
    for name, mine, exact in zip(("out", "grad x", "grad vector", "grad scale"), *made, strict=True):
        assert_near(name, mine, exact.double(), dtype)
    with torch.no_grad():
        assert torch.equal(ops.norm_preserving_add(x, vector, scale), made[0][0])
        turned = x.mT.contiguous().mT if x.ndim > 1 else x
        assert_near("out", ops.norm_preserving_add(turned, vector, 0.7), made[1][0].double(), dtype)
        assert torch.equal(ops.norm_preserving_add(x, torch.zeros_like(vector), scale), x), "nothing changes no bit"


@pytest.mark.parametrize("route", ROUTES)
def test_norm_preserving_add_of_nothing(route: str) -> None:
    """A sum of zero stays zero, and passes nothing on; a state of zero has no length to keep."""
    vector = torch.tensor([3.0, 4.0], requires_grad=True)
    x = torch.stack([-0.5 * vector, torch.zeros(2), vector]).detach().requires_grad_()
    out = ops.norm_preserving_add(x, vector, 0.5)
    torch.testing.assert_close(out, torch.stack([torch.zeros(2), torch.zeros(2), vector]))
    of_x, of_vector = torch.autograd.grad(out.sum(), (x, vector))
    assert of_vector.isfinite().all()
    assert torch.equal(of_x[:2], torch.zeros(2, 2))


@DRAWN
@given(rows=st.integers(1, 9), width=st.integers(1, 40), scale=st.floats(-3, 3))
def test_drawn_norm_gradients(rows: int, width: int, scale: float) -> None:
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((rows, width), (width,))]
    weight = torch.randn(rows, width, dtype=torch.float64)
    grads = [
        torch.autograd.grad((source.norm_preserving_add(*leaves, scale) * weight).sum(), leaves)
        for source in (ops, oracles)
    ]
    for mine, exact in zip(*grads, strict=True):
        assert (mine - exact).abs().max() <= 1e-9 * (1 + exact.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("g", "mask", "is_causal"), [(8, "none", True), (2, "none", True), (2, "bool b1ts", False)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_long_backward_in_pieces(threads: int, g: int, mask: str, is_causal: bool, dtype: torch.dtype) -> None:
    """Half precision is taken in fp32, 128 keys and rows at a time, where the processor has no instructions for it."""
    case = OpCase(mask, b=2, h=8, g=g, t=300, s=300, d=16, is_causal=is_causal, dtype=dtype)
    inputs = attending_inputs(case)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = []
        for backend in ("cpu", "reference"):
            leaves = leaves_of(case)
            out = ops.shifted_attention(*leaves, **inputs.options, backend=backend)
            found.append(torch.autograd.grad(out, leaves, inputs.incoming["out"].to(out.dtype)))
    finally:
        torch.set_num_threads(before)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    for mine, exact in zip(*found, strict=True):
        assert (mine.double() - exact.double()).norm() <= limit * exact.double().norm()


# --- what the backward writes over


def gradients_through(edge: Any, leaves: list[Tensor], grad: Tensor, **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad([edge], leaves, [grad], **options)


def edge_of(out: Tensor) -> Any:
    return torch.autograd.graph.get_gradient_edge(out)


def test_an_output_nobody_holds_saves_a_copy_of_it() -> None:
    """And gives the very same gradients: memory of a backward is what plain attention's is."""
    leaves, grad = leaves_of(OpCase(b=1, h=8, g=8, t=256, s=256, d=64)), torch.randn(1, 256, 8, 64)
    held = ops.shifted_attention(*leaves)
    of_held = torch.autograd.grad(held, leaves, grad)
    unheld = edge_of(ops.shifted_attention(*leaves))
    pointer = held.data_ptr()
    assert pointer != 0
    for mine, other in zip(gradients_through(unheld, leaves, grad), of_held, strict=True):
        assert torch.equal(mine, other)
    peaks = [_peak_of(hold, leaves, grad) for hold in (True, False)]
    assert peaks[0] - peaks[1] >= 0.9 * held.nbytes


def _peak_of(hold: bool, leaves: list[Tensor], grad: Tensor) -> int:
    gc.collect()
    out = ops.shifted_attention(*leaves)
    edge = edge_of(out)
    if not hold:
        del out
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        found = gradients_through(edge, leaves, grad)
        del found  # inside: see benchmarks.measure
    held = peak = 0
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


HOLDERS: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda out: out,
    "detached": lambda out: out.detach(),
    "view": lambda out: out[0],
    "storage": lambda out: out.untyped_storage(),
    "numpy": lambda out: out.detach().numpy(),
    "saved by another node": lambda out: (out.exp() * out).sum(),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_an_output_somebody_holds_is_not_written_over(holder: str) -> None:
    leaves = leaves_of(OpCase(t=6, s=6))
    out = ops.shifted_attention(*leaves)
    before, grad = out.detach().clone(), torch.randn(out.shape)
    wanted = torch.autograd.grad(ops.shifted_attention(*leaves), leaves, grad)
    held, edge, view = HOLDERS[holder](out), edge_of(out), out.detach()
    del out
    found = gradients_through(edge, leaves, grad)
    assert held is not None
    assert torch.equal(view, before)
    for mine, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, exact)


def test_a_graph_that_is_kept_gives_the_same_twice() -> None:
    leaves = leaves_of(OpCase(t=6, s=6))
    edge, grad = edge_of(ops.shifted_attention(*leaves)), torch.randn(2, 6, 4, 8)
    first = gradients_through(edge, leaves, grad, retain_graph=True)
    for mine, other in zip(gradients_through(edge, leaves, grad), first, strict=True):
        assert torch.equal(mine, other)
    with pytest.raises(RuntimeError, match="second time"):
        gradients_through(edge, leaves, grad)


def test_saved_tensor_hooks_keep_what_they_keep() -> None:
    leaves, grad = leaves_of(OpCase(t=6, s=6)), torch.randn(2, 6, 4, 8)
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.detach())
        return kept[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x.view_as(x)):
        edge = edge_of(ops.shifted_attention(*leaves))
    copies = [x.clone() for x in kept]
    found = gradients_through(edge, leaves, grad)
    assert len(kept) > 5
    assert all(torch.equal(x, copy) for x, copy in zip(kept, copies, strict=True))
    wanted = torch.autograd.grad(ops.shifted_attention(*leaves), leaves, grad)
    for mine, exact in zip(found, wanted, strict=True):
        assert torch.equal(mine, exact)


# --- derivatives of other kinds


@pytest.mark.parametrize("op", ["shifted", "attention", "gated_shift", "norm"])
@pytest.mark.parametrize("route", ROUTES)
def test_a_second_derivative_is_the_references_or_an_error(route: str, op: str) -> None:
    """Also where only what was saved requires a gradient: there torch's own decorator makes it zero without a word."""
    x = attending_inputs(OpCase(t=6, s=6))
    q = x.tensors["q"].detach().requires_grad_()
    k, v, *shift = (x.tensors[name] for name in LEAVES["shifted"][1:])
    lse, out = torch.randn(2, 4, 6), torch.randn(2, 6, 4, 8)
    call = {
        "shifted": lambda: ops.shifted_attention(q, k, v, *shift),
        "attention": lambda: ops.attention_with_lse(q, k, v)[0],
        "gated_shift": lambda: ops.gated_shift(out, q, lse, *shift),
        "norm": lambda: ops.norm_preserving_add(q, torch.ones(8), 0.5),
    }[op]
    (grad,) = torch.autograd.grad(call().sum(), q, create_graph=True)
    if route == "plain" and op in ("gated_shift", "norm"):  # plain torch has it
        assert torch.autograd.grad(grad.square().sum(), q)[0].abs().max() > 0
        return
    with pytest.raises(RuntimeError, match='no second derivatives; backend="reference" of mimic_core.ops has them'):
        (grad.square().sum() + call().sum()).backward()


@pytest.mark.parametrize("op", ["shifted", "attention"])
def test_the_reference_has_second_derivatives(op: str) -> None:
    leaves = [x.double().detach().requires_grad_() for x in leaves_of(OpCase(t=4, s=4, b=1, h=2, g=1), op)]
    function = ops.shifted_attention if op == "shifted" else lambda *y, **o: ops.attention_with_lse(*y, **o)[1]
    assert torch.autograd.gradgradcheck(lambda *y: function(*y, backend="reference"), leaves)


@pytest.mark.parametrize("route", ROUTES)
def test_transforms_of_torch_func_go_through_the_reference(route: str) -> None:
    q, k, v, *shift = (x.detach() for x in leaves_of(OpCase(t=6, s=6)))

    def loss(vector: Tensor) -> Tensor:
        return ops.shifted_attention(q, k, v, vector, *shift[1:]).square().sum()

    vector = shift[0].clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(shift[0]), torch.autograd.grad(loss(vector), vector)[0])
    together = torch.vmap(lambda x: ops.shifted_attention(x, k, v, *shift))(torch.stack([q, 2 * q]))
    torch.testing.assert_close(together[1], ops.shifted_attention(2 * q, k, v, *shift))
    tangent = torch.randn_like(shift[0])
    found = torch.func.jvp(loss, (shift[0],), (tangent,))[1]
    torch.testing.assert_close(found, (torch.autograd.grad(loss(vector), vector)[0] * tangent).sum())
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        assert forward_ad.unpack_dual(ops.shifted_attention(dual, k, v, *shift)).tangent is not None
        assert forward_ad.unpack_dual(ops.norm_preserving_add(dual, torch.ones(8), 0.5)).tangent is not None
        shifted = ops.gated_shift(torch.zeros(2, 6, 4, 8), dual, torch.zeros(2, 4, 6), *shift)
        assert forward_ad.unpack_dual(shifted).tangent is not None
    with pytest.raises(mc.BackendUnavailableError, match=r"does not support torch\.func and forward-mode"):
        torch.func.grad(lambda x: ops.shifted_attention(x, k, v, *shift, backend="cpu").sum())(q)


def test_per_sample_gradients() -> None:
    """A stack a sample: vmap of grad, as torch.func's tutorials write it."""
    q, k, v, *shift = (x.detach() for x in leaves_of(OpCase(t=6, s=6)))

    def loss(vector: Tensor, one: Tensor) -> Tensor:
        return ops.shifted_attention(one[None], k[:1], v[:1], vector, *shift[1:]).sum()

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(shift[0], q)
    for sample in range(2):
        torch.testing.assert_close(found[sample], torch.func.grad(loss)(shift[0], q[sample]))


# --- who watches


@pytest.mark.usefixtures("no_shape_checks")
def test_who_counts_or_traces_sees_what_runs() -> None:
    q, k, v, *shift = (x.detach() for x in leaves_of(OpCase(t=32, s=32)))
    with FlopCounterMode(display=False) as counter:
        ops.shifted_attention(q, k, v, *shift)
    assert counter.get_total_flops() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda x: ops.shifted_attention(x, k, v, *shift), (q,), check_trace=False)
        torch.testing.assert_close(traced(-q), ops.shifted_attention(-q, k, v, *shift))
        traced = torch.jit.trace(lambda x: ops.norm_preserving_add(x, shift[0][0], 0.5), (q,), check_trace=False)
        torch.testing.assert_close(traced(-q), ops.norm_preserving_add(-q, shift[0][0], 0.5))


def test_inference_mode_and_deterministic_algorithms() -> None:
    leaves = [x.detach() for x in leaves_of(OpCase(t=6, s=6))]
    wanted = ops.shifted_attention(*leaves)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.inference_mode():
            assert torch.equal(ops.shifted_attention(*leaves), wanted)
        again = [torch.autograd.grad(ops.shifted_attention(*x).sum(), x) for x in (leaves_of(OpCase(t=6, s=6)),) * 2]
        assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


# --- in a model


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_model_is_what_it_is_without(case: Case, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, cached decoding and gradients."""
    model, inputs = model_of(case), case.inputs()
    shifts = random_shifts(model, head)
    found: list[list[Tensor]] = []
    for kernels in (native._ops, None):
        monkeypatch.setattr(native, "_ops", kernels)
        with mc.patch(model, shifts):
            logits = logits_of(model, inputs)
            loss = losses.lm(logits, inputs["input_ids"], inputs["attention_mask"].bool())
            grads = torch.autograd.grad(loss, list(shifts.parameters()))
            with torch.no_grad():
                tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        found.append([logits.detach(), *grads, tokens.float()])
    for mine, plain in zip(*found, strict=True):
        assert (mine - plain).abs().max() <= 1e-4 * plain.abs().max()
        assert math.isfinite(float(mine.abs().max()))
