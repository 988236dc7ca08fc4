"""Which modules of a text decoder are its layers, and in which order they run."""

from __future__ import annotations

import re
from itertools import takewhile

from torch import nn

from ..errors import UnsupportedModelError
from .base import parts_of
from .probe import Probe

ATTENTION_CLASS = re.compile(r"(?<!Linear)(?<!Cross)Attention$")
_LISTS = ("layers", "h", "blocks", "block", "layer")
_Layers = nn.ModuleList | nn.Sequential


def layers_of(decoder: nn.Module, seen: Probe, names: dict[nn.Module, str]) -> list[tuple[str, nn.Module]]:
    """The decoder layers with their paths. All members of one list; if they run several times, also of others like it.

    Raises:
        UnsupportedModelError: there is no list of layers that run.
    """
    path, layers = _layer_list(decoder, seen, names)
    lists = {path: layers}
    if any(len(outputs_of(m, seen, names)) > 1 for m in layers):
        # A model that loops over two stacks (HRM).
        kinds = {type(m) for m in layers}
        like = ((names[m], m) for m in decoder.modules() if isinstance(m, _Layers) and m in names)
        lists = {
            where: found
            for where, found in like
            if found is layers or ({type(m) for m in found} == kinds and any(outputs_of(m, seen, names) for m in found))
        }
    found: dict[nn.Module, str] = {}
    for where, members in lists.items():
        for n, layer in enumerate(members):
            found.setdefault(layer, f"{where}.{n}")  # one that is there several times is one layer with several passes
    return [(where, layer) for layer, where in found.items()]


def outputs_of(layer: nn.Module, seen: Probe, names: dict[nn.Module, str]) -> list[tuple[int, ...] | None]:
    """The shape of a layer's output, for each time that it ran. A list of parts returns what the last of them does."""
    return next((found for m in reversed(parts_of(layer)) if (found := seen.outputs.get(names[m]))), [])


def starts(path: str, seen: Probe) -> list[int]:
    """At which places in the order of all calls of modules a layer begins."""
    return [place for place, name in enumerate(seen.begun) if name == path]


def runs_layers(paths: list[str], decoder: str, seen: Probe) -> str:
    """The nearest module above the layers that ran once. In an encoder-decoder this is not the whole model."""
    steps = zip(*(path.split(".")[:-1] for path in paths), strict=False)
    parts = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, steps)]
    above = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((path for path in above if len(seen.outputs.get(path, [])) == 1), decoder)


def _layer_list(decoder: nn.Module, seen: Probe, names: dict[nn.Module, str]) -> tuple[str, _Layers]:
    """The list with the most attention modules inside. Without attention, the list of which most members ran.

    Attention is seen at the interface. If nothing calls it, a list counts by its name, or as members of one class that
    have an attention module by its class.
    """
    best: tuple[tuple[int, ...], str, _Layers] | None = None
    for module in decoder.modules():
        if not isinstance(module, _Layers) or module not in names:
            continue
        if len(module) == 0 or any(m is None for m in module):  # one that some layers have, beside them
            continue
        like = len(module) if len({type(m) for m in module}) == 1 and _has_attention(module[0], names, seen) else 0
        if isinstance(module, nn.Sequential) and not like:
            continue
        path = names[module]
        inside = [name for name in seen.attention if name.startswith(f"{path}.") and "." in name[len(path) + 1 :]]
        attended = len(inside)
        # A vision tower may have as many layers as the decoder.
        of_tokens = sum(all(call.tokens == seen.tokens for call in seen.attention[name]) for name in inside)
        ran = sum(1 for member in module if any(names.get(m) in seen.outputs for m in parts_of(member)))
        named = path.rpartition(".")[2] in _LISTS
        key = (of_tokens, attended, int(named), like, ran, -path.count("."))
        if ran and (attended or named or like) and (best is None or key > best[0]):
            best = key, path, module
    if best is None:
        raise UnsupportedModelError(f"{type(decoder).__name__} has no list of layers that run")
    return best[1], best[2]


def _has_attention(layer: nn.Module, names: dict[nn.Module, str], seen: Probe) -> bool:
    inside = (m for m in layer.modules() if m is not layer and ATTENTION_CLASS.search(type(m).__name__))
    return any(names.get(m) in seen.outputs for m in inside)
