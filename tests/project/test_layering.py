"""What may import what, what is imported at all, and how large a file gets: read from the source, not run."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mimic_core

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mimic_core"
TESTS = ROOT / "tests"

# An import points to a lower layer, or to a neighbour in the same one.
LAYERS = {
    "types": 0,
    "errors": 0,
    "positions": 0,
    "parallel": 0,
    "samples": 0,
    "origins": 1,
    "registry": 0,
    "ops": 1,
    "losses": 1,
    "heads": 2,
    "edits": 2,
    "adapters": 3,
    "handle": 4,
    "patch": 4,
    "capture": 4,
    "build": 4,
    "checkpoint": 4,
    "describe": 4,
    "choose": 4,
    "estimate": 4,
    "merge": 4,
    "optimizers": 4,
    "averaging": 4,
    "integrations": 5,
    "vllm": 5,
    "testing": 4,
    "__init__": 5,
    "demo": 6,
}
# Those that nevertheless never import each other.
STRANGERS = [("heads", "edits"), ("edits", "heads"), ("adapters", "heads")]
HUB = {"transformers", "huggingface_hub", "safetensors"}
MAY_IMPORT_HUB = {"edits", "checkpoint", "demo", "integrations", "testing", "vllm"}
# Which compiler to call is said by CXX to everything that builds.
MAY_READ = {"ops/native/build.py": {"CXX"}}
# A model nobody has seen may raise anything; what it raised is told.
RUN_FOREIGN_CODE = {"adapters/probe.py", "adapters/residual.py", "testing/verdicts.py"}
SOURCES = sorted(PACKAGE.rglob("*.py"))
# The folders of tests/ that hold no tests: what the tests may import.
HELPERS = ("support", "zoo", "engines")


def module_name(path: Path) -> tuple[str, ...]:
    """("mimic_core", "heads", "live"); a package's __init__ is the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {module_name(path): path for path in SOURCES}


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """Every module a file imports, at its top or inside a function, as absolute names."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path)[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:
                # `from . import ops` imports a module, `from .ops import gate` a name of one.
                inner = (*base, alias.name)
                yield inner if inner in MODULES else base


def noun(module: tuple[str, ...]) -> str:
    """The part of the package that has a place in the layers."""
    return module[1] if len(module) > 1 else "__init__"


def own_imports(path: Path) -> list[tuple[str, ...]]:
    return [name for name in imports(path) if name[0] == "mimic_core"]


over_sources = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))


def test_every_part_of_the_package_has_a_layer() -> None:
    assert {noun(module) for module in MODULES} <= set(LAYERS)
    assert len(SOURCES) > 20


@over_sources
def test_imports_point_down(path: Path) -> None:
    here = noun(module_name(path))
    for imported in own_imports(path):
        there = noun(imported)
        assert imported in MODULES, f"{'.'.join(imported)} is no module"
        assert LAYERS[there] <= LAYERS[here], f"{here} (layer {LAYERS[here]}) imports {there} ({LAYERS[there]})"
        assert (here, there) not in STRANGERS, f"{here} and {there} never import each other"


def test_imports_have_no_cycle() -> None:
    # A package's __init__ gathers its files, so the question is asked of files, without what they get through it.
    files = {name: {found for found in own_imports(path) if found != name} for name, path in MODULES.items()}
    list(TopologicalSorter(files).static_order())


@over_sources
def test_only_some_parts_know_the_hub(path: Path) -> None:
    found = {name[0] for name in imports(path)} & HUB
    assert not found or noun(module_name(path)) in MAY_IMPORT_HUB, f"{path.name} imports {found}"


@over_sources
def test_nobody_imports_triton(path: Path) -> None:
    assert "triton" not in {name[0] for name in imports(path)}


def names_taken(path: Path) -> Iterator[str]:
    """What a file takes from the package by name: `mc.patch`, or `from mimic_core import patch`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "mimic_core":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("mc", "mimic_core"):
            yield node.attr


