"""The host: what a call and a layer cost where tensors are so small that Python and dispatch are all there is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile
from torch.torch_version import TorchVersion
from transformers import CompileConfig, DynamicCache

import mimic_core as mc

from .bench_patch import LIVE, MIMIC, UNPATCHED, shifts_that_show
from .bench_shift import Task, timed_rows
from .cases import DTYPES, Case, make_inputs
from .check import error, refuse
from .contestants import OURS, PUBLISHED, YARDSTICK, Contestant, contestants
from .errors import BenchmarkError
from .measure import Call, Copies, Effort, graphed, host_clock
from .models import Subject, smollm2, tiny_llama, tiny_llava
from .published import live_forwards, published, published_live
from .records import Row

PUBLISHED_LIVE = f"{PUBLISHED}: LIVE"
ADD, PLAIN_ADD = "add", "a plain add"
STATIC_CACHE = "generate, static cache"
CALLS = ("call, no gradient", "call, with gradient", "call, forward+backward")
# Microseconds are differences of times that vary by more: many short rounds.
_FULL = Effort(seconds=5.0, rounds=40, limit=20.0, most=400)
# A decode loop runs one model again and again. In samples of 2 ms, two calls of this model, the caches of the processor
# hold the other contestants, which doubles what is added.
_LAYERS = replace(_FULL, sample=0.02)
_QUICK = Effort(seconds=0.1, rounds=2, sample=0.0005)
# torch 2.6 fails to compile the models of transformers, patched or not.
CAN_COMPILE = TorchVersion(torch.__version__) >= "2.7"
_TOKENS = 4
_COPIES = 5
# torch 2.6 has the older name alone.
_GRAPHS = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
_LIMIT = 1e-3


def host_effort(quick: bool) -> Effort:
    """How long to measure what takes the host's time alone."""
    return _QUICK if quick else _FULL


def tasks(device: torch.device, quick: bool) -> Iterator[Task]:
    """Calls, layers of tiny models, and generation with a static cache; all on one thread."""
    effort = host_effort(quick)
    layers = _QUICK if quick else _LAYERS
    ways = ["eager"] if quick or not CAN_COMPILE else ["eager", "compiled"]
    graphs = ["graphs"] if device.type == "cuda" and not quick else []
    for way in [*ways, *graphs]:
        yield Task(f"host call {way}", partial(measure_calls, way, device, effort), threads=1)
        yield Task(f"host live call {way}", partial(measure_live_calls, way, device, effort), threads=1)
    for build in (tiny_llama, *(() if quick else (tiny_llava,))):
        # Compiling five models for three stages takes minutes: once is enough.
        for way in [*(ways if build is tiny_llama else ["eager"]), *graphs]:
            yield Task(f"host {build.__name__} {way}", partial(measure_layers, build, way, device, layers), threads=1)
    if graphs:
        for way in ("eager", "graphs"):
            measure = partial(measure_layers, smollm2, way, device, layers, stages=("decode step",))
            yield Task(f"host smollm2 {way}", measure, threads=1)
    if CAN_COMPILE:
        yield Task("host static cache", partial(measure_static_cache, device), threads=1)


def measure_calls(way: str, device: torch.device, effort: Effort, refused: list[BenchmarkError]) -> list[Row]:
    """One call of the op on 4 tokens beside torch's attention and the published form."""
    case = Case("d64", _TOKENS, _TOKENS)
    inputs = make_inputs(case, device)
    chosen = {c.name: c for c in contestants(inputs) if c.name in (YARDSTICK, OURS, PUBLISHED)}
    ways = {name: _compiled(c) if way == "compiled" else c for name, c in chosen.items()}
    leaves = {name: [getattr(inputs, leaf) for leaf in c.leaves] for name, c in ways.items()}
    runs = {name: partial(c.run, inputs) for name, c in ways.items()}
    facts = {"case": f"host-call-{case.name}", "model": case.shape, **case.sizes, "dtype": case.dtype}
    return _call_rows(runs, leaves, inputs.grad, way, device, effort, refused, facts)


def measure_live_calls(way: str, device: torch.device, effort: Effort, refused: list[BenchmarkError]) -> list[Row]:
    """One call of LIVE's addition on 4 tokens beside a plain addition and the published form."""
    width = 512
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(1, _TOKENS, width, generator=generator).to(device) for _ in range(2))
    vector, scale = torch.randn(width, generator=generator).to(device), torch.tensor(0.1, device=device)
    for leaf in (x, vector, scale):
        leaf.requires_grad_()
    functions: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        ADD: (torch.add, [x, vector]),
        OURS: (mc.ops.norm_preserving_add, [x, vector, scale]),
        PUBLISHED: (published_live, [x, vector, scale]),
    }
    runs: dict[str, Callable[[], Tensor]] = {}
    for name, (function, arguments) in functions.items():
        runs[name] = partial(torch.compile(function, dynamic=False) if way == "compiled" else function, *arguments)
    leaves = {name: arguments for name, (_, arguments) in functions.items()}
    facts = {"case": "host-live-call", "model": f"c{width}", "b": 1, "t": _TOKENS, "d": width, "dtype": "fp32"}
    return _call_rows(runs, leaves, grad, way, device, effort, refused, facts)


