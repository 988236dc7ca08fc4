"""How a tensor-parallel model of transformers is split among processes: seen in one forward on four tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor, nn

from ..edits import Installation, SiteEdit
from ..errors import UnsupportedModelError
from ..parallel import Parallel
from ..types import ATTENTION_SITES, At, LayerSpec, Located, ModelSpec, Site
from .base import text_config
from .probe import Probe, probe, run_on_text, unedited

_STATES: tuple[Site, ...] = ("attn_out", "mlp_out", "layer_out", "layer_in")
_kept: WeakKeyDictionary[nn.Module, tuple[Probe, ModelSpec, Parallel]] = WeakKeyDictionary()


def in_processes(found: Located) -> Located:
    """The located model with whole head counts, and how it is split. Most models are not: they stay as they are.

    The first call for a split model runs it on four tokens, so all processes must call.

    Raises:
        UnsupportedModelError: the outputs of its layers are not whole in each process, or it is split in a way that
            transformers does not tell.
    """
    model: Any = found.model
    if not dist.is_available() or not dist.is_initialized():
        return found
    if (getattr(model, "_tp_size", None) or 1) == 1:
        _check_whole(model)
        return found
    seen = probe(model, found.adapter.decoder(model), getattr(found.adapter, "example", None))
    before, spec, parallel = _kept.get(model, (None, found.spec, None))
    if before is not seen:
        mesh = model._device_mesh["tp"] if model._device_mesh.ndim > 1 else model._device_mesh
        parallel = Parallel(mesh.get_group(), mesh.get_local_rank(), mesh.size())
        _check_replicated(found, parallel)
        spec, parallel = _split(found, seen, parallel)
        _kept[model] = seen, spec, parallel
    return found._replace(spec=spec, parallel=parallel)


def _check_whole(model: nn.Module) -> None:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    hooked = any(getattr(m, "_is_hooked", False) for m in model.modules())
    sharded = any(isinstance(p, DTensor) for p in model.parameters())
    if hooked or (sharded and not any(isinstance(m, FSDPModule) for m in model.modules())):
        raise UnsupportedModelError(
            f"{type(model).__name__} is split among processes, but has no tp_size: give the model that "
            f"from_pretrained(..., tp_plan=...) returned, not a part of it; no other way to split layers is known here"
        )


def _check_replicated(found: Located, parallel: Parallel) -> None:
    seen: list[tuple[str, list[int], float, float]] = []

    def read(value: Tensor, at: At) -> None:
        wide = value.double()
        seen.append((f"{at.site} of layer {at.layer}", list(value.shape), wide.sum().item(), wide.norm().item()))

    @contextmanager
    def reading() -> Iterator[None]:
        seen.clear()
        layers = found.spec.layers
        edits = [SiteEdit(one.index, site, read) for one in layers for site in _STATES if site in one.sites]
        reader = Installation(found, edits)
        try:
            yield
        finally:
            reader.remove()

    with unedited(found.model):
        run_on_text(found.model, found.adapter.decoder(found.model), reading)
    first, *others = parallel.gathered(seen)
    for other in others:
        for (where, shape, total, norm), (_, its_shape, its_total, its_norm) in zip(first, other, strict=True):
            # Rounding may differ between kinds of devices. Parts of a sum differ by much more.
            far = max(abs(total - its_total), abs(norm - its_norm)) > 1e-3 * norm
            if shape != its_shape or far:
                raise UnsupportedModelError(
                    f"the value at {where} differs between the processes of this tensor-parallel model, but must be "
                    f"whole in each: its plan splits tokens (sequence parallel), or does not add up what each process "
                    f"computes. Load it with another tp_plan, or without one"
                )


def _split(found: Located, seen: Probe, parallel: Parallel) -> tuple[ModelSpec, Parallel]:
    """The spec with the head counts of all processes, and the layers whose heads are split."""
    model: Any = found.model
    names = {module: name for name, module in model.named_modules()}
    layers, split, size = [], set(), parallel.size
    for layer in map(partial(_without_hidden, size=size), found.spec.layers):
        module = found.module(layer.index, "attn_heads") if "attn_heads" in layer.sites else None
        calls = [] if module is None else seen.attention.get(names[module], [])
        if not calls:
            layers.append(layer)
            continue
        own, own_kv = calls[0].heads, calls[0].kv_heads
        config = getattr(module, "config", None) or text_config(model)
        heads = getattr(config, "num_attention_heads", None)
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        if (heads, kv_heads) == (own, own_kv):
            layers.append(layer)
        elif (heads, kv_heads) == (own * size, own_kv * size):
            layers.append(replace(layer, heads=heads, kv_heads=kv_heads))
            split.add(layer.index)
        else:
            sites = tuple(site for site in layer.sites if site not in ATTENTION_SITES)
            why = (
                f"each of {size} processes has {own} attention and {own_kv} key/value heads, and the config "
                f"names {heads} and {kv_heads}, so it is not known which these are"
            )
            layers.append(replace(layer, sites=sites, missing="; ".join(filter(None, (layer.missing, why)))))
    return replace(found.spec, layers=tuple(layers)), replace(parallel, layers=frozenset(split))


def _without_hidden(layer: LayerSpec, size: int) -> LayerSpec:
    """Each process has a part of the MLP's hidden values, or all, which transformers does not tell."""
    if "mlp_hidden" not in layer.sites:
        return layer
    sites = tuple(site for site in layer.sites if site != "mlp_hidden")
    why = f"it is not known which of the MLP's hidden values each of {size} processes has"
    return replace(layer, sites=sites, mlp_width=0, missing="; ".join(filter(None, (layer.missing, why))))
