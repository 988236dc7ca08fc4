"""Every head of the registry beside MimIC: what it adds to a model, and what virtual keys add to attention."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import mimic_core as mc

from .bench_patch import UNPATCHED, shifts_that_show
from .bench_shift import Task, timed_rows
from .cases import Case, Inputs, make_inputs
from .check import LIMITS, error, refuse
from .contestants import OURS, contestants
from .errors import BenchmarkError
from .measure import QUICK, Call, Effort
from .models import Subject, few_layers
from .records import Row

# As their papers have them, where they say it.
CONFIGS: dict[str, mc.HeadConfig] = {
    "mimic": mc.MimICConfig(),
    "live": mc.LIVEConfig(),
    "virtual_kv": mc.VirtualKVConfig(n=8, rank=8),
    "hyper_icl": mc.HyperICLConfig(),
    "i2cl": mc.I2CLConfig(),
    "m2iv": mc.M2IVConfig(),
    "icv": mc.ICVConfig(),
    "caa": mc.CAAConfig(),
    "loreft": mc.LoReFTConfig(),
    "ia3": mc.IA3Config(),
    "attn_bias": mc.AttnBiasConfig(),
    "mlp_bias": mc.MlpBiasConfig(),
    "mtv": mc.MTVConfig(),
    "task_vector": mc.TaskVectorConfig(layers=(1,)),
    "function_vector": mc.FunctionVectorConfig(),
}
PAIRS = (1, 4, 16)
LONGER = "a longer context"
FORWARD, GENERATE, TRAINING = "forward", "generate", "training step"
_EFFORT = Effort(seconds=5.0, rounds=9, limit=60.0)
_NEW = 32


def tasks(device: torch.device, quick: bool) -> Iterator[Task]:
    """Virtual keys beside torch's attention, then all heads in a model."""
    dtypes = ("fp32",) if quick else ("fp32", "bf16")
    for dtype in dtypes:
        for case in (Case("d64", 1024, 1024, dtype), Case("d64", 1, 1024, dtype, "none")):
            yield Task(f"pairs {case.name}", partial(measure_pairs, case, device, QUICK if quick else _EFFORT))
    lengths = {FORWARD: 1024, GENERATE: 64, TRAINING: 512}
    for what, t in lengths.items() if not quick else ((FORWARD, 64),):
        yield Task(f"heads {what}", partial(measure_heads, what, t, device, QUICK if quick else _EFFORT))


def of_pairs(n: int) -> str:
    """The name of a contestant with n virtual keys and values."""
    return f"{OURS}: {n} virtual pair{'s' if n > 1 else ''}"


def measure_pairs(case: Case, device: torch.device, effort: Effort, refused: list[BenchmarkError]) -> list[Row]:
    """Attention with virtual keys and values, without gradients, beside MimIC and attention over a longer context."""
    inputs = make_inputs(case, device)
    generator = torch.Generator().manual_seed(1)
    h, d = case.sizes["h"], case.sizes["d"]
    sdpa, mimic = contestants(inputs)[:2]
    calls: dict[str, Call] = {sdpa.name: partial(sdpa.run, inputs), mimic.name: partial(mimic.run, inputs)}
    pairs = {n: [torch.randn(h, n, d, generator=generator).to(device) for _ in range(2)] for n in PAIRS}
    with torch.no_grad():
        for n, (keys, values) in pairs.items():
            call = partial(_with_pairs, inputs, keys, values)
            in_fp64 = inputs._replace(q=inputs.q.double(), k=inputs.k.double(), v=inputs.v.double())
            exact = _longer(in_fp64, keys, values)
            try:
                refuse(of_pairs(n), case.name, {"out": error(call(), exact).largest}, LIMITS[case.dtype])
            except BenchmarkError as problem:
                refused.append(problem)
            else:
                calls[of_pairs(n)] = call
        calls[LONGER] = partial(_longer, inputs, *pairs[PAIRS[-1]])
        facts: dict[str, Any] = {"case": f"pairs-{case.name}", "model": case.shape, **case.sizes, "dtype": case.dtype}
        what = "decode" if case.mask == "none" else FORWARD
        return [Row(**row) for row in timed_rows(calls, device, effort, bench="heads", what=what, **facts)]


