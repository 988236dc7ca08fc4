"""How the ops in C++ are built, found, compared and refused: one line said, and plain torch in their place."""

from __future__ import annotations

import logging
import os
import platform
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mimic_core import BackendUnavailableError, ops
from mimic_core.ops import native
from mimic_core.ops.native import build
from tests.support.op_cases import Case, inputs_of

ROOT = Path(__file__).parents[2]
# Imports the package, then uses an op in three processes at once, then in one more.
PROCESSES = """
import os, sys, torch
torch.set_num_threads(1)
torch.hub.set_dir(sys.argv[1])
import mimic_core as mc
print("after the import:", *sorted(os.listdir(os.path.dirname(sys.argv[1]))), flush=True)

def use():
    q = torch.randn(1, 2, 3, 8)
    mc.ops.shifted_attention(q, q, q, torch.randn(2, 8), torch.randn(2, 8), torch.randn(2))
    os.write(1, f"{mc.ops.resolve_backend(q, q, q).why}\\n".encode())  # in one piece

for _ in range(3):
    if not os.fork():
        use()
        os._exit(0)
assert [os.wait()[1] for _ in range(3)] == [0] * 3
print("calls:", len(open(sys.argv[2]).readlines()), flush=True)
use()
print("calls:", len(open(sys.argv[2]).readlines()))
"""


@pytest.fixture
def library(native_ops: ModuleType) -> Path:
    """The library that was built for all tests."""
    return build.library_in(ROOT / ".pytest_cache" / "torch" / "mimic_core")


@pytest.fixture
def afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native_ops: ModuleType) -> Iterator[Path]:
    """As in a process that has not used an op yet, on a machine where nobody has; the folder it would look in."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setattr(native, "_looked", False)
    monkeypatch.setattr(native, "_ops", None)
    return tmp_path / "mimic_core"


@pytest.fixture
def quick_compiler(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that only copies what was compiled before, and says in a file that it was called.

    It takes a moment, so that others come meanwhile.
    """
    return compiler(
        tmp_path,
        monkeypatch,
        f'echo called >> {tmp_path}/calls\nsleep 0.2\nwhile [ "$1" != -o ]; do shift; done\ncp {library} "$2"',
    )


def compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    return path


def use() -> torch.Tensor:
    x = inputs_of(Case()).tensors
    return ops.shifted_attention(x["q"], x["k"], x["v"], x["vector"], x["gate_weight"], x["gate_bias"])


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "mimic_core"]


# --- built and found


def test_the_first_use_builds_it_and_says_so(
    afresh: Path, quick_compiler: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "mimic_core"):
        use()
        use()
    assert said(caplog) == [f"mimic_core: compiling its C++ ops for torch {torch.__version__}, once, about 20 seconds"]
    assert build.library_in(afresh).is_file()
    assert native._ops is not None
    assert ops.resolve_backend(*(inputs_of(Case()).tensors[name] for name in "qkv")).why == "the first choice; in C++"


