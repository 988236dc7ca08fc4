"""The ops in C++ on the way a GPU's tensors go, without a GPU: test_on_stand_ins.py runs this in a process of its own.

torch's kernels are the Python of support/stand_ins.py; kernels.cu is compiled for the CPU and run thread by thread
(support/gpu_stand_in/). So everything is what runs on a GPU but the chip and torch's own kernels: which is chosen, what
it is given, what is launched with which arguments, memory orders, gradients.
"""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mimic_core import ops
from mimic_core.ops.native import nvrtc
from tests.support import oracles, stand_ins
from tests.support.op_cases import (
    CASES,
    HALF_CASES,
    Case,
    assert_near,
    attending_inputs,
    check,
    inputs_of,
    laid_out,
    results,
)
from tests.support.stand_ins import KINDS

ROOT = Path(__file__).parents[2]
STAND_IN = ROOT / "tests" / "support" / "gpu_stand_in"
KEPT = ROOT / ".pytest_cache" / "gpu_stand_in"


def built(source: Path, options: list[str]) -> Path:
    """A shared library of a source file, compiled where none is of this very source."""
    sources = [path.read_bytes() for path in (source, nvrtc.SOURCE)]
    digest = hashlib.sha256(b"\0".join([*sources, *(o.encode() for o in options)])).hexdigest()[:16]
    made = KEPT / digest / f"{source.stem}.so"
    if not made.is_file():
        made.parent.mkdir(parents=True, exist_ok=True)
        flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
        subprocess.run(["g++", *flags, *options, str(source), "-o", f"{made}.new", "-ldl"], check=True)
        Path(f"{made}.new").replace(made)
    return made


def compile_for_cpu(options: str, device: int) -> bytes:
    kernels = f'-DKERNELS="{nvrtc.SOURCE}"'
    return str(built(STAND_IN / "kernels.cpp", [kernels, *options.split()])).encode() + b"\0"


@pytest.fixture(scope="session")
def driver() -> ctypes.CDLL:
    """The stand-in for CUDA's driver, loaded under its name: whoever asks the loader for that gets this one."""
    path = built(STAND_IN / "driver.cpp", ["-fvisibility=default", "-Wl,-soname,libcuda.so.1"])
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


@pytest.fixture(autouse=True)
def chosen(native_ops: ModuleType, driver: ctypes.CDLL) -> Iterator[dict[str, Any]]:
    native_ops.set_up(False, compile_for_cpu)
    with stand_ins.registered() as chosen:
        native_ops.stand_in(True)
        yield chosen
        native_ops.stand_in(False)


def launched(driver: ctypes.CDLL) -> int:
    return ctypes.c_int.in_dll(driver, "launches").value


def takes(case: Case) -> bool:
    return case.e is None and case.d % 8 == 0 and case.dtype != torch.float64


def flash_takes(case: Case) -> bool:
    return case.mask == "none" and not (case.is_causal and (case.t > case.s or (case.scale or 1) < 0))


# Attention alone launches nothing of ours: some cases will do.
SHIFTED = [case for case in CASES + HALF_CASES if takes(case) and case.s < 100]
SOME = [("shifted", case) for case in SHIFTED] + [
    (op, case) for op in ("attention", "attention_lse") for case in SHIFTED[::4]
]
WIDER = [
    ("shifted", replace(case, d=d)) for case in (Case(is_causal=True, t=6, s=6), HALF_CASES[0]) for d in (40, 136, 264)
]
CALLS = [(kind, op, case) for kind in KINDS for op, case in SOME + WIDER if kind != "flash" or flash_takes(case)]


