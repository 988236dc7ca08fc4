"""kernels.cu compiled ahead of time for GPUs that are not there; on_stand_ins.py runs it, on the CPU."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
import torch

from mimic_core import BackendUnavailableError
from mimic_core.ops.native import nvrtc

needs_nvrtc = pytest.mark.skipif(torch.version.cuda is None, reason="a torch without CUDA brings no NVRTC")
# (elements a load, storage): aligned rows in fp32, bf16 and fp16, and rows that are not aligned.
LOADS = [(4, 0), (8, 1), (8, 2), (1, 1)]
KERNELS = {"D": ("shift", "fold", "add"), "C": ("norm_add", "norm_gradients", "norm_sums")}


def archs() -> list[str]:
    newest = torch.version.cuda is not None and int(torch.version.cuda.split(".")[0]) > 12
    return ["sm_80", "sm_90", *(["sm_100"] if newest else [])]


@pytest.mark.slow
@needs_nvrtc
@pytest.mark.parametrize("arch", archs())
def test_every_kernel_compiles_and_spills_nothing(arch: str) -> None:
    widths = [f"-DD={d} -DE={d}" for d in (64, 80, 128, 256)] + [f"-DC={c}" for c in (576, 4096, 8192)]
    for (elements, storage), width in product(LOADS, widths):
        if elements == 1 and width not in ("-DD=80 -DE=80", "-DC=576"):
            continue
        image, log = nvrtc.machine_code(f"-DSTORAGE={storage} -DVEC={elements} {width}", arch)
        found = dict(re.findall(r"entry function '(\w+)'.*?(\d+) bytes spill stores", log, re.DOTALL))
        assert found == dict.fromkeys(KERNELS["D" if "-DD" in width else "C"], "0"), (width, log)
        assert image.startswith(b"\x7fELF")


@needs_nvrtc
def test_an_error_of_the_compiler_is_said() -> None:
    with pytest.raises(BackendUnavailableError, match=r"(?s)could not compile mimic_core's kernels for sm_90: .*error"):
        nvrtc.machine_code("-DSTORAGE=1 -DVEC=oops -DC=8", "sm_90")
    with pytest.raises(BackendUnavailableError, match="could not compile mimic_core's kernels for sm_1"):
        nvrtc.machine_code("-DSTORAGE=1 -DVEC=8 -DC=8", "sm_1")


@needs_nvrtc
def test_it_is_compiled_once_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    options = "-DSTORAGE=1 -DVEC=8 -DC=8"
    image = nvrtc.compile_kernels(options, 0)
    (kept,) = (tmp_path / "mimic_core" / "cuda").iterdir()
    assert kept.read_bytes() == image
    monkeypatch.setattr(nvrtc, "machine_code", None)
    assert nvrtc.compile_kernels(options, 1) == image
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(TypeError, match="not callable"):  # another GPU's is not taken for it
        nvrtc.compile_kernels(options, 0)


@needs_nvrtc
def test_a_folder_that_cannot_be_written_to_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mimic_core").write_text("a file")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert nvrtc.compile_kernels("-DSTORAGE=0 -DVEC=4 -DC=8", 0).startswith(b"\x7fELF")


def test_no_nvrtc_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    nvrtc._library.cache_clear()
    with pytest.raises(BackendUnavailableError, match="this torch was built without CUDA, so there is no NVRTC"):
        nvrtc.machine_code("-DSTORAGE=0 -DVEC=4 -DC=8", "sm_90")
    monkeypatch.setattr(torch.version, "cuda", "99.1")
    with pytest.raises(BackendUnavailableError, match=r"there is no libnvrtc\.so\.99"):
        nvrtc.machine_code("-DSTORAGE=0 -DVEC=4 -DC=8", "sm_90")
    nvrtc._library.cache_clear()
