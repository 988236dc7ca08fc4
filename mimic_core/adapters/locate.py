"""Which adapter a model gets."""

from __future__ import annotations

from torch import nn

from ..errors import UnsupportedModelError
from ..types import AttentionAdapter, Located
from .base import ADAPTERS, unwrap
from .generic import GenericAdapter


def adapter_for(model: nn.Module) -> AttentionAdapter:
    """The adapter registered for the model's type, or else the generic one, checked against the model.

    PEFT, DistributedDataParallel and `torch.compile` wrappers are looked through. The generic adapter runs the text
    decoder once on four tokens.

    Raises:
        UnsupportedModelError: the model is not laid out as its adapter expects, or the generic adapter can't find the
            layers of a text decoder in it.
    """
    return locate(model).adapter


def locate(model: nn.Module) -> Located:
    """`adapter_for`, with the model and the spec that finding it took."""
    inner = unwrap(model)
    model_type = getattr(getattr(inner, "config", None), "model_type", None)
    if not isinstance(inner, nn.Module) or not isinstance(model_type, str):
        raise UnsupportedModelError(
            f"a transformers model with config.model_type is needed to choose an adapter, found {type(inner).__name__}"
        )
    if model_type in ADAPTERS:
        adapter = ADAPTERS.get(model_type)()
        return Located(inner, adapter, adapter.spec(inner))
    generic = GenericAdapter()
    try:
        return Located(inner, generic, generic.spec(inner))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"no adapter is registered for model type {model_type!r} ({type(inner).__name__}), and its sites can't be "
            f"found: {error}. Register one: @mimic_core.register_adapter({model_type!r}) on a PathAdapter subclass "
            f"with the paths of its layers, attention and MLP"
        ) from error
