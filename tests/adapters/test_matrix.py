"""The support matrix: a slice of it run here, and the command that writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

import mimic_core as mc
from tests.zoo import matrix
from tests.zoo import page as matrix_page
from tests.zoo.matrix import Place

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "support-matrix.md"

# Chosen for variety; what each adds to those before it.
SLICE = {
    "qwen2_5_vl": "rope of several axes, image tokens among the text",
    "qwen3_vl": "image features added between layers",
    "paligemma": "a prefix that sees both ways",
    "gemma3": "two kinds of windows, q and k norm",
    "gemma4": "heads of several widths",
    "mllama": "cross-attention layers among the others",
    "qwen3_5": "linear attention in most layers",
    "llama4": "chunks, experts, feed_forward",
    "chameleon": "layers that return tuples",
    "blip-2": "a decoder whose last matrix sees tokens flattened",
    "fuyu": "fused queries, keys and values",
    "kosmos-2": "a norm before the projection",
    "pi0": "an action expert beside the decoder",
    "blip": "attention by products, beside cross-attention of the same class",
    "gemma2": "softcap",
    "gpt_oss": "sinks",
    "deepseek_v3": "values narrower than queries",
    "deepseek_v32": "a choice of keys",
    "gpt_bigcode": "one key/value head",
    "gpt2": "fused, with another name for everything",
    "nemotron_h": "attention in some blocks only",
    "zamba2": "a transformer block beside a state-space layer",
    "longcat_flash": "two attention modules in a layer",
    "diffllama": "two calls of attention in a layer",
    "falcon": "torch's SDPA in a file of transformers",
    "bloom": "attention by products of rows of heads, with ALiBi",
    "blt": "a decoder inside decoders",
}
OUTPUTS_ALONE = {"diffllama"}


def place(model_type: str) -> Place:
    found = [p for p in matrix.every_place() if p.model_type == model_type]
    if not found:
        pytest.skip(f"this transformers has no {model_type}")
    return found[0]


# Every third is enough where only what is quick is run, as with the oldest versions.
_MARKS = [(), (pytest.mark.newest,), (pytest.mark.exhaustive,)]


@pytest.mark.parametrize("model_type", [pytest.param(name, marks=_MARKS[i % 3]) for i, name in enumerate(SLICE)])
@pytest.mark.usefixtures("no_shape_checks")
def test_slice(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if model_type == "gemma2":  # the sdpa of older transformers forgets its softcap, so the LSE is refused there
        monkeypatch.setattr(matrix, "ATTENTION", ("eager",))
    row = matrix.check_type(place(model_type), quick=True)
    failures = [run["details"][law] for run in row["runs"] for law, v in run.get("laws", {}).items() if v == "failed"]
    assert failures == []
    assert matrix_page.serves(row) == ("outputs alone" if model_type in OUTPUTS_ALONE else "MimIC and LIVE")
    assert any("laws" in run for run in row["runs"])


# --- the command


def test_every_type_of_transformers_is_in_the_matrix() -> None:
    places = matrix.every_place()
    assert len(places) == len(set(places)) > 180
    assert {p.task for p in places} == {"image-text-to-text", "causal-lm"}
    assert {"llava", "idefics2", "mllama"} <= {p.model_type for p in places if p.task == "image-text-to-text"}
    assert {"llama", "gpt2", "mamba"} <= {p.model_type for p in places if p.task == "causal-lm"} <= {*CONFIG_MAPPING}


@pytest.mark.newest
def test_a_row_comes_from_a_process_of_its_own_and_one_that_dies_costs_one(tmp_path: Path) -> None:
    kept, gpt2 = Place("llava", "image-text-to-text"), Place("gpt2", "causal-lm")
    (tmp_path / kept.file).write_text(json.dumps({"type": "llava", "task": kept.task, "runs": [], "refused": "kept"}))
    rows = {row["type"]: row for row in matrix.run([kept, gpt2], tmp_path, limit=0.0)}
    assert rows["llava"]["refused"] == "kept"
    assert rows["gpt2"]["crashed"] == "took more than 0 seconds"
    assert not (tmp_path / gpt2.file).exists(), "to be tried again"
    assert matrix_page.serves(rows["gpt2"]) == "failed"
    rows = {row["type"]: row for row in matrix.run([gpt2, Place("no_such_type", "causal-lm")], tmp_path)}
    assert matrix_page.serves(rows["gpt2"]) == "MimIC and LIVE"
    assert {(run["attention"], run["images"]) for run in rows["gpt2"]["runs"]} == {("sdpa", False), ("eager", False)}
    assert "no_such_type" in rows["no_such_type"]["refused"]
    assert json.loads((tmp_path / "causal-lm.gpt2.json").read_text()) == rows["gpt2"]


# --- the page


def row(**changes: Any) -> dict[str, Any]:
    laws = {law.name: "passed" for law in mc.testing.LAWS} | changes.pop("laws", {})
    details = {law: f"why {law}" for law, verdict in laws.items() if verdict != "passed"}
    run = {"attention": "sdpa", "images": False, "laws": laws, "details": details, "seconds": 1.0}
    layers = [{"sites": list(mc.types.SITES), "missing": ""}, {"sites": ["mlp_out"], "missing": "no | attention"}]
    made = {"type": "x", "task": "causal-lm", "class": "X", "adapter": "A", "layers": layers, "runs": [run]}
    return made | {"versions": {"transformers": "9"}} | changes


def test_what_a_type_is_served_with() -> None:
    serves = matrix_page.serves
    assert serves(row()) == "MimIC and LIVE"
    assert serves(row(laws={"lse": "not applicable"})) == "without the gate"
    assert serves(row(layers=[{"sites": ["mlp_out"], "missing": ""}])) == "outputs alone"
    assert serves(row(laws={"padding": "failed"})) == "failed"
    assert serves(row(laws={"LIVE": "not applicable"})) == "failed", "nothing passes by being skipped"
    assert serves(row(runs=[])) == "failed"
    assert serves(row(runs=[], refused="no way")) == "refused"


def test_page_shows_the_worst_of_the_runs_and_why() -> None:
    bad = row(laws={"padding": "failed", "lse": "not applicable"})
    bad["runs"].append(row()["runs"][0])
    lines = matrix_page.lines_of([bad], [row(versions={"transformers": "5"})])
    text = matrix_page.page(lines)
    shown = [line for line in text.splitlines() if line.startswith("| `x` |")]
    short, cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in shown)
    names = [law.name for law in mc.testing.LAWS]
    why = "no / attention; padding: why padding"
    assert short == ["`x`", "failed", "MimIC and LIVE", why]
    assert cells[1:5] == ["X", "failed", "MimIC and LIVE", "1/2"]
    assert cells[5 + names.index("padding")] == "✗"
    assert cells[5 + names.index("lse")] == "✓"
    assert cells[-1] == why
    assert "with transformers 9. The column `lowest` has the result with transformers 5." in text
    both = matrix_page.lines_of([bad, row()], [])
    assert matrix_page.summary(both) == "Causal language models: 2 types; 1 MimIC and LIVE, 1 failed"


def test_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    lines = matrix_page.lines_of([row(), row(type="y", refused="no way", runs=[])], [row()])
    matrix_page.write(lines, tmp_path / "page.md")
    assert matrix_page.read(tmp_path / "page.md") == lines
    assert (tmp_path / "page.md").read_text() == matrix_page.page(lines)
    assert len((tmp_path / "page.jsonl").read_text().splitlines()) == 3, "the versions, and a line a type"


def test_some_types_are_renewed() -> None:
    before = matrix_page.lines_of([row(), row(type="b"), row(type="y", task="image-text-to-text")], [row(type="b")])
    anew = matrix_page.lines_of([row(type="b", laws={"LIVE": "failed"}), row(type="a")], [])
    lines = matrix_page.updated(before, anew)
    assert [(line["type"], line["served"], line["lowest"]) for line in lines[1:]] == [
        ("y", "MimIC and LIVE", "not there"),
        ("a", "MimIC and LIVE", "not there"),
        ("b", "failed", "MimIC and LIVE"),
        ("x", "MimIC and LIVE", "not there"),
    ]
    assert lines[0] == before[0]
    with pytest.raises(ValueError, match="the page is of transformers 9, these types ran with transformers 10"):
        matrix_page.updated(before, matrix_page.lines_of([row(versions={"transformers": "10"})], []))


def test_the_page_in_the_docs_is_of_its_lines() -> None:
    lines = matrix_page.read(PAGE)
    assert PAGE.read_text() == matrix_page.page(lines)
    assert PAGE.with_suffix(".jsonl").stat().st_size < 100_000
    assert len(lines) > 200
    assert not [line["type"] for line in lines[1:] if line["served"] == "failed"]
