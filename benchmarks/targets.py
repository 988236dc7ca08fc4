"""What mimic_core aims at, and whether rows of a CSV hold it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from .bench_heads import FORWARD, PAIRS, of_pairs
from .bench_host import CALLS, STATIC_CACHE
from .bench_patch import LIVE, MIMIC, UNPATCHED
from .contestants import OURS, PUBLISHED, YARDSTICK
from .records import Row

Measure: TypeAlias = "Callable[[Row], float | None]"


@dataclass(frozen=True)
class Target:
    """One thing to hold.

    Attributes:
        measures: The number a row has to show, or None where the target doesn't speak of the row.
        at_least: Whether `limit` is a floor instead of a ceiling.
    """

    name: str
    limit: float
    measures: Measure
    at_least: bool = False

    def worst(self, rows: Iterable[Row]) -> tuple[float, Row] | None:
        """The number furthest on the wrong side, and its row; None: nothing was measured."""
        found = [(value, row) for row in rows if (value := self.measures(row)) is not None]
        pick = min if self.at_least else max
        return pick(found, key=lambda pair: pair[0]) if found else None

    def holds(self, value: float) -> bool:
        """Whether a number is on the right side of the limit."""
        return value >= self.limit if self.at_least else value <= self.limit


def _ours(what: str, read: Measure, accept: Callable[[Row], bool] = lambda row: True) -> Measure:
    def measure(row: Row) -> float | None:
        wanted = (row.what, row.contestant) == (what, OURS) and row.bench != "heads"
        return read(row) if wanted and accept(row) else None

    return measure


def _targets() -> list[Target]:
    found = []
    for what in ("forward", "forward+backward"):
        for limit, low, high in ((1.10, 512, 1023), (1.05, 1024, 1 << 30)):
            reach = f"{low} <= t < {high + 1}" if high < 1 << 30 else f"t >= {low}"
            measures = _ours(what, lambda r: r.ratio, lambda r, a=low, z=high: a <= (r.t or 0) <= z)
            found.append(Target(f"{what}, time over {YARDSTICK}, {reach}", limit, measures))
    for what, limits in (("forward", (4, 5, 5.5)), ("forward+backward", (3, 3.8, 4.8))):
        for t, limit in zip((1024, 2048, 4096), limits, strict=True):
            measures = _ours(what, lambda r: r.speed_up, lambda r, t=t: r.t == t)
            found.append(Target(f"{what}, speed-up over {PUBLISHED}, t = {t}", limit, measures, at_least=True))
    for what, limit in (("forward", 1.05), ("forward+backward", 1.25)):
        measures = _ours(what, lambda r: r.extra_over_yardstick)
        found.append(Target(f"{what}, peak memory over {YARDSTICK}", limit, measures))
    return [
        *found,
        Target(
            "decode, microseconds added a call, 8 heads", 10, _ours("decode", lambda r: r.added_us, lambda r: r.h == 8)
        ),
        Target(
            f"decode step of SmolLM2-135M with MimIC, time over {UNPATCHED}",
            1.05,
            lambda r: (
                r.ratio
                if (r.bench, r.what, r.contestant) == ("patch", "decode step", MIMIC) and "smollm2" in r.model
                else None
            ),
        ),
        Target(
            f"training step, context of 2048, speed-up over {PUBLISHED}",
            2,
            _ours("training step", lambda r: r.speed_up, _long),
            at_least=True,
        ),
        Target(
            f"training step, context of 2048, times less extra memory than {PUBLISHED}",
            10,
            _ours("training step", _less_memory, _long),
            at_least=True,
        ),
        *_host_targets(),
        Target(
            "LIVE's addition, 1024 tokens, time over adding", 1.5, _ours("live forward", lambda r: r.ratio, _long_row)
        ),
        Target(f"virtual pairs, 1024 tokens, time over {YARDSTICK}", 1.1, _pairs),
        Target("gradients in fp32, error relative to fp64", 1e-5, _gradient("fp32", lambda r: r.error)),
        Target(f"gradients in bf16, error over that of {YARDSTICK}", 1.5, _gradient("bf16", _error_ratio)),
    ]


def _host_targets() -> list[Target]:
    """What Python and dispatch may cost. A GPU's host also launches kernels."""
    found = []
    for what, limits in zip(CALLS, ((4, 12), (6, 12), (25, 45)), strict=True):
        for gpu, limit in zip((False, True), limits, strict=True):
            name = f"{what}, 4 tokens, microseconds over {YARDSTICK}{' on a GPU' if gpu else ''}"
            found.append(Target(name, limit, _host(OURS, what, "d64", lambda r: r.added_us, gpu)))
    for head, limit in ((MIMIC, 8), (LIVE, 6)):
        name = f"tiny Llama, decode step, {head.removeprefix(f'{OURS}: ')}, microseconds a layer over {UNPATCHED}"
        found.append(Target(name, limit, _host(head, "decode step", "tiny-llama", lambda r: r.added_us, False)))
    for head in (MIMIC, LIVE):
        name = f"tiny Llama, training step, {head.removeprefix(f'{OURS}: ')}, microseconds a layer over {UNPATCHED}"
        found.append(Target(name, 40, _host(head, "training step", "tiny-llama", lambda r: r.added_us, False)))
    for way, limit in (("", 1.08), (", graphs", 1.03)):
        measures = _host(MIMIC, f"decode step{way}", "smollm2", lambda r: r.ratio, True)
        found.append(
            Target(f"decode step of SmolLM2-135M with MimIC{way}, host time over {UNPATCHED}", limit, measures)
        )
    for of in ("graph breaks", "recompiles"):
        found.append(Target(f"{STATIC_CACHE}, {of}", 0, lambda r, of=of: _of_ours(r, of)))
    return found


def _host(contestant: str, what: str, model: str, read: Measure, gpu: bool) -> Measure:
    def measure(row: Row) -> float | None:
        wanted = (row.bench, row.contestant, row.what) == ("host", contestant, what) and row.model.startswith(model)
        return read(row) if wanted and not row.of and row.device.startswith("NVIDIA") == gpu else None

    return measure


def _of_ours(row: Row, of: str) -> float | None:
    return row.count if row.of == of and row.contestant.startswith(OURS) else None


def _long_row(row: Row) -> bool:
    return (row.t or 0) >= 1024


def _pairs(row: Row) -> float | None:
    wanted = row.bench == "heads" and row.what == FORWARD and row.contestant in map(of_pairs, PAIRS)
    return row.ratio if wanted else None


def _gradient(dtype: str, read: Measure) -> Measure:
    return _ours("error", read, lambda row: row.dtype == dtype and row.of != "out")


def _long(row: Row) -> bool:
    return (row.s or 0) >= 2048


def _less_memory(row: Row) -> float | None:
    return 1 / row.extra_over_yardstick if row.extra_over_yardstick else None


def _error_ratio(row: Row) -> float | None:
    return row.error / row.yardstick_error if row.error is not None and row.yardstick_error else None


TARGETS = _targets()
