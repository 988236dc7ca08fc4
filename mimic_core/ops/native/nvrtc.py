"""Compile csrc/kernels.cu for a GPU with NVRTC, which comes with torch's CUDA wheels. No nvcc or GPU is needed."""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from ...errors import BackendUnavailableError
from .build import default_folder

SOURCE = Path(__file__).with_name("csrc") / "kernels.cu"


def compile_kernels(options: str, device: int) -> bytes:
    """The machine code of the kernels for a CUDA device. It is saved on disk if possible.

    Args:
        options: -D options, explained at the top of kernels.cu.

    Raises:
        BackendUnavailableError: there is no NVRTC, or it failed. The message has its output.
    """
    major, minor = torch.cuda.get_device_capability(device)
    arch = f"sm_{major}{minor}"
    made_of = (options, arch, torch.version.cuda, SOURCE.read_text())
    kept = default_folder() / "cuda" / f"{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}.cubin"
    try:
        return kept.read_bytes()
    except OSError:
        image, _ = machine_code(options, arch)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=kept.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(image)
        Path(name).replace(kept)
    except OSError:
        pass  # the next process compiles again, in half a second
    return image


def machine_code(options: str, arch: str) -> tuple[bytes, str]:
    """Machine code for an architecture ("sm_90"), and the assembler's log about registers and memory.

    Raises:
        BackendUnavailableError: there is no NVRTC, or it failed.
    """
    nvrtc = _library()
    program = ctypes.c_void_p()
    asked = [f"--gpu-architecture={arch}", "--ptxas-options=-v", "--std=c++17", *options.split()]
    _check(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), SOURCE.read_bytes(), b"kernels.cu", 0, None, None))
    try:
        given = (ctypes.c_char_p * len(asked))(*(option.encode() for option in asked))
        failed = nvrtc.nvrtcCompileProgram(program, len(asked), given)
        log = _read(nvrtc, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if failed:
            raise BackendUnavailableError(f"NVRTC could not compile mimic_core's kernels for {arch}: {log[:2000]}")
        return _read(nvrtc, program, "CUBIN"), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    found = ctypes.create_string_buffer(size.value)
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, found))
    return found.raw


def _check(nvrtc: ctypes.CDLL, result: int) -> None:
    if result:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise BackendUnavailableError(f"NVRTC failed: {nvrtc.nvrtcGetErrorString(result).decode()}")


@cache
def _library() -> ctypes.CDLL:
    """NVRTC from the wheels that torch depends on, from torch's own folder, or from the system."""
    if torch.version.cuda is None:
        raise BackendUnavailableError("this torch was built without CUDA, so there is no NVRTC")
    name = f"libnvrtc.so.{torch.version.cuda.split('.')[0]}"
    wheels = find_spec("nvidia")
    folders = [Path(place) for place in (wheels.submodule_search_locations or ()) if wheels] if wheels else []
    found = [path for folder in folders for path in sorted(folder.glob(f"*/lib/{name}"))]
    found += sorted((Path(torch.__file__).parent / "lib").glob("libnvrtc*.so*"))
    for candidate in (*map(str, found), name):
        try:
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    raise BackendUnavailableError(
        f"there is no {name}, which compiles mimic_core's kernels; it comes with torch's CUDA wheels"
    )
