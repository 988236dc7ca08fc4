"""Checkpoints made to harm: each loads as finite shifts that fit, or is a CheckpointError, and nothing runs."""

from __future__ import annotations

import json
import os
import pickle
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mimic_core as mc
from tests.support.cases import HEADS, fresh_model, model_of, random_shifts
from tests.support.checkpoints import LLAMA, NAMES

Files = dict[str, bytes]


def flipped(files: Files, chance: random.Random) -> None:
    name = chance.choice(NAMES)
    content = bytearray(files[name])
    for _ in range(chance.choice((1, 1, 2, 8, 64))):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    files[name] = bytes(content)


def cut(files: Files, chance: random.Random) -> None:
    name = chance.choice(NAMES)
    files[name] = files[name][: chance.randrange(len(files[name]))]


def grown(files: Files, chance: random.Random) -> None:
    name = chance.choice(NAMES)
    at = chance.randrange(len(files[name]))
    files[name] = files[name][:at] + chance.randbytes(chance.choice((1, 8, 1000))) + files[name][at:]


def lying_header(files: Files, chance: random.Random) -> None:
    size = chance.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1, chance.randrange(10_000)))
    files["shifts.safetensors"] = size.to_bytes(8, "little") + files["shifts.safetensors"][8:]


def other_offsets(files: Files, chance: random.Random) -> None:
    content = files["shifts.safetensors"]
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = chance.choice([key for key in header if key != "__metadata__"])
    change = chance.choice(("data_offsets", "shape", "dtype", "rename", "drop"))
    if change == "data_offsets":
        header[name][change] = [chance.randrange(-5, 5000), chance.randrange(-5, 10**12)]
    elif change == "shape":
        header[name][change] = chance.choice(([], [0], [2**40, 2**40], [-1], ["a"], [4, 24, 1]))
    elif change == "dtype":
        header[name][change] = chance.choice(("F16", "F64", "I64", "U8", "BF16", "F8_E4M3", "nothing", None, 3))
    elif change == "rename":
        header[chance.choice(("", "x", "heads.9.vector", "__metadata__", "../x"))] = header.pop(name)
    else:
        del header[name]
    text = json.dumps(header).encode()
    files["shifts.safetensors"] = len(text).to_bytes(8, "little") + text + content[8 + size :]


JUNK: list[Any] = [None, True, -1, 0, 10**30, 1e308, float("nan"), "", "x" * 1000, [], [[]], {}, {"a": 1}, ["query"]]


def other_json(files: Files, chance: random.Random) -> None:
    """A value anywhere in the description replaced, dropped or doubled."""
    description = json.loads(files["shifts.json"])
    spot: Any = description
    while True:
        keys = list(spot) if isinstance(spot, dict) else list(range(len(spot)))
        key = chance.choice(keys)
        inner = spot[key]
        if not isinstance(inner, dict | list) or not inner or chance.random() < 0.2:
            break
        spot = inner
    change = chance.choice(("replace", "drop", "rename"))
    if change == "drop":
        del spot[key]
    elif change == "rename" and isinstance(spot, dict):
        spot["x" + str(key)] = spot.pop(key)
    else:
        spot[key] = chance.choice(JUNK)
    files["shifts.json"] = json.dumps(description).encode()


def swapped(files: Files, chance: random.Random) -> None:
    files["shifts.json"], files["shifts.safetensors"] = files["shifts.safetensors"], files["shifts.json"]


MUTATIONS: list[Callable[[Files, random.Random], None]] = [
    flipped,
    cut,
    grown,
    lying_header,
    other_offsets,
    other_json,
    other_json,
    swapped,
]


