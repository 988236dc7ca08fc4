"""Shape annotations checked at test time, and fixtures every test may use."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread
from types import ModuleType
from zlib import crc32

import pytest
import torch
from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook

# The models are tiny: a second thread costs more than it does.
torch.set_num_threads(1)
# In every phase of every test, pytest attaches its handlers to each logger that does not propagate. torch has sixty.
for _logger in logging.root.manager.loggerDict.values():
    if isinstance(_logger, logging.Logger):
        _logger.propagate = True

# The ops in C++ are built where only tests look: also the processes that a test starts, so none builds them again.
TORCH_HOME = Path(__file__).parent.parent / ".pytest_cache" / "torch"
os.environ["TORCH_HOME"] = str(TORCH_HOME)
NATIVE_FOLDER = TORCH_HOME / "mimic_core"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-shape-checks", action="store_true", help="import the package as a user does")
    parser.addoption("--one-case-in", type=int, default=1, metavar="N", help="of each test's cases, one in N")


def pytest_configure(config: pytest.Config) -> None:
    # Before anything imports mimic_core.
    if not config.getoption("--no-shape-checks"):
        install_import_hook("mimic_core", "beartype.beartype")
    # Tests are collected while the compiler runs. Under xdist the first process does it, the others wait for its file.
    if not hasattr(config, "workerinput") and not config.getoption("collectonly"):
        # Imported here: two threads that import the package at the same time may see half of it.
        from mimic_core import BackendUnavailableError
        from mimic_core.ops.native import build

        def build_native_ops() -> None:
            with suppress(BackendUnavailableError):  # the fixture native_ops raises it again
                build.build(build.library_in(NATIVE_FOLDER))

        Thread(target=build_native_ops).start()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    share = config.getoption("--one-case-in")
    if share is not None and share > 1:
        chosen = {item for cases in cases_of_tests(items) for item in cases[: -(-len(cases) // share)]}
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]
    if not torch.cuda.is_available():
        _keep_one_case_of_each_gpu_test(config, items)
    for item in items:
        if item.get_closest_marker("newest") or item.get_closest_marker("exhaustive"):
            item.add_marker("slow")
    # One that starts last keeps a process busy for minutes while the others have nothing left to do. Each of two
    # processes begins with one half of the list.
    slow, quick = [], []
    for item in items:
        (slow if item.get_closest_marker("slow") else quick).append(item)
    half = (len(items) + 1) // 2 - (len(slow) + 1) // 2
    items[:] = [*slow[::2], *quick[:half], *slow[1::2], *quick[half:]]
    # `-m "not slow"` is every quick test with one of its cases.
    for cases in cases_of_tests([item for item in items if not item.get_closest_marker("slow")]):
        for item in cases[1:]:
            item.add_marker("slow")


def _keep_one_case_of_each_gpu_test(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU thousands of cases would be skipped one by one. The one that is left says why."""
    of_gpu = [item for item in items if item.get_closest_marker("gpu")]
    dropped = {item for cases in cases_of_tests(of_gpu) for item in cases[1:]}
    config.hook.pytest_deselected(items=[item for item in items if item in dropped])
    items[:] = [item for item in items if item not in dropped]


def cases_of_tests(items: list[pytest.Item]) -> list[list[pytest.Item]]:
    """The cases of each test, in the order of a hash: which comes first is nobody's choice, and lasts."""
    tests: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        tests.setdefault((item.path, item.location[2].partition("[")[0]), []).append(item)
    return [sorted(cases, key=lambda item: crc32(item.nodeid.encode())) for cases in tests.values()]


@pytest.fixture
def no_shape_checks() -> Iterator[None]:
    """What a user has: annotations unchecked, so that the library's own errors are seen."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture
def functions_made_in_functions_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checker of shapes would compile each anew whenever it is made: at every call of attention."""
    monkeypatch.setattr("jaxtyping.jaxtyped", lambda **options: lambda function: function)


@pytest.fixture(autouse=True)
def _shape_checks_in_a_fourth_of_the_cases(request: pytest.FixtureRequest) -> None:
    """And in every test without cases. They are a third of the time of the laws, and see the same functions in each."""
    if hasattr(request.node, "callspec") and crc32(request.node.nodeid.encode()) % 4:
        request.getfixturevalue("no_shape_checks")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # torch.manual_seed formats the stack for each kind of device that is not there, which takes milliseconds
        torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def _registries_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads and adapters that a test registers are forgotten when it ends."""
    from mimic_core.adapters.base import ADAPTERS
    from mimic_core.heads.base import _HEADS

    for registry in (ADAPTERS, _HEADS):
        monkeypatch.setattr(registry, "_items", dict(registry._items))


@pytest.fixture(autouse=True)
def let_go_of_patched_models() -> Callable[[], None]:
    """A patched model that an earlier test dropped is collected before a test, and not in the middle of it.

    Until then it holds the wrap of the attention interface, which many tests compare before and after.
    """

    def collect() -> None:
        interface = sys.modules.get("mimic_core.edits.interface")
        prompts = sys.modules.get("mimic_core.edits.prompts")
        if interface is None:
            return
        named = sys.modules["mimic_core.edits.named"]
        if named.is_replaced() or any(one.holders for one in (interface.wrapper, prompts.watched_generate)):
            gc.collect()

    collect()
    return collect


@pytest.fixture(scope="session")
def native_ops() -> ModuleType:
    """The ops in C++, from the library that all processes of a run share."""
    from mimic_core.ops import build_native, native

    build_native(NATIVE_FOLDER)
    assert native._ops is not None
    return native._ops


@pytest.fixture(autouse=True)
def _native_or_plain(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, native_ops: ModuleType) -> None:
    """Which route a test takes is not the machine's choice: C++, or plain torch where it is marked so.

    Or where it has the parameter `backend` "plain".
    """
    from mimic_core.ops import native

    plain = getattr(getattr(request.node, "callspec", None), "params", {}).get("backend") == "plain"
    plain = plain or request.node.get_closest_marker("plain") is not None
    monkeypatch.setattr(native, "_ops", None if plain else native_ops)
    monkeypatch.setattr(native, "_looked", True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
