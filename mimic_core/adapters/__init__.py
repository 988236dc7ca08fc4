"""Adapters: where a model's sites are, and how an edit gets there."""

from .base import AttentionAdapter, PathAdapter, adapter_for, locate, register_adapter, unwrap
from .install import Installation, SiteEdit
from .named import Idefics2Adapter, IdeficsAdapter, LlamaAdapter, LlavaAdapter

__all__ = [
    "AttentionAdapter",
    "Idefics2Adapter",
    "IdeficsAdapter",
    "Installation",
    "LlamaAdapter",
    "LlavaAdapter",
    "PathAdapter",
    "SiteEdit",
    "adapter_for",
    "locate",
    "register_adapter",
    "unwrap",
]
