"""A stack and a strength for each sample: as each sample alone, with every head and in every way to generate."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mimic_core as mc
from mimic_core.types import At
from tests.support.cases import BY_NAME, HEADS, Case, fresh_model, logits_of, model_of, random_shifts

LLAMA = BY_NAME["llama"]
NAMES = ["a", None, "b", "a"]


def four(case: Case) -> dict[str, Tensor]:
    """The two samples of a case twice, in another order."""
    return {name: torch.cat([x, x.flip(0)]) for name, x in case.inputs("left").items()}


def two_stacks(model: nn.Module, head: str, other: str | None = None) -> dict[str, mc.ShiftStack]:
    a, b = random_shifts(model, head), random_shifts(model, other or head)
    with torch.no_grad():
        for p in b.parameters():
            p.mul_(-1.5)
    return {"a": a, "b": b}


def alone(model: nn.Module, stacks: dict[str, mc.ShiftStack], inputs: dict[str, Tensor]) -> dict[Any, Tensor]:
    """The logits of the whole batch with one stack, and with none."""
    found = {None: logits_of(model, inputs)}
    for name, stack in stacks.items():
        with mc.patch(model, stack):
            found[name] = logits_of(model, inputs)
    return found


@pytest.mark.parametrize(
    ("name", "head", "other"),
    [
        *(("llama", head, None) for head in HEADS),
        ("llama", "mimic", "live"),
        ("llama", "mimic-and-mlp", "task-vector"),
        ("llama", "mimic-one-layer", "mimic"),
        ("llava", "mimic", "live-layer-out"),
        ("idefics", "mimic", "function-vector"),
        ("idefics2", "live", "mimic-shared"),
    ],
)
def test_each_sample_is_as_with_its_own_patch(name: str, head: str, other: str | None) -> None:
    case = BY_NAME[name]
    model, inputs = model_of(case), four(case)
    stacks = two_stacks(model, head, other)
    wanted = alone(model, stacks, inputs)
    assert (wanted["a"] - wanted["b"])[inputs["attention_mask"].bool()].abs().max() > 1e-2
    weights = torch.randn_like(wanted[None])

    def gradients() -> dict[str, Tensor]:
        found = {f"{s}.{n}": p.grad for s in stacks for n, p in stacks[s].named_parameters()}
        for stack in stacks.values():
            stack.zero_grad()
        return {key: torch.zeros(()) if grad is None else grad for key, grad in found.items()}

    (sum((wanted[name][i] * weights[i]).sum() for i, name in enumerate(NAMES) if name)).backward()
    of_each = gradients()
    with mc.patch(model, mc.StackSet(stacks)) as handle, handle.using(NAMES):
        found = logits_of(model, inputs)
    (found * weights).sum().backward()
    for i, stack in enumerate(NAMES):
        real = inputs["attention_mask"][i].bool()
        torch.testing.assert_close(found[i][real], wanted[stack][i][real], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found[1], wanted[None][1], atol=0, rtol=0)
    largest = max(x.abs().max() for x in of_each.values())
    for key, grad in gradients().items():
        torch.testing.assert_close(grad, of_each[key], atol=1e-5 * float(largest), rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 4},
    ],
    ids=str,
)
def test_generate(options: dict[str, Any]) -> None:
    model, inputs = model_of(LLAMA), {k: four(LLAMA)[k] for k in ("input_ids", "attention_mask")}
    stacks = two_stacks(model, "mimic", "task-vector")
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    rows = options.get("num_return_sequences", 1)
    wanted = {None: model.generate(**inputs, **options)}
    for name, stack in stacks.items():
        with mc.patch(model, stack):
            wanted[name] = model.generate(**inputs, **options)
    with mc.patch(model, mc.StackSet(stacks)) as handle, handle.using(NAMES):
        found = model.generate(**inputs, **options)
    for i, row in enumerate(found):
        want = wanted[NAMES[i // rows]][i]
        assert row.tolist()[: len(want)] == want.tolist()[: len(row)]
    assert len({tuple(x.flatten().tolist()) for x in wanted.values()}) == 3


def edited_sites(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for head in ("mimic", "live", "task-vector"):
        yield head, lambda head=head: mc.patch(model, random_shifts(model, head))
    for site in ("query", "key", "value", "attn_heads", "attn_out", "mlp_out", "layer_out"):
        yield site, lambda site=site: mc.hook(model, site, lambda value, at: value * 1.5 + 0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_strength(dtype: torch.dtype) -> None:
    """At 0 and 1 bit for bit, between them and beyond it goes on from there; the same for all, and for each sample."""
    model, inputs = model_of(LLAMA, dtype=dtype), LLAMA.inputs()
    bare = logits_of(model, inputs)
    for name, put in edited_sites(model):
        with put() as handle, torch.no_grad():
            full = logits_of(model, inputs)
            by = {}
            for strength in (0.0, 0.5, 1.0, 2.0):
                handle.strength = strength
                by[strength] = logits_of(model, inputs)
            handle.strength = torch.tensor(0.5)
            assert torch.equal(logits_of(model, inputs), by[0.5]), name
            handle.strength = 1.0
            for strength in (0.0, 0.5, 2.0):
                with handle.using(strength=[strength, 1.0]):
                    mixed = logits_of(model, inputs)
                with handle.using(strength=strength):
                    assert torch.equal(logits_of(model, inputs), by[strength]), name
                torch.testing.assert_close(mixed[0], by[strength][0], atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(mixed[1], full[1], atol=1e-5, rtol=1e-5)
        assert torch.equal(by[0.0], bare), name
        assert torch.equal(by[1.0], full), name
        assert not torch.equal(by[0.5], by[0.0]), name
        assert not torch.equal(by[2.0], by[1.0]), name


def test_strength_is_linear_in_the_edit() -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    shifts = random_shifts(model, "mimic")
    scaled = copy.deepcopy(shifts)
    with torch.no_grad():
        for head in scaled:
            head.vector.mul_(0.3)
    with mc.patch(model, scaled):
        wanted = logits_of(model, inputs)
    with mc.patch(model, shifts, strength=0.3) as handle:
        assert handle.strength == 0.3
        torch.testing.assert_close(logits_of(model, inputs), wanted, atol=1e-5, rtol=1e-5)


def test_strength_zero_of_an_edit_that_overflows() -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    bare = logits_of(model, inputs)
    shifts = random_shifts(model, "mimic")
    with torch.no_grad():
        for head in shifts:
            head.vector.fill_(torch.inf)
    with mc.patch(model, shifts, strength=0.0) as handle:
        assert torch.equal(logits_of(model, inputs), bare)
        with handle.using(strength=[0.0, 0.5]):
            found = logits_of(model, inputs)
    assert torch.equal(found[0], bare[0])
    assert found[1].isnan().any()


@pytest.mark.parametrize("at_first", [(0.4, 1.3), (0.0, 1.3)])
def test_a_strength_can_be_trained(at_first: tuple[float, float]) -> None:
    """Its gradient is that of a factor of the vectors."""
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    shifts = random_shifts(model, "mimic")
    strength = torch.tensor(at_first, requires_grad=True)
    with mc.patch(model, shifts) as handle, handle.using(strength=strength):
        (logits_of(model, inputs)[:, :8] ** 2).sum().backward()
    for i in range(2):
        scaled = copy.deepcopy(shifts)
        scaled.zero_grad()
        with torch.no_grad():
            for head in scaled:
                head.vector.mul_(strength[i])
        with mc.patch(model, scaled):
            (logits_of(model, inputs)[i, :8] ** 2).sum().backward()
        wanted = sum((head.vector.grad * full.vector).sum() for head, full in zip(scaled, shifts, strict=True))
        assert strength.grad is not None
        torch.testing.assert_close(strength.grad[i], wanted.detach(), atol=0, rtol=1e-4)


def test_stacks_come_and_go_while_the_set_is_in_the_model() -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    named = two_stacks(model, "mimic") | {"c": random_shifts(model, "live"), "d": random_shifts(model, "mimic", 0.9)}
    wanted = alone(model, named, inputs)
    stacks = mc.StackSet({"a": named["a"]})
    with mc.patch(model, stacks) as handle:
        with handle.using("a"):
            stacks["a"] = named["b"]
            torch.testing.assert_close(logits_of(model, inputs), wanted["a"], atol=1e-5, rtol=1e-4)
        with handle.using("a"):
            torch.testing.assert_close(logits_of(model, inputs), wanted["b"], atol=1e-5, rtol=1e-4)
        stacks["c"], stacks["d"] = named["c"], named["d"]
        for name in ("c", "d"):
            with handle.using(["a", name]):
                found = logits_of(model, inputs)
            torch.testing.assert_close(found[0], wanted["b"][0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found[1][:8], wanted[name][1][:8], atol=1e-5, rtol=1e-4)
        del stacks["a"]
        with pytest.raises(mc.UnknownNameError, match="no stack is called 'a'; the set has 'c', 'd'"):
            handle.using("a").__enter__()
        with handle.using(None):
            assert torch.equal(logits_of(model, inputs), wanted[None])
    assert torch.equal(logits_of(model, inputs), wanted[None])
    assert not mc.handles(model)


def test_a_stack_of_a_new_kind_waits_for_later_patches() -> None:
    model = model_of(LLAMA)
    stacks = mc.StackSet({"a": random_shifts(model, "mimic")})
    with mc.patch(model, stacks) as handle:
        with mc.patch(model, random_shifts(model, "live")):
            stacks["c"] = random_shifts(model, "live")
            with pytest.raises(mc.PatchStateError, match="the model has later patches"), handle.using("c"):
                pass
        with handle.disabled(), pytest.raises(mc.PatchStateError, match="`disabled` is open"), handle.using("c"):
            pass
        with handle.using("c"):
            logits_of(model, LLAMA.inputs())
        stacks["wide"] = stacks["c"]
        with pytest.raises(mc.ShapeError, match="does not fit stack"):
            stacks["other"] = mc.build_shifts(model_of(BY_NAME["qwen2"]))


class Recorded(mc.ShiftHead):
    """A head that knows nothing of samples, and counts how often it runs."""

    site = "mlp_out"
    ran = 0

    def __init__(self, config: mc.HeadConfig, layer: mc.LayerSpec) -> None:
        super().__init__(config, layer)
        self.factor = nn.Linear(1, 1)

    def forward(self, value: Tensor, at: At) -> Tensor:
        Recorded.ran += 1
        return self.factor(value[..., None])[..., 0]


def test_heads_that_know_nothing_of_samples_run_once_a_stack() -> None:
    mc.register_head("recorded")(Recorded)
    model, inputs = model_of(LLAMA), four(LLAMA)
    stacks = {name: mc.build_shifts(model, "recorded") for name in ("a", "b", "unused")}
    wanted = alone(model, stacks, inputs)
    Recorded.ran = 0
    with mc.patch(model, mc.StackSet(stacks)) as handle, handle.using(NAMES):
        found = logits_of(model, inputs)
    assert Recorded.ran == 2 * 3
    for i, name in enumerate(NAMES):
        torch.testing.assert_close(found[i], wanted[name][i], atol=1e-5, rtol=1e-5)


def test_threads_have_samples_of_their_own() -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    named = two_stacks(model, "mimic")
    with torch.no_grad():
        wanted = alone(model, named, inputs)
        wrong: list[str] = []
        with mc.patch(model, mc.StackSet(named)) as handle:

            def run(name: str) -> None:
                for _ in range(20):
                    with torch.no_grad(), handle.using(name):
                        if not torch.allclose(logits_of(model, inputs), wanted[name], atol=1e-5):
                            wrong.append(name)

            threads = [threading.Thread(target=run, args=(name,)) for name in ("a", "b", "a")]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert not wrong


@pytest.mark.usefixtures("no_shape_checks")
def test_what_is_refused() -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    stacks = mc.StackSet(two_stacks(model, "mimic"))
    with pytest.raises(mc.PatchStateError, match="already in this model"), mc.patch(model, stacks["a"]):
        mc.patch(model, stacks)
    with mc.patch(model, stacks) as handle:
        with pytest.raises(mc.PatchStateError, match="already in this model"):
            mc.patch(model.model, stacks["b"])
        with pytest.raises(mc.PatchStateError, match=r"with handle.using\('name'\)"):
            logits_of(model, inputs)
        with pytest.raises(mc.PatchStateError, match="needs a name, or None"), handle.using(strength=2.0):
            pass
        with pytest.raises(mc.UnknownNameError, match="no stack is called 'x'"), handle.using(["a", "x"]):
            pass
        with (
            pytest.raises(mc.ShapeError, match="3 strengths were given for 2"),
            handle.using(["a", "b"], strength=[1, 2, 3]),
        ):
            pass
        for names in (["a"], ["a", "b", None], ["a", "b", "a", None]):
            with pytest.raises(mc.ShapeError, match=f"got {len(names)} samples, but .* 2 rows"), handle.using(names):
                logits_of(model, inputs)
        # Outside `generate` nobody says that the rows of a sample stand side by side.
        with pytest.raises(mc.ShapeError, match="got 2 samples, but .* 4 rows"), handle.using(["a", "b"]):
            logits_of(model, four(LLAMA))
        # Beams of a sample change places, so a name for each row would not stay with its text.
        with pytest.raises(mc.ShapeError, match="got 4 samples, but .* 4 rows, 2 of each"), handle.using(NAMES):
            model.generate(input_ids=inputs["input_ids"], num_beams=2, max_new_tokens=2, do_sample=False)
        for strength in ("1", True, float("nan"), torch.tensor(1), torch.ones(2, 2), None):
            with pytest.raises(mc.ShapeError, match="a strength is a finite number"):
                handle.strength = strength
    with pytest.raises(mc.PatchStateError, match="was removed"), handle.using("a"):
        pass
    with mc.patch(model, stacks["a"]) as handle:
        with pytest.raises(mc.PatchStateError, match="names are for a patch with a StackSet"), handle.using("a"):
            pass
        with pytest.raises(mc.ShapeError, match="got 3 samples"), handle.using(strength=[1.0, 2.0, 3.0]):
            logits_of(model, inputs)
    for name in ("", "a.b", 3):
        with pytest.raises(mc.UnknownNameError, match="the name of a stack"):
            stacks[name] = stacks["a"]
    with pytest.raises(mc.WrongTypeError, match="a ShiftStack is needed"):
        mc.StackSet({"a": nn.Linear(2, 2)})


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("said", ["strength", "positions"])
def test_a_checkpoint_that_runs_a_layer_again_is_refused(said: str, reentrant: bool) -> None:
    """In the backward nobody knows what was said in the forward."""
    model = fresh_model(LLAMA).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    inputs = LLAMA.inputs()
    mask = torch.rand(2, 11) < 0.5
    for head in ("mimic", "live"):
        with mc.patch(model, random_shifts(model, head)) as handle:
            with handle.using(strength=[0.5, 2.0]) if said == "strength" else handle.at(positions=mask):
                with pytest.raises(mc.PatchStateError) if reentrant and said == "positions" else torch.enable_grad():
                    loss = model(**inputs, use_cache=False).logits.square().mean()
            if not (reentrant and said == "positions"):
                with pytest.raises(mc.PatchStateError, match="gradient checkpointing"):
                    loss.backward()


def test_names_and_a_copy() -> None:
    model = fresh_model(LLAMA)
    stacks = mc.StackSet({"forward": random_shifts(model, "mimic"), "type": random_shifts(model, "live")})
    assert list(stacks) == ["forward", "type"]
    assert len(stacks) == 2
    assert "type" in stacks
    assert len(list(stacks.parameters())) == sum(len(list(stacks[name].parameters())) for name in stacks)
    inputs = LLAMA.inputs()
    with mc.patch(model, stacks) as handle:
        twin = copy.deepcopy(model)
        with handle.using(["forward", "type"]):
            wanted = logits_of(model, inputs)
            with pytest.raises(mc.PatchStateError, match="which stack each sample gets"):
                logits_of(twin, inputs)
        (other,) = mc.handles(twin)
        with other.using(["forward", "type"]):
            assert torch.equal(logits_of(twin, inputs), wanted)
        other.remove()
    assert torch.equal(logits_of(twin, inputs), logits_of(model, inputs))


def test_samples_and_positions_are_said_together() -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    prompt = inputs["attention_mask"].bool() & (torch.arange(11) < 6)
    stacks = two_stacks(model, "task-vector", "mimic")
    chosen = torch.rand(2, 11, generator=torch.Generator().manual_seed(1)) < 0.5
    for said in ({"prompt": prompt}, {"positions": chosen}):
        wanted = {}
        for name, stack in stacks.items():
            with mc.patch(model, stack) as alone_handle, alone_handle.at(**said):
                wanted[name] = logits_of(model, inputs)
        with mc.patch(model, mc.StackSet(stacks)) as handle:
            with handle.at(**said), handle.using(["a", "b"]):
                found = logits_of(model, inputs)
            with handle.using(["a", "b"], strength=[1.0, 1.0]), handle.at(**said):
                again = logits_of(model, inputs)
        for i, name in enumerate(stacks):
            real = inputs["attention_mask"][i].bool()
            torch.testing.assert_close(found[i][real], wanted[name][i][real], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(again, found, atol=2e-5, rtol=1e-4)
