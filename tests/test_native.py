"""The CPU kernels in C++: what the backends' tests don't ask of them, and how they are built, found and refused."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import oracles
import pytest
import torch
from cases import CASES, Case, logits_of, model_of, random_shifts, zero_vectors
from hypothesis import given
from hypothesis import strategies as st
from op_cases import CASES as OP_CASES
from op_cases import DRAWN, HALF, LEAVES, assert_near, inputs_of
from op_cases import Case as OpCase
from torch import Tensor

import mimic_core as mc
from mimic_core import BackendUnavailableError, losses, ops
from mimic_core.ops import _epilogue, _native

HEADS = ["mimic", "live"]


# --- the row loops against plain torch, and against the oracle


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("attends", [False, True])
def test_each_function_is_its_double_in_plain_torch(
    attends: bool, dtype: torch.dtype, native_kernels: ModuleType
) -> None:
    inputs = inputs_of(OpCase(b=3, t=70, s=70, d=20, e=12, dtype=dtype))
    x = inputs.tensors
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shift = (x["vector"], x["gate_weight"], x["gate_bias"])
    lse = torch.randn(3, 4, 70, dtype=wide).transpose(1, 2).contiguous().transpose(1, 2)  # as the kernel lays it out
    rows = torch.rand(3, 1, 70) < 0.7 if attends else None
    made = []
    for module in (native_kernels, _epilogue):
        out, dq = (inputs.incoming["out"].clone(), x["q"].clone())
        mu = module.gated_shift_(out, x["q"], lse, rows, *shift)
        grad = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(dtype)
        hat, df, *of_shift = module.folded_gradients(grad, out, x["q"], mu, *shift[:2], True)
        assert module.folded_gradients(grad, out, x["q"], mu, *shift[:2], False)[0] is None
        module.add_to_dq_(dq, df, shift[1])
        made.append({"out": out, "out mu": mu, "out hat": hat, "grad df": df, "grad dq": dq})
        made[-1] |= {f"grad {i}": y for i, y in enumerate(of_shift)}
    for name, mine in made[0].items():
        assert mine.dtype == made[1][name].dtype, name
        assert_near(name, mine, made[1][name].double(), dtype)


@pytest.mark.native
@pytest.mark.parametrize("value_width", [8, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_gated_shift_of_an_output_that_stays(dtype: torch.dtype, value_width: int) -> None:
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


@pytest.mark.native
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 130, 33)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_norm_preserving_add(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    vector, scale = torch.randn(shape[-1], dtype=wide), torch.tensor(0.7, dtype=wide)
    incoming = torch.randn(shape, dtype=torch.float64).to(dtype)
    made = []
    for source in (ops, oracles):
        leaves = [y.detach().requires_grad_() for y in (x, vector, scale)]
        out = source.norm_preserving_add(*leaves)
        made.append((out.detach(), *torch.autograd.grad(out, leaves, incoming.to(out.dtype))))
    for name, mine, exact in zip(("out", "grad x", "grad vector", "grad scale"), *made, strict=True):
        assert_near(name, mine, exact.double(), dtype)
    with torch.no_grad():
        assert torch.equal(ops.norm_preserving_add(x, vector, scale), made[0][0])
        turned = x.mT.contiguous().mT if x.ndim > 1 else x  # which the loops don't take
        assert_near("out", ops.norm_preserving_add(turned, vector, 0.7), made[1][0].double(), dtype)


@pytest.mark.native
def test_norm_preserving_add_of_nothing() -> None:
    vector = torch.tensor([3.0, 4.0], requires_grad=True)
    x = torch.stack([-0.5 * vector, torch.zeros(2), vector]).detach().requires_grad_()
    out = ops.norm_preserving_add(x, vector, 0.5)
    torch.testing.assert_close(out, torch.stack([torch.zeros(2), torch.zeros(2), vector]))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (x, vector)))


@pytest.mark.native
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


@pytest.mark.native
def test_tensors_without_memory_of_their_own_go_another_way() -> None:
    """vmap's and functorch's tensors, a fake one: the loops would read memory that is not there."""
    nothing = torch.zeros(0, 6, requires_grad=True)
    assert ops.norm_preserving_add(nothing, torch.ones(6), 0.5).shape == (0, 6)
    x = inputs_of(OpCase()).tensors
    shift = (x["vector"], x["gate_weight"], x["gate_bias"])
    want = ops.shifted_attention(x["q"], x["k"], x["v"], *shift)
    with torch.no_grad():
        got = torch.vmap(lambda q, k, v: ops.gated_shift(q.transpose(1, 2), q, q[..., 0], *shift))(
            *(x[name][None].expand(2, *x[name].shape) for name in ("q", "q", "q"))
        )
    assert got.shape[0] == 2
    jvp = torch.func.jvp(lambda s: ops.norm_preserving_add(x["q"], s, 0.5), (torch.ones(8),), (torch.ones(8),))
    assert jvp[1].isfinite().all()
    assert want.isfinite().all()


@pytest.mark.native
@pytest.mark.parametrize("case", [case for case in OP_CASES if case.e is None][:20], ids=str)
def test_the_one_call_is_the_other_way_to_the_bit(case: OpCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """What decoding takes, and what it declines, against the route with gradients."""
    inputs = inputs_of(case)
    arguments = [inputs.tensors[name] for name in LEAVES["shifted"]]
    with torch.no_grad():
        quick = ops.shifted_attention(*arguments, **inputs.options)
    with_grads = ops.shifted_attention(*(x.detach().requires_grad_() for x in arguments), **inputs.options)
    assert torch.equal(quick, with_grads)


# --- in a model


@pytest.mark.native
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_zero_vector_is_the_unpatched_model(case: Case, head: str) -> None:
    model, inputs = model_of(case), case.inputs()
    plain = logits_of(model, inputs)
    with torch.no_grad(), mc.patch(model, zero_vectors(random_shifts(model, head))):
        assert torch.equal(logits_of(model, inputs), plain)


@pytest.mark.native
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_model_is_what_it_is_without(case: Case, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, cached decoding and gradients."""
    model, inputs = model_of(case), case.inputs()
    shifts = random_shifts(model, head)
    found: list[list[Tensor]] = []
    for kernels in (_native.kernels(), None):
        monkeypatch.setattr(_native, "_kernels", kernels)
        with mc.patch(model, shifts):
            logits = logits_of(model, inputs)
            loss = losses.lm(logits, inputs["input_ids"], inputs["attention_mask"].bool())
            grads = torch.autograd.grad(loss, list(shifts.parameters()))
            with torch.no_grad():
                tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        found.append([logits.detach(), *grads, tokens.float()])
    for mine, plain in zip(*found, strict=True):
        assert (mine - plain).abs().max() <= 1e-4 * plain.abs().max()


