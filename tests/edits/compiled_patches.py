"""Patches that come and go on models that torch.compile has seen: what runs, and what is compiled anew.

test_compile.py runs this file in a process of its own: the shape checks of the other tests are not code to compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig

import mimic_core as mc
from tests.support.cases import fresh_model, random_shifts
from tests.support.compilable import LLAMA, SHALLOW, text
from tests.support.looped import Looped

HEADS = ["mimic", "live", "mimic-shared", "mimic-and-mlp"]


@pytest.fixture(autouse=True)
def _no_earlier_compilation() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def each_layer(change: Callable[[Any], None]) -> Callable[[Any], None]:
    def all_of(model: Any) -> None:
        for layer in model.model.layers:
            change(layer)

    return all_of


def compiled_forward(of: Callable[[Any], Any]) -> Callable[[Any], None]:
    def replace(x: Any) -> None:
        of(x).forward = torch.compile(of(x).forward, backend="eager")

    return replace


# Every way to have a model, or a part of it, compiled before it is patched.
WAYS: dict[str, Callable[[Any], None]] = {
    "model.compile": lambda m: m.compile(backend="eager"),
    "model.forward": compiled_forward(lambda m: m),
    "decoder.compile": lambda m: m.model.compile(backend="eager"),
    "layer.compile": each_layer(lambda layer: layer.compile(backend="eager")),
    "layer.forward": each_layer(compiled_forward(lambda layer: layer)),
    "attention.compile": each_layer(lambda layer: layer.self_attn.compile(backend="eager")),
    "attention.forward": each_layer(compiled_forward(lambda layer: layer.self_attn)),
    "mlp.compile": each_layer(lambda layer: layer.mlp.compile(backend="eager")),
    "mlp.forward": each_layer(compiled_forward(lambda layer: layer.mlp)),
}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**text(5), use_cache=False).logits


# A head inside attention and one at an output, in every way; hooks at the other sites in one way of each part.
HEADS_TRIED = ("mimic", "live")
HOOKED = {
    way: [(site, j in (i, (i + 2) % 4)) for j, site in enumerate(("query", "attn_out", "mlp_out", "layer_out"))]
    for i, way in enumerate(("model.compile", "layer.forward", "attention.compile", "mlp.forward"))
}
# Where the whole of a layer is traced anew for each, and another way like it has both: one.
ONE_HEAD = {"model.forward": ("mimic",), "decoder.compile": ("live",), "layer.compile": ("mimic",)}
PATCHED = [
    *(
        pytest.param(way, (*ONE_HEAD.get(way, HEADS_TRIED), *(site for site, ci in HOOKED.get(way, ()) if ci)), id=way)
        for way in WAYS
    ),
    *(pytest.param(way, HEADS_TRIED, id=f"{way}, both", marks=pytest.mark.exhaustive) for way in ONE_HEAD),
    *(
        pytest.param(way, tuple(site for site, ci in sites if not ci), id=f"{way}, more", marks=pytest.mark.exhaustive)
        for way, sites in HOOKED.items()
    ),
]


@pytest.mark.parametrize(("way", "patches"), PATCHED)
def test_a_patch_is_there_and_gone_however_the_model_was_compiled(way: str, patches: tuple[str, ...]) -> None:
    """One patch after the other on one compiled model: its plain graph is made once."""
    model, twin = fresh_model(SHALLOW), fresh_model(SHALLOW)
    WAYS[way](model)
    plain = logits(model)
    for what in patches:
        if what in HEADS:
            shifts = random_shifts(model, what)
            handle, of_twin = mc.patch(model, shifts), mc.patch(twin, shifts)
        else:
            handle, of_twin = (mc.hook(m, what, lambda x, at: x.flip(-1)) for m in (model, twin))
        wanted = logits(twin)
        assert (wanted - plain).abs().max() > 1e-3, what
        assert_close(logits(model), wanted, what)
        with handle.disabled():
            assert_close(logits(model), plain, f"{what}, disabled")
        assert_close(logits(model), wanted, f"{what}, again")
        handle.remove()
        of_twin.remove()
        assert_close(logits(model), plain, f"{what}, removed")


def assert_close(found: Tensor, wanted: Tensor, what: str) -> None:
    torch.testing.assert_close(found, wanted, msg=lambda said: f"{what}: {said}")


def test_a_graph_that_begins_in_the_middle_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a graph break the rest of attention's forward is a graph that calls no attention module."""
    from transformers.models.llama import modeling_llama

    rotate = modeling_llama.apply_rotary_pos_emb

    def breaks(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        torch._dynamo.graph_break()
        return rotate(q, k, cos, sin)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", breaks)
    model, twin = fresh_model(SHALLOW), fresh_model(SHALLOW)
    WAYS["layer.compile"](model)
    plain = logits(model)
    assert graphs() > 2
    shifts = random_shifts(model, "mimic")
    with mc.patch(model, shifts), mc.patch(twin, shifts):
        torch.testing.assert_close(logits(model), logits(twin))
        assert (logits(model) - plain).abs().max() > 1e-3
    torch.testing.assert_close(logits(model), plain)


def test_a_graph_sees_other_modules_of_the_same_class() -> None:
    """torch.compile alone does not: the graph takes the weights of whatever stands there, with the edits of before."""
    model, other = fresh_model(LLAMA), fresh_model(LLAMA)
    model.compile(backend="eager")
    decoder, layers = model.model, model.model.layers
    with mc.patch(model, random_shifts(model, "live")):
        wanted, made = logits(model), graphs()
        model.model = other.model
        with pytest.raises(mc.PatchStateError, match="modules were replaced"):
            logits(model)
        model.model = decoder
        layers[0], layers[1] = layers[1], layers[0]
        with pytest.raises(mc.PatchStateError, match="modules were replaced"):
            logits(model)
        layers[0], layers[1] = layers[1], layers[0]
        assert torch.equal(logits(model), wanted)
        assert made == 1


def test_what_was_replaced_by_others_starts_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where somebody has put a forward into a module, as accelerate does, graphs ask for that one."""
    model, twin = fresh_model(SHALLOW), fresh_model(SHALLOW)
    for m in (model, twin):
        for layer in m.model.layers:
            forward = layer.mlp.forward
            layer.mlp.forward = lambda x, forward=forward: forward(x)
    model.compile(backend="eager")
    plain = logits(model)
    shifts = random_shifts(model, "live")
    with mc.patch(model, shifts), mc.patch(twin, shifts):
        torch.testing.assert_close(logits(model), logits(twin))
    torch.testing.assert_close(logits(model), plain)
    assert all(layer.mlp.forward is not None and "forward" in vars(layer.mlp) for layer in model.model.layers)


@pytest.mark.usefixtures("compilable")
@pytest.mark.parametrize(
    "head", [*HEADS[:2], *(pytest.param(head, marks=pytest.mark.exhaustive) for head in HEADS[2:])]
)
def test_only_the_patched_model_is_compiled_anew_and_once(head: str) -> None:
    model, other = fresh_model(SHALLOW), fresh_model(SHALLOW)
    for m in (model, other):
        m.compile(backend="eager", fullgraph=True)
        logits(m)
    before = graphs()
    stacks = [random_shifts(model, head) for _ in range(2)]
    for parameter in stacks[1].parameters():
        parameter.data.mul_(2)
    seen = []
    for shifts in stacks:
        with mc.patch(model, shifts):
            seen.append(logits(model))
            assert graphs() == before + 1, "another stack of the same form runs the same graph"
    assert (seen[0] - seen[1]).abs().max() > 1e-3
    logits(other)
    logits(model)
    assert graphs() == before + 1, "other models' graphs stay, and its own of before are there again"


@pytest.mark.usefixtures("compilable")
@pytest.mark.parametrize(
    ("g", "head"),
    [
        (4, "mimic"),
        (2, "live"),
        pytest.param(2, "mimic-shared", marks=pytest.mark.exhaustive),
        pytest.param(4, "mimic-and-mlp", marks=pytest.mark.exhaustive),
    ],
)
def test_generate_with_a_static_cache_compiles_once(g: int, head: str) -> None:
    """transformers compiles the decoding of a static cache itself: shifts on, off, and those of another stack."""
    model = fresh_model(SHALLOW if g == 2 else LLAMA)
    inputs = text(7) | {"attention_mask": torch.ones(2, 7, dtype=torch.long)}
    compile_config = CompileConfig(backend="aot_eager", fullgraph=True, dynamic=False, mode=None)
    compile_config._compile_all_devices = True

    def generated(tokens: int, **options: Any) -> Tensor:
        return model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **options)

    def compiled(tokens: int = 8) -> Tensor:
        return generated(tokens, cache_implementation="static", compile_config=compile_config)

    counts = []
    for _ in range(2):
        with mc.patch(model, random_shifts(model, head)) as handle:
            assert torch.equal(compiled(), generated(8))
            counts.append(graphs())
            with handle.disabled():
                assert torch.equal(compiled(), generated(8))
            counts.append(graphs())
            compiled()
            counts.append(graphs())
    assert counts == [1, 2, 2, 2, 2, 2], "with shifts and without, whatever the token and the stack"
    assert not counters["graph_break"]


@pytest.mark.usefixtures("compilable")
def test_a_strength_is_compiled_anew() -> None:
    model = fresh_model(SHALLOW)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for head in ("mimic", "live"):
        with torch.no_grad(), mc.patch(model, random_shifts(model, head)) as handle:
            for strength in (1.0, 0.5, torch.tensor(0.25), 0.0, 1.0):
                handle.strength = strength
                got, want = (m(**text(5), use_cache=False).logits for m in (compiled, model))
                torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
            with (
                handle.using(strength=[0.5, 2.0]),
                pytest.raises(Exception, match="not available inside torch.compile"),
            ):
                compiled(**text(5), use_cache=False)
    stacks = mc.StackSet({"a": random_shifts(model, "mimic")})
    with torch.no_grad(), mc.patch(model, stacks) as handle, handle.using("a"):
        with pytest.raises(Exception, match="not available inside torch.compile"):
            compiled(**text(5), use_cache=False)


@pytest.mark.parametrize("eager", [False, True])
def test_layers_that_run_several_times_run_uncompiled_with_their_edits(eager: bool) -> None:
    torch.manual_seed(0)
    model: Any = Looped(eager).eval().requires_grad_(False)
    ids = torch.arange(14).view(2, 7) % 11
    shifts = mc.build_shifts(model, ["mimic", "live"])
    with torch.no_grad():
        for p in shifts.parameters():
            p.copy_(torch.randn(p.shape))
    compiled = torch.compile(model, backend="aot_eager")
    plain = compiled(ids)
    outs = []
    with mc.patch(model, shifts):
        for run in (model, compiled):
            logits = run(ids)
            outs.append((logits, *torch.autograd.grad(logits.square().mean(), list(shifts.parameters()))))
        with pytest.raises(Exception, match="several times, and has edits there, which can't be exported|disable"):
            torch.export.export(model, (ids,), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
    assert (outs[0][0] - plain).abs().max() > 0.1
    torch.testing.assert_close(compiled(ids), plain, rtol=0, atol=0)
