"""`save_pretrained`, `push_to_hub`, `from_pretrained` and the model card."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import mimic_core as mc
from tests.support.cases import BY_NAME, HEADS, fresh_model, model_of, random_shifts
from tests.support.checkpoints import LLAMA, assert_same
from tests.support.hub_stand_in import Hub, Repo

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_hubs_own_client_over_http(tmp_path: Path) -> None:
    fresh_model(LLAMA).save_pretrained(tmp_path / "base")
    files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    with Hub(token="hf_secret") as hub:
        hub.repos["org/base"] = Repo(trees={"main": files})
        environment = {
            **{name: x for name, x in os.environ.items() if not name.startswith("HF_")},
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": str(ROOT),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        done = subprocess.run(
            [sys.executable, str(Path(__file__).parent / "over_http.py"), hub.token],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.stdout.strip().endswith("all of it"), done.stderr[-4000:]
    assert hub.repos["me/vqa"].private
    assert not hub.repos["me/open"].private
    assert set(hub.repos["me/vqa"].trees["v2"]) == {"shifts.json", "shifts.safetensors", "README.md"}
    assert hub.repos["me/vqa"].trees["main"]["README.md"] == hub.repos["me/vqa"].trees["v2"]["README.md"]
    uploads = [token for _, path, token in hub.seen if "commit" in path or "create" in path]
    assert set(uploads) == {hub.token}


@pytest.mark.parametrize("head", HEADS)
def test_a_card_beside_the_files(head: str, tmp_path: Path) -> None:
    model = model_of(LLAMA)
    shifts = random_shifts(model, head)
    shifts.save_pretrained(tmp_path, license="mit", training="Not at all.")
    assert_same(mc.ShiftStack.from_pretrained(tmp_path, model), shifts)
    card = (tmp_path / "README.md").read_text()
    data = yaml.safe_load(card.split("---")[1])
    assert data["library_name"] == "mimic_core"
    assert data["license"] == "mit"
    assert {"shift-head", shifts.name, "llama"} <= set(data["tags"])
    assert "base_model" not in data, "a model without a name"
    assert f"{sum(p.numel() for p in shifts.parameters()):,}" in card
    assert f"{len(shifts)} of 3" in card
    for site in next(iter(shifts)).edits():
        assert f"`{site}`" in card
    assert "Not at all." in card
    if head == "mimic-one-layer":
        assert "`layers=[1]`" in card
    (tmp_path / "README.md").write_text("my own words")
    shifts.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own words"


@pytest.mark.parametrize("name", ["/home/me/secret/model", "./model", "model/with/depth", ""])
def test_a_local_path_is_no_base_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh_model(LLAMA)
    model.config._name_or_path = model.name_or_path = name
    mc.build_shifts(model).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "base_model" not in card
    assert name == "" or name not in card


@pytest.mark.parametrize(
    ("case", "auto"), [("llama", "AutoModelForCausalLM"), ("idefics2", "AutoModelForImageTextToText")]
)
def test_the_class_that_loads_the_model(case: str, auto: str, tmp_path: Path) -> None:
    mc.build_shifts(model_of(BY_NAME[case])).save_pretrained(tmp_path)
    assert f"import {auto} as" in (tmp_path / "README.md").read_text()


def test_nothing_is_pushed_that_could_not_be_loaded() -> None:
    shifts = mc.build_shifts(model_of(LLAMA))
    shifts[0].vector.data.fill_(float("nan"))
    with pytest.raises(mc.CheckpointError, match="holds NaN or infinity"):
        shifts.push_to_hub("me/shifts")
