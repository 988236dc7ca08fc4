"""Attention level: what the shift costs over torch's own attention, and what it saves over the published form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mimic_core as mc

from .cases import DTYPES, Case, Inputs, decode_cases, make_inputs, prefill_cases
from .check import LIMITS, Error, check, error, refuse, wanted_of
from .contestants import OURS, PUBLISHED, YARDSTICK, Contestant, contestants
from .errors import BenchmarkError
from .measure import Around, Call, Clock, Effort, clock_for, effort_for, interleaved, peak_memory
from .records import Row

# Width of the hidden states LIVE's vector is added to: SmolLM2-135M, Qwen1.5-0.5B, and the models of 7B and more.
WIDTHS = (576, 1024, 4096)


class Task(NamedTuple):
    """One case to measure: its name for the progress bar, and what does it. Refusals go to the list it is given.

    Attributes:
        threads: Of torch, where they are not to be as many as it takes.
    """

    name: str
    run: Callable[[list[BenchmarkError]], list[Row]]
    threads: int | None = None


def tasks(device: torch.device, quick: bool) -> Iterator[Task]:
    """Everything at attention level."""
    effort = effort_for(device, quick)
    for case in [*prefill_cases(device.type, quick), *decode_cases(device.type, quick)]:
        yield Task(case.name, partial(measure_case, case, device, effort))
    widths = WIDTHS[:1] if quick else WIDTHS
    for width in widths:
        for t in (1, 1024):
            dtype = "bf16" if device.type == "cuda" else "fp32"
            yield Task(f"live-c{width}-t{t}", partial(measure_live, width, t, dtype, device, effort))


def measure_case(case: Case, device: torch.device, effort: Effort, refused: list[BenchmarkError]) -> list[Row]:
    """Check every contestant of a case, then time those that are right and count their memory.

    Raises:
        BenchmarkError: the yardstick itself is wrong.
    """
    inputs = make_inputs(case, device)
    wanted = wanted_of(inputs)
    right: list[Contestant] = []
    found: dict[str, dict[str, Error]] = {}
    for contestant in contestants(inputs, case.flex):
        try:
            found[contestant.name] = check(contestant, case, inputs, wanted)
        except BenchmarkError as problem:
            if contestant.name == YARDSTICK:
                raise
            refused.append(problem)
            continue
        right.append(contestant)
    rows = [row for c in right if c.shifts for row in _error_rows(case, c, found)]
    del wanted
    stages = {"decode": _forward} if case.mask == "none" else {"forward": _forward, "forward+backward": _both}
    by_name = {c.name: c for c in right}
    for what, stage in stages.items():
        calls = {name: partial(stage, c, inputs) for name, c in by_name.items()}
        facts: dict[str, Any] = {
            "case": case.name,
            "model": case.shape,
            **case.sizes,
            "dtype": case.dtype,
            "mask": case.mask,
        }
        for row in timed_rows(calls, device, effort, bench="shift", what=what, **facts):
            contestant = by_name[row["contestant"]]
            rows.append(Row(**row, backend=contestant.backend, why=contestant.why))
    return rows


@torch.no_grad()
def _forward(contestant: Contestant, inputs: Inputs) -> Tensor:
    return contestant.run(inputs)


def _both(contestant: Contestant, inputs: Inputs) -> tuple[Tensor, ...]:
    return contestant.gradients(inputs)


def timed_rows(
    calls: Mapping[str, Call],
    device: torch.device,
    effort: Effort,
    around: Mapping[str, Around] | None = None,
    memory: bool = True,
    clock: Clock | None = None,
    **facts: Any,
) -> Iterator[dict[str, Any]]:
    """Time contestants in turns and count their memory; the first is the yardstick. Fields of a `Row` each."""
    times = interleaved(calls, clock or clock_for(device), effort, around)
    yardstick = next(iter(calls))
    peaks: dict[str, int] = {}
    for name in calls if memory else ():
        with (around or {}).get(name, nullcontext)():
            peaks[name] = peak_memory(calls[name], device)
    for name in calls:
        ratio = times.ratio(name, yardstick)
        yield {
            **facts,
            "contestant": name,
            "yardstick": yardstick,
            "ratio": ratio.median,
            "ratio_p20": ratio.p20,
            "ratio_p80": ratio.p80,
            "time_us": times.median(name) * 1e6,
            "added_us": times.added(name, yardstick) * 1e6,
            "speed_up": times.ratio(PUBLISHED, name).median if PUBLISHED in calls else None,
            "peak_bytes": peaks.get(name),
            "extra_over_yardstick": peaks[name] / peaks[yardstick] if peaks.get(yardstick) else None,
            "rounds": times.rounds,
        }


def _error_rows(case: Case, contestant: Contestant, found: Mapping[str, Mapping[str, Error]]) -> Iterator[Row]:
    yardstick, sizes = found[YARDSTICK], dict[str, Any](case.sizes)
    largest = max(e.length for name, e in yardstick.items() if name != "out")
    for of, e in found[contestant.name].items():
        yield Row(
            bench="shift",
            case=case.name,
            model=case.shape,
            **sizes,
            dtype=case.dtype,
            mask=case.mask,
            what="error",
            contestant=contestant.name,
            backend=contestant.backend,
            why=contestant.why,
            yardstick=YARDSTICK,
            of=of,
            error=e.length,
            yardstick_error=yardstick[of].length if of in yardstick else largest,
        )


def measure_live(
    width: int, t: int, dtype: str, device: torch.device, effort: Effort, refused: list[BenchmarkError]
) -> list[Row]:
    """LIVE's addition that keeps the length of what it is added to, against adding alone."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(1, t, width, generator=generator).to(device, DTYPES[dtype]) for _ in range(2))
    vector = torch.randn(width, generator=generator).to(device)
    scale = torch.tensor(0.1, device=device)
    leaves = [leaf.requires_grad_() for leaf in (x, vector, scale)]

    def plain() -> Tensor:
        return (x + vector).to(x.dtype)

    def ours() -> Tensor:
        return mc.ops.norm_preserving_add(x, vector, scale)

    case = f"live-c{width}-t{t}-{dtype}"
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    moved = exact[0] + exact[2] * exact[1]
    wanted = moved * exact[0].norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True)
    found = [ours(), *torch.autograd.grad(ours(), leaves, grad)]
    right = [wanted, *torch.autograd.grad(wanted, exact, grad.double())]
    names = ("out", "x", "vector", "scale")
    differences = {n: error(a.detach(), b.detach()).largest for n, a, b in zip(names, found, right, strict=True)}
    try:
        refuse(OURS, case, differences, LIMITS[dtype])
    except BenchmarkError as problem:
        refused.append(problem)
        return []
    calls = {"add": plain, OURS: ours}
    facts: dict[str, Any] = {
        "bench": "shift",
        "case": case,
        "model": f"c{width}",
        "b": 1,
        "t": t,
        "d": width,
        "dtype": dtype,
    }
    with torch.no_grad():
        rows = [Row(**row) for row in timed_rows(calls, device, effort, what="live forward", **facts)]
    if t > 1:
        both = {
            "add": lambda: torch.autograd.grad(plain(), leaves[:2], grad),
            OURS: lambda: torch.autograd.grad(ours(), leaves, grad),
        }
        rows += [Row(**row) for row in timed_rows(both, device, effort, what="live forward+backward", **facts)]
    return rows
