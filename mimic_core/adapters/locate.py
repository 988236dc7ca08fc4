"""Choose the adapter of a model."""

from __future__ import annotations

from torch import nn

from ..errors import UnsupportedModelError
from ..types import AttentionAdapter, Located
from .base import ADAPTERS, unwrap
from .generic import GenericAdapter
from .parallel import in_processes


def adapter_for(model: nn.Module) -> AttentionAdapter:
    """The adapter registered for the model's type, or else the generic one. It is checked against the model.

    The model may be inside PEFT, DistributedDataParallel and `torch.compile` wrappers. The generic adapter runs the
    text decoder once on four tokens.

    Raises:
        UnsupportedModelError: the model does not have the modules that its adapter expects, or the generic adapter
            finds no layers of a text decoder.
    """
    return locate(model).adapter


def locate(model: nn.Module) -> Located:
    """Like `adapter_for`, with the model without wrappers and its spec."""
    inner = unwrap(model)
    model_type = getattr(getattr(inner, "config", None), "model_type", None)
    if not isinstance(inner, nn.Module) or not isinstance(model_type, str):
        raise UnsupportedModelError(
            f"a transformers model with config.model_type is needed to choose an adapter, found {type(inner).__name__}"
        )
    if model_type in ADAPTERS:
        adapter = ADAPTERS.get(model_type)()
        return in_processes(Located(inner, adapter, adapter.spec(inner)))
    generic = GenericAdapter()
    try:
        spec = generic.spec(inner)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"no adapter is registered for model type {model_type!r} ({type(inner).__name__}), and its sites can't be "
            f"found: {error}. Register one: @mimic_core.register_adapter({model_type!r}) on a PathAdapter subclass "
            f"with the paths of its layers, attention and MLP"
        ) from error
    return in_processes(Located(inner, generic, spec))
