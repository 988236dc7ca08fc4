"""Virtual keys and Hyper-ICL in one attention call, against softmax attention written out: every gradient, in fp64."""

from __future__ import annotations

import pytest
import torch
from einops import einsum, rearrange, repeat
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import mimic_core as mc
from mimic_core.edits.call import AttentionCall, Plan
from mimic_core.edits.entry import Bystander, Entry, SiteEdit
from mimic_core.heads import HyperICLHead, VirtualKVHead
from tests.support.cases import CASES, logits_of, model_of

B, H, G, T, S, D, E = 2, 4, 2, 5, 7, 6, 3
SCALE = 0.7
LAYER = mc.LayerSpec(0, "", 8, H, G, D, E, ("query", "attn_heads"))
HEADS = [
    VirtualKVHead(mc.VirtualKVConfig(n=1), LAYER),
    VirtualKVHead(mc.VirtualKVConfig(n=3, rank=2, learn_weight=True), LAYER),
    HyperICLHead(mc.HyperICLConfig(rank=2), LAYER),
]


class Module(nn.Module):
    num_key_value_groups = H // G
    is_causal = False


def oracle(head: mc.ShiftHead, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """[b t h e]. A row that attends to nothing has some finite numbers."""
    p = {name: x.double() for name, x in head.state_dict(keep_vars=True).items()}
    q, k, v = q.double(), *(repeat(x.double(), "b g s d -> b (g n) s d", n=H // G) for x in (k, v))
    logits = einsum(q, k, "b h t d, b h s d -> b h t s") * SCALE
    keys, values, seen = k, v, mask.expand(B, H, T, S)
    if isinstance(head, HyperICLHead):
        centred = q - q.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        g = torch.sigmoid(einsum(normed, p["gate_weight"], "b h t d, h d -> b h t") + p["gate_bias"][:, None])
        left, right = (einsum(x, u, "b h t d, h d r -> b h t r") for x, u in ((q, p["u_q"]), (k, p["u_k"])))
        logits = logits + g[..., None] * (left @ right.mT) / 2**0.5
    else:
        mine = [p[name] if name in p else p[f"{name}_left"] @ p[f"{name}_right"] for name in ("key", "value")]
        keys, values = (torch.cat([x.expand(B, *x.shape), y], dim=2) for x, y in zip(mine, (k, v), strict=True))
        seen = torch.cat([torch.ones(B, H, T, mine[0].shape[1], dtype=torch.bool), seen], dim=-1)
    plain = logits.masked_fill(~mask, -1e4).softmax(-1) @ v
    if not isinstance(head, HyperICLHead):
        logits = einsum(q, keys, "b h t d, b h s d -> b h t s") * SCALE
        longer = logits.masked_fill(~seen, -1e4).softmax(-1) @ values
        plain = (1 - p["weight"]) * plain + p["weight"] * longer
    return rearrange(plain, "b h t e -> b t h e")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", HEADS, ids=lambda head: type(head).__name__)
def test_it_is_softmax_attention(head: mc.ShiftHead, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn(p.shape, generator=draw))
    shapes = ((B, H, T, D), (B, G, S, D), (B, G, S, E))
    q, k, v = (torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in shapes)
    mask = torch.rand(B, 1, T, S, generator=draw) > 0.4
    mask[0, :, 2] = False
    attends = mask.any(-1)[:, 0]
    leaves = [q, k, v, *head.parameters()]

    edit = SiteEdit(0, head.site, head.forward, needs_lse=head.needs_lse)
    call = AttentionCall(sdpa_attention_forward, "sdpa", Module(), q, k, v, mask, {"scaling": SCALE})
    whole, _ = call.run(Plan((Entry(edit, Bystander(), bit=1),)))
    assert whole.dtype == dtype
    if isinstance(head, VirtualKVHead):
        plain, _ = sdpa_attention_forward(Module(), q, k, v, mask, scaling=SCALE)
        assert torch.equal(whole[~attends], plain[~attends]), "a row that attends to nothing is left as it is"
    found, wanted = whole[attends], oracle(head, q, k, v, mask)[attends]
    weights = torch.randn(found.shape, generator=draw).to(dtype)
    grads = [torch.autograd.grad((x * weights).sum(), leaves) for x in (found, wanted)]
    near = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    for one, other in ((found, wanted), *zip(*grads, strict=True)):
        assert other.abs().max() > 0.01
        assert (one.double() - other.double()).abs().max() <= near * max(1, other.abs().max().item())


def test_what_a_new_stack_does() -> None:
    """Hyper-ICL nothing, virtual keys with weight 0 nothing; by default, these only make attention's output smaller."""
    llama = next(case for case in CASES if case.name == "llama")
    model, inputs = model_of(llama), llama.inputs()
    plain = logits_of(model, inputs)
    for config in (mc.HyperICLConfig(), mc.VirtualKVConfig(learn_weight=True, weight_init=0.0)):
        with mc.patch(model, shifts := mc.build_shifts(model, config)):
            logits = logits_of(model, inputs)
            assert torch.equal(logits, plain)
            logits.square().mean().backward()
        assert all(any(p.grad is not None and p.grad.any() for p in head.parameters()) for head in shifts)
    with mc.capture(model, "attn_heads", layers=[0]) as before, mc.patch(model, mc.build_shifts(model, "virtual_kv")):
        with mc.capture(model, ["attn_heads", "lse"], layers=[0]) as after:
            logits_of(model, inputs)
    ratio = (after["attn_heads"][0] / before.states[0])[inputs["attention_mask"].bool()]
    wanted = torch.sigmoid(after["lse"][0] - torch.tensor(8.0).log()).transpose(1, 2)[inputs["attention_mask"].bool()]
    torch.testing.assert_close(ratio, wanted[..., None].expand_as(ratio), atol=0.03, rtol=0)


def test_sizes_are_checked() -> None:
    for options in ({"n": 0}, {"rank": 0}):
        with pytest.raises(mc.ShapeError, match=r"n and rank should be 1 or more, or rank None; found n="):
            mc.VirtualKVConfig(**options)
    with pytest.raises(mc.ShapeError, match="rank should be 1 or more, found 0"):
        mc.HyperICLConfig(rank=0)
