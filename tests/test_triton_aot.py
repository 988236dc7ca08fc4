"""Every Triton kernel compiled for two GPUs that need not be there, as the library launches it; registers must suffice.

In a process of its own: the compiler is lost to one in which Triton interprets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch.torch_version import TorchVersion

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

ARCHITECTURES = (80, 90)
WIDTHS = (64, 80, 96, 128)
BACKWARD = ("keys_kernel", "queries_kernel")
WITHOUT_SPILLS = (
    *("attention_kernel", "decode_kernel", "combine_kernel", "fold_kernel", "shift_kernel", "add_kernel"),
    *("norm_kernel", "norm_backward_kernel"),
)
# Bytes a thread of a backward kernel may keep in memory for want of registers.
MOST_SPILLED = {80: 96, 90: 64}
# Shared memory of a block, in bytes.
SHARED = {80: 163 * 1024, 90: 227 * 1024}


def compiled(arch: int) -> tuple[str, list[dict]]:
    """The version of Triton, and one record for each kernel."""
    if arch != 90 and TorchVersion(version("triton")) < "3.6":
        pytest.skip("an old Triton is asked for one chip only: it takes a minute each")
    script = Path(__file__).parent / "triton_aot.py"
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_ALWAYS_COMPILE"] = "1"  # a cached kernel tells nothing of its registers
    done = subprocess.run([sys.executable, str(script), str(arch)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-8000:]
    first, *records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return first["triton"], records


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_compiles_and_registers_suffice(arch: int):
    triton, records = compiled(arch)
    assert {r["kernel"] for r in records} == {*BACKWARD, *WITHOUT_SPILLS}
    for kernel in (*BACKWARD, "attention_kernel", "decode_kernel", "fold_kernel", "shift_kernel", "add_kernel"):
        found = {(r["width"], r["dtype"]) for r in records if r["kernel"] == kernel}
        assert found >= {(width, "torch.bfloat16") for width in WIDTHS} | {(64, "torch.float32")}, kernel
    for r in records:
        assert r["shared"] <= SHARED[arch], r
    if TorchVersion(triton) < "3.6":
        return  # it wastes registers that later versions don't
    spilling = [r for r in records if r["spilled"] > (MOST_SPILLED[arch] if r["kernel"] in BACKWARD else 0)]
    assert not spilling, "\n".join(map(str, spilling))