# --- built, found, refused


def test_nothing_is_there_until_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "_looked", False)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    assert _native.kernels() is None
    assert _native._folder() == tmp_path / "mimic_core"


def test_built_once_and_found_by_a_later_process(native_kernels: ModuleType, tmp_path: Path) -> None:
    built = ops.build_native(Path(__file__).parent.parent / ".pytest_cache" / "native")
    found = tmp_path / "mimic_core" / built.parent.name / built.name
    found.parent.mkdir(parents=True)
    found.write_bytes(built.read_bytes())
    script = (
        "import sys, torch; torch.hub.set_dir(sys.argv[1]); from mimic_core.ops import _native as n; print(n.kernels())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "hub")], capture_output=True, text=True, check=True
    )
    assert str(found) in done.stdout


def test_the_command_of_the_readme(native_kernels: ModuleType, tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    (command,) = re.findall(r"(?m)^python -c .*build_native.*$", (root / "README.md").read_text())
    built = ops.build_native(root / ".pytest_cache" / "native")
    there = tmp_path / "mimic_core" / built.parent.name / built.name  # so that it is not compiled a second time
    there.parent.mkdir(parents=True)
    there.write_bytes(built.read_bytes())
    arguments = [sys.executable, *shlex.split(command)[1:]]
    environment = {**os.environ, "TORCH_HOME": str(tmp_path)}
    done = subprocess.run(arguments, cwd=root, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(there)


def test_it_is_said_that_they_run(native_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs_of(OpCase()).tensors
    assert ops.resolve_backend(x["q"], x["k"], x["v"]).why == "the first choice"
    monkeypatch.setattr(_native, "_kernels", native_kernels)
    why = ops.resolve_backend(x["q"], x["k"], x["v"]).why
    assert why == "the first choice; with the kernels of build_native around it"


def test_a_library_that_cannot_be_loaded_is_said_so(tmp_path: Path) -> None:
    path = _native._library(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x7fELF truncated")
    with pytest.raises(BackendUnavailableError, match=r"can't be loaded: .*; remove the file, and build them again"):
        ops.build_native(tmp_path)


def test_no_compiler_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    with pytest.raises(
        BackendUnavailableError, match="(?s)could not be built: .* they need a C\\+\\+ compiler and ninja"
    ):
        ops.build_native(tmp_path)
    assert not _native._library(tmp_path).exists()


def test_no_setuptools_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.cpp_extension", raising=False)
    monkeypatch.setitem(sys.modules, "setuptools", None)
    monkeypatch.delattr(torch.utils, "cpp_extension", raising=False)
    with pytest.raises(BackendUnavailableError, match=r"setuptools and ninja, and setuptools is missing; pip install"):
        ops.build_native(tmp_path)
