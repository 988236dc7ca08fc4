"""Edits inside attention that calls torch's SDPA by itself: who else sees them, and where they can't be exact."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mimic_core as mc
from mimic_core.edits.call import SDPACall
from tests.support.plain_models import Block, CausalSelfAttention, NanoGPT, check_only_own_calls_are_edited

TORCHS = torch._C._nn.scaled_dot_product_attention
IDS = torch.arange(12).view(2, 6)


def made(block: Any = Block) -> Any:
    torch.manual_seed(0)
    return NanoGPT(block).eval().requires_grad_(False)


def random_mimic(model: nn.Module) -> mc.ShiftStack:
    generator = torch.Generator().manual_seed(3)
    shifts = mc.build_shifts(model, "mimic")
    with torch.no_grad():
        for p in shifts.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return shifts


def gradients(model: nn.Module, shifts: mc.ShiftStack) -> tuple[Tensor, list[Tensor]]:
    shifts.zero_grad()
    logits = model(IDS)[0]
    logits.square().mean().backward()
    return logits.detach(), [p.grad.clone() for p in shifts.parameters()]


def test_torchs_function_is_back_when_the_last_patch_is_gone() -> None:
    first, second = made(), made()
    handles = [mc.patch(model, random_mimic(model)) for model in (first, second, first)]
    for handle in handles:
        assert F.scaled_dot_product_attention is not TORCHS
        handle.remove()
    assert F.scaled_dot_product_attention is TORCHS
    handle = mc.patch(first, random_mimic(first))
    del first, handle
    twin = copy.deepcopy(second)
    mc.patch(twin, random_mimic(twin))
    del twin


def test_only_the_modules_own_calls_are_edited() -> None:
    q = torch.randn(2, 4, 6, 8)
    check_only_own_calls_are_edited(made(), made(), IDS, lambda: F.scaled_dot_product_attention(q, q, q))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_runs_the_edits_again(reentrant: bool) -> None:
    class Checkpointed(Block):
        on = False

        def forward(self, x: Tensor, past: Any) -> Tensor:
            run = super().forward
            return checkpoint(run, x, past, use_reentrant=reentrant) if self.on else run(x, past)

    model = made(Checkpointed)
    model.transformer["wte"].weight.requires_grad_(True)  # reentrant checkpointing needs an input with gradient
    shifts = random_mimic(model)
    with mc.patch(model, shifts):
        wanted = gradients(model, shifts)
        Checkpointed.on = True
        found = gradients(model, shifts)
    assert torch.equal(found[0], wanted[0])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(found[1], wanted[1], strict=True))
    assert all(grad.abs().max() > 0 for grad in wanted[1])


def block_of(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Block]:
    """A block whose attention is `attend`."""

    class SelfAttention(CausalSelfAttention):
        def forward(self, x: Tensor, past: Any) -> Tensor:
            q, k, v = self.c_attn(x).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
            return self.c_proj(attend(q, k, v).transpose(1, 2).flatten(2))

    def make() -> Block:
        block = Block()
        block.attn = SelfAttention()
        return block

    return make


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_a_checkpoint_inside_attention_is_refused() -> None:
    inside = made(block_of(lambda q, k, v: checkpoint(sdpa, q, k, v, use_reentrant=True)))
    inside.transformer["wte"].weight.requires_grad_(True)
    with mc.patch(inside, random_mimic(inside)):
        with pytest.raises(mc.UnsupportedModelError, match="SelfAttention can't be made: .* reentrant gradient check"):
            inside(IDS)
    assert torch.equal(inside(IDS)[0], made(block_of(sdpa))(IDS)[0])


@pytest.mark.parametrize("how", ["virtual_kv", "a hook"])
def test_the_gradient_goes_through_the_lse_that_an_edit_reads(how: str) -> None:
    keys, values = (torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))

    def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if how == "virtual_kv":
            k, v = (torch.cat([x.expand(2, -1, -1, -1), y], 2) for x, y in ((keys, k), (values, v)))
        s = k.shape[2]
        scores = (q @ k.mT * 8**-0.5).masked_fill(torch.ones(6, s).triu(1 + s - 6).bool(), -torch.inf)
        out = scores.softmax(-1) @ v
        return out if how == "virtual_kv" else out + scores.logsumexp(-1, keepdim=True).sigmoid()

    model, wanted = made(), made(block_of(by_hand)).requires_grad_()
    wanted.load_state_dict(model.state_dict())
    if how == "virtual_kv":
        shifts = mc.build_shifts(model, "virtual_kv", n=2).requires_grad_(False)
        for head in shifts:
            head.get_parameter("key").copy_(keys)
            head.get_parameter("value").copy_(values)
        handle = mc.patch(model, shifts)
    else:
        handle = mc.hook(model, "attn_heads", lambda value, at: value + at.lse.transpose(1, 2)[..., None].sigmoid())
    with handle:
        logits = model.requires_grad_()(IDS)[0]
        logits.square().mean().backward()
    expected = wanted(IDS)[0]
    expected.square().mean().backward()
    torch.testing.assert_close(logits, expected)
    for (name, p), q in zip(model.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_attention_that_is_called_twice_has_no_site() -> None:
    twice = made(block_of(lambda q, k, v: sdpa(q, k, v) - 0.5 * sdpa(k, q, v)))
    spec = mc.adapter_for(twice).spec(twice)
    assert {layer.sites for layer in spec.layers} == {("attn_out", "mlp_out", "layer_out", "layer_in", "mlp_hidden")}
    assert spec.layers[0].missing == "attn attends 2 times in a forward"
    sometimes: list[int] = []
    later = made(block_of(lambda q, k, v: sdpa(q, k, v) - sum(sdpa(k, q, v) for _ in sometimes)))
    with mc.patch(later, random_mimic(later)):
        sometimes.append(1)
        with pytest.raises(mc.UnsupportedModelError, match="is called several times in one forward of it"):
            later(IDS)


@pytest.mark.slow
def test_compiled_code_has_the_edits() -> None:
    model = made()
    shifts = random_mimic(model)
    compiled: Any = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = compiled(IDS)[0]
        with mc.patch(model, shifts):
            wanted = model(IDS)[0]
            assert not torch.equal(wanted, plain)
            # torch 2.6 can refuse it, depending on what was compiled before.
            may_fail = torch.__version__.startswith("2.6")
            with suppress(mc.PatchStateError) if may_fail else nullcontext():
                assert torch.allclose(compiled(IDS)[0], wanted, atol=1e-5)
        assert torch.equal(compiled(IDS)[0], plain)


class Holding(CausalSelfAttention):
    """Attention that has torch's SDPA in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.attend: Any = F.scaled_dot_product_attention
        self.more: dict[str, Any] = {"is_causal": True}

    def forward(self, x: Tensor, past: Any) -> Tensor:
        q, k, v = self.c_attn(x).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return self.c_proj(self.attend(q, k, v, **self.more).transpose(1, 2).flatten(2))


