"""Shift heads: their learnable parameters, and how they change a site."""

from .base import HeadConfig, ShiftHead, head_class, head_for_config, register_head
from .bias import AttnBiasConfig, AttnBiasHead, MlpBiasConfig, MlpBiasHead
from .live import LIVEConfig, LIVEHead
from .mimic import MimICConfig, MimICHead
from .prompt_end import FunctionVectorConfig, FunctionVectorHead, TaskVectorConfig, TaskVectorHead
from .stack import ShiftStack
from .stack_set import StackSet

__all__ = [
    "AttnBiasConfig",
    "AttnBiasHead",
    "FunctionVectorConfig",
    "FunctionVectorHead",
    "HeadConfig",
    "LIVEConfig",
    "LIVEHead",
    "MimICConfig",
    "MimICHead",
    "MlpBiasConfig",
    "MlpBiasHead",
    "ShiftHead",
    "ShiftStack",
    "StackSet",
    "TaskVectorConfig",
    "TaskVectorHead",
    "head_class",
    "head_for_config",
    "register_head",
]
