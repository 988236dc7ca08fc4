"""Shift heads: what is learned, and how it edits a site."""

from .base import HeadConfig, ShiftHead, head_class, head_for_config, register_head
from .live import LIVEConfig, LIVEHead
from .mimic import MimICConfig, MimICHead
from .stack import ShiftStack

__all__ = [
    "HeadConfig",
    "LIVEConfig",
    "LIVEHead",
    "MimICConfig",
    "MimICHead",
    "ShiftHead",
    "ShiftStack",
    "head_class",
    "head_for_config",
    "register_head",
]
