"""Adapters: they say where the sites of a model are."""

from ..types import AttentionAdapter
from .base import PathAdapter, register_adapter, unwrap
from .generic import GenericAdapter
from .locate import adapter_for, locate
from .named import Idefics2Adapter, IdeficsAdapter, LlamaAdapter, LlavaAdapter
from .probe import probe

__all__ = [
    "AttentionAdapter",
    "GenericAdapter",
    "Idefics2Adapter",
    "IdeficsAdapter",
    "LlamaAdapter",
    "LlavaAdapter",
    "PathAdapter",
    "adapter_for",
    "locate",
    "probe",
    "register_adapter",
    "unwrap",
]