def outcomes(head: str, seed: int, count: int, folder: Path) -> dict[str, int]:
    """How many mutated checkpoints of a head are refused, and how many load."""
    model = model_of(LLAMA)
    mc.save_shifts(random_shifts(model, head), folder)
    sound = {name: (folder / name).read_bytes() for name in NAMES}
    chance, found = random.Random(seed), {"refused": 0, "loaded": 0}
    for _ in range(count):
        files = dict(sound)
        if chance.random() < 0.5:  # otherwise the sum of the tensors' file refuses most before they are looked at
            described = json.loads(files["shifts.json"])
            del described["sha256"]
            files["shifts.json"] = json.dumps(described).encode()
        for _ in range(chance.choice((1, 1, 1, 2))):
            try:
                chance.choice(MUTATIONS)(files, chance)
            except (ValueError, IndexError, KeyError, AttributeError):
                continue  # what an earlier mutation has left is no JSON
        for name, content in files.items():
            (folder / name).write_bytes(content)
        try:
            shifts = mc.load_shifts(folder, model)
        except mc.CheckpointError:
            found["refused"] += 1
            continue
        assert all(torch.isfinite(x).all() for x in shifts.state_dict().values())
        with torch.no_grad(), mc.patch(model, shifts):
            model(**LLAMA.inputs())
        found["loaded"] += 1
    return found


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.filterwarnings("ignore:shifts at")
def test_mutated_checkpoints_load_whole_or_are_refused(head: str, tmp_path: Path, no_shape_checks: None) -> None:
    found = outcomes(head, seed=list(HEADS).index(head), count=40, folder=tmp_path)
    assert found["refused"] >= 10


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:shifts at")
def test_ten_thousand_mutated_checkpoints(tmp_path: Path, no_shape_checks: None) -> None:
    each = -(-10_000 // len(HEADS))
    found = [outcomes(head, 1000 + i, each, tmp_path / head) for i, head in enumerate(HEADS)]
    assert sum(x["refused"] for x in found) > 5000
    assert sum(x["loaded"] for x in found) > 100


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    mc.save_shifts(random_shifts(model_of(LLAMA), "mimic"), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def deep(folder: Path) -> None:
    (folder / "shifts.json").write_text("[" * 200_000 + "]" * 200_000)


def huge_description(folder: Path) -> None:
    with (folder / "shifts.json").open("ab") as file:
        file.truncate(1 << 36)  # a hole: 64 GiB that take no room


def huge_tensors(folder: Path) -> None:
    with (folder / "shifts.safetensors").open("ab") as file:
        file.truncate(1 << 36)


def link_to(name: str, target: str) -> Callable[[Path], None]:
    def link(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return link


def pipe(folder: Path) -> None:
    (folder / "shifts.json").unlink()
    os.mkfifo(folder / "shifts.json")


def many_layers(folder: Path) -> None:
    described = json.loads((folder / "shifts.json").read_text())
    described["model"]["layers"] *= 10_000
    (folder / "shifts.json").write_text(json.dumps(described))


class RanError(Exception):
    """What unpickling would raise."""


class Bomb:
    def __reduce__(self) -> Any:
        return exec, ("raise __import__('tests.checkpoint.test_checkpoint_hostile').RanError",)


def a_pickle(folder: Path) -> None:
    (folder / "shifts.safetensors").write_bytes(pickle.dumps(Bomb()))


def a_torch_file(folder: Path) -> None:
    torch.save({"heads.0.vector": Bomb()}, folder / "shifts.safetensors")


HARM = {
    "deep nesting": deep,
    "a huge description": huge_description,
    "huge tensors": huge_tensors,
    "endless description": link_to("shifts.json", "/dev/zero"),
    "endless tensors": link_to("shifts.safetensors", "/dev/zero"),
    "a link to a folder": link_to("shifts.safetensors", "/"),
    "a link to itself": link_to("shifts.json", "shifts.json"),
    "a pipe": pipe,
    "30,000 layers": many_layers,
    "a pickle": a_pickle,
    "a torch file": a_torch_file,
}


@pytest.mark.parametrize("harm", HARM)
def test_what_would_hang_fill_the_memory_or_run_is_refused(harm: str, folder: Path) -> None:
    HARM[harm](folder)
    with pytest.raises(mc.CheckpointError):
        mc.load_shifts(folder, model_of(LLAMA))


def test_files_that_are_replaced_while_they_are_read(tmp_path: Path) -> None:
    """Two stacks saved in turns to one folder: what loads is one or the other, never a mixture."""
    model = fresh_model(LLAMA)
    stacks = [random_shifts(model, head) for head in ("mimic", "mimic-all-keys")]
    mc.save_shifts(stacks[0], tmp_path)
    stop, loaded, refused = threading.Event(), 0, 0

    def write() -> None:
        while not stop.is_set():
            for shifts in stacks:
                mc.save_shifts(shifts, tmp_path)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(100):
            try:
                found = mc.load_shifts(tmp_path, model)
            except mc.CheckpointError as error:
                assert "is not the file that" in str(error)  # noqa: PT017 - either outcome is right
                refused += 1
                continue
            wanted = next(shifts for shifts in stacks if shifts.config == found.config)
            assert all(torch.equal(x, wanted.state_dict()[name]) for name, x in found.state_dict().items())
            loaded += 1
    finally:
        stop.set()
        writer.join(timeout=60)
    assert loaded