@pytest.mark.parametrize("path", sorted((PACKAGE / "demo").glob("*.py")), ids=lambda path: path.name)
def test_the_demo_uses_the_public_api(path: Path) -> None:
    outside = {name for name in own_imports(path) if noun(name) != "demo"}
    assert outside <= {("mimic_core",), ("mimic_core", "losses"), ("mimic_core", "ops")}
    assert set(names_taken(path)) <= {*mimic_core.__all__, "__version__"}


@over_sources
def test_no_eval_no_environment_no_utils(path: Path) -> None:
    assert path.stem not in ("utils", "helpers", "common", "misc")
    allowed: set[ast.AST] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "compile"), f"{path.name}:{node.lineno} calls {node.func.id}"
        if ast.unparse(node) in {
            f"os.environ.get({name!r})" for name in MAY_READ.get(str(path.relative_to(PACKAGE)), ())
        }:
            allowed.add(node.func.value)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            assert node in allowed or node.attr not in ("environ", "environb", "getenv", "putenv"), (
                f"{path.name}:{node.lineno}"
            )
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            assert not {alias.name for alias in node.names} & {"environ", "environb", "getenv", "putenv"}


@over_sources
def test_no_broad_except(path: Path) -> None:
    """An `except` that names everything has to raise again."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler) and str(path.relative_to(PACKAGE)) not in RUN_FOREIGN_CODE:
            names = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else {"BaseException"}
            if names & {"Exception", "BaseException"}:
                raises_again = [n for n in node.body if isinstance(n, ast.Raise) and n.exc is None]
                assert raises_again, f"{path.name}:{node.lineno} catches everything"


def test_tests_and_their_helpers_import_no_test() -> None:
    """What two test files need is a helper."""
    found = {path: {name for name in imports(path) if name[0] == "tests"} for path in sorted(TESTS.rglob("*.py"))}
    assert sum(map(len, found.values())) > 50, "the rule sees the imports"
    tests = {
        (str(path.relative_to(ROOT)), ".".join(name))
        for path, names in found.items()
        for name in names
        if len(name) < 2 or name[1] not in HELPERS
    }
    assert tests == set()


def test_helpers_hold_no_test() -> None:
    sources = [path for folder in HELPERS for path in sorted((TESTS / folder).rglob("*.py"))]
    assert len(sources) > 10
    names = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert names == []


def text_files() -> list[Path]:
    suffixes = (".py", ".cpp", ".cu", ".h", ".md", ".toml", ".yml", ".yaml", ".txt", ".typed")
    return [
        path
        for folder in ("mimic_core", "benchmarks", "tests", "docs")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in suffixes and not any(part.startswith((".", "__pycache__")) for part in path.parts[-3:])
    ]


def test_no_file_is_over_400_lines() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in text_files()}
    assert len(lengths) > 30
    assert {name: n for name, n in lengths.items() if n > 400} == {}


def test_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").is_file()


IMPORTED_AFTERWARDS = """
import importlib, json, sys
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
before = set(sys.modules)
import mimic_core
print(json.dumps(sorted(set(sys.modules) - before)))
"""


@pytest.mark.slow
def test_importing_the_package_stays_light() -> None:
    """What it adds to torch and to the parts of transformers it names: not one of the heavy ones."""
    library = [path for path in SOURCES if noun(module_name(path)) not in ("demo", "integrations", "testing", "vllm")]
    named = {".".join(name) for path in library for name in imports(path) if name[0] in {"torch", *HUB}}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED_AFTERWARDS, json.dumps(sorted(named))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    ours = [name for name in found if name.partition(".")[0] == "mimic_core"]
    assert {"mimic_core.patch", "mimic_core.adapters.named"} <= set(ours)
    unasked = ("mimic_core.demo", "mimic_core.integrations", "mimic_core.testing", "mimic_core.vllm")
    assert not [name for name in ours if name.startswith(unasked)]
    heavy = ("triton", "matplotlib", "torchvision", "peft", "accelerate", "gguf", "beartype", "hypothesis", "tqdm")
    assert [name for name in found if name.partition(".")[0] in heavy] == []
