"""Names: put in by decorators and by other packages' entry points, and what a wrong one is told."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

import mimic_core
from mimic_core import UnknownNameError, UnsupportedModelError, heads
from mimic_core.registry import Registry

Install = Callable[..., None]


@pytest.fixture
def registry() -> Registry[object]:
    return Registry("thing", group="mimic_core.test_things")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a package of one module and its entry points, the way pip leaves it on the path; undone afterwards."""
    before = set(sys.modules)

    def put(module: str, source: str, entry_points: str) -> None:
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(entry_points)
        if str(tmp_path) not in sys.path:
            monkeypatch.syspath_prepend(str(tmp_path))

    yield put
    for name in set(sys.modules) - before:
        if name.startswith("plugin_"):
            del sys.modules[name]


def test_register_and_get(registry: Registry[object]):
    thing, other = object(), object()
    assert registry.register("b", "a")(thing) is thing
    registry.register("c")(other)
    assert registry.get("a") is registry.get("b") is thing
    assert registry.get("c") is other
    assert list(registry) == ["a", "b", "c"]
    assert "a" in registry
    assert "d" not in registry
    assert 3 not in registry


def test_decorator(registry: Registry[object]):
    @registry.register("made")
    class Made:
        pass

    assert registry.get("made") is Made


def test_unknown_name_is_told_the_known_ones(registry: Registry[object]):
    with pytest.raises(UnknownNameError, match=r"^no thing is called 'x'; known: none$"):
        registry.get("x")
    registry.register("b", "a")(object())
    with pytest.raises(UnknownNameError, match=r"^no thing is called 'x'; known: a, b$"):
        registry.get("x")


def test_a_name_is_needed(registry: Registry[object]):
    with pytest.raises(ValueError, match="a thing needs at least one name"):
        registry.register()


def test_a_clash_registers_nothing(registry: Registry[object]):
    first, second = object(), object()
    registry.register("taken")(first)
    with pytest.raises(ValueError, match=r"thing 'taken' is already registered as <object object"):
        registry.register("free", "taken")(second)
    assert registry.get("taken") is first
    assert "free" not in registry
    registry.register("taken")(first)  # the same object again is no clash


def test_a_class_defined_again_replaces_itself(registry: Registry[object]):
    def define() -> Any:
        @registry.register("cell")
        class Cell:
            pass

        return Cell

    first, second = define(), define()
    assert first is not second
    assert registry.get("cell") is second

    with pytest.raises(ValueError, match="already registered"):
        registry.register("cell")(type("Other", (), {}))
    # Instances of one class are different things, though class and module are the same.
    registry.register("instance")(first())
    with pytest.raises(ValueError, match="already registered"):
        registry.register("instance")(first())


def test_registries_do_not_share(registry: Registry[object]):
    registry.register("mine")(object())
    assert "mine" not in Registry("thing", group="mimic_core.test_things")


