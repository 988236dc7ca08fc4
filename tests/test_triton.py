"""The Triton kernels against the slow oracles: under Triton's interpreter on any machine, natively with a CUDA device.

Triton decides at its import whether it compiles or interprets, and a process that interprets has lost the compiler. So
the cases run under the interpreter in a process of their own, which `test_under_the_interpreter` starts. To see them
one by one, start it by hand: TRITON_INTERPRET=1 pytest tests/test_triton.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import Case, attending_inputs, check, inputs_of, poisoned_empty, results
from triton_kernels import DEVICE, INTERPRETED, Backend, on_kernels

from mimic_core.ops import _triton, _triton_blocks

# Divisions by zero and infinities that a mask brings are meant.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

# Longer than a block of queries and of keys, and no multiple of one; tiles of every kind of width; all forms of masks.
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [
    Case(b=1, h=2, g=1, t=150, s=140, d=64, is_causal=True, dtype=BF16),
    Case("bool b1ts empty", b=1, h=4, g=2, t=140, s=150, d=80, dtype=BF16),
    Case("bias bhts empty", b=1, h=2, g=2, t=40, s=70, d=96, dtype=FP16),
    Case(b=1, h=3, g=1, t=30, s=70, d=128, dtype=BF16),
    Case("min b11s empty", b=2, h=2, g=1, t=40, s=75, d=128, dtype=FP16),
    Case(b=1, h=2, g=1, t=40, s=45, d=64, is_causal=True),
    Case(b=1, h=2, g=1, t=45, s=20, d=80, is_causal=True),
    Case("inf b1ts empty", b=1, h=2, g=1, t=40, s=70, d=80),
    Case("bool b1ts", b=1, h=2, g=2, t=40, s=35, d=96),
    Case(b=1, h=2, g=1, t=35, s=40, d=128),
    Case("bias b1ts", b=1, h=1, g=1, t=20, s=18, d=256),
    *(Case(b=1, d=d, is_causal=True) for d in (1, 16, 24, 32, 40, 72)),
    *(Case(f"{form} {axes} empty") for form in ("bool", "min", "inf", "bias") for axes in ("b1ts", "b11s")),
    *(Case(f"bool {axes}") for axes in ("s", "bht1", "hts")),
    Case("bias b1t1"),
    Case("bias 1hts turned", g=4),
    Case("bool b1ts turned"),
    Case("bias64 b1ts strided"),
    Case("min32 b1ts empty", dtype=BF16),
    Case("inf b1ts", scale=-0.3),
    Case(scale=-0.3, is_causal=True),
    *(Case(layout=layout, t=6, s=6, is_causal=True) for layout in ("projected", "strided", "turned")),
    Case(t=7, s=3, b=1, g=1, is_causal=True),
]
# Some seen by few keys, some by so many that they are split; 20 heads of a group are more than one tile of 16.
DECODE_CASES = [
    Case(t=1),
    Case(t=1, is_causal=True),
    Case(t=1, s=1, g=4, d=1),
    Case(b=1, t=1, s=300, d=80, dtype=BF16),
    Case("bool b11s empty", b=2, t=1, s=600, g=1, d=64, dtype=FP16),
    Case("bias bhts", b=1, t=1, s=270, d=96),
    Case("min b11s", b=1, h=2, g=2, t=1, s=530, d=128, dtype=BF16),
    Case("bool bhts empty", b=1, h=20, g=1, t=1, s=40, d=16),
    Case(b=1, t=1, s=300, d=16, scale=-0.3, layout="strided"),
]


# Both are one kernel but for its last lines: the interpreter, a thousand times slower, is asked for half of one.
CALLS = [
    pytest.param(op, case, id=f"{op}-{case}")
    for op in ("attention", "shifted")
    for i, case in enumerate(CASES + DECODE_CASES)
    if op == "shifted" or not INTERPRETED or i % 2
]


@on_kernels
@pytest.mark.parametrize(("op", "case"), CALLS)
def test_case_is_the_oracle(op: str, case: Case):
    check(op, case, results(op, Backend, attending_inputs(case)))


@on_kernels
@pytest.mark.parametrize("case", [CASES[5], CASES[7], Case("bias bhts", dtype=BF16), DECODE_CASES[5]], ids=str)
@pytest.mark.parametrize("op", ["out", "lse", "attention_lse"])
def test_case_with_one_output_is_the_oracle(op: str, case: Case):
    check(op, case, results(op, Backend, attending_inputs(case)))


@st.composite
def drawn_cases(draw: st.DrawFn) -> Case:
    g = draw(st.integers(1, 2))
    is_causal = draw(st.booleans())
    form = draw(st.sampled_from(("bool", "min", "inf", "bias")))
    axes = draw(st.sampled_from(("b1ts", "11ts", "b11s", "bhts", "1hts", "s")))
    option = draw(st.sampled_from(("", " empty", " turned", " empty strided")))
    t, s = draw(st.one_of(st.just(1), st.integers(2, 90))), draw(st.integers(1, 90))
    # Where a row sees few keys hardly more than the rounding of the output is left of a gradient.
    few = (min(t, s) if is_causal else s) < 8
    dtype = FP32 if few else draw(st.sampled_from((FP32, BF16, FP16)))
    if dtype == FP32:  # its blocks are small
        t, s = min(t, 40), min(s, 40)
    return Case(
        mask="none" if is_causal or draw(st.booleans()) else f"{form} {axes}{option}",
        b=draw(st.integers(1, 2)),
        h=g * draw(st.integers(1, 2)),
        g=g,
        t=t,
        s=s,
        d=draw(st.sampled_from((16, 64, 80, 96, 128))),
        is_causal=is_causal,
        scale=draw(st.sampled_from((None, 0.25, -0.25))),
        dtype=dtype,
        layout=draw(st.sampled_from(("contiguous", "projected", "strided", "turned"))),
    )


@on_kernels
@pytest.mark.parametrize("op", ["attention", "shifted"])
@settings(max_examples=6, deadline=None, derandomize=True)
@given(case=drawn_cases())
def test_drawn_case_is_the_oracle(op: str, case: Case):
    check(op, case, results(op, Backend, attending_inputs(case)))


@on_kernels
@pytest.mark.parametrize(
    "case", [Case(d=80, g=1), Case("bool b1ts empty", d=64), Case(b=1, h=2, t=1, s=300, d=80)], ids=str
)
def test_without_gradients_comes_the_same(case: Case):
    inputs = inputs_of(case)
    tensors, options = inputs.tensors, inputs.options
    with torch.no_grad(), poisoned_empty():
        shifted = Backend.shifted_attention(*tensors.values(), **options)
        out, lse = Backend.attention_with_lse(*(tensors[name] for name in "qkv"), **options)
        alone = Backend.attention_lse(tensors["q"], tensors["k"], **options)
    assert not shifted.requires_grad
    assert torch.equal(shifted, results("shifted", Backend, inputs).outputs["out"])
    both = results("attention", Backend, inputs).outputs
    assert torch.equal(out, both["out"])
    assert torch.equal(lse, both["lse"])
    assert torch.equal(alone, lse)


@on_kernels
@pytest.mark.parametrize("frozen", [("q", "k", "v"), ("k", "v"), ("q",), ("vector", "gate_weight", "gate_bias")])
def test_gradients_of_what_is_not_frozen_are_the_same(frozen: tuple[str, ...]):
    inputs = inputs_of(Case("bool b1ts", d=80))
    whole = results("shifted", Backend, inputs)
    tensors = {name: x.detach().requires_grad_(name not in frozen) for name, x in inputs.tensors.items()}
    with poisoned_empty():
        out = Backend.shifted_attention(*tensors.values(), **inputs.options)
        out.backward(inputs.incoming["out"])
    for name, x in tensors.items():
        if name in frozen:
            assert x.grad is None
        else:
            assert x.grad is not None
            assert torch.equal(x.grad, whole.grads[name]), name


@on_kernels
def test_an_expanded_gradient_is_taken():
    inputs = inputs_of(Case(d=16))
    leaves = [x.detach().requires_grad_() for x in inputs.tensors.values()]
    of_sum = torch.autograd.grad(Backend.shifted_attention(*leaves, **inputs.options).sum(), leaves)
    ones = torch.ones_like(inputs.incoming["out"])
    spelled_out = torch.autograd.grad(Backend.shifted_attention(*leaves, **inputs.options), leaves, ones)
    assert all(torch.equal(one, other) for one, other in zip(of_sum, spelled_out, strict=True))


@on_kernels
def test_saturated_gates_are_finite():
    inputs = inputs_of(Case("bool b1ts empty"))
    for bias in (-1e4, 1e4):
        tensors = {**inputs.tensors, "gate_bias": torch.full((4,), bias)}
        got = results("shifted", Backend, inputs._replace(tensors=tensors))
        assert all(x.isfinite().all() for x in (*got.outputs.values(), *got.grads.values()))


@on_kernels
def test_what_the_kernels_do_not_take_is_said():
    x = inputs_of(Case()).tensors
    q, k, v = (x[name].to(DEVICE) for name in "qkv")
    bias = torch.zeros(1, 1, 5, 7, device=DEVICE, requires_grad=True)
    wide = torch.ones(1, 1, 2, 264, device=DEVICE)
    for given_, reason in (
        ((q.double(), k.double(), v.double(), None), "float64"),
        ((q, k, v[..., :5], None), "as wide as queries, found 5 and 8"),
        ((wide, wide, wide, None), "up to 256 wide, found 264"),
        ((q, k, v, bias), "the mask requires a gradient"),
        ((q[:, :, :0], k, v, None), "empty"),
        ((q.to("meta"), k, v, None), "on meta"),
    ):
        assert reason in str(_triton.unavailable(*given_))
    assert _triton.unavailable(q, k, v, bias.detach()) is None


@pytest.mark.skipif(INTERPRETED, reason="is about a process that compiles")
def test_a_cpu_is_refused_where_nothing_interprets():
    x = inputs_of(Case()).tensors
    assert _triton.unavailable(x["q"], x["k"], x["v"], None) == "the tensors are on cpu"


@pytest.mark.parametrize(
    ("width", "tiles"),
    [
        *((1, (16, 0)), (8, (16, 0)), (16, (16, 0)), (24, (32, 0)), (32, (32, 0)), (40, (32, 16)), (64, (64, 0))),
        *((72, (64, 16)), (80, (64, 16)), (96, (64, 32)), (112, (128, 0)), (128, (128, 0)), (256, (256, 0))),
    ],
)
def test_a_head_is_cut_into_tiles(width: int, tiles: tuple[int, int]):
    assert _triton_blocks.tiles(width) == (width, *tiles)


def test_keys_are_split_over_the_processors():
    cpu = torch.device("cpu")  # counts as 132 processors
    assert _triton_blocks.splits(cpu, 8, 100) == 1
    assert _triton_blocks.splits(cpu, 8, 512) == 4
    assert _triton_blocks.splits(cpu, 8, 100_000) == 32
    assert _triton_blocks.splits(cpu, 1, 100_000) == 64
    assert _triton_blocks.splits(cpu, 1000, 100_000) == 1


# Parts, so that several processes share the work.
PARTS = [
    ("test_triton.py", "case and attention"),
    ("test_triton.py", "case and shifted"),
    ("test_triton.py", "not (case and (attention or shifted))"),
    ("test_triton_epilogue.py", ""),
]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is what it starts")
@pytest.mark.parametrize(("file", "part"), PARTS)
def test_under_the_interpreter(file: str, part: str):
    tests = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(tests / file), "-k", part]
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(command, cwd=tests.parent, env=environment, capture_output=True, text=True)
    if "this version of Triton's interpreter fails" in done.stdout and "failed" not in done.stdout:
        pytest.skip("this version of Triton's interpreter fails with this numpy")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
