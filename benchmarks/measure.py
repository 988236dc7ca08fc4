"""Time and memory: contestants take turns in one process, and what is reported is the ratio within a turn."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import cycle
from statistics import median
from typing import Any, NamedTuple, TypeAlias

import torch

from .errors import BenchmarkError

Call: TypeAlias = Callable[[], object]
Around: TypeAlias = Callable[[], AbstractContextManager[object]]
Clock: TypeAlias = Callable[[Call, int], float]


@dataclass(frozen=True)
class Effort:
    """When a measurement has enough.

    Attributes:
        seconds: Total time to reach, all contestants together.
        rounds: Rounds to reach as well.
        limit: Seconds after which three rounds are enough, or fewer where `rounds` says so.
        most: Most rounds, whatever the time.
        sample: Shortest time of one sample; a faster call is repeated within it.
    """

    seconds: float
    rounds: int
    limit: float = 20.0
    most: int = 200
    sample: float = 0.002

    def enough(self, rounds: int, seconds: float) -> bool:
        """Whether so many rounds in so many seconds will do."""
        if rounds >= self.rounds:
            return seconds > self.seconds
        return rounds >= 3 and seconds > self.limit


FULL = Effort(seconds=2.0, rounds=7, limit=8.0)
# On a GPU nobody else has, one round is much like the next.
FULL_CUDA = Effort(seconds=0.5, rounds=15, limit=4.0)
QUICK = Effort(seconds=0.4, rounds=2, sample=0.0005)
# A call of so many seconds is warm after one.
_LONG = 0.02


def effort_for(device: torch.device, quick: bool) -> Effort:
    """How long to measure on a device."""
    if quick:
        return QUICK
    return FULL_CUDA if device.type == "cuda" else FULL


class Spread(NamedTuple):
    """Median, and where the middle three fifths lie."""

    median: float
    p20: float
    p80: float


def spread(values: list[float]) -> Spread:
    """Median, 20th and 80th percentile (nearest ranks: both are measured values)."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return Spread(median(ordered), ordered[math.floor(0.2 * last)], ordered[math.ceil(0.8 * last)])


@dataclass(frozen=True)
class Times:
    """Seconds per call of each contestant, one entry a round; entries of the same round belong together."""

    seconds: Mapping[str, list[float]]

    @property
    def rounds(self) -> int:
        return len(next(iter(self.seconds.values())))

    def median(self, name: str) -> float:
        """Median seconds per call."""
        return median(self.seconds[name])

    def ratio(self, name: str, to: str) -> Spread:
        """Of the ratios within each round."""
        return spread([a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True)])

    def added(self, name: str, to: str) -> float:
        """Median of the differences within each round, in seconds."""
        return median([a - b for a, b in zip(self.seconds[name], self.seconds[to], strict=True)])


def interleaved(
    calls: Mapping[str, Call], clock: Clock, effort: Effort, around: Mapping[str, Around] | None = None
) -> Times:
    """Time contestants in turns: A B C, C A B, ..., every other round backwards, so that no one has a fixed neighbour.

    Args:
        around: Entered before a contestant's sample and left after it, outside the clock. A call is then not repeated.
    """
    around = around or {}
    names = list(calls)
    fastest = math.inf
    for _ in range(3):  # warming up; of the second time on, a short call's length is to be believed
        for name in names:
            with around.get(name, nullcontext)():
                fastest = min(fastest, clock(calls[name], 1))
        if fastest > _LONG:
            break
    repeats = 1 if around else max(1, math.ceil(effort.sample / fastest))
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for number in range(effort.most):
            if effort.enough(number, time.perf_counter() - start):
                break
            turn = number % len(names)
            order = names[turn:] + names[:turn]
            for name in reversed(order) if number % 2 else order:
                with around.get(name, nullcontext)():
                    times[name].append(clock(calls[name], repeats) / repeats)
    finally:
        gc.enable()
    return Times(times)


def clock_for(device: torch.device) -> Clock:
    """How a device's time is taken."""
    return CudaClock(device) if device.type == "cuda" else cpu_clock


def cpu_clock(call: Call, repeats: int) -> float:
    """Seconds of so many calls; results are freed in between."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - start


class Copies:
    """The same call of several copies of a model. `host_clock` takes the next copy for each sample.

    Where a model lies in memory changes the time of its layers: the medians of five copies of a patched tiny Llama lie
    within 3 microseconds a layer, as much as half of what the edit adds.
    """

    def __init__(self, calls: Iterable[Call]) -> None:
        self._calls = cycle(calls)
        self._call = next(self._calls)

    def __call__(self) -> object:
        return self._call()

    def another(self) -> Call:
        """The call of the next copy, which is called from now on."""
        self._call = next(self._calls)
        return self._call


def host_clock(device: torch.device) -> Clock:
    """Seconds until so many calls are enqueued: on a GPU what they launch has not run by then."""

    def clock(call: Call, repeats: int) -> float:
        if isinstance(call, Copies):
            call = call.another()
            call()  # what the other models have put into the caches is not a part of the sample
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return cpu_clock(call, repeats)

    return clock


def graphed(call: Call) -> Call:
    """A call as a CUDA graph: what it launches is recorded once, and enqueued as one from then on."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class CudaClock:
    """Seconds between two events on the stream; the L2 cache is overwritten before, so that inputs come from memory."""

    def __init__(self, device: torch.device) -> None:
        # Larger than any L2 there is. Its writing also keeps the stream busy while the first kernels are enqueued.
        self._flush = torch.empty(256 << 20, dtype=torch.int8, device=device)

    def __call__(self, call: Call, repeats: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000


def peak_memory(call: Call, device: torch.device) -> int:
    """Most bytes one call holds at a time above what was there before, its result included.

    Call it once before: what is made once and kept is not part of a call. Exact for what goes through torch's
    allocator, inside aten's kernels too. What libraries below it allocate for themselves (MKL, oneDNN, cuBLAS) is not
    seen.
    """
    gc.disable()  # garbage of before would be freed inside and counted
    try:
        return _cuda_peak(call, device) if device.type == "cuda" else _cpu_peak(call)
    finally:
        gc.enable()


def _cuda_peak(call: Call, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


def _cpu_peak(call: Call) -> int:
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        result = call()
        # Freed inside. torch keeps the size of what a profile saw come and not go, by address, for all later profiles:
        # when memory of before lies at that address in one of them and is freed, it would count as this call's.
        del result
    counted = getattr(profiler, "kineto_results", None)
    if counted is None:
        raise BenchmarkError("torch's profiler returned no events, so the memory of a call can't be measured")
    held = peak = 0
    events: list[Any] = [e for e in counted.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
