"""What a checkpoint says of itself: dtypes, its model, the file it describes; and what is not written."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrize
from transformers import LlamaConfig, LlamaForCausalLM

import mimic_core as mc
from mimic_core.adapters import locate
from mimic_core.origins import Origin, origin_of
from tests.support.cases import TEXT, Case, fresh_model, over_cases, over_heads, random_shifts
from tests.support.checkpoints import LLAMA


def other_llama(seed: int = 1, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**TEXT | {"head_dim": 24} | changes)).eval()


def origin(model: nn.Module) -> Origin:
    return origin_of(locate(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@over_cases
@over_heads
def test_a_stack_comes_back_in_its_dtype(case: Case, head: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = fresh_model(case)
    shifts = random_shifts(model, head).to(dtype)
    mc.save_shifts(shifts, tmp_path)
    found = mc.load_shifts(tmp_path, model)
    for name, x in shifts.state_dict().items():
        assert found.state_dict()[name].dtype == dtype
        assert torch.equal(found.state_dict()[name], x)


def test_a_local_folder_has_no_revision(tmp_path: Path) -> None:
    model = fresh_model(LLAMA)
    mc.save_shifts(random_shifts(model, "mimic"), tmp_path)
    with pytest.raises(mc.CheckpointError, match="local directory, which has no revision 'v1'"):
        mc.load_shifts(tmp_path, model, revision="v1")


@pytest.mark.parametrize("other", [{"seed": 1}, {"vocab_size": 256}], ids=["weights", "vocabulary"])
def test_another_model_of_the_same_sizes_warns_or_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    made_for, found = other_llama(0), other_llama(**other)
    made_for.config._name_or_path = made_for.name_or_path = "org/base"
    mc.save_shifts(mc.build_shifts(made_for, "mimic"), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mc.load_shifts(tmp_path, made_for, strict=True)
    with pytest.warns(UserWarning, match="the weights of 'org/base', and this model's weights differ"):
        loaded = mc.load_shifts(tmp_path, found)
    with pytest.raises(mc.CheckpointError, match="made for another model: the weights of 'org/base'"):
        mc.load_shifts(tmp_path, found, strict=True)
    # Saved again, it still says what it was made for.
    mc.save_shifts(loaded, tmp_path / "again")
    mc.load_shifts(tmp_path / "again", made_for, strict=True)


def test_another_type_of_the_same_sizes_is_told(tmp_path: Path) -> None:
    model = other_llama(0)
    mc.save_shifts(mc.build_shifts(model, "live"), tmp_path)
    description = json.loads((tmp_path / "shifts.json").read_text())
    description["origin"]["model_type"] = "mistral"
    (tmp_path / "shifts.json").write_text(json.dumps(description))
    with pytest.raises(mc.CheckpointError, match="model type 'mistral', not 'llama'"):
        mc.load_shifts(tmp_path, model, strict=True)


def test_what_is_the_same_model_has_the_same_fingerprint() -> None:
    model = other_llama(0)
    wanted = origin(model)
    assert wanted.fingerprint is not None
    assert origin(copy.deepcopy(model).bfloat16()) == wanted
    lora = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj", "down_proj", "embed_tokens"]))
    assert mc.build_shifts(lora, "mimic").origin == wanted
    with mc.patch(model, mc.build_shifts(model, "mimic")):
        assert origin(model) == wanted
    assert origin(other_llama(1)) != wanted
    for p in lora.parameters():
        p.data = torch.randn_like(p)
    assert origin(lora.merge_and_unload()) != wanted
    assert origin(model.to("meta")).fingerprint is None


def test_every_tensor_counts_that_a_fingerprint_is_made_of() -> None:
    model = fresh_model(LLAMA)
    wanted, noticed = origin(model), 0
    for p in model.parameters():
        before = p.data.clone()
        p.data = p.data * 1.1 + 0.1
        noticed += origin(model) != wanted
        p.data = before
    assert origin(model) == wanted
    assert noticed >= 16


def test_a_checkpoint_without_an_origin_loads_on_any_model_of_its_sizes(tmp_path: Path) -> None:
    """As files from before it was recorded do."""
    mc.save_shifts(mc.build_shifts(other_llama(0), "mimic"), tmp_path)
    description = json.loads((tmp_path / "shifts.json").read_text())
    del description["origin"], description["sha256"]
    (tmp_path / "shifts.json").write_text(json.dumps(description))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mc.load_shifts(tmp_path, other_llama(1), strict=True)


def test_the_tensors_of_another_save_are_refused(tmp_path: Path) -> None:
    model = fresh_model(LLAMA)
    for name, scale in (("one", 0.5), ("two", 0.6)):
        mc.save_shifts(random_shifts(model, "mimic", scale), tmp_path / name)
    (tmp_path / "one" / "shifts.safetensors").write_bytes((tmp_path / "two" / "shifts.safetensors").read_bytes())
    with pytest.raises(mc.CheckpointError, match=r"is not the file that shifts\.json describes"):
        mc.load_shifts(tmp_path / "one", model)


class Halved(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


def parametrized(shifts: mc.ShiftStack) -> None:
    parametrize.register_parametrization(shifts[0], "vector", Halved())


def of_integers(shifts: mc.ShiftStack) -> None:
    shifts[1].register_buffer("seen", torch.zeros(2, dtype=torch.long))


def not_a_number(shifts: mc.ShiftStack) -> None:
    shifts[1].vector.data[0] = torch.nan


def float8(shifts: mc.ShiftStack) -> None:
    shifts[0].vector = nn.Parameter(shifts[0].vector.data.to(torch.float8_e4m3fn), requires_grad=False)


@pytest.mark.parametrize("break_it", [parametrized, of_integers, not_a_number, float8])
def test_what_could_not_be_loaded_is_not_written(break_it: Any, tmp_path: Path) -> None:
    shifts = random_shifts(fresh_model(LLAMA), "mimic")
    break_it(shifts)
    state = torch.random.get_rng_state()
    with pytest.raises(mc.CheckpointError, match="could not be loaded again"):
        mc.save_shifts(shifts, tmp_path / "shifts")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not list(tmp_path.iterdir())
