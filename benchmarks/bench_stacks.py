"""Many stacks in one batch: a decoded token with 1, 8 and 64 of them, beside batches of mixed adapters in PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import mimic_core as mc

from .bench_host import host_effort
from .bench_patch import UNPATCHED, shifts_that_show
from .bench_shift import Task, timed_rows
from .check import error, refuse
from .contestants import OURS
from .errors import BenchmarkError
from .measure import Call, Effort, host_clock
from .models import tiny_llama
from .records import Row

HEADS = {"MimIC": "mimic", "LIVE": "live"}
ROWS, STACKS = (16, 64), (1, 8, 64)
LORA = "PEFT: LoRA"
_CACHED, _NEW = 32, 8
_LIMIT = 1e-3

# Makes a call for a model, tokens, and what a forward gets beside them. The call gives logits [b ...].
Stage: TypeAlias = "Callable[[Any, Tensor, dict[str, Any]], Callable[[], Tensor]]"


class Contestant(NamedTuple):
    """A model that stays as it is, and what its calls get beside the tokens.

    Attributes:
        names: The stack of each row.
        alone: Runs a function of a model in which all rows have the stack of this name.
    """

    name: str
    model: nn.Module
    options: dict[str, Any]
    names: Sequence[str]
    alone: Callable[[str, Callable[[nn.Module], Tensor]], Tensor]


def tasks(device: torch.device, quick: bool) -> Iterator[Task]:
    """A token of a tiny Llama, in a loop of the caller's and in `generate`, for each number of rows; on one thread."""
    effort = host_effort(quick)
    rows, stacks = ((4,), (1, 2)) if quick else (ROWS, STACKS)
    for b in rows:
        yield Task(f"stacks {b} rows", partial(measure, b, stacks, device, effort), threads=1)


def of(kind: str, count: int) -> str:
    """The name of a contestant with so many stacks, or adapters. 0: one plain patch."""
    what = "adapter" if kind == LORA else "stack"
    how_many = f"{count} {what}{'s' if count > 1 else ''}" if count else "one patch"
    return f"{kind if kind == LORA else f'{OURS}: {kind}'}, {how_many}"


def measure(
    b: int, counts: Sequence[int], device: torch.device, effort: Effort, refused: list[BenchmarkError]
) -> list[Row]:
    """Row i has stack i modulo the number of stacks. Each contestant is a model of its own."""
    torch.manual_seed(0)
    subject = tiny_llama(device, torch.float32)
    ids = torch.randint(3, subject.vocabulary - 1, (b, _CACHED), device=device)
    spec = mc.adapter_for(subject.model).spec(subject.model).layers[0]
    case = f"stacks-{subject.name}-b{b}"
    facts: dict[str, Any] = {"bench": "stacks", "case": case, "model": subject.name, "dtype": "fp32", "b": b, "t": 1}
    facts |= {"h": spec.heads, "g": spec.kv_heads, "d": spec.head_dim, "s": _CACHED}
    rows = []
    with ExitStack() as until_measured:
        contestants = list(_contestants(subject.model, b, counts, device, until_measured))
        for what, stage in STAGES.items():
            calls: dict[str, Call] = {UNPATCHED: stage(subject.model, ids, {})}
            for one in contestants:
                call = stage(one.model, ids, one.options)
                found = call()
                alone = {name: one.alone(name, lambda m, stage=stage: stage(m, ids, {})()) for name in set(one.names)}
                wanted = torch.stack([alone[name][i] for i, name in enumerate(one.names)])
                try:
                    refuse(one.name, case, {"logits": error(found, wanted.double()).largest}, _LIMIT)
                except BenchmarkError as problem:
                    refused.append(problem)
                else:
                    calls[one.name] = call
            clock = host_clock(device)
            timed = timed_rows(calls, device, effort, memory=False, clock=clock, what=what, **facts)
            rows += [Row(**row) for row in timed]
    return rows


def _contestants(
    bare: nn.Module, b: int, counts: Sequence[int], device: torch.device, until_measured: ExitStack
) -> Iterator[Contestant]:
    for kind, head in HEADS.items():
        stacks = {str(i): shifts_that_show(bare, head, device) for i in range(max(counts))}
        alone = partial(_patched, bare, stacks)
        for count in (0, *counts):
            model, many = copy.deepcopy(bare), max(count, 1)
            own = {str(i): copy.deepcopy(stacks[str(i)]) for i in range(many)}
            names = [str(i % many) for i in range(b)]
            handle = until_measured.enter_context(mc.patch(model, mc.StackSet(own) if count else own["0"]))
            if count:
                until_measured.enter_context(handle.using(names))
            yield Contestant(of(kind, count), model, {}, names, alone)
    for count in counts if find_spec("peft") else ():
        model, names = _with_lora(copy.deepcopy(bare), count), [str(i % count) for i in range(b)]
        yield Contestant(of(LORA, count), model, {"adapter_names": names}, names, partial(_with_adapter, model))


def _patched(
    model: nn.Module, stacks: dict[str, mc.ShiftStack], name: str, run: Callable[[nn.Module], Tensor]
) -> Tensor:
    with mc.patch(model, stacks[name]):
        return run(model)


def _with_adapter(model: Any, name: str, run: Callable[[nn.Module], Tensor]) -> Tensor:
    model.set_adapter(name)
    return run(model)


def _with_lora(model: nn.Module, count: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, init_lora_weights=False)  # random weights, so that a wrong row shows
    found = get_peft_model(model, config, adapter_name="0")  # pyright: ignore[reportArgumentType]
    for i in range(1, count):
        found.add_adapter(str(i), config)
    return found.eval()


def _decode(model: Any, ids: Tensor, options: dict[str, Any]) -> Callable[[], Tensor]:
    """One token on a cache, which is then as it was."""
    past = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=past, use_cache=True, **options)
    token = ids[:, -1:]

    @torch.no_grad()
    def decode() -> Tensor:
        logits = model(input_ids=token, past_key_values=past, use_cache=True, **options).logits
        past.crop(-1)
        return logits

    return decode


def _generate(model: Any, ids: Tensor, options: dict[str, Any]) -> Callable[[], Tensor]:
    how: dict[str, Any] = {"max_new_tokens": _NEW, "min_new_tokens": _NEW, "do_sample": False, "output_logits": True}
    how |= {"attention_mask": torch.ones_like(ids), "return_dict_in_generate": True}

    def generate() -> Tensor:
        return torch.stack(model.generate(input_ids=ids, **how, **options).logits, dim=1)

    return generate


STAGES: dict[str, Stage] = {"decode step": _decode, f"generate {_NEW} tokens": _generate}
