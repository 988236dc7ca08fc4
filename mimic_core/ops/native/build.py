"""Compile csrc/ with the machine's C++ compiler, once for each version of torch, and load it."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib import machinery, util
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import torch
from filelock import FileLock

from ...errors import BackendUnavailableError

_loaded: dict[str, ModuleType] = {}
_SOURCES = Path(__file__).with_name("csrc")
_NAME = "mimic_native"
# For a class of processors, not only for this one, because several machines may share a home directory.
_FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}
# OpenMP is compiled in but not linked, so that the OpenMP library of torch is used, and its threads. Two OpenMP
# libraries in a process would use the same cores. With hidden visibility, the compiler can inline functions.
_ALWAYS = ["-std=c++20", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-strict-aliasing", "-fvisibility=hidden"]


def default_folder() -> Path:
    """The folder that every process searches: beside torch.hub's, so TORCH_HOME and XDG_CACHE_HOME change it."""
    return Path(torch.hub.get_dir()).parent / "mimic_core"


def library_in(folder: Path) -> Path:
    """The path of the library. Its name is a hash of all that it depends on: torch, the source, the processor class."""
    made_of = [
        *(part.encode() for part in [*_flags(), _processors(), str(sys.implementation.cache_tag)]),
        *(f"{x}".encode() for x in (torch.__version__, torch.version.git_version, torch.version.cuda)),
        *(path.read_bytes() for path in sorted(_SOURCES.iterdir()) if path.suffix in (".h", ".cpp")),
    ]
    digest = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:16]
    return folder / digest / f"{_NAME}{machinery.EXTENSION_SUFFIXES[0]}"


def build(path: Path) -> None:
    """Compile the library at `path` if it does not exist. If several processes call this, only one compiles.

    Raises:
        BackendUnavailableError: there is no compiler, it failed, or the folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name("lock")):
            if not path.is_file():
                _compile(path)
    except OSError as error:
        raise BackendUnavailableError(f"mimic_core's C++ ops can't be saved in {path.parent}: {error}") from error


def load(path: Path) -> ModuleType:
    """Load the library at `path`. If one of the same name is loaded, return it: torch can register its ops only once.

    Raises:
        BackendUnavailableError: it cannot be loaded.
    """
    if path.parent.name in _loaded:
        return _loaded[path.parent.name]
    spec = util.spec_from_file_location(_NAME, path)
    try:
        if spec is None or spec.loader is None:
            raise ImportError("not an extension module")
        module = util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise BackendUnavailableError(
            f"mimic_core's C++ ops at {path} can't be loaded: {error}; remove the file, and call "
            f"mimic_core.ops.build_native() to compile them again"
        ) from error
    return _loaded.setdefault(path.parent.name, module)


def earlier_failure(path: Path) -> str | None:
    """The error of the compiler when it last failed to compile this library, if it is still the same compiler."""
    try:
        compiler, _, said = _failed(path).read_text().partition("\n")
    except OSError:
        return None
    return said if compiler == _identity(_compiler()) else None


def _failed(path: Path) -> Path:
    return path.with_name("failed.txt")


def _compiler() -> str | None:
    """The compiler that $CXX names, or else the first C++ compiler on the path."""
    asked = os.environ.get("CXX")
    for name in (asked,) if asked else ("c++", "g++", "clang++"):
        words = shlex.split(name)
        if words and (found := shutil.which(words[0])):
            return shlex.join([found, *words[1:]])
    return None


def _identity(compiler: str | None) -> str:
    if compiler is None:
        return "none"
    binary = Path(shlex.split(compiler)[0]).resolve()
    return f"{compiler} {binary.stat().st_mtime_ns}"


def _compile(path: Path) -> None:
    compiler = _compiler()
    try:
        if sys.platform != "linux":
            raise BackendUnavailableError(f"mimic_core's C++ ops are built only on Linux, and this is {sys.platform}")
        if compiler is None:
            asked = os.environ.get("CXX")
            raise BackendUnavailableError(
                f"no C++ compiler was found ({f'CXX is {asked}' if asked else 'none of c++, g++, clang++'})"
            )
        with TemporaryDirectory(dir=path.parent) as work:
            made = Path(work, path.name)
            for command in _commands(shlex.split(compiler), made):
                _run(command)
            made.replace(path)
    except BackendUnavailableError as error:
        _failed(path).write_text(f"{_identity(compiler)}\n{error}")
        raise


def _commands(compiler: list[str], made: Path) -> list[list[str]]:
    root = Path(torch.__file__).parent
    include = [root / "include", root / "include/torch/csrc/api/include", sysconfig.get_path("include")]
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_python", "-ldl"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    object_file = str(made.with_suffix(".o"))
    return [
        [
            *compiler,
            *_flags(),
            abi,
            *(f"-I{x}" for x in include),
            "-c",
            str(_SOURCES / "native.cpp"),
            "-o",
            object_file,
        ],
        [*compiler, "-shared", object_file, "-o", str(made), f"-L{root / 'lib'}", *libraries],
    ]


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise BackendUnavailableError(f"the C++ compiler can't be run: {error}") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise BackendUnavailableError(
            f"the C++ compiler failed: {' '.join(said[:1]) or f'it ended with {done.returncode}'}\n"
            f"{shlex.join(command)}\n{done.stderr[-4000:]}"
        )


def _flags() -> list[str]:
    return [*_ALWAYS, *_FLAGS.get(torch.backends.cpu.get_cpu_capability(), [])]


def _processors() -> str:
    return f"{platform.machine()}-{torch.backends.cpu.get_cpu_capability()}"
