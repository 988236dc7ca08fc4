"""Shifts from and to the Hugging Face hub, without a network: a cache as the hub's client leaves it, calls recorded."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from hashlib import sha1
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects

import mimic_core as mc
from tests.support.cases import HEADS, model_of, random_shifts
from tests.support.checkpoints import LLAMA, NAMES, all_random, assert_same

COMMITS = ("0123456789abcdef0123456789abcdef01234567", "fedcba9876543210fedcba9876543210fedcba98")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no way to the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def put(cache: Path, repo: str, commit: str, refs: list[str], files: Mapping[str, bytes]) -> None:
    """What downloading a commit leaves: blobs by hash, a snapshot of links to them, refs that name the commit."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for place in (folder / "blobs", folder / "refs", snapshot):
        place.mkdir(parents=True, exist_ok=True)
    for ref in refs:
        (folder / "refs" / ref).write_text(commit)
    for name, content in files.items():
        blob = sha1(content).hexdigest()
        (folder / "blobs" / blob).write_bytes(content)
        (snapshot / name).symlink_to(os.path.join("..", "..", "blobs", blob))


def saved(shifts: mc.ShiftStack, folder: Path) -> dict[str, bytes]:
    mc.save_shifts(shifts, folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("head", HEADS)
def test_a_cached_repository_loads_offline(head: str, cache: Path, tmp_path: Path) -> None:
    shifts = all_random(model_of(LLAMA), head)
    put(cache, "user/vqa-shifts", COMMITS[0], ["main"], saved(shifts, tmp_path / "local"))
    assert_same(mc.load_shifts("user/vqa-shifts", model_of(LLAMA)), shifts)


def test_revisions(cache: Path, tmp_path: Path) -> None:
    model = model_of(LLAMA)
    old, new = random_shifts(model, "live"), random_shifts(model, "mimic")
    put(cache, "user/shifts", COMMITS[0], ["v1"], saved(old, tmp_path / "old"))
    put(cache, "user/shifts", COMMITS[1], ["main", "v2"], saved(new, tmp_path / "new"))
    for revision, wanted in {"v1": old, "v2": new, "main": new, None: new}.items():
        assert_same(mc.load_shifts("user/shifts", model, revision=revision), wanted)
    with pytest.raises(mc.CheckpointError, match="no shifts at 'user/shifts'"):
        mc.load_shifts("user/shifts", model, revision="v3")


def test_a_local_directory_goes_before_the_hub(cache: Path, tmp_path: Path) -> None:
    model = model_of(LLAMA)
    here, there = random_shifts(model, "live"), random_shifts(model, "mimic")
    put(cache, "user/shifts", COMMITS[0], ["main"], saved(there, tmp_path / "there"))
    assert_same(mc.load_shifts("user/shifts", model), there)
    mc.save_shifts(here, "user/shifts")
    assert_same(mc.load_shifts("user/shifts", model), here)


@pytest.mark.parametrize(
    "source", ["user/unknown", "unknown", "user/shifts/deeper", "./unknown", "/no/such/folder", "not a name"]
)
def test_nothing_there(source: str, cache: Path) -> None:
    with pytest.raises(
        mc.CheckpointError, match="neither a local directory nor a hub repository that can be reached"
    ) as caught:
        mc.load_shifts(source, model_of(LLAMA))
    assert repr(source) in str(caught.value)


def test_a_file_is_no_checkpoint(cache: Path, tmp_path: Path) -> None:
    saved(random_shifts(model_of(LLAMA), "live"), tmp_path / "local")
    with pytest.raises(mc.CheckpointError, match="neither a local directory nor"):
        mc.load_shifts(tmp_path / "local" / "shifts.safetensors", model_of(LLAMA))


@pytest.mark.parametrize("kept", NAMES)
def test_half_a_snapshot(kept: str, cache: Path, tmp_path: Path) -> None:
    files = saved(random_shifts(model_of(LLAMA), "mimic"), tmp_path / "local")
    put(cache, "user/shifts", COMMITS[0], ["main"], {kept: files[kept]})
    with pytest.raises(mc.CheckpointError, match=r"shifts\.(json|safetensors) can't be read"):
        mc.load_shifts("user/shifts", model_of(LLAMA))


def http_error(name: str) -> Exception:
    """An error of the HTTP client that huggingface_hub is built on, which differs between its versions."""
    base = next(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")
    return getattr(sys.modules[base.__module__.partition(".")[0]], name)("something on the way")


@pytest.mark.parametrize("name", ["ConnectError", "ConnectTimeout", "ReadTimeout", "ReadError", "ProxyError"])
def test_a_hub_out_of_reach(name: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise http_error(name)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", fail)
    with pytest.raises(mc.CheckpointError, match="no shifts at 'user/shifts': .*something on the way"):
        mc.load_shifts("user/shifts", model_of(LLAMA))


Calls = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What is asked of the hub, and which files of the folder each upload would send."""
    calls: Calls = []

    def record(name: str) -> Callable[..., Any]:
        def method(api: huggingface_hub.HfApi, *args: Any, **kwargs: Any) -> Any:
            given = dict(zip(["repo_id"], args, strict=False)) | kwargs
            if folder := given.get("folder_path"):
                there = [str(p.relative_to(folder)) for p in sorted(Path(folder).rglob("*")) if p.is_file()]
                given["sent"] = {
                    path: Path(folder, path).read_bytes()
                    for path in filter_repo_objects(there, allow_patterns=given["allow_patterns"])
                }
            calls.append((name, given))
            return SimpleNamespace(commit_url="https://hub/commit")

        return method

    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, record(name))
    return calls


def test_push_sends_the_two_files(calls: Calls, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "local"
    for other in ("README.md", "model.safetensors", "old/shifts.json", "shifts.json.bak", ".git/shifts.json"):
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        (folder / other).write_text("not to be sent")
    shifts = random_shifts(model_of(LLAMA), "mimic")
    mc.save_shifts(shifts, folder, push_to_hub="user/vqa-shifts")
    assert [name for name, _ in calls] == ["create_repo", "upload_folder"]
    created, uploaded = (given for _, given in calls)
    assert created == {"repo_id": "user/vqa-shifts", "private": None, "exist_ok": True}
    assert uploaded["repo_id"] == "user/vqa-shifts"
    assert sorted(uploaded["sent"]) == NAMES
    # What was sent is what comes back.
    put(cache, "user/vqa-shifts", COMMITS[0], ["main"], uploaded["sent"])
    assert_same(mc.load_shifts("user/vqa-shifts", model_of(LLAMA)), shifts)


def test_nothing_is_pushed_unasked_or_half_saved(calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shifts = random_shifts(model_of(LLAMA), "live")
    mc.save_shifts(shifts, tmp_path)

    def disk_full(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.write_bytes", disk_full)
    with pytest.raises(OSError, match="disk full"):
        mc.save_shifts(shifts, tmp_path, push_to_hub="user/shifts")
    assert calls == []
