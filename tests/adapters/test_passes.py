"""Layers that run several times in a forward: each pass has a head of its own.

The oracle is the same model written without a loop: each pass is a layer, with a copy of the weights.
"""

from __future__ import annotations

import copy
import pickle
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mimic_core as mc
from mimic_core.testing import check_adapter
from tests.support.looped import PASSES, Block, Looped
from tests.zoo.tiny import tiny

pytestmark = pytest.mark.usefixtures("no_shape_checks", "functions_made_in_functions_unchecked")


def looped(eager: bool = False) -> Looped:
    torch.manual_seed(0)
    return Looped(eager).eval().requires_grad_(False)


def unrolled(model: Looped) -> Looped:
    plain = copy.deepcopy(model)
    plain.layers = nn.ModuleList([copy.deepcopy(layer) for _ in range(PASSES) for layer in model.layers])
    plain.passes = 1
    return plain


def filled(model: nn.Module, *heads: Any, seed: int = 1) -> mc.ShiftStack:
    shifts = mc.build_shifts(model, list(heads) or ["mimic", "live"])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in shifts.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return shifts


IDS = torch.arange(14).view(2, 7) % 11


def gradients(model: nn.Module, shifts: mc.ShiftStack) -> tuple[Tensor, list[Tensor]]:
    for p in shifts.parameters():
        p.grad = None
    with mc.patch(model, shifts):
        logits = model(IDS)
        logits.square().sum().backward()
    grads = [p.grad for p in shifts.parameters()]
    assert all(grad is not None and grad.any() for grad in grads)
    return logits.detach(), [grad for grad in grads if grad is not None]


@pytest.mark.parametrize("eager", [False, True])
def test_it_is_the_model_without_a_loop(eager: bool) -> None:
    model = looped(eager)
    plain = unrolled(model)
    spec = mc.build_shifts(model, "mimic").spec
    assert [(layer.path, layer.run) for layer in spec.layers] == [
        (f"layers.{n}", run) for run in range(PASSES) for n in range(2)
    ]
    found, ours = gradients(model, filled(model))
    wanted, theirs = gradients(plain, filled(plain))
    assert (wanted - plain(IDS)).abs().max() > 0.1
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["sdpa", "eager", pytest.param("dory", marks=pytest.mark.newest)])
def test_all_laws_hold(kind: str) -> None:
    if kind == "dory":
        case = tiny(kind, task="causal-lm")
        report = check_adapter(case.model, case.inputs(images=False, length=16))
        assert report["checkpointing"].verdict == "passed"
        assert "refused" in report["checkpointing reentrant"].detail
    else:
        report = check_adapter(looped(kind == "eager"), {"ids": IDS})
    report.raise_for_failures()
    sites = ("query", "key", "value", "attn_heads", "lse", "attn_out", "mlp_out", "layer_out", "layer_in", "mlp_hidden")
    laws = (*sites, "MimIC", "LIVE", "own layer", "shapes", "zero shift", "removal")
    assert [report[law].verdict for law in laws] == ["passed"] * len(laws)


def test_hook_and_capture_tell_passes_apart() -> None:
    model = looped()
    mc.adapter_for(model)  # this runs it, which hooks would see
    outputs: list[Tensor] = []
    handle = model.layers[1].register_forward_hook(lambda module, args, out: outputs.append(out))
    with mc.capture(model, ["layer_out", "query"]) as seen:
        model(IDS)
    handle.remove()
    assert list(seen["layer_out"]) == list(range(2 * PASSES))
    assert all(torch.equal(seen["layer_out"][2 * run + 1], outputs[run]) for run in range(PASSES))
    assert len({float(x.sum()) for x in seen["query"].values()}) == 2 * PASSES
    # One pass alone: those before it stay as they are, those after it do not.
    again: list[Tensor] = []
    handle = model.layers[1].register_forward_hook(lambda module, args, out: again.append(out))
    with mc.hook(model, "mlp_out", lambda value, at: value + 1, layers=[3]):
        model(IDS)
    handle.remove()
    assert [torch.equal(a, b) for a, b in zip(again, outputs, strict=True)] == [True, False, False]


