"""A patched model under torch.compile, torch.export and CUDA graphs: no graph break, no needless recompilation.

test_compile.py runs this file in a process of its own: the shape checks of the other tests are not code to compile.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import StaticCache

import mimic_core as mc
from tests.support.cases import CASES, Case, fresh_model, random_shifts
from tests.support.compilable import LLAMA, SHALLOW, Logits, in_onnxruntime, text


@pytest.fixture(autouse=True)
def _no_earlier_compilation() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def grads_of(model: Any, shifts: mc.ShiftStack, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    logits = model(**inputs, use_cache=False).logits
    return logits.detach(), *torch.autograd.grad(logits.square().mean(), list(shifts.parameters()))


@pytest.mark.parametrize(
    ("mask", "backend"),
    [("causal", "reference"), ("bool", "reference"), ("causal", "cpu"), ("bool", "cpu"), ("causal", "sdpa")],
)
def test_ops_are_one_graph(mask: str, backend: str) -> None:
    def run(*x: Tensor, mask: Tensor | None) -> Tensor:
        return mc.ops.shifted_attention(*x, mask=mask, is_causal=mask is None, backend=backend)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    # The chunks of the "sdpa" backend are as many as the sizes make them: each length is compiled, for 15 seconds.
    for t in (9,) if backend == "sdpa" else (6, 9, 13):
        shapes = [(2, 4, t, 8), (2, 2, t, 8), (2, 2, t, 8), (4, 8), (4, 8), (4,)]
        x = [torch.randn(shape, requires_grad=True) for shape in shapes]
        allowed = None if mask == "causal" else torch.rand(2, 1, t, t) < 0.7
        got, want = (f(*x, mask=allowed) for f in (compiled, run))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        for mine, exact in zip(*(torch.autograd.grad(y.square().sum(), x) for y in (got, want)), strict=True):
            torch.testing.assert_close(mine, exact, atol=1e-4, rtol=1e-4)
    assert counter.frame_count == 1 or backend == "sdpa"


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_norm_preserving_add_is_one_graph(backend: str) -> None:
    x, vector, scale = (torch.randn(shape, requires_grad=True) for shape in ((3, 5, 8), (8,), ()))
    compiled = torch.compile(mc.ops.norm_preserving_add, fullgraph=True, backend=backend)
    got, want = (f(x, vector, scale) for f in (compiled, mc.ops.norm_preserving_add))
    torch.testing.assert_close(got, want)
    for mine, exact in zip(*(torch.autograd.grad(y.sum(), (x, vector, scale)) for y in (got, want)), strict=True):
        torch.testing.assert_close(mine, exact)


def assert_one_graph_forward_and_backward(case: Case, attention: str, head: str, backend: str) -> None:
    model = fresh_model(case, attention)
    shifts = random_shifts(model, head)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with mc.patch(model, shifts):
        frames = []
        for length in (6, 9, 13):
            got, want = (grads_of(m, shifts, text(length)) for m in (compiled, model))
            for mine, exact in zip(got, want, strict=True):
                assert (mine - exact).abs().max() <= 1e-4 * exact.abs().max()
            frames.append(counter.frame_count)
    assert frames[0] == frames[-1], "no length is compiled anew"


@pytest.mark.usefixtures("compilable")
@pytest.mark.parametrize(
    ("case", "attention", "head"),
    [
        (SHALLOW, "sdpa", "live"),  # and "mimic" by inductor below
        pytest.param(SHALLOW, "eager", "mimic", marks=pytest.mark.exhaustive),
        pytest.param(SHALLOW, "sdpa", "mimic-shared", marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_one_graph_forward_and_backward(case: Case, attention: str, head: str) -> None:
    assert_one_graph_forward_and_backward(case, attention, head, "aot_eager")


@pytest.mark.usefixtures("compilable")
def test_inductor() -> None:
    assert_one_graph_forward_and_backward(LLAMA, "sdpa", "mimic", "inductor")


@pytest.mark.usefixtures("compilable")
@pytest.mark.parametrize("case", [c for c in CASES if c.name != "llama"], ids=str)
def test_every_adapters_decoder_compiles(case: Case) -> None:
    """The part that is patched: vision towers of transformers break graphs by themselves."""
    if case.name == "idefics":
        pytest.skip("its decoder wants the images' hidden states beside the text")
    model = fresh_model(case)
    decoder = mc.adapter_for(model).decoder(model)
    decoder.layers = decoder.layers[:1]  # they are alike, and each would be traced
    shifts = random_shifts(model, "mimic")
    compiled = torch.compile(decoder, fullgraph=True, backend="eager")
    embedded = {"inputs_embeds": torch.randn(2, 7, mc.adapter_for(model).spec(model).hidden_size)}
    with torch.no_grad():
        unpatched = decoder(**embedded, use_cache=False).last_hidden_state
    with mc.patch(model, shifts):
        got, want = (m(**embedded, use_cache=False).last_hidden_state for m in (compiled, decoder))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert (got - unpatched).abs().max() > 1e-3


@pytest.mark.usefixtures("compilable")
@pytest.mark.parametrize(
    ("case", "cache", "head"),
    [(SHALLOW, "dynamic", "mimic"), (SHALLOW, "static", "live")],
    ids=str,
)
def test_decoding_compiles_once(case: Case, cache: str, head: str) -> None:
    model = fresh_model(case)
    shifts = random_shifts(model, head)
    tokens = text(12, batch=1)["input_ids"]
    with torch.no_grad(), mc.patch(model, shifts):
        whole = model(input_ids=tokens).logits
        past = StaticCache(config=model.config, max_cache_len=16) if cache == "static" else None
        past = model(input_ids=tokens[:, :4], past_key_values=past, use_cache=True).past_key_values
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
        frames = []
        for i in range(4, 12):
            step = compiled(input_ids=tokens[:, i : i + 1], past_key_values=past, use_cache=True)
            torch.testing.assert_close(step.logits[:, 0], whole[:, i], atol=2e-5, rtol=1e-4)
            frames.append(counter.frame_count)
    # The first steps teach the compiler which sizes change.
    assert frames[2] == frames[-1], frames


@pytest.mark.usefixtures("compilable")
@pytest.mark.parametrize("head", ["mimic", "live", "mimic-shared"])
def test_export(head: str) -> None:
    """The exported graph is plain torch: it runs without this package's patch around it, and elsewhere."""
    model = fresh_model(LLAMA)
    ids = text(7)["input_ids"]
    with mc.patch(model, random_shifts(model, head)):
        wanted = model(input_ids=ids, use_cache=False).logits
        with torch.no_grad():
            exported = torch.export.export(Logits(model), (ids,), strict=False)
    for program in (exported, exported.run_decompositions()):
        torch.testing.assert_close(program.module()(ids), wanted, atol=1e-5, rtol=1e-5)
    calls = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert not [name for name in calls if "mimic" in name]


