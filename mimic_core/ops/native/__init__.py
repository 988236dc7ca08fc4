"""The ops in C++ (csrc/): a call of one costs what its attention costs, and 2 microseconds.

They are there without asking: at the first call of an op the library is loaded, and built before that where nobody has.
They are compared with the reference before anybody gets them. Where they can't be had, one line says why and everything
runs in plain torch, with the same results.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ...errors import BackendUnavailableError
from .._precision import has_bf16_instructions
from . import build, nvrtc
from .agreement import disagreement

_log = logging.getLogger("mimic_core")
_lock = threading.RLock()
_ops: ModuleType | None = None
_looked = False
_on_devices: dict[int, bool] = {}

# Whose bits a call is to give: `Follow` in csrc/ops.h.
NOBODY, TRANSFORMERS, PACKING_TRANSFORMERS = 0, 1, 2


def ops_for(x: Tensor) -> ModuleType | None:
    """The ops in C++ for a tensor's device, or None: they can't be had, or torch.compile traces.

    They return None for arguments they don't take.
    """
    if torch.compiler.is_dynamo_compiling():
        return None
    found = _ops if _looked else _first()
    if found is None or not x.is_cuda:
        return found
    return found if _on_devices.get(x.device.index) or _enable(found, x.device) else None


def serves(device: torch.device) -> bool:
    """Whether the ops in C++ take tensors of a device."""
    return _ops is not None and (device.type == "cpu" or _on_devices.get(device.index or 0, False))


def traced() -> bool:
    """Whether torch.compile traces this, and may put torch.ops.mimic_core into its graph.

    On a CPU that adds 3 to 14 microseconds to a compiled decode step, where plain torch traced adds 43 to 55; with many
    tokens both are alike. A graph that is exported is plain torch: it runs where nobody has this library.
    """
    return (
        torch.compiler.is_dynamo_compiling()
        and _ops is not None
        and not getattr(torch.compiler, "is_exporting", bool)()
    )


def build_native(folder: str | Path | None = None) -> Path:
    """Compile the ops in C++ for this torch and this class of processor ahead of time, and use them from now on.

    Nobody has to: the first call of an op does it. It is for images, clusters and machines whose later processes have
    no compiler. Takes about 20 seconds.

    Args:
        folder: Where to put them. None is a folder beside torch.hub's, the only place later processes look in.

    Returns:
        The shared library.

    Raises:
        BackendUnavailableError: there is no C++ compiler, it failed, or what it made can't be used; the message has its
            output.
    """
    path = build.library_in(Path(folder) if folder is not None else build.default_folder())
    with _lock:
        build.build(path)
        _use(path)
    return path


def _enable(native: ModuleType, device: torch.device) -> bool:
    """Whether the ops take a CUDA device's tensors: its kernels are compiled and compared at its first use."""
    index = device.index
    # While a CUDA graph is captured nothing can be compared.
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
            _log.warning("mimic_core: without its CUDA kernels on %s, slower, in plain torch: %s", device, problem)
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
                "mimic_core: without its C++ ops, slower, in plain torch: %s (mimic_core.ops.build_native() says more)",
                reason,
            )
        return _ops


def _use(path: Path) -> None:
    global _ops, _looked
    native = build.load(path)
    native.set_up(has_bf16_instructions(), nvrtc.compile_kernels)
    if problem := disagreement(native, torch.device("cpu")):
        raise BackendUnavailableError(f"its C++ ops at {path} are wrong here and not used: {problem}")
    _ops, _looked = native, True
