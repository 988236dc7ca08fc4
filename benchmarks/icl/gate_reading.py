"""Read what a MimIC does to one prompt, and what real demonstrations do to it, for each attention head and token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

import mimic_core as mc
from mimic_core.demo.prompts import Prompt


@dataclass(frozen=True)
class Reading:
    """Of the tokens of one line (question and answer), for every layer.

    Attributes:
        share: The share of attention that demonstrations take, from 0 to 1. Of a MimIC it is the gate.
        size: The length of a layer's shift, all its attention heads together, over the length of the attention output
            that it is added to.
    """

    share: Float[Tensor, "l h t"]
    size: Float[Tensor, "l t"]


@torch.no_grad()
def of_shifts(model: nn.Module, shifts: mc.ShiftStack, inputs: dict[str, Tensor]) -> Reading:
    """What MimIC's heads do to a prompt: their gates, and the length of gate * vector.

    Args:
        shifts: A stack of MimIC with a gate for each attention head, one head in every layer.
        inputs: One prompt without padding. All its tokens are read, the first one too.
    """
    shares, sizes = [], []
    # A capture that is opened before the patch sees attention as it is before the shift is added.
    with (
        mc.capture(model, "attn_heads") as before,
        mc.patch(model, shifts),
        mc.capture(model, ["query", "lse"]) as seen,
    ):
        model(**inputs, use_cache=False)
    for layer in shifts.layers:
        vector, weight, bias = (shifts[layer].get_parameter(n) for n in ("vector", "gate_weight", "gate_bias"))
        log_z1 = (seen["query"][layer] * weight[:, None]).sum(-1) + bias[:, None]  # b h t
        gate = mc.ops.gate(log_z1, seen["lse"][layer])
        shares.append(gate[0])
        sizes.append(_relative(gate.transpose(1, 2)[..., None] * vector, before["attn_heads"][layer])[0])
    return Reading(torch.stack(shares), torch.stack(sizes))


@torch.no_grad()
def of_demonstrations(model: nn.Module, prompt: Prompt, inputs: dict[str, Tensor]) -> Reading:
    """What the demonstrations of a prompt do to the tokens of its last line.

    Attention over demonstrations and the own tokens is attention over the own tokens, plus a share of the difference
    (docs/math.md, section 1). The share and the length of what it adds are exact: nothing is learned here. The BOS
    token comes before the demonstrations, so its share is 0. It stands first, as in the line alone.

    Args:
        inputs: The prompt, without padding.
    """
    start = prompt.query_at
    shares, sizes = [], []

    def look(value: Tensor, at: mc.At) -> None:
        query = at.query[:, :, start:]
        t = query.shape[2]
        key, own_value = (torch.cat([x[:, :, :1], x[:, :, start:]], dim=2) for x in (at.key, at.value))
        sees = torch.ones(t, t + 1, dtype=torch.bool, device=query.device).tril(1)  # BOS, and the line so far
        own, lse = mc.ops.attention_with_lse(query, key, own_value, mask=sees, scale=at.scale)
        share = -torch.expm1(lse - at.lse[:, :, start:])
        shares.append(nn.functional.pad(share[0].clamp(min=0), (1, 0)))
        sizes.append(nn.functional.pad(_relative(value[:, start:] - own, own)[0], (1, 0)))

    with mc.hook(model, "attn_heads", look):
        model(**inputs, use_cache=False)
    return Reading(torch.stack(shares), torch.stack(sizes))


def _relative(shift: Float[Tensor, "b t h e"], out: Float[Tensor, "b t h e"]) -> Float[Tensor, "b t"]:
    return shift.flatten(2).norm(dim=-1) / out.flatten(2).norm(dim=-1)