def holding(how: str) -> Any:
    def bound(q: Tensor, k: Tensor, v: Tensor, *, attend: Any = F.scaled_dot_product_attention) -> Tensor:
        return attend(q, k, v, is_causal=True)

    def make() -> Block:
        block = Block()
        block.attn = one = Holding()
        if how == "partial":
            one.attend, one.more = partial(one.attend, is_causal=True), {}
        elif how == "default":
            one.attend, one.more = bound, {}
        elif how == "closure":
            of_torch = one.attend
            one.attend, one.more = (lambda *qkv: of_torch(*qkv, is_causal=True)), {}
        return block

    return made(make)


@pytest.mark.usefixtures("no_shape_checks", "functions_made_in_functions_unchecked")
@pytest.mark.parametrize("how", ["attribute", "partial", "default", "closure"])
def test_sdpa_that_no_file_has_as_a_name(how: str) -> None:
    report = mc.testing.check_adapter(holding(how))
    report.raise_for_failures()
    assert report["MimIC"].verdict == report["key"].verdict == "passed"
    model, named = holding(how), made(block_of(sdpa))
    found, wanted = (gradients_of_patched(one) for one in (model, named))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert torch.equal(model(IDS)[0], named(IDS)[0])
    outs = []
    for one in (model, named):  # torch's kernel runs, and no edit twice
        with mc.hook(one, "value", lambda x, at: x + 1), mc.hook(one, "attn_heads", lambda x, at: 2 * x):
            outs.append(one(IDS)[0])
    assert torch.equal(*outs)
    assert not torch.equal(outs[0], model(IDS)[0])


