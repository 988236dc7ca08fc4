"""The model and the stacks that run in every engine, what they give in one process, and the engines by name."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import mimic_core as mc
from tests.support.cases import TEXT, Case, fresh_model, random_shifts
from tests.support.training import gradients_of, rows

# Columns of the table, by name in `HEADS`: each registered head, and the options of MimIC that run another way.
COLUMNS = (
    "mimic",
    "mimic-shared",
    "mimic-vector-only",
    "live",
    "task-vector",
    "function-vector",
    "attn-bias",
    "mlp-bias",
    "icv",
    "caa",
    "i2cl",
    "m2iv",
    "virtual-kv",
    "hyper-icl",
    "ia3",
    "loreft",
    "mtv",
)
# 4-bit weights need blocks of 64, and their kernel multiples of 32.
SIZES = TEXT | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
CASE = Case("llama", lambda: LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=32)))
IDS = rows(4)
# Rounding in fp32, as a part of the largest number.
FP32 = 1e-5


@dataclass(frozen=True)
class Engine:
    """A way to hold or run a model.

    Attributes:
        run: Compares one head with one process: raises AssertionError if it is not equal, or what the engine raises.
        processes: How many processes run it.
        cannot: What the engine's own error says where it can't do something. Other errors are failures.
    """

    name: str
    run: Callable[[str], None]
    processes: int = 1
    cannot: str | None = None


ENGINES: dict[str, Engine] = {}


def engine(name: str, processes: int = 1, cannot: str | None = None) -> Callable[..., Callable[[str], None]]:
    def add(run: Callable[[str], None]) -> Callable[[str], None]:
        ENGINES[name] = Engine(name, run, processes, cannot)
        return run

    return add


def subject(head: str, dtype: torch.dtype = torch.float64) -> tuple[Any, mc.ShiftStack]:
    model = fresh_model(CASE, dtype=dtype)
    return model, random_shifts(model, head).to(dtype)


def logits_of(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def run(model: nn.Module, shifts: nn.Module, ids: Tensor = IDS) -> list[Tensor]:
    """Logits, and the gradient of each parameter, of a model that is patched already."""
    shifts.zero_grad()
    logits = logits_of(model, ids)
    logits.square().mean().backward()
    return [logits.detach(), *gradients_of(shifts)]


def learned(model: nn.Module, shifts: Any, ids: Tensor = IDS) -> list[Tensor]:
    """The same of a model that is not patched yet."""
    with mc.patch(model, shifts):
        return run(model, shifts, ids)


@cache
def alone(head: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """What one process in plain torch gives."""
    model, shifts = subject(head, dtype)
    found = learned(model, shifts)
    assert differ(found[0], logits_of(model))
    return found


def differ(a: Tensor, b: Tensor) -> bool:
    return (a - b).abs().max().item() > 1e-3


def same(found: Sequence[Tensor], wanted: Sequence[Tensor], off: float = 1e-9) -> None:
    """Equal, up to rounding: off by no more than a part of the largest number."""
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max().item() <= off * other.abs().max().item(), (one, other)


def quiet() -> None:
    """Only the table is printed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    transformers.logging.disable_progress_bar()
