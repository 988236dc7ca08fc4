"""What runs around torch's CUDA kernels in Python, without a GPU. on_stand_ins.py is the same for the ops in C++.

On fake CUDA tensors the real operators check every argument and return the shapes they would. The numbers come from
stand-ins. With a GPU the kernels themselves run, around them the ops in C++ and plain torch (marker gpu).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.torch_version import TorchVersion

from mimic_core import BackendUnavailableError, ops
from mimic_core.ops.plain import cuda
from tests.support import stand_ins
from tests.support.op_cases import CASES, HALF_CASES, Case, attending_inputs, check, inputs_of, on_gpu, results
from tests.support.stand_ins import KINDS

pytestmark = pytest.mark.plain
needs_cuda_build = pytest.mark.skipif(
    not torch.backends.cuda.is_built() or TorchVersion(torch.__version__) < "2.13",
    reason="a torch built without CUDA, or whose fake CUDA tensors want a GPU",
)


# --- the real operators, on fake tensors


@needs_cuda_build
@pytest.mark.parametrize("mask", ["none", "causal", "bool b11s", "bool b1ts", "bool bhts", "bias 1hts", "upright"])
@pytest.mark.parametrize("g", [4, 2, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_arguments_fit_the_schemas(kind: str, g: int, mask: str) -> None:
    t, s = {"causal": (33, 33), "upright": (33, 50)}.get(mask, (33, 47))
    case = Case("none" if mask in ("causal", "upright") else mask, g=g, t=t, s=s, d=64, dtype=torch.bfloat16)
    if kind == "flash" and case.mask != "none":
        pytest.skip("flash takes no mask")
    inputs = inputs_of(case)
    kernel = cuda._KERNELS[KINDS[kind]]
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (torch.empty(inputs.tensors[name].shape, dtype=torch.bfloat16, device="cuda") for name in "qkv")
        given = inputs.options["mask"]
        if given is not None:
            given = torch.empty((1,) * (4 - given.ndim) + given.shape, dtype=given.dtype, device="cuda")
        p = kernel.prepare(q, k, v, given, 0.125, mask in ("causal", "upright"))
        out, lse, saved = kernel.forward(p)
        assert (out.shape, out.dtype) == (q.shape, q.dtype)
        assert (lse.shape, lse.dtype) == (q.shape[:3], torch.float32)
        grads = kernel.backward(out, p, out, lse, saved)
        assert [x.shape for x in grads] == [x.shape for x in (p.q, p.k, p.v)]
        if p.mask is not None:
            assert p.mask.shape == (2, 4, 33, s)
            assert all(step % 16 == 0 for step in p.mask.stride()[:-1]), "rows start where whole vectors can be loaded"


@needs_cuda_build
def test_auto_on_cuda() -> None:
    with FakeTensorMode():
        q, k, v = (torch.empty(2, n, 33, 64, dtype=torch.bfloat16, device="cuda") for n in (4, 2, 2))
        assert ops.resolve_backend(q, k, v) == ("cuda", "the first choice")
        for change, reason in [
            (lambda x: x.double(), "no fused kernel supports fp64"),
            (lambda x: x[..., :20], "head_dim should be a multiple of 8, found 20"),
            (lambda x: x[:0], "do not take an empty batch"),
        ]:
            odd = [change(x) for x in (q, k, v)]
            with pytest.raises(BackendUnavailableError, match=reason):
                ops.resolve_backend(*odd, backend="cuda")
        with pytest.raises(
            BackendUnavailableError, match="the kernels need values as wide as queries, found 32 and 64"
        ):
            ops.resolve_backend(q, k, v[..., :32], backend="cuda")


# --- the maths around them


@pytest.fixture
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_aten", SimpleNamespace(**stand_ins.aten()))


def _ops_of(kind: str) -> Any:
    """The ops of one kernel with the signatures of `mimic_core.ops`."""
    kernel = cuda._OPS[KINDS[kind].value]

    def attention_with_lse(q: Any, k: Any, v: Any, mask: Any = None, scale: Any = None, is_causal: bool = False) -> Any:
        return kernel.attention_with_lse(q, k, v, *ops._arguments(q, k, v, mask, scale, is_causal))

    def attention_lse(q: Any, k: Any, mask: Any = None, scale: Any = None, is_causal: bool = False) -> Any:
        return kernel.attention_lse(q, k, *ops._arguments(q, k, k, mask, scale, is_causal))

    def shifted_attention(
        q: Any, k: Any, v: Any, *shift: Any, mask: Any = None, scale: Any = None, is_causal: bool = False
    ) -> Any:
        return kernel.shifted_attention(q, k, v, *shift, *ops._arguments(q, k, v, mask, scale, is_causal))

    return SimpleNamespace(
        attention_with_lse=attention_with_lse, attention_lse=attention_lse, shifted_attention=shifted_attention
    )


SOME = [case for case in CASES + HALF_CASES if case.s < 100 and case.e is None]


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("op", ["attention", "attention_lse", "shifted"])
@pytest.mark.parametrize("case", SOME, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_around_a_kernel_is_the_oracle(kind: str, case: Case, op: str) -> None:
    masked = case.mask != "none" or (case.is_causal and (case.t > case.s or (case.scale or 1) < 0))
    if kind == "flash" and masked:
        pytest.skip("flash takes no mask")
    check(op, case, results(op, _ops_of(kind), attending_inputs(case)))


# --- the kernels themselves


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["attention", "shifted"])
@pytest.mark.parametrize("layout", ["contiguous", "projected"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", ["none", "causal", "bool b1ts empty", "bias bhts"])
@pytest.mark.parametrize("d", [64, 80, 128])
@pytest.mark.parametrize("kind", ["auto", *KINDS])
def test_on_a_gpu(kind: str, d: int, mask: str, dtype: torch.dtype, layout: str, op: str) -> None:
    if kind == "flash" and mask not in ("none", "causal"):
        pytest.skip("flash takes no mask")
    if kind in ("flash", "cudnn") and dtype == torch.float32:
        pytest.skip("half precision alone")
    causal = mask == "causal"
    case = Case("none" if causal else mask, g=2, t=70, s=70, d=d, is_causal=causal, dtype=dtype, layout=layout)
    check(op, case, on_gpu(op, ops if kind == "auto" else _ops_of(kind), case))


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["attention", "shifted"])
def test_a_plan_that_others_made_is_not_ours(op: str) -> None:
    """Gradients of plain attention came in another order of memory: cuDNN's plan for that would read ours wrongly."""
    case = Case(g=4, t=72, s=72, d=64, dtype=torch.bfloat16)
    q, k, v = (attending_inputs(case).tensors[name].detach().cuda().requires_grad_() for name in "qkv")
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = F.scaled_dot_product_attention(q, k, v)
        out.backward(torch.randn_like(out))
    check(op, case, on_gpu(op, _ops_of("cudnn"), case))
