"""A second, slow way to shift a model, which shares no code with the library: the oracle of whole-model tests.

MimIC, virtual keys and Hyper-ICL through an attention function of its own that transformers calls in place of "eager";
LIVE through forward hooks.
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
    params = module.__dict__.get("oracle_params")
    if params is not None and params["kind"] == "ia3":
        key, value, params = key * params["key_scale"][:, None], value * params["value_scale"][:, None], None
    out, log_z2, log_z2_all = _attended(query, key, value, attention_mask, scaling, None)
    if params is not None:
        if params["kind"] == "mimic":
            shifted = _shift(out, query, log_z2_all if params["all_keys"] else log_z2, params)
        elif params["kind"] == "mtv":
            shifted = [x + w * (v - x) for x, w, v in zip(out, params["weight"], params["vector"], strict=True)]
        else:
            shifted, _, _ = _attended(query, key, value, attention_mask, scaling, params)
            weight = params.get("weight", 1.0)
            shifted = [(1 - weight) * old + weight * new for new, old in zip(shifted, out, strict=True)]
        out = [_only(new, old, params["chosen"]) for new, old in zip(shifted, out, strict=True)]
    return torch.stack(out, dim=2), None


def _attended(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, p: dict[str, Any] | None
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Attention of each head and the LSEs. Virtual keys stand before the others; Hyper-ICL's term is in the logits."""
    heads = query.shape[1]
    out, log_z2, log_z2_all = [], [], []
    for h in range(heads):
        kv = h * key.shape[1] // heads
        all_logits = torch.einsum("btd,bsd->bts", query[:, h], key[:, kv]) * scaling
        values = value[:, kv]
        if p is not None and p["kind"] == "hyper_icl":
            all_logits = all_logits + _bilinear(query[:, h], key[:, kv], h, p)
        logits = all_logits if attention_mask is None else all_logits + attention_mask[:, 0]
        if p is not None and p["kind"] == "virtual_kv":
            of_head = {name: x[h] for name, x in p.items() if isinstance(x, Tensor) and x.ndim == 3}
            if "key" not in of_head:
                of_head = {name: of_head[f"{name}_left"] @ of_head[f"{name}_right"] for name in ("key", "value")}
            logits = torch.cat([query[:, h] @ of_head["key"].T * scaling, logits], dim=-1)
            values = torch.cat([of_head["value"].expand(len(values), -1, -1), values], dim=1)
        weights = torch.exp(logits - logits.max(-1, keepdim=True).values)
        weights = weights / weights.sum(-1, keepdim=True)
        out.append(weights @ values)
        log_z2.append(torch.logsumexp(logits, -1))
        log_z2_all.append(torch.logsumexp(all_logits, -1))
    return out, log_z2, log_z2_all


def _bilinear(query: Tensor, key: Tensor, h: int, p: dict[str, Any]) -> Tensor:
    centred = query - query.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    g = 1 / (1 + torch.exp(-(normed @ p["gate_weight"][h] + p["gate_bias"][h])))
    rank = p["u_q"].shape[-1]
    return g[..., None] * torch.einsum("btr,bsr->bts", query @ p["u_q"][h], key @ p["u_k"][h]) / rank**0.5


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


def _reft(h: Tensor, p: dict[str, Any]) -> Tensor:
    rows: list[Tensor] = []
    for row in p["rotation"]:
        for other in rows:
            row = row - (row @ other) * other
        rows.append(row / row.pow(2).sum().sqrt())
    r = torch.stack(rows)
    return h + (h @ p["weight"].T + p["bias"] - h @ r.T) @ r


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
    model: nn.Module, layers: nn.ModuleList, params: list[list[dict[str, Any]]], chosen: list[list[bool]] | None = None
) -> Iterator[None]:
    """Inside, `model` runs with the shifts of `params`, a list of entries for each layer.

    An entry has "kind" ("mimic", "virtual_kv", "hyper_icl", "mtv", "ia3", "loreft", "live", "vector" or "two outputs")
    and the tensors of that method. `chosen`: the tokens to shift, by sample; None shifts all.
    """
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    hooks: list[Any] = []

    def edit(module: nn.Module, function: Any) -> None:
        hooks.append(module.register_forward_hook(_edit_output(lambda h: _only(function(h), h, chosen))))

    for layer, p in ((layer, p) for layer, entries in zip(layers, params, strict=True) for p in entries):
        outputs = {"mlp_out": layer.mlp, "attn_out": layer.self_attn, "layer_out": layer}
        if p["kind"] == "loreft":
            edit(layer, lambda h, p=p: _reft(h, p))
        elif p["kind"] in ("mimic", "virtual_kv", "hyper_icl", "mtv", "ia3"):
            if "mlp_scale" in p:
                scale = p["mlp_scale"]
                hooks.append(layer.mlp.down_proj.register_forward_pre_hook(lambda m, args, s=scale: (args[0] * s,)))
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