@pytest.mark.slow
def test_importing_builds_nothing_and_many_processes_at_once_compile_once(quick_compiler: Path, tmp_path: Path) -> None:
    """And a later process finds it. They are forks of one process: each would import everything for ten seconds."""
    command = [sys.executable, "-c", PROCESSES, str(tmp_path / "hub"), str(tmp_path / "calls")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    in_cpp = "the first choice; in C++"
    # The compiler is called twice: to compile, and to link.
    assert done.stdout.splitlines() == ["after the import: compiler", *[in_cpp] * 3, "calls: 2", in_cpp, "calls: 2"]
    assert 1 <= done.stderr.count("mimic_core:") <= 3, "those say so who compile or wait, and the later one does not"


def test_a_library_that_is_there_is_found(
    afresh: Path, library: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    there = build.library_in(afresh)
    there.parent.mkdir(parents=True)
    there.write_bytes(library.read_bytes())
    monkeypatch.setattr(build, "_compile", None)  # nobody compiles
    with caplog.at_level(logging.WARNING, "mimic_core"):
        use()
    assert native._ops is not None
    assert said(caplog) == []


def test_many_threads_at_once_compile_once(afresh: Path, quick_compiler: Path, tmp_path: Path) -> None:
    found = []
    threads = [threading.Thread(target=lambda: found.append(use())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(x, found[0]) for x in found)
    assert len(found) == 4
    assert (tmp_path / "calls").read_text().split() == ["called"] * 2


def test_the_command_of_the_readme(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (command,) = re.findall(r"(?m)^python -c .*build_native.*$", (ROOT / "README.md").read_text())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    there = build.library_in(tmp_path / "mimic_core")  # so that it is not compiled a second time
    there.parent.mkdir(parents=True)
    there.write_bytes(library.read_bytes())
    exec(shlex.split(command)[2], {})
    assert capsys.readouterr().out.strip() == str(there)


def test_what_it_was_built_for_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = build.library_in(tmp_path)
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert build.library_in(tmp_path) != before
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    assert build.library_in(tmp_path) != before


# --- not to be had


def broken(name: str, folder: Path, patch: pytest.MonkeyPatch) -> str:
    """Make a machine where it can't be built; what should be said."""
    if name == "no compiler":
        patch.setenv("CXX", str(folder / "no-such-compiler"))
        return f"no C++ compiler was found (CXX is {folder}/no-such-compiler)"
    if name == "an old compiler":
        compiler(folder, patch, "echo \"c++: error: unrecognized option '-std=c++20'\" >&2; exit 1")
        return "the C++ compiler failed: c++: error: unrecognized option '-std=c++20'"
    if name == "no headers of Python":
        compiler(folder, patch, "echo 'x.h:1: fatal error: Python.h: No such file' >&2; exit 1")
        return "the C++ compiler failed: x.h:1: fatal error: Python.h: No such file"
    if name == "a compiler that can't be run":
        path = compiler(folder, patch, "")
        path.write_bytes(b"\x7fELF no program")
        return "the C++ compiler can't be run: "
    if name == "a folder that can't be written to":
        (folder / "mimic_core").write_text("a file")
        return f"mimic_core's C++ ops can't be saved in {folder}/mimic_core"
    assert name == "a library that can't be loaded"
    patch.setattr(build, "_loaded", {})
    path = build.library_in(folder / "mimic_core")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x7fELF truncated")
    return f"mimic_core's C++ ops at {path} can't be loaded: "


BROKEN = [
    "no compiler",
    "an old compiler",
    "no headers of Python",
    "a compiler that can't be run",
    "a folder that can't be written to",
    "a library that can't be loaded",
]


def test_vectors_fit_the_registers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The compiler keeps wider ones in memory, and warns. One kernel took nine times as long because of it."""
    compiler = build._compiler()
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("it compiles for x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    command, _ = build._commands(shlex.split(compiler), tmp_path / "native.so")
    done = subprocess.run(
        [*command, "-O0", "-Wvector-operation-performance"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "-Wvector-operation-performance" not in done.stderr


@pytest.mark.parametrize("name", BROKEN)
def test_where_it_cannot_be_had_one_line_says_why(
    name: str, afresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reason = broken(name, tmp_path, monkeypatch)
    with caplog.at_level(logging.WARNING, "mimic_core"):
        first = use()
        assert torch.equal(use(), first)
    *_, line = said(caplog)
    assert line.startswith(f"mimic_core: no C++ ops, so it uses plain torch, slower: {reason}")
    assert line.endswith("(mimic_core.ops.build_native() shows more)")
    assert "\n" not in line
    assert len(said(caplog)) <= 2, "said once"
    assert native._ops is None
    monkeypatch.setattr(native, "_looked", False)
    with pytest.raises(BackendUnavailableError, match=re.escape(reason)):
        ops.build_native()


def test_a_compiler_that_failed_is_not_asked_again(
    afresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every process would wait for it. `build_native` asks it, and so does the first use with another compiler."""
    path = compiler(tmp_path, monkeypatch, f"echo called >> {tmp_path}/calls; echo 'error: no' >&2; exit 1")
    for _ in range(2):
        monkeypatch.setattr(native, "_looked", False)
        use()
    assert (tmp_path / "calls").read_text().split() == ["called"]
    with pytest.raises(BackendUnavailableError, match=f"{path}.*native.cpp"):
        ops.build_native()
    assert (tmp_path / "calls").read_text().split() == ["called"] * 2
    os.utime(path, (1, 1))
    monkeypatch.setattr(native, "_looked", False)
    use()
    assert (tmp_path / "calls").read_text().split() == ["called"] * 3


def test_ops_that_are_wrong_here_are_not_used(
    afresh: Path, quick_compiler: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "disagreement", lambda *_: "shifted_attention is 0.5 off")
    with caplog.at_level(logging.WARNING, "mimic_core"):
        use()
    assert native._ops is None
    assert "give wrong results here, so they are not used: shifted_attention is 0.5 off" in said(caplog)[-1]


@pytest.mark.parametrize("name", ["shifted_attention", "attention_with_lse", "norm_preserving_add"])
def test_a_wrong_op_is_found_out(name: str, native_ops: ModuleType) -> None:
    class Wrong:
        def __getattr__(self, asked: str) -> object:
            right = getattr(native_ops, asked)
            if asked != name:
                return right

            def wrong(*args: object) -> object:
                found = right(*args)
                return found[0], found[1] * 1.01 if isinstance(found, tuple) else found

            return wrong if name == "attention_with_lse" else lambda *args: right(*args) * 1.01

    assert native.disagreement(native_ops, torch.device("cpu")) is None
    problem = native.disagreement(Wrong(), torch.device("cpu"))  # pyright: ignore[reportArgumentType]
    assert problem is not None
    assert problem.startswith(f"{name} in torch.float32 on cpu is 0.0")


def test_the_comparison_is_no_part_of_the_call_it_comes_first_in(native_ops: ModuleType) -> None:
    """Gradient checkpointing counts the tensors that are saved, and autocast would change the reference."""
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        assert native.disagreement(native_ops, torch.device("cpu")) is None
    assert saved == []


def test_only_linux_builds(afresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(BackendUnavailableError, match="built only on Linux, and this is win32"):
        ops.build_native()
