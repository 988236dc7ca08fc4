"""Shift heads: their learnable parameters, and how they change a site."""

from .base import HeadConfig, ShiftHead, Taken, head_class, head_for_config, register_head
from .bias import AttnBiasConfig, AttnBiasHead, MlpBiasConfig, MlpBiasHead
from .caa import CAAConfig, CAAHead
from .composed import ComposedStack
from .hyper_icl import HyperICLConfig, HyperICLHead
from .i2cl import I2CLConfig, I2CLHead
from .ia3 import IA3Config, IA3Head
from .icv import ICVConfig, ICVHead
from .live import LIVEConfig, LIVEHead
from .loreft import LoReFTConfig, LoReFTHead
from .m2iv import M2IVConfig, M2IVHead
from .mimic import MimICConfig, MimICHead
from .mtv import MTVConfig, MTVHead
from .prompt_end import FunctionVectorConfig, FunctionVectorHead, TaskVectorConfig, TaskVectorHead
from .stack import ShiftStack
from .stack_set import StackSet
from .virtual_kv import VirtualKVConfig, VirtualKVHead

__all__ = [
    "AttnBiasConfig",
    "AttnBiasHead",
    "CAAConfig",
    "CAAHead",
    "ComposedStack",
    "FunctionVectorConfig",
    "FunctionVectorHead",
    "HeadConfig",
    "HyperICLConfig",
    "HyperICLHead",
    "I2CLConfig",
    "I2CLHead",
    "IA3Config",
    "IA3Head",
    "ICVConfig",
    "ICVHead",
    "LIVEConfig",
    "LIVEHead",
    "LoReFTConfig",
    "LoReFTHead",
    "M2IVConfig",
    "M2IVHead",
    "MTVConfig",
    "MTVHead",
    "MimICConfig",
    "MimICHead",
    "MlpBiasConfig",
    "MlpBiasHead",
    "ShiftHead",
    "ShiftStack",
    "StackSet",
    "Taken",
    "TaskVectorConfig",
    "TaskVectorHead",
    "VirtualKVConfig",
    "VirtualKVHead",
    "head_class",
    "head_for_config",
    "register_head",
]
