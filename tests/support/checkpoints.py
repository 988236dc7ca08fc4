"""The checkpoint of a tiny Llama: its files, its description, and whether what was loaded is what was saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import mimic_core as mc
from tests.support.cases import BY_NAME, random_shifts

LLAMA = BY_NAME["llama"]
SITES = ["query", "key", "value", "lse", "attn_heads", "attn_out", "mlp_out", "layer_out", "layer_in", "mlp_hidden"]
NAMES = ["shifts.json", "shifts.safetensors"]

# What is on people's disks: a change here needs a new version, and the old one still read.
DESCRIPTION: dict[str, Any] = {
    "format": "mimic_core.shifts",
    "version": 1,
    "head": "mimic",
    "config": {
        "layers": None,
        "positions": "all",
        "shared": False,
        "gate": True,
        "log_z2": "attended",
        "mlp_vector": False,
        "vector_std": 0.001,
        "gate_std": 0.02,
    },
    "model": {
        "model_type": "llama",
        "hidden_size": 32,
        "layers": [
            {
                "index": index,
                "path": f"model.layers.{index}",
                "hidden_size": 32,
                "heads": 4,
                "kv_heads": 2,
                "head_dim": 24,
                "value_dim": 24,
                "sites": SITES,
                "mlp_width": 48,
            }
            for index in range(3)
        ],
    },
}


def assert_same(found: mc.ShiftStack, wanted: mc.ShiftStack) -> None:
    assert (found.name, found.config, found.layers) == (wanted.name, wanted.config, wanted.layers)
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(found, kind)()), dict(getattr(wanted, kind)())
        assert list(ours) == list(theirs)
        for name, x in ours.items():
            assert x.dtype == torch.float32, name
            assert x.requires_grad == theirs[name].requires_grad, name
            assert torch.equal(x, theirs[name]), name


def all_random(model: nn.Module, head: str) -> mc.ShiftStack:
    """Random parameters, and buffers that are not where they start."""
    shifts = random_shifts(model, head)
    for x in shifts.buffers():
        x.uniform_(0.2, 0.9)
    return shifts
