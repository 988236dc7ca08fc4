"""Adapters: where a model's sites are, and how an edit gets there."""

from .base import AttentionAdapter, PathAdapter, register_adapter, unwrap
from .generic import GenericAdapter
from .install import Installation, SiteEdit
from .locate import adapter_for, locate
from .named import Idefics2Adapter, IdeficsAdapter, LlamaAdapter, LlavaAdapter
from .probe import probe

__all__ = [
    "AttentionAdapter",
    "GenericAdapter",
    "Idefics2Adapter",
    "IdeficsAdapter",
    "Installation",
    "LlamaAdapter",
    "LlavaAdapter",
    "PathAdapter",
    "SiteEdit",
    "adapter_for",
    "locate",
    "probe",
    "register_adapter",
    "unwrap",
]
