"""The documentation runs: every Python block of every page, in order, as one program; and its names and links exist.

Beside blocks fenced as `python`, a comment `<!-- setup ... -->` is run at its place: what a page needs and a reader
doesn't have to see. A block fenced as `output` must be what the page has printed since the last one. Nothing else is
run, and no Python block can be left out.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from types import ModuleType

import pytest

import mimic_core as mc
from tests.support.pages import split

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
over_pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

PUBLIC = [f"mc.{name}" for name in mc.__all__]
PUBLIC += [f"mc.ops.{name}" for name in mc.ops.__all__]
PUBLIC += [f"mc.losses.{name}" for name in mc.losses.__all__]


@pytest.fixture
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """A module for a page to run as, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType("page_of_the_docs")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield module
    vars(module).clear()


def run(page: Path, module: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a page; its tracebacks point into it."""
    blocks, _ = split(page.read_text())
    printed = ""
    for block in blocks:
        if block.language in ("python", "setup"):
            code = compile("\n" * block.above + block.text, str(page), "exec", dont_inherit=True)
            exec(code, vars(module))
            printed += capsys.readouterr().out
        elif block.language == "output":
            assert printed == block.text, f"line {block.above} of {page.name} is not what the page prints"
            printed = ""


@over_pages
@pytest.mark.usefixtures("no_shape_checks")
def test_page_runs(page: Path, module: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    if page.name == "serve.md":  # tests/serve runs it, and so does this where vLLM is installed
        pytest.importorskip("vllm", reason="vLLM has an environment of its own")
    run(page, module, capsys)


@over_pages
def test_python_is_fenced_as_python(page: Path) -> None:
    """Under another name it would not be run."""
    blocks, _ = split(page.read_text())
    known = ["", "bash", "console", "json", "math", "output", "python", "setup", "sh", "text", "toml", "yaml"]
    assert {block.language for block in blocks} <= set(known)


@over_pages
def test_relative_links_lead_somewhere(page: Path) -> None:
    _, prose = split(page.read_text())
    prose = re.sub(r"(`+).+?\1", "", prose)
    targets = re.findall(r"\]\(\s*<?([^\s)>]+)", prose) + re.findall(r"(?m)^\s*\[[^\]]+\]:\s*(\S+)", prose)
    targets += re.findall(r"""\b(?:src|href)=["']([^"']+)""", prose)
    for target in targets:
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        path, _, heading = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.is_relative_to(ROOT), f"{target} leads out of the project"
        assert found.exists(), f"{target} leads to nothing"
        if heading and found.suffix == ".md":
            assert heading in headings(found), f"{target}: there is no such heading"


def headings(page: Path) -> set[str]:
    """The anchors GitHub gives the headings of a page."""
    titles = re.findall(r"(?m)^#+\s+(.+?)\s*$", split(page.read_text())[1])
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@over_pages
def test_names_exist(page: Path) -> None:
    for name in set(re.findall(r"\bmc\.([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)", page.read_text())):
        attrgetter(name)(mc)


def test_api_page_lists_exactly_the_public_names() -> None:
    listed = re.findall(r"(?m)^\| `(mc\.[\w.]+)` \|", (ROOT / "docs" / "api.md").read_text())
    assert sorted(listed) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_a_docstring(name: str) -> None:
    doc = attrgetter(name.removeprefix("mc."))(mc).__doc__ or ""
    assert inspect.cleandoc(doc).strip(), f"{name} has no docstring"
    assert not doc.startswith(f"{name.rpartition('.')[2]}("), f"{name} has only the docstring dataclasses make"


PAGE = """# Title

<!-- setup
x = [1]
-->
Prose `with [code](gone.md)`.

```python
import os
x.append(2)
print(os.getcwd() != "", x)
```

```output
True [1, 2]
```

````text
```python
raise SystemExit("text, not code")
```
````

1. A list:

   ~~~python
   if x == [1, 2]:
       raise ValueError("line 28")
   ~~~
"""


def test_a_page_is_one_program(tmp_path: Path, module: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    with pytest.raises(ValueError, match="line 28") as caught:
        run(page, module, capsys)
    assert (str(caught.traceback[-1].path), caught.traceback[-1].lineno + 1) == (str(page), 28)
    page.write_text(PAGE.replace("True [1, 2]", "True [1]").replace("== [1, 2]", "== [1]"))
    with pytest.raises(AssertionError, match="not what the page prints"):
        run(page, ModuleType("again"), capsys)


def test_blocks_of_a_page() -> None:
    blocks, prose = split(PAGE)
    assert [block.language for block in blocks] == ["setup", "python", "output", "text", "python"]
    assert [line for line in prose.splitlines() if line] == ["# Title", "Prose `with [code](gone.md)`.", "1. A list:"]
    with pytest.raises(AssertionError, match="starts on line 1 has no end"):
        split("```python\nx = 1\n")


def test_the_changelog_is_of_this_version() -> None:
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == mc.__version__


def test_the_map_of_the_code_names_what_is_there() -> None:
    paths = set(re.findall(r"`([\w./*]+/[\w./*]*)`", (ROOT / "CONTRIBUTING.md").read_text()))
    assert len(paths) > 10
    folders = (ROOT, ROOT / "mimic_core")
    assert [path for path in paths if not any(list(folder.glob(path)) for folder in folders)] == []


def test_the_reference_has_every_public_name() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    shown = {name for path in re.findall(r"^::: mimic_core\.(\S+)$", text, re.MULTILINE) for name in path.split(".")}
    named = [getattr(mc, name) for name in mc.__all__]
    errors = {found.__name__ for found in named if isinstance(found, type) and issubclass(found, Exception)}
    assert len(errors) > 3
    assert set(mc.__all__) - errors <= shown
    assert "errors" in shown


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