def _compiled(contestant: Contestant) -> Contestant:
    return contestant._replace(run=torch.compile(contestant.run, dynamic=False))


def _call_rows(
    runs: Mapping[str, Callable[[], Tensor]],
    leaves: Mapping[str, list[Tensor]],
    grad: Tensor,
    way: str,
    device: torch.device,
    effort: Effort,
    refused: list[BenchmarkError],
    facts: Mapping[str, Any],
) -> list[Row]:
    @torch.no_grad()
    def without(name: str) -> Tensor:
        return runs[name]()

    def both(name: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(runs[name](), leaves[name], grad)

    right = _right(str(facts["case"]), {name: partial(both, name) for name in runs}, OURS, PUBLISHED, refused)
    stages: dict[str, Callable[[str], object]] = dict(
        zip(CALLS, (without, lambda name: runs[name](), both), strict=True)
    )
    if way == "graphs":
        stages = {CALLS[0]: without}
    rows = []
    for what, stage in stages.items():
        calls: dict[str, Call] = {name: partial(stage, name) for name in right}
        rows += _timed(calls, what, way, 1, device, effort, facts)
    return rows


def measure_layers(
    build: Callable[..., Subject],
    way: str,
    device: torch.device,
    effort: Effort,
    refused: list[BenchmarkError],
    stages: tuple[str, ...] = ("forward", "decode step", "training step"),
) -> list[Row]:
    """Microseconds a layer of a patched model over the unpatched one, with copies of the model that stay patched."""
    dtype = "bf16" if build is smollm2 and device.type == "cuda" else "fp32"
    torch.manual_seed(0)
    subject = build(device, DTYPES[dtype])
    shifts = {name: shifts_that_show(subject.model, name, device) for name in ("mimic", "live")}
    patches: dict[str, tuple[Callable[..., Any], mc.ShiftStack] | None] = {
        UNPATCHED: None,
        MIMIC: (mc.patch, shifts["mimic"]),
        LIVE: (mc.patch, shifts["live"]),
        PUBLISHED: (published, shifts["mimic"]),
        PUBLISHED_LIVE: (partial(live_forwards, published_live), shifts["live"]),
        PLAIN_ADD: (partial(live_forwards, _add), shifts["live"]),
    }
    spec = mc.adapter_for(subject.model).spec(subject.model)
    sizes = {"h": spec.layers[0].heads, "g": spec.layers[0].kv_heads, "d": spec.layers[0].head_dim}
    rows = []
    with ExitStack() as patched:
        models: dict[str, list[tuple[Subject, mc.ShiftStack | None]]] = {name: [] for name in patches}
        for name, _ in product(patches, range(_COPIES if way == "eager" else 1)):
            twin, stack, patch = replace(subject, model=copy.deepcopy(subject.model)), None, patches[name]
            if patch is not None:
                stack = copy.deepcopy(patch[1])
                patched.enter_context(patch[0](twin.model, stack))
            if way == "compiled":
                twin.model.compile(dynamic=False)
            models[name].append((twin, stack))
        # All of them run the same code, of which torch.compile makes 8 graphs and no more unless told otherwise.
        patched.enter_context(torch._dynamo.config.patch({_GRAPHS: 64}))
        for what in stages if way != "graphs" else stages[:2]:
            torch.compiler.reset()
            calls: dict[str, Call] = {name: Copies(_stage(what, *one) for one in models[name]) for name in models}
            case = f"host-{subject.name}-{what.replace(' ', '-')}"
            names = _right(case, calls, MIMIC, PUBLISHED, refused)
            names = [name for name in _right(case, calls, LIVE, PUBLISHED_LIVE, refused) if name in names]
            t = 1 if what == "decode step" else _TOKENS
            facts = {"case": case, "model": subject.name, "b": 1, **sizes, "t": t, "dtype": dtype}
            chosen = {name: calls[name] for name in names}
            rows += _timed(chosen, what, way, len(spec.layers), device, effort, facts)
    return rows


def _add(x: Tensor, vector: Tensor, scale: Tensor) -> Tensor:
    """The least that anything at LIVE's site can do."""
    return x + vector


def _stage(what: str, subject: Subject, stack: mc.ShiftStack | None) -> Call:
    model, inputs = subject.model, subject.inputs(_TOKENS)
    inputs.pop("attention_mask")  # transformers looks into it, for which a GPU has to be waited for
    if what == "training step":
        parameters = [] if stack is None else list(stack.parameters())

        def train() -> tuple[Tensor, ...]:
            embedded = model.get_input_embeddings()(inputs["input_ids"]).requires_grad_()  # pyright: ignore
            out = model(inputs_embeds=embedded, use_cache=False).logits
            found = torch.autograd.grad(out.square().sum(), [embedded, *parameters], allow_unused=True)
            return tuple(x for x in found if x is not None)

        return train
    if what == "forward":

        @torch.no_grad()
        def forward() -> Tensor:
            return model(**inputs, use_cache=False).logits

        return forward
    past = DynamicCache()
    with torch.no_grad():
        model(**inputs, past_key_values=past, use_cache=True)
    token = inputs["input_ids"][:, -1:]

    @torch.no_grad()
    def decode() -> Tensor:
        logits = model(input_ids=token, past_key_values=past, use_cache=True).logits
        past.crop(-1)
        return logits

    return decode


def _right(case: str, calls: Mapping[str, Call], ours: str, wanted: str, refused: list[BenchmarkError]) -> list[str]:
    """The names of those to time: without ours where it is not equal to the published form."""
    pairs = [x if isinstance(x, tuple) else (x,) for x in (calls[ours](), calls[wanted]())]
    differences = {
        f"[{i}]": error(a.detach(), b.detach().double()).largest for i, (a, b) in enumerate(zip(*pairs, strict=True))
    }
    try:
        refuse(ours, case, differences, _LIMIT)
    except BenchmarkError as problem:
        refused.append(problem)
        return [name for name in calls if name != ours]
    return list(calls)


def _timed(
    calls: Mapping[str, Call],
    what: str,
    way: str,
    layers: int,
    device: torch.device,
    effort: Effort,
    facts: Mapping[str, Any],
) -> list[Row]:
    """Rows of the times, a layer each, and of the kernels launched over the yardstick's."""
    what = what if way == "eager" else f"{what}, {way}"
    timed_calls = {name: graphed(call) for name, call in calls.items()} if way == "graphs" else calls
    times = list(timed_rows(timed_calls, device, effort, memory=False, clock=host_clock(device), what=what, **facts))
    launched = {name: _launched(call, device) for name, call in calls.items()}  # by now nothing is left to compile
    rows = []
    yardstick = next(iter(calls))
    for row in times:
        timed = Row(bench="host", **row)
        a_layer = {name: (getattr(timed, name) or 0.0) / layers for name in ("time_us", "added_us")}
        rows.append(replace(timed, **a_layer, layers=layers))
        more = (launched[timed.contestant] - launched[yardstick]) / layers
        blank = {"contestant": timed.contestant, "yardstick": yardstick, "layers": layers}
        rows.append(Row(bench="host", **{**facts, **blank}, what=what, of="launches", count=more))
    return rows


def _launched(call: Call, device: torch.device) -> int:
    """Kernels a call launches on a GPU; on a CPU the operators it calls, those inside others too."""
    call()
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    return sum(event.device_type.name == device.type.upper() for event in profiler.events() or [])


def measure_static_cache(device: torch.device, refused: list[BenchmarkError]) -> list[Row]:
    """Generation with a static cache, which transformers compiles: graph breaks, and graphs made after token two."""
    torch.manual_seed(0)
    subject = tiny_llama(device, torch.float32)
    inputs = subject.inputs(_TOKENS)
    # What is counted is made before a backend gets the graphs.
    config = CompileConfig(backend="eager", fullgraph=False, dynamic=False)
    # A mode is of inductor alone. Of itself, transformers compiles on GPUs alone.
    vars(config).update(mode=None, _compile_all_devices=True)

    def graphs_after(tokens: int) -> int:
        subject.model.generate(  # pyright: ignore[reportCallIssue]
            **inputs,
            max_new_tokens=tokens,
            do_sample=False,
            cache_implementation="static",
            compile_config=config,
        )
        return counters["stats"]["unique_graphs"]

    rows = []
    graphs_after(12)  # makes the longest cache, which the model keeps
    for name, head in ((UNPATCHED, None), (MIMIC, "mimic"), (LIVE, "live")):
        torch.compiler.reset()
        counters.clear()
        with ExitStack() as patched:
            if head is not None:
                patched.enter_context(mc.patch(subject.model, shifts_that_show(subject.model, head, device)))
            made = [graphs_after(tokens) for tokens in (2, 2, 12)]
        found = {"graph breaks": sum(counters["graph_break"].values()), "recompiles": made[2] - made[0]}
        facts = {"case": "host-static-cache", "model": subject.name, "dtype": "fp32", "t": 1, "b": 1}
        for of, count in found.items():
            row = Row(bench="host", **facts, what=STATIC_CACHE, contestant=name, yardstick=UNPATCHED)
            rows.append(replace(row, of=of, count=count))
    torch.compiler.reset()
    return rows
