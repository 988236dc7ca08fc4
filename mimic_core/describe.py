"""A table of the layers and sites of a model."""

from __future__ import annotations

from torch import nn

from .adapters import AttentionAdapter, Handed, locate, probe
from .errors import UnsupportedModelError
from .types import ATTENTION_SITES, SITES, LayerSpec, ModelSpec

_HEADER = ("layer", "path", "hidden", "heads", "kv", "head_dim", "sites", "in the logits")


def describe(model: nn.Module, *, adapter: Handed = None) -> None:
    """Print a table of a model's decoder layers: sizes, sites, what is in the attention logits, what is missing.

    To find what is in the logits, the text decoder runs once on four tokens.

    Args:
        adapter: See `adapter_for`.

    Raises:
        UnsupportedModelError: no adapter fits the model.
    """
    print(description(model, adapter))


def description(model: nn.Module, handed: Handed = None) -> str:
    """The text that `describe` prints."""
    inner, adapter, spec, *_ = locate(model, handed)
    try:
        logits, note = _logits(inner, adapter, spec), ""
    except UnsupportedModelError as error:
        logits, note = {}, f"\nwhat is in the logits is not known: {error}"
    loops = {layer.path for layer in spec.layers if layer.run}
    rows = [_HEADER, *(_row(layer, logits, layer.path in loops) for layer in spec.layers)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    missing = dict.fromkeys(f"{layer.path}: {layer.missing}" for layer in spec.layers if layer.missing)
    head = f"{type(inner).__name__} ({spec.model_type}), by {type(adapter).__name__}"
    return "\n".join([head, *lines, *missing]) + note


def _row(layer: LayerSpec, logits: dict[int, tuple[str, ...]], loops: bool) -> tuple[str, ...]:
    width = str(layer.head_dim)
    if layer.value_dim != layer.head_dim:
        width += f" (values {layer.value_dim})"
    lacking = [site for site in SITES if site not in layer.sites]
    sites = "all" if not lacking else ", ".join(layer.sites) or "none"
    if lacking and set(ATTENTION_SITES) <= set(layer.sites):
        sites = f"all but {', '.join(lacking)}"
    sizes = (layer.heads, layer.kv_heads) if layer.heads else ("", "")
    return (
        str(layer.index),
        f"{layer.path}, pass {layer.run}" if loops else layer.path,
        str(layer.hidden_size),
        *map(str, sizes),
        width if layer.heads else "",
        sites,
        ", ".join(logits.get(layer.index, ())),
    )


def _logits(model: nn.Module, adapter: AttentionAdapter, spec: ModelSpec) -> dict[int, tuple[str, ...]]:
    seen = probe(model, adapter.decoder(model), getattr(adapter, "example", None))
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for layer in spec.layers:
        if "attn_heads" in layer.sites:
            calls = seen.attention.get(names[adapter.module(model, layer.index, "attn_heads")], [])
            found[layer.index] = calls[0].logits if calls else ()
    return found
