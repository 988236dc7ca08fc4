"""Adapters: they say where the sites of a model are."""

from ..types import AttentionAdapter
from .base import PathAdapter, register_adapter, unwrap
from .generic import GenericAdapter
from .locate import Handed, adapter_for, handed_over, locate
from .named import Idefics2Adapter, IdeficsAdapter, LlamaAdapter, LlavaAdapter
from .probe import probe

__all__ = [
    "AttentionAdapter",
    "GenericAdapter",
    "Handed",
    "Idefics2Adapter",
    "IdeficsAdapter",
    "LlamaAdapter",
    "LlavaAdapter",
    "PathAdapter",
    "adapter_for",
    "handed_over",
    "locate",
    "probe",
    "register_adapter",
    "unwrap",
]