def gradients_of_patched(model: Any) -> list[Tensor]:
    """With two stacks and a reader: something stands around the module for each."""
    first, second, seen = random_mimic(model), random_mimic(model), []
    with mc.patch(model, first), mc.patch(model, second), mc.hook(model, "lse", lambda x, at: seen.append(x)):
        model.extra = nn.Identity()  # it is looked at anew, through the edits
        assert set(mc.adapters.locate(model).own) == {0, 1, 2}
        seen.clear()
        logits, grads = gradients(model, first)
        return [logits, *grads, *seen]


def test_copies_and_pickles_are_patched_too() -> None:
    model = made()
    with mc.patch(model, random_mimic(model)):
        wanted = model(IDS)[0]
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert F.scaled_dot_product_attention is not TORCHS
    for one in copies:
        assert torch.equal(one(IDS)[0], wanted)
        for handle in mc.handles(one):
            handle.remove()
        assert torch.equal(one(IDS)[0], model(IDS)[0])
    assert F.scaled_dot_product_attention is TORCHS


def test_a_patched_model_is_located_as_before() -> None:
    """The forward that looks for sites runs through the edits, which are off."""
    model = made()
    with mc.patch(model, random_mimic(model)):
        model.extra = nn.Identity()  # what was found before does not hold any more
        assert set(mc.adapters.locate(model).own) == {0, 1, 2}


# --- what the kit says of a library that does it wrong


def without_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SDPACall, "_kernel_is_ours", lambda self: False)
    monkeypatch.setattr(SDPACall, "is_causal", False)


def before_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    init = SDPACall.__init__

    def wrong(self: SDPACall, original: Any, module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> None:
        init(self, original, module, query, *args, **kwargs)
        self.query = query.roll(1, -1)  # as if it was taken before a rotation
        base = self.base
        self.base = lambda module, q, *rest, **more: base(module, q.roll(-1, -1), *rest, **more)

    monkeypatch.setattr(SDPACall, "_kernel_is_ours", lambda self: False)
    monkeypatch.setattr(SDPACall, "__init__", wrong)


@pytest.mark.usefixtures("no_shape_checks", "functions_made_in_functions_unchecked")
@pytest.mark.parametrize(("wrong", "expected"), [(without_mask, {"lse", "MimIC"}), (before_scale, {"query", "MimIC"})])
def test_the_kit_sees_a_wrong_call(wrong: Any, expected: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(monkeypatch)
    failed = {row.law for row in mc.testing.check_adapter(made()).failures}
    assert failed >= expected


@pytest.mark.usefixtures("no_shape_checks", "functions_made_in_functions_unchecked")
def test_the_kit_sees_another_modules_call() -> None:
    class Shifted(mc.PathAdapter):
        layers, attention, mlp = "transformer.h", "attn", "mlp"

        def module(self, model: nn.Module, layer: int, site: Any) -> nn.Module:
            return super().module(model, (layer + 1) % 3 if site == "query" else layer, site)

    failed = {row.law for row in mc.testing.check_adapter(made(), adapter=Shifted).failures}
    assert {"own layer", "query"} <= failed
