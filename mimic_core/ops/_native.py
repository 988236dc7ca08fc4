"""The CPU's row loops in C++ (native.cpp): built once, by request, and used from then on.

Without them everything runs in plain torch, with the same results. What they save is passes over memory in half
precision, and calls: at one token a layer, on 8 attention heads, the shift adds 1 microsecond instead of 24.
"""

from __future__ import annotations

import hashlib
import platform
import sys
from importlib import machinery, util
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import torch
from filelock import FileLock

from ..errors import BackendUnavailableError

_SOURCE, _HEADER = (Path(__file__).with_name(name) for name in ("native.cpp", "native_rows.h"))
# For a class of processors, not for this one: a home directory may be shared by several machines.
_FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}

_kernels: ModuleType | None = None
_looked = False


def kernels() -> ModuleType | None:
    """The built kernels, or None where nobody built them; None, too, in code that torch.compile traces."""
    global _kernels, _looked
    if torch.compiler.is_compiling():
        return None
    if not _looked:
        _looked = True
        path = _library(_folder())
        if path.is_file():
            _kernels = _load(path)
    return _kernels


def build_native(folder: str | Path | None = None) -> Path:
    """Compile the CPU kernels for this torch and this class of processor, and use them from now on.

    Needed once a machine; later processes find them. Takes about 20 seconds, a C++ compiler, and the packages ninja
    and setuptools (`pip install "mimic_core[native]"`). Nothing else in the library needs them.

    Args:
        folder: Where to put them. None is a folder beside torch.hub's, the only place later processes look in.

    Returns:
        The shared library.

    Raises:
        BackendUnavailableError: there is no compiler or no ninja, or the compiler failed; its output is in the message.
    """
    global _kernels, _looked
    path = _library(Path(folder) if folder is not None else _folder())
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name("lock")):
        if not path.is_file():
            _compile(path)
    _kernels, _looked = _load(path), True
    return path


def _folder() -> Path:
    return Path(torch.hub.get_dir()).parent / "mimic_core"


def _library(folder: Path) -> Path:
    """Named after all it depends on: a new torch, another source or other flags are another library."""
    flags = " ".join(_flags()).encode()
    made_of = (
        flags,
        _SOURCE.read_bytes(),
        _HEADER.read_bytes(),
        torch.__version__.encode(),
        sys.implementation.cache_tag.encode(),
        _class().encode(),
    )
    digest = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:16]
    return folder / digest / f"mimic_native{machinery.EXTENSION_SUFFIXES[0]}"


def _flags() -> list[str]:
    # OpenMP without linking one: its functions are found in the library torch brings, whose threads they then are.
    # Two of them in a process would fight over the cores.
    always = ["-O3", "-fopenmp", "-fno-math-errno", "-fno-strict-aliasing"]
    return always + _FLAGS.get(torch.backends.cpu.get_cpu_capability(), [])


def _class() -> str:
    return f"{platform.machine()}-{torch.backends.cpu.get_cpu_capability()}"


def _compile(path: Path) -> None:
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        raise BackendUnavailableError(
            f"the native kernels are compiled with setuptools and ninja, and {error.name} is missing; "
            f'pip install "mimic_core[native]"'
        ) from error
    with TemporaryDirectory(dir=path.parent) as work:
        try:
            cpp_extension.load(
                "mimic_native", [str(_SOURCE)], extra_cflags=_flags(), build_directory=work, is_python_module=False
            )
        except (OSError, RuntimeError) as error:
            raise BackendUnavailableError(
                f"the native kernels could not be built: {error}; they need a C++ compiler and ninja, and nothing "
                f"else in mimic_core needs them"
            ) from error
        Path(work, f"mimic_native{cpp_extension.LIB_EXT}").replace(path)


def _load(path: Path) -> ModuleType:
    spec = util.spec_from_file_location("mimic_native", path)
    try:
        if spec is None or spec.loader is None:
            raise ImportError("not an extension module")
        module = util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise BackendUnavailableError(
            f"the native kernels at {path} can't be loaded: {error}; remove the file, and build them again with "
            f"mimic_core.ops.build_native() if they are wanted"
        ) from error
    return module
