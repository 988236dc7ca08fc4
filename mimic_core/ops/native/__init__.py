"""The ops in C++ (csrc/). A call takes 2 microseconds more than its attention.

The first call of an op loads the library, or compiles it if it does not exist. Then the ops are compared with the
reference before they are used. If this fails, a line in the log says why, and everything runs in plain torch, with the
same results.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ...errors import BackendUnavailableError
from .._precision import has_bf16_instructions
from . import build, nvrtc
from .agreement import disagreement

_log = logging.getLogger("mimic_core")
_lock = threading.RLock()
_ops: ModuleType | None = None
_looked = False
_on_devices: dict[int, bool] = {}

# Which implementation's bits a call must give: `Follow` in csrc/ops.h.
NOBODY, TRANSFORMERS, PACKING_TRANSFORMERS = 0, 1, 2


def ops_for(x: Tensor) -> ModuleType | None:
    """The ops in C++ for a tensor's device. None if they are not available or torch.compile is tracing.

    They return None for arguments that they do not support.
    """
    if is_dynamo_compiling():
        return None
    found = _ops if _looked else _first()
    if found is None or not x.is_cuda:
        return found
    return found if _on_devices.get(x.device.index) or _enable(found, x.device) else None


def serves(device: torch.device) -> bool:
    """Whether the ops in C++ support tensors of a device."""
    return _ops is not None and (device.type == "cpu" or _on_devices.get(device.index or 0, False))


def traced() -> bool:
    """Whether torch.compile is tracing and can put torch.ops.mimic_core into its graph.

    On a CPU this adds 3 to 14 microseconds to a compiled decode step; plain torch in the graph adds 43 to 55. With many
    tokens both are equal. An exported graph is plain torch, so it runs without this library.
    """
    return is_dynamo_compiling() and _ops is not None and not getattr(torch.compiler, "is_exporting", bool)()


def build_native(folder: str | Path | None = None) -> Path:
    """Compile the ops in C++ for this torch and this class of processors ahead of time, and use them from now on.

    This is optional, because the first call of an op does it too. It is for container images, clusters and machines
    where later processes have no compiler. It takes about 20 seconds.

    Args:
        folder: The folder for the library. None is a folder beside that of torch.hub, the only one that other processes
            search.

    Returns:
        The path of the shared library.

    Raises:
        BackendUnavailableError: there is no C++ compiler, it failed, or the library cannot be used. The message has the
            output of the compiler.
    """
    path = build.library_in(Path(folder) if folder is not None else build.default_folder())
    with _lock:
        build.build(path)
        _use(path)
    return path


def _enable(native: ModuleType, device: torch.device) -> bool:
    """Whether the ops support a CUDA device. At its first use, the kernels are compiled and compared."""
    index = device.index
    # The comparison is not possible while a CUDA graph is captured.
    if index in _on_devices or torch.cuda.is_current_stream_capturing():
        return _on_devices.get(index, False)
    with _lock:
        if index in _on_devices:
            return _on_devices[index]
        native.enable_cuda(index, True)
        try:
            problem = disagreement(native, device)
        except (BackendUnavailableError, RuntimeError) as error:
            problem = str(error).splitlines()[0]
        if problem:
            native.enable_cuda(index, False)
            _log.warning("mimic_core: no CUDA kernels on %s, so it uses plain torch, slower: %s", device, problem)
        _on_devices[index] = not problem
        return not problem


def _first() -> ModuleType | None:
    global _looked
    with _lock:
        if _looked:
            return _ops
        path = build.library_in(build.default_folder())
        try:
            if not path.is_file():
                if said := build.earlier_failure(path):
                    raise BackendUnavailableError(said)
                _log.warning(
                    "mimic_core: compiling its C++ ops for torch %s, once, about 20 seconds", torch.__version__
                )
                build.build(path)
            _use(path)
        except BackendUnavailableError as error:
            _looked = True
            reason = str(error).splitlines()[0]
            _log.warning(
                "mimic_core: no C++ ops, so it uses plain torch, slower: %s (mimic_core.ops.build_native() shows more)",
                reason,
            )
        return _ops


def _use(path: Path) -> None:
    global _ops, _looked
    native = build.load(path)
    native.set_up(has_bf16_instructions(), nvrtc.compile_kernels)
    if problem := disagreement(native, torch.device("cpu")):
        raise BackendUnavailableError(
            f"mimic_core's C++ ops at {path} give wrong results here, so they are not used: {problem}"
        )
    _ops, _looked = native, True