@pytest.mark.usefixtures("compilable")
@pytest.mark.parametrize("head", ["mimic", "live"])
def test_onnx(head: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = fresh_model(LLAMA)
    ids = text(7)["input_ids"]
    with mc.patch(model, random_shifts(model, head)), torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
        found = in_onnxruntime(model, ids, tmp_path)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("compilable")
def test_a_capture_of_compiled_code_holds_nothing() -> None:
    """It says so when it is read; it does not hold the tokens of another forward."""
    model = fresh_model(SHALLOW)
    compiled = torch.compile(model, backend="eager")
    with mc.capture(model, "mlp_out") as seen:
        compiled(**text(5), use_cache=False)
    with pytest.raises(mc.PatchStateError, match="code made by torch.compile is not captured"):
        seen["mlp_out"]


@pytest.mark.gpu
def test_cuda_graph_of_a_decode_step() -> None:
    model = fresh_model(LLAMA).cuda()
    shifts = random_shifts(model, "mimic").cuda()
    tokens = text(6, batch=1)["input_ids"].cuda()
    with torch.no_grad(), mc.patch(model, shifts):
        # Each has a cache of its own: a forward adds to it.
        pasts = [StaticCache(config=model.config, max_cache_len=16) for _ in range(2)]
        for past in pasts:
            model(input_ids=tokens, past_key_values=past)
        compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
        for at in range(6, 9):
            one = {"input_ids": torch.randint(3, 60, (1, 1), device="cuda")}
            one["position_ids"] = torch.tensor([[at]], device="cuda")
            both = zip((compiled, model), pasts, strict=True)
            got, want = (m(**one, past_key_values=past).logits.clone() for m, past in both)
            torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
