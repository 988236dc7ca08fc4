"""A patched decoder that calls torch's SDPA by itself, under torch.compile: no graph break, and the edits are in it.

test_compile.py runs this file in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import mimic_core as mc
from tests.support import named_sdpa
from tests.support.plain_models import Block, Cache, CausalSelfAttention, NanoGPT

IDS = torch.arange(12).view(2, 6)
HEADS = {"mimic": {}, "live": {}, "virtual_kv": {"n": 2}, "hyper_icl": {}, "ia3": {}, "mtv": {"positions": "all"}}


@pytest.fixture(autouse=True)
def _no_earlier_compilation() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def made(block: Any = Block) -> Any:
    torch.manual_seed(0)
    return NanoGPT(block).eval().requires_grad_(False)


def block_calling(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Any:
    """A block whose attention is `attend`, of [b h t d]."""

    class Attention(CausalSelfAttention):
        def forward(self, x: Tensor, past: Cache | None) -> Tensor:
            q, k, v = self.c_attn(x).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
            return self.c_proj(attend(q, k, v).transpose(1, 2).flatten(2))

    class Own(Block):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention()

    return Own


def calling(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Any:
    return made(block_calling(attend))


def from_a_default(q: Tensor, k: Tensor, v: Tensor, attend: Any = F.scaled_dot_product_attention) -> Tensor:
    return attend(q, k, v, is_causal=True)


def shifts_of(model: Any, head: str = "mimic") -> mc.ShiftStack:
    shifts = mc.build_shifts(model, head, **HEADS[head])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in shifts.parameters():
            p.copy_(torch.rand(p.shape, generator=generator))
    return shifts


def outcome(run: Any, shifts: mc.ShiftStack, ids: Tensor) -> tuple[Tensor, ...]:
    logits = run(ids)[0]
    return logits.detach(), *torch.autograd.grad(logits.square().mean(), list(shifts.parameters()))


def same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "block", [Block, named_sdpa.NamedBlock, block_calling(from_a_default)], ids=["torchs", "of its file", "no name"]
)
def test_one_graph_with_the_edits(head: str, block: Any) -> None:
    model = made(block)
    shifts = shifts_of(model, head)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    plain = compiled(IDS)[0]
    with mc.patch(model, shifts) as handle:
        assert not torch.equal(model(IDS)[0], plain)
        for _ in range(2):
            same(outcome(compiled, shifts, IDS), outcome(model, shifts, IDS))
        before = counter.frame_count
        with handle.disabled():
            torch.testing.assert_close(compiled(IDS)[0], plain)
        same(outcome(compiled, shifts, IDS), outcome(model, shifts, IDS))
        assert counter.frame_count <= before + 1, "only the model without edits is compiled anew"
    torch.testing.assert_close(compiled(IDS)[0], plain)


def broken_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def broken_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch._dynamo.graph_break()
    return out


@torch.compiler.disable
def disabled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def inner(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return _inner(q, k, v)


def _inner(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("attend", [broken_before, broken_after, disabled, inner])
def test_a_graph_that_breaks_inside_the_attention(attend: Any) -> None:
    """Also if it had been compiled before the patch."""
    model = calling(attend)
    compiled = torch.compile(model, backend="eager")
    plain = compiled(IDS)[0]
    shifts = shifts_of(model)
    with mc.patch(model, shifts):
        assert not torch.equal(model(IDS)[0], plain)
        for _ in range(3):
            same(outcome(compiled, shifts, IDS), outcome(model, shifts, IDS))
    assert torch.equal(compiled(IDS)[0], plain)


@pytest.mark.parametrize("part", ["attn", "block"])
def test_a_part_that_is_compiled_by_itself(part: str) -> None:
    """And has been run before the patch: what was compiled then knows nothing of it."""
    model = calling(_inner)
    plain = model(IDS)[0]
    for block in model.transformer["h"]:
        (block if part == "block" else block.attn).compile(backend="eager")
    torch.testing.assert_close(model(IDS)[0], plain)
    shifts, alone = shifts_of(model), calling(_inner)
    with mc.patch(alone, shifts):
        wanted = outcome(alone, shifts, IDS)
    with mc.patch(model, shifts):
        same(outcome(model, shifts, IDS), wanted)
    torch.testing.assert_close(model(IDS)[0], plain)


def test_a_compiled_function_is_refused() -> None:
    """Its graph calls torch's function itself."""
    model = calling(torch.compile(_inner, backend="eager"))
    model(IDS)
    with mc.patch(model, shifts_of(model)), pytest.raises(mc.PatchStateError, match="attends another way"):
        model(IDS)


def test_a_call_that_cannot_be_edited_is_refused() -> None:
    twice: list[int] = []
    model = calling(lambda q, k, v: _inner(q, k, v) + sum(_inner(q, k, v) for _ in twice))
    compiled = torch.compile(model, backend="eager")
    with mc.patch(model, shifts_of(model)):
        torch.testing.assert_close(compiled(IDS)[0], model(IDS)[0])
        twice.append(1)
        with pytest.raises((mc.UnsupportedModelError, mc.PatchStateError), match="several times|2 times"):
            compiled(IDS)


def test_multi_head_attention_of_torch_runs_uncompiled() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: Tensor, past: Cache | None) -> Tensor:
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            return self.inner(x, x, x, attn_mask=mask)[0]

    class Own(Block):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention()

    model = made(Own)
    compiled = torch.compile(model, backend="eager")
    plain = compiled(IDS)[0]
    shifts = shifts_of(model)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with mc.patch(model, shifts):
            same(outcome(compiled, shifts, IDS), outcome(model, shifts, IDS))
            assert not torch.allclose(compiled(IDS)[0], plain)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def test_litgpt_is_one_graph() -> None:
    """Grouped heads, RoPE, RMSNorm: its code as it is."""
    pytest.importorskip("litgpt")
    from litgpt.config import Config
    from litgpt.model import GPT

    sizes = {"n_layer": 2, "n_head": 4, "n_query_groups": 2, "n_embd": 32, "head_size": 8, "padded_vocab_size": 64}
    kinds = {"norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "intermediate_size": 64, "bias": False}
    torch.manual_seed(0)
    model = GPT(Config(block_size=32, rotary_percentage=1.0, **sizes, **kinds)).eval().requires_grad_(False)
    shifts = shifts_of(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    plain = compiled(IDS)
    with mc.patch(model, shifts):
        found, wanted = (outcome(lambda ids, run=run: (run(ids),), shifts, IDS) for run in (compiled, model))
        same(found, wanted)
        assert not torch.allclose(found[0], plain)
    assert torch.equal(compiled(IDS), plain)


def test_export() -> None:
    """The exported program is plain torch. It has the edits, and runs after the patch is gone."""

    class Logits(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids)[0]

    model = made()
    with torch.no_grad(), mc.patch(model, shifts_of(model)):
        wanted = model(IDS)[0]
        exported = torch.export.export(Logits(model), (IDS,), strict=False)
    torch.testing.assert_close(exported.module()(IDS), wanted)
    calls = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert not [name for name in calls if "mimic" in name]
    assert not torch.allclose(model(IDS)[0], wanted)
