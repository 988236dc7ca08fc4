"""Saved shifts: what is written, and that it comes back exactly."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

import mimic_core as mc
from mimic_core import heads
from tests.support.cases import BY_NAME, CASES, HEADS, Case, logits_of, model_of, random_shifts
from tests.support.checkpoints import DESCRIPTION, LLAMA, NAMES, all_random, assert_same

PER_HEAD = {"vector": [4, 24], "gate_weight": [4, 24], "gate_bias": [4]}
KEYS: dict[str, dict[str, list[int]]] = {
    "mimic": PER_HEAD,
    "mimic-all-keys": PER_HEAD,
    "mimic-shared": {"vector": [96], "gate_weight": [96], "gate_bias": []},
    "mimic-vector-only": {"vector": [4, 24]},
    "mimic-shared-vector-only": {"vector": [96]},
    "mimic-and-mlp": {**PER_HEAD, "mlp_vector": [32]},
    "mimic-one-layer": PER_HEAD,
    "live": {"vector": [32], "scale": []},
    "task-vector": {"vector": [32], "weight": []},
    "function-vector": {"vector": [32]},
    "attn-bias": {"vector": [32]},
    "mlp-bias": {"vector": [32]},
    "icv": {"vector": [32]},
    "caa": {"vector": [32]},
    "i2cl": {"attn_scales": [2], "attn_vector": [32], "mlp_scales": [2], "mlp_vector": [32]},
    "m2iv": {"attn_vector": [32], "mlp_vector": [32]},
    "virtual-kv": {"key": [4, 3, 24], "value": [4, 3, 24], "weight": [1]},
    "virtual-kv-low-rank": {
        **{name: [4, 3, 2] for name in ("key_left", "value_left")},
        **{name: [4, 2, 24] for name in ("key_right", "value_right")},
        "weight": [1],
    },
    "ia3": {"key_scale": [2, 24], "value_scale": [2, 24], "mlp_scale": [48]},
    "loreft": {"rotation": [2, 32], "weight": [2, 32], "bias": [2]},
    "mtv": {"vector": [4, 24], "weight": [4]},
    "hyper-icl": {"u_q": [4, 24, 2], "u_k": [4, 24, 2], "gate_weight": [4, 24], "gate_bias": [4]},
    "live-layer-out": {"vector": [32], "scale": []},
    "live-attn-out": {"vector": [32], "scale": []},
}


def listed(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_round_trip(case: Case, head: str, tmp_path: Path) -> None:
    model = model_of(case)
    shifts = all_random(model, head)
    mc.save_shifts(shifts, tmp_path / "new" / "folder")
    assert listed(tmp_path / "new" / "folder") == NAMES
    loaded = mc.load_shifts(str(tmp_path / "new" / "folder"), model)
    assert_same(loaded, shifts)
    assert type(loaded.config) is type(shifts.config)
    assert loaded.spec == shifts.spec


def test_the_description_is_pinned(tmp_path: Path) -> None:
    mc.save_shifts(random_shifts(model_of(LLAMA), "mimic"), tmp_path)
    text = (tmp_path / "shifts.json").read_text()
    found = json.loads(text)
    assert list(found) == [*DESCRIPTION, "origin", "sha256"]
    assert found["sha256"] == hashlib.sha256((tmp_path / "shifts.safetensors").read_bytes()).hexdigest()
    assert list(found["origin"]) == ["model_type", "name_or_path", "fingerprint"]
    assert {name: found[name] for name in DESCRIPTION} == DESCRIPTION
    assert text.endswith("}\n")


@pytest.mark.parametrize(
    ("head", "config"),
    [
        ("mimic-one-layer", {"layers": [1]}),
        ("mimic-shared", {"shared": True}),
        ("mimic-all-keys", {"log_z2": "all_keys"}),
        ("live-layer-out", {"layers": None, "site": "layer_out", "learn_scale": True, "sigmoid": True}),
        ("live-attn-out", {"site": "attn_out", "learn_scale": False, "scale_init": 1.0, "vector_std": 0.01}),
    ],
)
def test_the_config_is_in_the_description(head: str, config: dict[str, Any], tmp_path: Path) -> None:
    mc.save_shifts(random_shifts(model_of(LLAMA), head), tmp_path)
    found = json.loads((tmp_path / "shifts.json").read_text())
    assert found["head"] == head.partition("-")[0]
    assert set(found["config"]) == set(HEADS[head].option_names())
    assert found["config"].items() >= config.items()


@pytest.mark.parametrize("head", HEADS)
def test_the_saved_names_are_pinned(head: str, tmp_path: Path) -> None:
    mc.save_shifts(random_shifts(model_of(LLAMA), head), tmp_path)
    layers = [1] if head in ("mimic-one-layer", "task-vector") else [0, 1, 2]
    with safe_open(tmp_path / "shifts.safetensors", "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}
        assert {name: x.get_shape() for name, x in slices.items()} == {
            f"heads.{layer}.{name}": shape for layer in layers for name, shape in KEYS[head].items()
        }
        assert {x.get_dtype() for x in slices.values()} == {"F32"}


def test_files_of_version_1_load(tmp_path: Path) -> None:
    tensors = {f"heads.{i}.{name}": torch.randn(shape) for i in range(3) for name, shape in PER_HEAD.items()}
    (tmp_path / "shifts.safetensors").write_bytes(save(tensors))
    (tmp_path / "shifts.json").write_text(json.dumps(DESCRIPTION))
    loaded = mc.load_shifts(tmp_path, model_of(LLAMA))
    assert loaded.config == mc.MimICConfig()
    assert all(torch.equal(x, tensors[name]) for name, x in loaded.state_dict().items())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64])
def test_parameters_are_as_they_were_saved_whatever_the_model_holds(stored: torch.dtype, tmp_path: Path) -> None:
    model = model_of(LLAMA, dtype=torch.bfloat16)
    shifts = random_shifts(model, "mimic")
    rounded = {name: x.to(stored) for name, x in shifts.state_dict().items()}
    mc.save_shifts(shifts.to(stored), tmp_path)
    loaded = mc.load_shifts(tmp_path, model)
    for name, x in loaded.state_dict().items():
        assert x.dtype == stored
        assert torch.equal(x, rounded[name])


def test_parameters_that_are_views_are_saved_by_value(tmp_path: Path) -> None:
    shifts, table = random_shifts(model_of(LLAMA), "mimic"), torch.randn(24, 3, 4)
    for head in shifts:
        head.vector.data = table[:, head.layer.index].T  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    mc.save_shifts(shifts, tmp_path)
    assert_same(mc.load_shifts(tmp_path, model_of(LLAMA)), shifts)


@pytest.mark.parametrize("saved_from", ["bare", "with a head"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bare_models_and_models_with_a_head_share_shifts(case: Case, saved_from: str, tmp_path: Path) -> None:
    model = model_of(case)
    bare = model.base_model
    assert isinstance(bare, nn.Module)
    one, other = (bare, model) if saved_from == "bare" else (model, bare)
    shifts = random_shifts(one, "mimic")
    mc.save_shifts(shifts, tmp_path)
    loaded = mc.load_shifts(tmp_path, other)
    assert_same(loaded, shifts)
    with mc.patch(one, shifts):
        wanted = logits_of(model, case.inputs())
    with mc.patch(other, loaded):
        assert torch.equal(logits_of(model, case.inputs()), wanted)


def test_a_family_of_the_same_sizes_fits(tmp_path: Path) -> None:
    """Key/value heads and the family's name don't enter a shift's shape."""
    shifts = random_shifts(model_of(BY_NAME["mistral"]), "mimic")
    mc.save_shifts(shifts, tmp_path)
    assert_same(mc.load_shifts(tmp_path, model_of(BY_NAME["qwen2"])), shifts)


