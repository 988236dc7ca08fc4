"""Checkpoints that are refused: damaged, foreign, of another version or for another model; and pickle, always."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import mimic_core as mc
from tests.support.cases import TEXT, model_of, random_shifts
from tests.support.checkpoints import DESCRIPTION, LLAMA


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound checkpoint of MimIC shifts, to be damaged."""
    mc.save_shifts(random_shifts(model_of(LLAMA), "mimic"), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


Damage = Callable[[Path], object]


def described(**changes: Any) -> Damage:
    def write(folder: Path) -> None:
        (folder / "shifts.json").write_text(json.dumps(DESCRIPTION | changes))

    return write


def with_config(**changes: Any) -> Damage:
    return described(config=DESCRIPTION["config"] | changes)


def text(content: str | bytes) -> Damage:
    return lambda folder: (folder / "shifts.json").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    def write(folder: Path) -> None:
        found = load((folder / "shifts.safetensors").read_bytes())
        change(found)
        (folder / "shifts.safetensors").write_bytes(save(found))

    return write


def cut(name: str, keep: float) -> Damage:
    def write(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return write


def of_another_model(dtype: torch.dtype) -> Damage:
    def write(folder: Path) -> None:
        state = {name: x.to(dtype) for name, x in model_of(LLAMA).state_dict().items()}
        (folder / "shifts.safetensors").write_bytes(save(state))

    return write


UNREADABLE = r"shifts\.safetensors can't be read: .+; the file is damaged or missing"
NO_JSON = r"shifts\.json can't be read as JSON: "
FOREIGN = r"shifts\.json does not describe shifts: expected an object with format 'mimic_core\.shifts'"
CANNOT_MAKE = r"shifts\.json does not describe shifts that this version can build: "
NOT_SHARED = r"shifts\.json says that .* and .* are shared, which they can't be"
MISFIT = r"shifts\.safetensors does not fit its description: "
MISSING_ALL = MISFIT + r"heads\.0\.vector is missing; .+; .+; heads\.1\.vector is missing and \d+ more"


def without(name: str, **changes: Any) -> Damage:
    def write(folder: Path) -> None:
        tensors(lambda t: t.pop(name))(folder)
        described(**changes)(folder)

    return write


REFUSED: dict[str, tuple[Damage, str]] = {
    "no tensors": (lambda folder: (folder / "shifts.safetensors").unlink(), UNREADABLE),
    "empty tensors": (cut("shifts.safetensors", 0), UNREADABLE),
    "truncated header": (cut("shifts.safetensors", 0.01), UNREADABLE),
    "truncated tensors": (cut("shifts.safetensors", 0.9), UNREADABLE),
    "another model's tensors": (of_another_model(torch.float32), MISSING_ALL),
    # Where some checks of values are not implemented.
    "another model's fp8 tensors": (of_another_model(torch.float8_e4m3fn), MISSING_ALL),
    "no JSON": (lambda folder: (folder / "shifts.json").unlink(), NO_JSON),
    "empty JSON": (text(""), NO_JSON),
    "truncated JSON": (cut("shifts.json", 0.7), NO_JSON),
    "not JSON": (text("vectors: 3"), NO_JSON),
    "not text": (text(b"\xff\xfe\x00{}"), NO_JSON),
    "a list": (text("[1, 2]"), FOREIGN),
    "a number": (text("3"), FOREIGN),
    "a model's config": (text('{"model_type": "llama", "hidden_size": 32}'), FOREIGN),
    "another format": (described(format="peft.lora"), FOREIGN),
    "newer version": (described(version=2), r"has version 2, this mimic_core reads version 1; update mimic_core"),
    "no version": (described(version=None), r"has version None, this mimic_core reads version 1"),
    "unknown head": (
        described(head="prefix"),
        CANNOT_MAKE + r"no shift head is called 'prefix'; known: .*function_vector, .*mimic, .*; if the "
        r"shift head is from another package, import it first",
    ),
    "no head": (described(head=None), CANNOT_MAKE),
    "head is a list": (described(head=["mimic"]), CANNOT_MAKE),
    "unknown option": (with_config(temperature=2.0), CANNOT_MAKE + ".*'temperature'"),
    "unknown choice": (with_config(log_z2="some"), CANNOT_MAKE + ".*'attended' or 'all_keys', found 'some'"),
    "no such layer": (with_config(layers=[0, 3]), CANNOT_MAKE + r".*from 0 to 2 .* found \[0, 3\]"),
    "layers of text": (with_config(layers=["first"]), CANNOT_MAKE),
    "no number": (with_config(vector_std="small"), CANNOT_MAKE),
    "no config": (described(config=None), CANNOT_MAKE),
    "no model": (described(model=None), CANNOT_MAKE),
    "model without sizes": (described(model={"model_type": "llama"}), CANNOT_MAKE + ".*'layers'"),
    "layers without sizes": (described(model=DESCRIPTION["model"] | {"layers": [{"index": 0}]}), CANNOT_MAKE),
    "shared, but there": (described(shared={"heads.1.vector": "heads.0.vector"}), NOT_SHARED),
    "shared with nothing": (without("heads.1.vector", shared={"heads.1.vector": "heads.7.vector"}), NOT_SHARED),
    "shared, other shapes": (without("heads.1.vector", shared={"heads.1.vector": "heads.1.gate_bias"}), NOT_SHARED),
    "shared, not known": (described(shared={"heads.9.vector": "heads.0.vector"}), NOT_SHARED),
    "shared, no names": (described(shared=["heads.1.vector"]), NOT_SHARED),
    "shared, a list": (described(shared={"heads.1.vector": ["heads.0.vector"]}), NOT_SHARED),
    "another head's tensors": (described(head="live", config={}), MISFIT + r".*heads\.0\.scale is missing"),
    "missing tensor": (tensors(lambda t: t.pop("heads.1.gate_bias")), MISFIT + r"heads\.1\.gate_bias is missing$"),
    "extra tensor": (tensors(lambda t: t.update(more=torch.ones(1))), MISFIT + "more is not known$"),
    "extra layer": (
        tensors(lambda t: t.update({"heads.3.vector": torch.ones(4, 24)})),
        MISFIT + r"heads\.3\.vector is not known$",
    ),
    "wrong shape": (
        tensors(lambda t: t.update({"heads.0.vector": torch.ones(4, 8)})),
        MISFIT + r"heads\.0\.vector is \[4, 8\], not \[4, 24\]$",
    ),
    "transposed": (
        tensors(lambda t: t.update({"heads.2.gate_weight": torch.ones(24, 4)})),
        MISFIT + r"heads\.2\.gate_weight is \[24, 4\], not \[4, 24\]$",
    ),
    "NaN": (
        tensors(lambda t: t["heads.2.vector"][3].fill_(torch.nan)),
        MISFIT + r"heads\.2\.vector holds NaN or infinity$",
    ),
    "infinity": (
        tensors(lambda t: t["heads.0.gate_bias"].fill_(-torch.inf)),
        MISFIT + r"heads\.0\.gate_bias holds NaN or infinity$",
    ),
}


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED)
def test_damaged_files_are_refused(damage: Damage, message: str, folder: Path, no_shape_checks: None) -> None:
    damage(folder)
    with pytest.raises(mc.CheckpointError, match=message) as caught:
        mc.load_shifts(folder, model_of(LLAMA))
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_hidden_layers": 4}, r"made for 3 decoder layers \(llama\), not 4 \(llama\)"),
        ({"num_hidden_layers": 2}, r"made for 3 decoder layers \(llama\), not 2 \(llama\)"),
        ({"head_dim": 16}, r"made for head_dim 24 in layer 0 \(llama\), not 16 \(llama\)"),
        ({"num_attention_heads": 8}, r"made for heads 4 in layer 0 \(llama\), not 8 \(llama\)"),
        ({"hidden_size": 48}, r"made for hidden_size 32 in layer 0 \(llama\), not 48 \(llama\)"),
    ],
)
def test_a_model_of_other_sizes_is_refused(sizes: dict[str, int], message: str, folder: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**{**TEXT, "head_dim": 24, **sizes}))
    with pytest.raises(mc.CheckpointError, match=rf"shifts at .* do not fit this model: they were {message}") as caught:
        mc.load_shifts(folder, model)
    assert str(folder) in str(caught.value)