def _with_pairs(x: Inputs, keys: Tensor, values: Tensor) -> Tensor:
    out, lse = mc.ops.attention_with_lse(x.q, x.k, x.v, is_causal=x.is_causal)
    weight = torch.ones(1, device=lse.device)
    return mc.ops.virtual_context(out, x.q, lse, keys, values, weight, x.q.shape[-1] ** -0.5)


def _longer(x: Inputs, keys: Tensor, values: Tensor) -> Tensor:
    """Attention over the context with the virtual keys and values before it, which every token sees."""
    keys, values = (y.to(x.q.dtype).expand(x.q.shape[0], *y.shape) for y in (keys, values))
    k, v = torch.cat([keys, x.k], dim=2), torch.cat([values, x.v], dim=2)
    t, s, n = x.q.shape[2], x.k.shape[2], keys.shape[2]
    mask = None
    if x.is_causal:
        mask = torch.ones(t, s + n, dtype=torch.bool, device=k.device)
        mask[:, n:] = mask[:, n:].tril()
    return scaled_dot_product_attention(x.q, k, v, mask).transpose(1, 2)


def measure_heads(what: str, t: int, device: torch.device, effort: Effort, refused: list[BenchmarkError]) -> list[Row]:
    """One stage of a model with each head, each in a copy of the model that stays patched."""
    torch.manual_seed(0)
    subject = few_layers(device, torch.float32)
    case = f"heads-{subject.name}-{what.replace(' ', '-')}"
    stacks = {name: shifts_that_show(subject.model, config, device) for name, config in CONFIGS.items()}
    if what == TRAINING:  # some take all values from activations
        stacks = {name: stack for name, stack in stacks.items() if [*stack.parameters()]}
    spec = stacks["mimic"].spec.layers
    calls: dict[str, Call] = {UNPATCHED: _stage(what, subject, t, None)}
    with ExitStack() as patched:
        for name, stack in stacks.items():
            twin = replace(subject, model=copy.deepcopy(subject.model))
            patched.enter_context(mc.patch(twin.model, stack))
            calls[name] = _stage(what, twin, t, stack)
            try:
                refuse(name, case, {"logits": _difference(subject, twin, stack)}, LIMITS["fp32"])
            except BenchmarkError as problem:
                refused.append(problem)
                del calls[name]
        sizes = {"b": 1, "h": spec[0].heads, "g": spec[0].kv_heads, "d": spec[0].head_dim, "t": t, "s": t}
        facts: dict[str, Any] = {"case": case, "model": subject.name, "dtype": "fp32", "layers": len(spec), **sizes}
        rows = list(timed_rows(calls, device, effort, memory=False, bench="heads", what=what, **facts))
        numbers = {name: sum(p.numel() for p in stack.parameters()) for name, stack in stacks.items()}
        return [Row(**row, of="", count=numbers.get(row["contestant"])) for row in rows]


@torch.no_grad()
def _difference(bare: Subject, patched: Subject, stack: mc.ShiftStack) -> float:
    """The error of the logits of a patched model, relative to the bare one with the same stack, both in fp64."""
    inputs, exact = bare.inputs(48), copy.deepcopy(bare.model).double()
    with mc.patch(exact, copy.deepcopy(stack).double()):
        wanted = exact(**inputs, use_cache=False).logits
    return error(patched.model(**inputs, use_cache=False).logits, wanted).largest


def _stage(what: str, subject: Subject, t: int, stack: mc.ShiftStack | None) -> Callable[[], object]:
    model: Any = subject.model
    inputs = subject.inputs(t)
    parameters = [] if stack is None else list(stack.parameters())

    @torch.no_grad()
    def forward() -> object:
        return model(**inputs, use_cache=False, logits_to_keep=1).logits

    def generate() -> object:
        return model.generate(**inputs, min_new_tokens=_NEW, max_new_tokens=_NEW, do_sample=False)

    def train() -> object:
        embedded = model.get_input_embeddings()(inputs["input_ids"]).requires_grad_()
        logits = model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"], use_cache=False).logits
        return torch.autograd.grad(logits.square().mean(), [embedded, *parameters], allow_unused=True)

    return {FORWARD: forward, GENERATE: generate, TRAINING: train}[what]
