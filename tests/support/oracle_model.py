"""A second, slow way to shift a model, which shares no code with the library: the oracle of whole-model tests.

MimIC through an attention function of its own that transformers calls in place of "eager"; LIVE through forward hooks.
Everything is written from the formulae, in whatever precision the model has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "oracle_of_mimic_core_tests"


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    heads = query.shape[1]
    out, log_z2, log_z2_all = [], [], []
    for h in range(heads):
        kv = h * key.shape[1] // heads
        all_logits = torch.einsum("btd,bsd->bts", query[:, h], key[:, kv]) * scaling
        logits = all_logits if attention_mask is None else all_logits + attention_mask[:, 0]
        weights = torch.exp(logits - logits.max(-1, keepdim=True).values)
        weights = weights / weights.sum(-1, keepdim=True)
        out.append(weights @ value[:, kv])
        log_z2.append(torch.logsumexp(logits, -1))
        log_z2_all.append(torch.logsumexp(all_logits, -1))
    params = module.__dict__.get("oracle_params")
    if params is not None:
        if params["all_keys"]:
            log_z2 = log_z2_all
        shifted = _shift(out, query, log_z2, params)
        out = [_only(new, old, params["chosen"]) for new, old in zip(shifted, out, strict=True)]
    return torch.stack(out, dim=2), None


def _shift(out: list[Tensor], query: Tensor, log_z2: list[Tensor], p: dict[str, Any]) -> list[Tensor]:
    heads, width = len(out), out[0].shape[-1]
    vectors = p["vector"].reshape(heads, width)
    if "gate_weight" not in p:
        return [out[h] + vectors[h] for h in range(heads)]
    weight, bias = p["gate_weight"], p["gate_bias"]
    if p["shared"]:
        together = torch.cat([query[:, h] for h in range(heads)], dim=-1)
        log_z1 = together @ weight + bias
        mean = torch.stack(log_z2).mean(0)
        mu = torch.exp(log_z1) / (torch.exp(log_z1) + torch.exp(mean))
        return [out[h] + mu[..., None] * vectors[h] for h in range(heads)]
    shifted = []
    for h in range(heads):
        log_z1 = query[:, h] @ weight[h] + bias[h]
        mu = torch.exp(log_z1) / (torch.exp(log_z1) + torch.exp(log_z2[h]))
        shifted.append(out[h] + mu[..., None] * vectors[h])
    return shifted


def _keep_length(h: Tensor, move: Tensor) -> Tensor:
    moved = h + move
    return moved / moved.pow(2).sum(-1, keepdim=True).sqrt() * h.pow(2).sum(-1, keepdim=True).sqrt()


def _edit_output(function: Any) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (function(output[0]), *output[1:])
        return function(output)

    return hook


def _vector(h: Tensor, p: dict[str, Any]) -> Tensor:
    weight = p.get("weight")
    return h + p.get("factor", 1.0) * p["vector"] if weight is None else h + weight * (p["vector"] - h)


def _only(new: Tensor, old: Tensor, chosen: list[list[bool]] | None) -> Tensor:
    """The new states [b t c] at the chosen tokens, the old ones at the others."""
    if chosen is None:
        return new
    rows = [
        torch.stack([new[i, j] if chosen[i][j] else old[i, j] for j in range(old.shape[1])])
        for i in range(old.shape[0])
    ]
    return torch.stack(rows)


@contextmanager
def shifted(
    model: nn.Module, layers: nn.ModuleList, params: list[dict[str, Any] | None], chosen: list[list[bool]] | None = None
) -> Iterator[None]:
    """Inside, `model` runs with the shifts of `params`, one entry per layer (None: not shifted).

    An entry has "kind" ("mimic", "live", "vector" or "two outputs") and the tensors of that method. `chosen`: the
    tokens to shift, by sample; None shifts all.
    """
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    hooks: list[Any] = []

    def edit(module: nn.Module, function: Any) -> None:
        hooks.append(module.register_forward_hook(_edit_output(lambda h: _only(function(h), h, chosen))))

    for layer, p in zip(layers, params, strict=True):
        if p is None:
            continue
        outputs = {"mlp_out": layer.mlp, "attn_out": layer.self_attn, "layer_out": layer}
        if p["kind"] == "mimic":
            layer.self_attn.__dict__["oracle_params"] = p | {"chosen": chosen}
            if "mlp_vector" in p:
                edit(layer.mlp, lambda h, m=p["mlp_vector"]: _keep_length(h, m))
        elif p["kind"] == "two outputs":
            for place in ("attn", "mlp"):
                a, c = p.get(f"{place}_scales", (1.0, 1.0))
                edit(outputs[f"{place}_out"], lambda h, a=a, v=c * p[f"{place}_vector"]: a * h + v)
        elif p["kind"] == "vector":
            edit(outputs[p["site"]], lambda h, p=p: _vector(h, p))
        else:
            factor = torch.sigmoid(p["scale"]) if p["sigmoid"] else p["scale"]
            edit(outputs[p["site"]], lambda h, m=factor * p["vector"]: _keep_length(h, m))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers:
            layer.self_attn.__dict__.pop("oracle_params", None)
        model.set_attn_implementation(before)