def test_a_model_without_an_adapter_is_refused(folder: Path) -> None:
    with pytest.raises(mc.UnsupportedModelError, match=r"no adapter is registered for torch\S+Linear"):
        mc.load_shifts(folder, nn.Linear(2, 2))


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_pickle_is_ever_read(zipped: bool, folder: Path, tmp_path: Path) -> None:
    model, proof = model_of(LLAMA), tmp_path / "executed"
    content = {"heads.0.vector": Payload(proof)}
    # Beside the tensors, where a loader with a fallback would look, and in their place.
    for name in ("shifts.pt", "shifts.bin", "pytorch_model.bin"):
        torch.save(content, folder / name, _use_new_zipfile_serialization=zipped)
    mc.load_shifts(folder, model)
    (folder / "shifts.safetensors").unlink()
    with pytest.raises(mc.CheckpointError, match=UNREADABLE):
        mc.load_shifts(folder, model)
    (folder / "shifts.pt").rename(folder / "shifts.safetensors")
    with pytest.raises(mc.CheckpointError, match=UNREADABLE):
        mc.load_shifts(folder, model)
    assert not proof.exists()
    # Under another name: newer versions of torch.load take the file's word for it, too.
    shutil.copy(folder / "shifts.safetensors", tmp_path / "shifts.pt")
    torch.load(tmp_path / "shifts.pt", weights_only=False)
    assert proof.exists(), "the payload was no payload"