def test_packages_are_read_again_when_one_is_installed(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(
        "mimic_core.registry.entry_points", lambda group: read.append(group) or entry_points(group=group)
    )
    registry = Registry("thing", group="mimic_core.read_once")
    for i, name in enumerate(("first", "second")):  # a new folder on the path; a new package in that folder
        os.utime(tmp_path, (1, 1))
        for _ in range(3):
            assert name not in registry
            assert list(registry) == ["first"][:i]
        install(f"plugin_{name}", "thing = 1", f"[mimic_core.read_once]\n{name} = plugin_{name}:thing\n")
        assert registry.get(name) == 1
    assert len(read) == 4, "before and after each: the time of the folder was changed between"


def test_entry_point(registry: Registry[object], install: Install):
    install(
        "plugin_things",
        "class Thing: pass\nclass Nested:\n    inner = Thing\n",
        "[mimic_core.test_things]\nfrom_afar = plugin_things:Thing\nnested = plugin_things:Nested.inner\n"
        "[mimic_core.other_things]\nelsewhere = plugin_things:Thing\n",
    )
    assert list(registry) == ["from_afar", "nested"], "known by name"
    assert "from_afar" in registry
    assert "plugin_things" not in sys.modules, "and not loaded before it is asked for"
    thing = registry.get("from_afar")
    assert thing is sys.modules["plugin_things"].Thing
    assert registry.get("from_afar") is registry.get("nested") is thing
    with pytest.raises(UnknownNameError, match="no thing is called 'elsewhere'; known: from_afar, nested"):
        registry.get("elsewhere")


def test_what_is_registered_goes_before_an_entry_point(registry: Registry[object], install: Install):
    install("plugin_late", "raise RuntimeError('loaded')", "[mimic_core.test_things]\nname = plugin_late:Thing\n")
    thing = object()
    registry.register("name")(thing)
    assert registry.get("name") is thing
    assert list(registry) == ["name"]


def test_entry_point_that_registers_itself(registry: Registry[object], install: Install):
    install(
        "plugin_itself",
        "import mimic_core\n"
        "@mimic_core.register_head('itself')\n"
        "class Head(mimic_core.ShiftHead):\n    site = 'mlp_out'\n",
        "[mimic_core.heads]\nitself = plugin_itself:Head\n",
    )
    assert heads.head_class("itself") is sys.modules["plugin_itself"].Head
    assert heads.head_class("itself").name == "itself"


@pytest.mark.parametrize("base", ["ShiftHead", "heads.MimICHead"])
@pytest.mark.parametrize("by", ["name", "config"])
def test_shift_head_of_another_package(by: str, base: str, install: Install):
    with pytest.raises(UnknownNameError, match=r"no shift head is called 'from_afar'; known: .*mimic"):
        heads.head_class("from_afar")
    install(
        "plugin_head",
        "import mimic_core, mimic_core.heads\n"
        "class Config(mimic_core.HeadConfig): pass\n"
        f"class Head(mimic_core.{base}):\n    site, config_class = 'mlp_out', Config\n",
        "[mimic_core.heads]\nfrom_afar = plugin_head:Head\n",
    )
    head = heads.head_class("from_afar") if by == "name" else _found_by_config()
    assert issubclass(head, mimic_core.ShiftHead)
    assert head is sys.modules["plugin_head"].Head
    assert head.name == "from_afar", "a checkpoint is saved under the head's name"


def _found_by_config() -> type[mimic_core.ShiftHead]:
    return heads.head_for_config(importlib.import_module("plugin_head").Config())


def test_adapter_of_another_package(install: Install):
    model = nn.Linear(1, 1)
    model.config = SimpleNamespace(model_type="from_afar")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UnsupportedModelError, match=r"no adapter .* model type 'from_afar', class \S+\.Linear, and"):
        mimic_core.adapter_for(model)
    install(
        "plugin_adapter",
        "from mimic_core import ModelSpec\n"
        "class Adapter:\n"
        "    def spec(self, model): return ModelSpec('from_afar', 1, ())\n"
        "    def decoder(self, model): return model\n"
        "    def module(self, model, layer, site): return model\n",
        "[mimic_core.adapters]\nfrom_afar = plugin_adapter:Adapter\n",
    )
    adapter = mimic_core.adapter_for(model)
    assert type(adapter) is sys.modules["plugin_adapter"].Adapter
    assert isinstance(adapter, mimic_core.AttentionAdapter)
    assert adapter.spec(model).model_type == "from_afar"


def test_registered_by_decorator(install: Install):
    """`register_head` and `register_adapter` share their registries with the entry points."""

    @mimic_core.register_head("by_decorator")
    class Head(mimic_core.ShiftHead):
        site = "mlp_out"

    assert heads.head_class("by_decorator") is Head
    assert Head.name == "by_decorator"
    with pytest.raises(ValueError, match="shift head 'mimic' is already registered"):
        mimic_core.register_head("mimic")(Head)
    with pytest.raises(ValueError, match="adapter 'llava' is already registered"):
        mimic_core.register_adapter("llava")(mimic_core.PathAdapter)
