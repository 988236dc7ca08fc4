"""Compile every Triton kernel as the library launches it, for a GPU that need not be there; a script.

The launch itself is intercepted: arguments, block sizes and options are those of real calls, only nothing runs. Prints
one JSON object per compiled kernel, with what ptxas said of registers and spills.

    python triton_aot.py 90
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler
from triton.runtime import JITFunction, driver

sys.path.insert(0, str(Path(__file__).parent.parent))

from mimic_core.ops import _triton, _triton_blocks

BATCH, HEADS, GROUPS, QUERIES, KEYS = 2, 4, 2, 256, 320
BF16, FP32 = torch.bfloat16, torch.float32


class Driver:
    """A GPU of which only the architecture is known."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


assembled: list[str] = []


def intercept(arch: int) -> list[tuple[str, Any]]:
    """From here on a launch compiles and does no more; the kernels are in the list that comes back."""
    compiled: list[tuple[str, Any]] = []
    run, assemble = JITFunction.run, subprocess.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    def overhear(command: Any, *args: Any, **options: Any) -> Any:
        done = assemble(command, *args, **options)
        if "stderr" in options and "-v" in command:
            assembled.append(Path(options["stderr"].name).read_text())
        return done

    JITFunction.run = compile_only
    compiler.subprocess.run = overhear
    driver.set_active(Driver(arch))  # pyright: ignore[reportArgumentType]
    for module in (_triton, _triton_blocks):
        module.capability = lambda device: divmod(arch, 10)
    return compiled


def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype).requires_grad_()


def mask_of(kind: str, queries: int, keys: int, dtype: torch.dtype) -> Tensor | None:
    if kind == "bool":
        return torch.ones(BATCH, 1, queries, keys, dtype=torch.bool)
    return torch.zeros(BATCH, 1, queries, keys, dtype=dtype) if kind == "additive" else None


def attention(width: int, dtype: torch.dtype, kind: str) -> None:
    """Forward and backward of a shifted attention."""
    q = numbers(BATCH, HEADS, QUERIES, width, dtype=dtype)
    k, v = (numbers(BATCH, GROUPS, KEYS, width, dtype=dtype) for _ in "kv")
    parameters = numbers(HEADS, width, dtype=FP32), numbers(HEADS, width, dtype=FP32), numbers(HEADS, dtype=FP32)
    mask = mask_of(kind, QUERIES, KEYS, dtype)
    out = _triton.shifted_attention(q, k, v, *parameters, mask, 0.1, kind == "causal")
    out.backward(torch.zeros_like(out))


def attention_alone(width: int, dtype: torch.dtype) -> None:
    q = numbers(BATCH, HEADS, QUERIES, width, dtype=dtype)
    k = numbers(BATCH, GROUPS, KEYS, width, dtype=dtype)
    out, lse = _triton.attention_with_lse(q, k, k, None, 0.1, False)
    torch.autograd.backward([out, lse], [torch.zeros_like(out), torch.zeros_like(lse)])
    _triton.attention_lse(q, k, None, 0.1, False).sum().backward()


@torch.no_grad()
def decode(width: int, dtype: torch.dtype, kind: str, keys: int) -> None:
    q = numbers(BATCH, HEADS, 1, width, dtype=dtype)
    k = numbers(BATCH, GROUPS, keys, width, dtype=dtype)
    parameters = numbers(HEADS, width, dtype=FP32), numbers(HEADS, width, dtype=FP32), numbers(HEADS, dtype=FP32)
    _triton.shifted_attention(q, k, k, *parameters, mask_of(kind, 1, keys, dtype), 0.1, False)


def epilogue(width: int, dtype: torch.dtype) -> None:
    from mimic_core.ops import _triton_epilogue

    vector, weight, bias = (
        x.detach() for x in (numbers(HEADS, width, dtype=FP32),) * 2 + (numbers(HEADS, dtype=FP32),)
    )
    out = torch.zeros(BATCH, QUERIES, HEADS, width, dtype=dtype)
    q = out.transpose(1, 2).contiguous()
    lse = torch.zeros(BATCH, HEADS, QUERIES)
    attends = torch.ones(BATCH, 1, QUERIES, dtype=torch.bool)
    mu = _triton_epilogue.gated_shift_(out, q, lse, attends, vector, weight, bias)
    _, df, *_ = _triton_epilogue.folded_gradients(out, out, q, mu, vector, weight)
    _triton_epilogue.add_to_dq_(q, df, weight)
    x, scale = numbers(BATCH, QUERIES, width * HEADS * 8, dtype=dtype), numbers(1, dtype=FP32)[0]
    _triton_epilogue.norm_preserving_add(x, numbers(width * HEADS * 8, dtype=FP32), scale).sum().backward()


def figures(log: str) -> dict[str, int]:
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
    registers = re.findall(r"Used (\d+) registers", log)
    return {"registers": int(registers[-1]), "spilled": max(spilled)}


def main(arch: int) -> None:
    compiled = intercept(arch)

    def report(width: int, dtype: torch.dtype, kind: str) -> None:
        # A kernel compiled before for a call of the same kind is not assembled again, and not reported again.
        fresh = [(name, kernel) for name, kernel in compiled if id(kernel) not in seen]
        for (name, kernel), log in zip(fresh, assembled, strict=True):
            seen[id(kernel)] = kernel
            about = {
                "kernel": name,
                "width": width,
                "dtype": str(dtype),
                "mask": kind,
                "shared": kernel.metadata.shared,
            }
            print(json.dumps(about | figures(log)), flush=True)
        compiled.clear()
        assembled.clear()

    seen: dict[int, Any] = {}
    for width in (64, 80, 96, 128):
        # Both on the chip that matters most; on the other each mask with one tile and with two.
        for kind in ("causal", "bool") if arch == 90 else ("causal",) if width in (64, 96) else ("bool",):
            attention(width, BF16, kind)
            decode(width, BF16, kind, 128)
            report(width, BF16, kind)
        decode(width, BF16, "none", 4096)
        epilogue(width, BF16)
        report(width, BF16, "none")
    attention(64, BF16, "additive")
    report(64, BF16, "additive")
    attention_alone(64, BF16)
    report(64, BF16, "none")
    attention(64, FP32, "causal")
    decode(64, FP32, "none", 128)
    epilogue(64, FP32)
    report(64, FP32, "causal")


if __name__ == "__main__":
    print(json.dumps({"triton": triton.__version__}))
    main(int(sys.argv[1]))