def test_saving_over_an_older_checkpoint(tmp_path: Path) -> None:
    model = model_of(LLAMA)
    (tmp_path / "README.md").write_text("mine")
    mc.save_shifts(random_shifts(model, "mimic-and-mlp"), tmp_path)
    newer = all_random(model, "live-attn-out")
    mc.save_shifts(newer, tmp_path)
    assert_same(mc.load_shifts(tmp_path, model), newer)
    # Over the very file a stack was read from.
    mc.save_shifts(mc.load_shifts(tmp_path, model), tmp_path)
    assert_same(mc.load_shifts(tmp_path, model), newer)
    assert listed(tmp_path) == ["README.md", *NAMES]
    assert (tmp_path / "README.md").read_text() == "mine"


def disk_full(*args: Any, **kwargs: Any) -> None:
    raise OSError("disk full")


def disk_full_midway(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data[: len(data) // 2])
    raise OSError("disk full")


STEPS = {
    "pathlib.Path.write_bytes": disk_full_midway,
    "pathlib.Path.write_text": disk_full,
    "os.replace": disk_full,
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("older", [False, True])
def test_an_error_while_saving_leaves_what_was_there(
    step: str, older: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(LLAMA)
    shifts = random_shifts(model, "mimic")
    if older:
        mc.save_shifts(shifts, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr(step, STEPS[step])
        with pytest.raises(OSError, match="disk full"):
            mc.save_shifts(random_shifts(model, "live"), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    if older:
        assert_same(mc.load_shifts(tmp_path, model), shifts)


def test_a_head_of_ones_own(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class BiasConfig(mc.HeadConfig):
        widths: tuple[int, ...] = (32,)

    @mc.register_head("bias")
    class BiasHead(mc.ShiftHead):
        site = "mlp_out"
        config_class = BiasConfig

        def __init__(self, config: BiasConfig, layer: mc.LayerSpec) -> None:
            super().__init__(config, layer)
            self.bias = nn.Parameter(torch.randn(config.widths))

        def forward(self, value: Tensor, at: mc.At) -> Tensor:
            return value + self.bias

    model, inputs = model_of(LLAMA), LLAMA.inputs()
    shifts = mc.build_shifts(model, BiasConfig(layers=(0, 2), widths=(1, 32)))
    mc.save_shifts(shifts, tmp_path)
    loaded = mc.load_shifts(tmp_path, model)
    assert_same(loaded, shifts)
    with mc.patch(model, shifts):
        wanted = logits_of(model, inputs)
    with mc.patch(model, loaded):
        assert torch.equal(logits_of(model, inputs), wanted)

    del heads.base._HEADS._items["bias"]
    with pytest.raises(
        mc.CheckpointError,
        match=r"no shift head is called 'bias'; known: .*function_vector, .*mimic, .*; .* import it first",
    ):
        mc.load_shifts(tmp_path, model)


def test_files_are_for_everybody_whom_the_umask_lets(tmp_path: Path) -> None:
    model = model_of(LLAMA)
    before = os.umask(0o027)
    try:
        mc.save_shifts(random_shifts(model, "mimic"), tmp_path / "shifts")
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "shifts").iterdir()}
    assert modes == {"shifts.json": "0o640", "shifts.safetensors": "0o640"}


def test_what_heads_share_is_trained_as_one_and_written_once(tmp_path: Path) -> None:
    """A parameter of two layers, and a module with a buffer of all."""

    @mc.register_head("with-a-module-for-test")
    class WithModule(mc.ShiftHead):
        site = "mlp_out"

        def __init__(self, config: mc.HeadConfig, layer: mc.LayerSpec) -> None:
            super().__init__(config, layer)
            self.net = torch.nn.BatchNorm1d(layer.hidden_size, affine=False)
            self.net.scale = torch.nn.Parameter(torch.randn(layer.hidden_size))
            self.vector = torch.nn.Parameter(torch.randn(layer.hidden_size))

        def forward(self, value: torch.Tensor, at: Any) -> torch.Tensor:
            variance: Any = self.net.running_var
            return value * self.net.scale + variance * self.vector

    model, inputs = model_of(LLAMA), LLAMA.inputs()
    apart, shifts = mc.build_shifts(model, "with-a-module-for-test"), mc.build_shifts(model, "with-a-module-for-test")
    for head in shifts:
        head.net = shifts[0].net
    shifts[2].vector = shifts[1].vector
    assert len(list(shifts.parameters())) == 3
    apart.load_state_dict(shifts.state_dict())
    for stack in (apart, shifts):
        with mc.patch(model, stack):
            logits_of(model, inputs).square().mean().backward()
    torch.testing.assert_close(shifts[0].net.scale.grad, sum(head.net.scale.grad for head in apart))
    torch.testing.assert_close(shifts[1].vector.grad, apart[1].vector.grad + apart[2].vector.grad)
    mc.save_shifts(shifts, tmp_path)
    with safe_open(tmp_path / "shifts.safetensors", "pt") as file:
        written = set(file.keys())
    own = {
        "heads.0.vector",
        "heads.1.vector",
        *(f"heads.0.net.{name}" for name in ("scale", *dict(shifts[0].net.named_buffers()))),
    }
    assert written == own
    loaded = mc.load_shifts(tmp_path, model)
    assert list(loaded.state_dict()) == list(shifts.state_dict())
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in shifts.state_dict().items())
    assert loaded[2].vector is loaded[1].vector is not loaded[0].vector
    assert loaded[0].net.scale is loaded[2].net.scale
    assert loaded[0].net.running_var is loaded[1].net.running_var
    mc.save_shifts(loaded, tmp_path / "again")
    assert (tmp_path / "again" / "shifts.json").read_text() == (tmp_path / "shifts.json").read_text()


def test_parameters_over_each_other_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = model_of(LLAMA)
    shifts = random_shifts(model, "mimic")
    shifts[2].vector = torch.nn.Parameter(shifts[1].vector.data)
    with pytest.raises(mc.CheckpointError, match=r"heads\.1\.vector and heads\.2\.vector share their memory"):
        mc.save_shifts(shifts, tmp_path / "shifts")
    assert not (tmp_path / "shifts").exists()


def test_parameters_side_by_side_in_one_memory_are_saved(tmp_path: Path) -> None:
    model = model_of(LLAMA)
    shifts = random_shifts(model, "live")
    flat = torch.cat([head.vector.detach() for head in shifts])
    for head, part in zip(shifts, flat.split(flat.numel() // len(shifts)), strict=True):
        head.vector = torch.nn.Parameter(part)
    mc.save_shifts(shifts, tmp_path / "shifts")
    assert_same(mc.load_shifts(tmp_path / "shifts", model), shifts)
