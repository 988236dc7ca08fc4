"""Shift heads for frozen vision-language models.

An adapter says where the sites of a model are. A shift head says how a site is changed. `patch` puts heads into a
model, `capture` reads activations, `ops` has the tensor functions.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import losses, ops
from .adapters import AttentionAdapter, GenericAdapter, PathAdapter, adapter_for, register_adapter
from .build import build_shifts
from .capture import Capture, capture
from .checkpoint import load_shifts, save_shifts, shifts_from_reference
from .choose import choose_heads
from .describe import describe
from .errors import (
    BackendUnavailableError,
    CheckpointError,
    MimicError,
    PatchStateError,
    ShapeError,
    UnknownNameError,
    UnsupportedModelError,
    WrongTypeError,
)
from .estimate import estimate
from .heads import (
    AttnBiasConfig,
    CAAConfig,
    FunctionVectorConfig,
    HeadConfig,
    HyperICLConfig,
    I2CLConfig,
    IA3Config,
    ICVConfig,
    LIVEConfig,
    LoReFTConfig,
    M2IVConfig,
    MimICConfig,
    MlpBiasConfig,
    MTVConfig,
    ShiftHead,
    ShiftStack,
    StackSet,
    TaskVectorConfig,
    VirtualKVConfig,
    register_head,
)
from .merge import merge
from .patch import Handle, handles, hook, patch
from .types import At, LayerSpec, ModelSpec

if TYPE_CHECKING:
    from . import testing

__version__ = "0.1.0"

__all__ = [
    "At",
    "AttentionAdapter",
    "AttnBiasConfig",
    "BackendUnavailableError",
    "CAAConfig",
    "Capture",
    "CheckpointError",
    "FunctionVectorConfig",
    "GenericAdapter",
    "Handle",
    "HeadConfig",
    "HyperICLConfig",
    "I2CLConfig",
    "IA3Config",
    "ICVConfig",
    "LIVEConfig",
    "LayerSpec",
    "LoReFTConfig",
    "M2IVConfig",
    "MTVConfig",
    "MimICConfig",
    "MimicError",
    "MlpBiasConfig",
    "ModelSpec",
    "PatchStateError",
    "PathAdapter",
    "ShapeError",
    "ShiftHead",
    "ShiftStack",
    "StackSet",
    "TaskVectorConfig",
    "UnknownNameError",
    "UnsupportedModelError",
    "VirtualKVConfig",
    "WrongTypeError",
    "adapter_for",
    "build_shifts",
    "capture",
    "choose_heads",
    "describe",
    "estimate",
    "handles",
    "hook",
    "load_shifts",
    "losses",
    "merge",
    "ops",
    "patch",
    "register_adapter",
    "register_head",
    "save_shifts",
    "shifts_from_reference",
    "testing",
]


def __getattr__(name: str) -> Any:
    if name == "testing":  # imported lazily: only authors of adapters need it
        return import_module(".testing", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