def test_another_number_of_passes_is_an_error() -> None:
    model = looped()
    plain = model(IDS)
    for passes in (2, 4):
        with mc.patch(model, filled(model, "live")) as handle:
            model.passes = passes
            with pytest.raises(mc.PatchStateError, match=rf"layers.0 ran {passes} times in this forward, and 3 times"):
                model(IDS)
            with handle.disabled():
                model(IDS)
            model.passes = PASSES
            assert not torch.equal(model(IDS), plain)
        assert torch.equal(model(IDS), plain)


def test_each_thread_counts_its_own() -> None:
    model = looped()
    with mc.patch(model, filled(model)), torch.no_grad():
        wanted = [model((IDS + n) % 11) for n in range(3)]
        found: dict[int, list[Tensor]] = {n: [] for n in range(3)}

        def run(n: int) -> None:
            with torch.no_grad():
                found[n] += [model((IDS + n) % 11) for _ in range(8)]

        threads = [threading.Thread(target=run, args=(n,)) for n in range(3)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    assert all(len(outs) == 8 and all(torch.equal(x, wanted[n]) for x in outs) for n, outs in found.items())


@pytest.mark.parametrize("where", ["layers.0", "layers.0.mlp.up", "layers.1.mlp.up"])
def test_a_forward_inside_another_counts_its_own(where: str) -> None:
    """A hook runs the model on something else: after a layer, or in the middle of one, in its second pass."""
    model = looped()
    shifts = filled(model, "mimic", mc.LIVEConfig(site="layer_out"))
    with mc.patch(model, shifts), torch.no_grad():
        wanted = [model(IDS), model((IDS + 1) % 11)]
        inner: list[Tensor] = []
        times: list[int] = []

        def runs_it(module: nn.Module, args: Any, out: Any) -> None:
            times.append(1)
            if len(times) == 2:
                inner.append(model((IDS + 1) % 11))

        handle = model.get_submodule(where).register_forward_hook(runs_it)
        outer = model(IDS)
        handle.remove()
    assert torch.equal(outer, wanted[0])
    assert torch.equal(inner[0], wanted[1])


@pytest.mark.parametrize("sites", [("mimic",), ("live",), ("mimic", "live")])
def test_gradient_checkpointing(sites: tuple[str, ...]) -> None:
    model = looped()
    shifts = filled(model, *sites)
    wanted, gradient = gradients(model, shifts)
    model.reentrant = False
    found, again = gradients(model, shifts)
    assert torch.equal(found, wanted)
    assert all(torch.equal(a, b) for a, b in zip(again, gradient, strict=True))
    model.reentrant = True
    with pytest.raises(mc.PatchStateError, match="it is not known which pass this is.*'use_reentrant': False"):
        gradients(model, shifts)
    model.reentrant = None
    with mc.patch(model, shifts):  # all of the model is run again
        for p in shifts.parameters():
            p.grad = None
        logits: Any = checkpoint(model, IDS, use_reentrant=False)
        logits.square().sum().backward()
    assert all(
        p.grad is not None and torch.equal(p.grad, b) for p, b in zip(shifts.parameters(), gradient, strict=True)
    )


def test_a_tensor_that_began_two_passes_does_not_tell_them_apart() -> None:
    class Restarts(Looped):
        """Each pass of the first layer begins with the embeddings."""

        def forward(self, ids: Tensor) -> Tensor:
            x = start = self.embed(ids).requires_grad_()
            for _ in range(self.passes):
                x = x + self.checkpointed(self.layers[0], start)
                x = self.checkpointed(self.layers[1], x)
            return self.head(x)

    torch.manual_seed(0)
    model = Restarts().eval().requires_grad_(False)
    model.reentrant = False
    shifts = filled(model, "live")
    with torch.no_grad(), mc.patch(model, shifts):
        model(IDS)
    with mc.patch(model, shifts), pytest.raises(mc.PatchStateError, match="it is not known which pass this is"):
        model(IDS).sum().backward()


def test_passes_that_begin_with_one_tensor_and_get_others_too() -> None:
    """As in the loop of Inkling 2, whose later passes get messages of the earlier."""

    class Told(Block):
        def forward(self, x: Tensor, message: Tensor | None = None) -> Tensor:
            return super().forward(x if message is None else x + message)

    class Messages(Looped):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Told(False)])

        def forward(self, ids: Tensor) -> Tensor:
            start, told = self.embed(ids), ()
            for _ in range(self.passes):
                run: Any = self.layers[0] if self.reentrant is None else partial(checkpoint, self.layers[0])
                told = (run(start, *told, **({} if self.reentrant is None else {"use_reentrant": False})),)
            return self.head(*told)

    torch.manual_seed(0)
    model = Messages().eval().requires_grad_(False)
    shifts = filled(model)
    wanted, gradient = gradients(model, shifts)
    model.reentrant = False
    found, again = gradients(model, shifts)
    assert torch.equal(found, wanted)
    assert all(torch.equal(a, b) for a, b in zip(again, gradient, strict=True))


