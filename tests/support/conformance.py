"""The conformance kit run on a case, and what of its report the tests look at."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

import mimic_core.testing
from tests.support.cases import BY_NAME, Case, fresh_model

LAWS = [law.name for law in mimic_core.testing.LAWS]
LLAMA = BY_NAME["llama"]
SITES = ["query", "key", "value", "attn_heads", "attn_out", "mlp_out", "layer_out", "layer_in", "mlp_hidden"]


def report_of(case: Case, attention: str = "sdpa", model: nn.Module | None = None) -> mimic_core.testing.Report:
    model = fresh_model(case, attention) if model is None else model
    before = state_of(model)
    report = mimic_core.testing.check_adapter(model, case.inputs(), name=case.name)
    after = state_of(model)
    assert {key for key in {**before, **after} if before.get(key) != after.get(key)} == set()
    return report


def state_of(model: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {
        f"{name}.{key}": list(x) if isinstance(x, dict) else id(x)
        for name, m in model.named_modules()
        for key, x in vars(m).items()
    }
    return state | {
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "config": model.config.to_json_string(),
        "interface": AttentionInterface.get_interface,
        "random": torch.random.get_rng_state().tolist(),
    }


def failed(report: mimic_core.testing.Report) -> set[str]:
    return {row.law for row in report.failures}
