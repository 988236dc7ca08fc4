"""Choose the adapter of a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import nn

from ..errors import UnsupportedModelError, WrongTypeError
from ..types import AttentionAdapter, Located
from .base import ADAPTERS, class_of, dotted, name_of, unwrap
from .generic import GenericAdapter
from .parallel import in_processes
from .probe import may_attend_alone, probe_attention

Handed = AttentionAdapter | type[AttentionAdapter] | None
"""An adapter that the caller hands over: an object, or a class that is made without arguments."""

# Key of the adapter in the model's `__dict__`: a copy of the model must not get another one.
_HANDED_OVER = "_mimic_core_adapter"


def adapter_for(model: nn.Module, adapter: Handed = None) -> AttentionAdapter:
    """The adapter of a model. It is checked against the model.

    It is the one handed over here or in an earlier call for this model object; or the one registered for its class, or
    for its model type; or else the generic one, which runs the text decoder once on four tokens. The model may be
    inside PEFT, DistributedDataParallel and `torch.compile` wrappers.

    Args:
        adapter: An adapter, or a class of adapters. The model and its copies keep it, until another one is handed over.

    Raises:
        UnsupportedModelError: the model does not have the modules that its adapter expects, or the generic adapter
            finds no layers of a text decoder.
        WrongTypeError: `adapter` is no adapter.
    """
    return locate(model, adapter).adapter


def locate(model: nn.Module, adapter: Handed = None) -> Located:
    """Like `adapter_for`, with the model without wrappers and its spec."""
    inner = unwrap(model)
    if not isinstance(inner, nn.Module):
        raise UnsupportedModelError(f"a torch.nn.Module is needed, found {type(inner).__name__}")
    if class_of(inner) is nn.Module or isinstance(inner, nn.DataParallel):
        raise UnsupportedModelError(
            f"a {type(inner).__name__} is a wrapper that is not looked into: give the model inside"
        )
    if adapter is None:
        return in_processes(_with_own(_kept_or_registered(inner)))
    if isinstance(adapter, type):
        adapter = cast("type[AttentionAdapter]", adapter)()
    if not isinstance(adapter, AttentionAdapter):
        raise WrongTypeError(f"an adapter with spec, decoder and module is needed, found {type(adapter).__name__}")
    found = in_processes(_with_own(Located(inner, adapter, adapter.spec(inner))))
    inner.__dict__[_HANDED_OVER] = adapter
    return found


@contextmanager
def handed_over(model: nn.Module, adapter: Handed) -> Iterator[None]:
    """Inside the `with`, the model has this adapter. None: the one that it has anyway."""
    own = vars(unwrap(model)) if adapter is not None else {}
    before = own.get(_HANDED_OVER)
    try:
        if adapter is not None:
            own[_HANDED_OVER] = adapter() if isinstance(adapter, type) else adapter
        yield
    finally:
        own.pop(_HANDED_OVER, None)
        if before is not None:
            own[_HANDED_OVER] = before


def _kept_or_registered(model: nn.Module) -> Located:
    kept: AttentionAdapter | None = vars(model).get(_HANDED_OVER)
    known = {_defined(name): name for name in ADAPTERS}
    names = [known[name] for name in (*map(dotted, class_of(model).__mro__), name_of(model)) if name in known]
    if kept is not None or names:
        adapter = ADAPTERS.get(names[0])() if kept is None else kept
        return Located(model, adapter, adapter.spec(model))
    generic = GenericAdapter()
    try:
        return Located(model, generic, generic.spec(model))
    except UnsupportedModelError as error:
        name = name_of(model)
        of_class = "for_class=" if name == dotted(class_of(model)) else ""
        kind = "" if of_class else f"model type {name!r}, class "
        raise UnsupportedModelError(
            f"no adapter is registered for {kind}{dotted(class_of(model))}, and its sites can't be found: {error}. "
            f"Register one: @mimic_core.register_adapter({of_class}{name!r}) on a PathAdapter subclass with the paths "
            f"of its layers, attention and MLP. If it does not run on token ids alone, say what it runs on: "
            f"adapter=mimic_core.GenericAdapter(example=...)"
        ) from error


def _with_own(found: Located) -> Located:
    """Say which layers attend without the interface. Models that transformers says to ask it are taken to do so."""
    layers = [layer.index for layer in found.spec.layers if "attn_heads" in layer.sites]
    asks = getattr(found.model, "_supports_attention_backend", False) and not isinstance(found.adapter, GenericAdapter)
    if not layers or (asks and not may_attend_alone(found.model)):
        return found
    names = {module: name for name, module in found.model.named_modules()}
    places = {i: names[found.module(i, "attn_heads")] for i in layers}
    decoder, example = found.adapter.decoder(found.model), getattr(found.adapter, "example", None)
    try:
        seen = probe_attention(found.model, decoder, example, places.values())
    except UnsupportedModelError:  # an adapter may know what can't be run on text
        return found
    calls = {i: seen.attention.get(path, []) for i, path in places.items()}
    return found._replace(own={i: calls[i][0].own for i in layers if any(call.own for call in calls[i])})


def _defined(name: str) -> str:
    """The name that a class has where it is defined: `litgpt.GPT` is `litgpt.model.GPT`."""
    module, _, attribute = name.rpartition(".")
    found = getattr(sys.modules.get(module), attribute, None) if module else None
    return dotted(found) if isinstance(found, type) else name