def test_copies_and_files(tmp_path: Path) -> None:
    model = looped()
    shifts = filled(model)
    with mc.patch(model, shifts):
        wanted = model(IDS)
        twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS), wanted)
    loaded = pickle.loads(pickle.dumps(twin))
    assert torch.equal(loaded(IDS), wanted)
    mc.save_shifts(shifts, tmp_path)
    with mc.patch(model, mc.load_shifts(tmp_path, model)):
        assert torch.equal(model(IDS), wanted)
    with pytest.raises(mc.MimicError, match="6 decoder layers"):
        mc.load_shifts(tmp_path, model, adapter=mc.GenericAdapter(share_passes=True))


def test_some_positions_samples_and_strength() -> None:
    """Against the model without a loop, whose layers have the same heads."""
    model = looped()
    plain = unrolled(model)
    outs = []
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[0, 3:] = mask[1, :2] = True
    for one in (model, plain):
        first, second = filled(one, "live"), filled(one, "live", seed=2)
        both = mc.StackSet({"a": first, "b": second})
        with torch.no_grad(), mc.patch(one, both) as handle:
            with handle.using(["a", "b"]), handle.at(positions=mask):
                outs.append(one(IDS))
        with torch.no_grad(), mc.patch(one, first, strength=0.5):
            outs.append(one(IDS))
    assert not torch.equal(outs[0], outs[1])
    torch.testing.assert_close(outs[0], outs[2], rtol=0, atol=1e-5)
    torch.testing.assert_close(outs[1], outs[3], rtol=0, atol=1e-5)


def test_one_stack_for_all_passes_or_one_each(capsys: pytest.CaptureFixture[str]) -> None:
    """Two adapters of the same model do not disturb each other."""
    model = looped()
    shared = mc.GenericAdapter(share_passes=True)
    one = mc.build_shifts(model, "live", adapter=shared)
    assert one.layers == (0, 1)
    capture = mc.capture(model, "layer_out", adapter=mc.GenericAdapter())
    mc.describe(model, adapter=shared)
    assert ", pass" not in capsys.readouterr().out
    with capture as seen:
        model(IDS)
    assert len(seen["layer_out"]) == 2 * PASSES
    mc.describe(model, adapter=mc.GenericAdapter())
    assert "layers.1, pass 2" in capsys.readouterr().out
    with mc.capture(model, "layer_out", adapter=shared), pytest.raises(mc.PatchStateError, match="already holds"):
        model(IDS)


def test_a_bias_for_each_pass_is_not_merged() -> None:
    model = looped()
    with pytest.raises(mc.UnsupportedModelError):
        mc.merge(model, filled(model, "mlp_bias").parts[0])
