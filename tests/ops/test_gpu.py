"""The ops in C++ on a GPU: every kernel of torch's around which they stand, streams and CUDA graphs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.nn.attention import sdpa_kernel

from mimic_core import ops
from mimic_core.ops import native
from mimic_core.ops.sequences import Sequences, sequences_lse
from tests.support import oracles
from tests.support.op_cases import Case, check, leaves_of, on_gpu
from tests.support.stand_ins import KINDS

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _its_kernels_are_there() -> None:
    x = torch.ones(1, 1, 1, 8, device="cuda")
    ops.attention_with_lse(x, x, x)
    assert native.serves(x.device), "the CUDA kernels were not compiled, or differ from the reference: see the log"


@pytest.mark.parametrize("op", ["attention", "attention_lse", "shifted"])
@pytest.mark.parametrize("layout", ["contiguous", "projected"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", ["none", "causal", "bool b1ts empty", "bias bhts"])
@pytest.mark.parametrize(("t", "g"), [(70, 2), (70, 4), (1, 2)])
@pytest.mark.parametrize("d", [64, 80, 128])
@pytest.mark.parametrize("kind", ["auto", *KINDS])
def test_the_oracle(kind: str, d: int, t: int, g: int, mask: str, dtype: torch.dtype, layout: str, op: str) -> None:
    if kind == "flash" and mask not in ("none", "causal"):
        pytest.skip("flash takes no mask")
    if kind in ("flash", "cudnn") and dtype == torch.float32:
        pytest.skip("half precision alone")
    causal = mask == "causal"
    s = t if causal else 70
    case = Case("none" if causal else mask, g=g, t=t, s=s, d=d, is_causal=causal, dtype=dtype, layout=layout)
    with nullcontext() if kind == "auto" else sdpa_kernel(KINDS[kind]):
        check(op, case, on_gpu(op, ops, case))


@pytest.mark.parametrize("width", [64, 576, 1024, 4096, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_preserving_add(dtype: torch.dtype, width: int) -> None:
    x, vector = torch.randn(3, 40, width).to(dtype), torch.randn(width)
    leaves = [x.cuda().requires_grad_(), vector.cuda().requires_grad_(), torch.tensor(0.3).cuda().requires_grad_()]
    exact = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    out, wanted = ops.norm_preserving_add(*leaves), oracles.norm_preserving_add(*exact)
    grad = torch.randn(out.shape).to(dtype)
    found = [out, *torch.autograd.grad(out, leaves, grad.cuda())]
    limit = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    for mine, right in zip(found, [wanted, *torch.autograd.grad(wanted, exact, grad.double())], strict=True):
        assert (mine.detach().cpu() - right).norm() <= limit * right.norm()


def _call() -> tuple[list[Any], list[Any]]:
    leaves = [x.detach().cuda() for x in leaves_of(Case(g=2, t=33, s=33, d=64, dtype=torch.bfloat16))]
    return leaves, [torch.randn(512, device="cuda"), torch.tensor(0.2, device="cuda")]


def test_on_another_stream() -> None:
    leaves, (vector, scale) = _call()
    wanted = ops.shifted_attention(*leaves, is_causal=True)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what follows on this stream alone has to wait for it
        moved = [x.clone() for x in leaves]
        found = ops.shifted_attention(*moved, is_causal=True)
        added = ops.norm_preserving_add(found.flatten(2).float()[..., :512], vector, scale)
    stream.synchronize()
    assert torch.equal(found, wanted)
    assert torch.equal(added, ops.norm_preserving_add(wanted.flatten(2).float()[..., :512], vector, scale))


def test_in_a_cuda_graph() -> None:
    """Captured once, replayed with other inputs: nothing waits for the GPU, and no number is kept from the capture."""
    leaves, _ = _call()
    ops.shifted_attention(*leaves, is_causal=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.shifted_attention(*leaves, is_causal=True)
    for _ in range(2):
        for x in leaves:
            x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(out, ops.shifted_attention(*leaves, is_causal=True))


def test_twice_is_the_same() -> None:
    case = Case(g=2, t=70, s=70, d=64, is_causal=True, dtype=torch.bfloat16)
    first, second = (on_gpu("shifted", ops, case) for _ in range(2))
    for part, again in zip(first, second, strict=True):
        assert all(torch.equal(x, again[name]) for name, x in part.items())


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("g", [4, 2])
def test_the_lse_of_sequences(g: int, is_causal: bool, window: int | None) -> None:
    """torch's flash kernel for sequences of several lengths, against chunks on a CPU; the last rows are of none."""
    starts_q, starts_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 9, 10, 40], [0, 20, 21, 60]))
    told = Sequences(starts_q, starts_k, 30, 39, is_causal, window)
    q, k = torch.randn(43, 4, 64).bfloat16(), torch.randn(60, g, 64).bfloat16()
    grad = torch.randn(4, 43)
    found = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float64)):
        leaves = [x.to(device, dtype).requires_grad_() for x in (q, k)]
        here = told._replace(starts_q=starts_q.to(device), starts_k=starts_k.to(device))
        lse = sequences_lse(*leaves, here, 0.125)
        seen = lse != -torch.inf
        grads = torch.autograd.grad(lse[seen], leaves, grad.to(device, lse.dtype)[seen])
        found.append([x.detach().double().cpu() for x in (lse.where(seen, 0.0), seen, *grads)])
    for mine, right in zip(*found, strict=True):
        assert (mine - right).norm() <= 2e-2 * right.norm()