@pytest.mark.parametrize(("kind", "op", "case"), CALLS, ids=lambda x: str(x))
def test_around_a_kernel_is_the_oracle(
    kind: str, case: Case, op: str, chosen: dict[str, Any], driver: ctypes.CDLL
) -> None:
    chosen.update(kind=kind, asked=0)
    before = launched(driver)
    check(op, case, results(op, ops, attending_inputs(case)))
    assert chosen["asked"] == 1, "torch is asked once a call"
    # Gate and shift; the fold; what is added to dq, with the sums. Nothing around attention alone.
    assert launched(driver) - before == (3 if op == "shifted" else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value_width", [8, 24])
@pytest.mark.parametrize("layout", ["contiguous", "projected", "odd"])
def test_gated_shift(layout: str, value_width: int, dtype: torch.dtype) -> None:
    inputs = inputs_of(Case(e=value_width, d=16, t=70, dtype=dtype))
    x, out = inputs.tensors, inputs.incoming["out"]
    q = x["q"] if layout != "odd" else torch.cat([x["q"].flatten()[:1], x["q"].flatten()])[1:].view_as(x["q"])
    lse = torch.randn(2, 4, 70)
    lse[0, 1] = -torch.inf
    arguments = (out, laid_out(q, layout), lse, x["vector"], x["gate_weight"], x["gate_bias"])
    incoming = torch.randn(out.shape).to(dtype)
    made = []
    for source in (ops, oracles):
        leaves = [y.detach().requires_grad_() for y in arguments]
        found = source.gated_shift(*leaves)
        made.append((found.detach(), *torch.autograd.grad(found, leaves, incoming.to(found.dtype))))
    for i, (mine, exact) in enumerate(zip(*made, strict=True)):
        assert_near("out" if i == 0 else f"grad {i}", mine, exact.double(), dtype)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMED = [(6,), (5, 24), (3, 90, 33), (270, 8), (2, 4096)]  # and more rows than blocks


# A kernel is compiled for each width and dtype. Each takes a number or a tensor as its factor; both meet every width.
@pytest.mark.parametrize(
    ("number", "shape", "dtype"),
    [((i + j) % 2 == 0, shape, dtype) for i, shape in enumerate(NORMED) for j, dtype in enumerate(DTYPES)],
    ids=str,
)
def test_norm_preserving_add(number: bool, shape: tuple[int, ...], dtype: torch.dtype, driver: ctypes.CDLL) -> None:
    x, vector, scale = torch.randn(shape).to(dtype), torch.randn(shape[-1]), torch.tensor(0.7)
    incoming = torch.randn(shape).to(dtype)
    made, before = [], launched(driver)
    for source in (ops, oracles):
        leaves = [y.detach().requires_grad_() for y in ((x, vector) if number else (x, vector, scale))]
        found = source.norm_preserving_add(*leaves, *([0.7] if number else []))
        made.append((found.detach(), *torch.autograd.grad(found, leaves, incoming.to(found.dtype))))
    assert launched(driver) - before == 3, "one forward; gradients, and their sums"
    for i, (mine, exact) in enumerate(zip(*made, strict=True)):
        assert_near("out" if i == 0 else f"grad {i}", mine, exact.double(), dtype)
    assert torch.equal(ops.norm_preserving_add(x, torch.zeros(shape[-1]), 0.7), x), "a vector of zero changes no bit"
    opposite = x.detach().float().clone().requires_grad_()
    row = opposite[(0,) * (len(shape) - 1)].detach()
    found = ops.norm_preserving_add(opposite, -2 * row, 0.5)
    (gradient,) = torch.autograd.grad(found, opposite, torch.ones_like(found))
    assert not found[(0,) * (len(shape) - 1)].any(), "a sum of exactly zero stays zero"
    assert gradient.isfinite().all()


def test_a_shift_of_zero_changes_no_bit(chosen: dict[str, Any]) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = inputs_of(Case(d=64, dtype=dtype)).tensors
        plain, _ = ops.attention_with_lse(x["q"], x["k"], x["v"])
        nothing = torch.zeros_like(x["vector"])
        for leaf in (nothing, nothing.clone().requires_grad_()):
            shifted = ops.shifted_attention(x["q"], x["k"], x["v"], leaf, x["gate_weight"], x["gate_bias"])
            assert torch.equal(shifted, plain)


def test_an_output_that_is_kept_is_not_written_over(chosen: dict[str, Any]) -> None:
    inputs = attending_inputs(Case(d=64))
    leaves = [inputs.tensors[name].detach().requires_grad_() for name in ("q", "k", "v")]
    shift = [inputs.tensors[name].detach().requires_grad_() for name in ("vector", "gate_weight", "gate_bias")]
    kept = ops.shifted_attention(*leaves, *shift)
    before = kept.detach().clone()
    grad = torch.randn(kept.shape)
    with_it = torch.autograd.grad(kept, [*leaves, *shift], grad)
    assert torch.equal(kept, before)
    edge = torch.autograd.graph.get_gradient_edge(ops.shifted_attention(*leaves, *shift))
    for mine, other in zip(torch.autograd.grad([edge], [*leaves, *shift], [grad]), with_it, strict=True):
        torch.testing.assert_close(mine, other)


def test_what_the_driver_says_is_said(driver: ctypes.CDLL, native_ops: ModuleType) -> None:
    native_ops.set_up(False, lambda options, device: b"/no/such/library\0")
    with pytest.raises(RuntimeError, match="mimic_core: loading a kernel failed with CUDA_ERROR_INVALID_IMAGE"):
        ops.norm_preserving_add(torch.randn(3, 56), torch.randn(56), 0.5)

    def raises(options: str, device: int) -> bytes:
        raise OSError(f"no compiler for {options} on {device}")

    native_ops.set_up(False, raises)
    with pytest.raises(OSError, match="no compiler for -DSTORAGE=0 -DVEC=4 -DC=56 on -1"):
        ops.norm_preserving_add(torch.randn(3, 56), torch.randn(56), 0.5)
