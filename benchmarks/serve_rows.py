"""The rows of `python -m benchmarks.serve` and their table, where vLLM is not installed too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .records import Machine, read

UNPATCHED, NO_PLUGIN = "unpatched", "without the plugin"
HEADS, RANKS = {"MimIC": "mimic", "LIVE": "live"}, (8, 16)
STACKS = 8
DECODE, FIRST = "decode step", "first token"
# At 8 requests with a context of 512 tokens, on a CPU.
LIMITS = {"MimIC": 1.10, "LIVE": 1.03}


@dataclass(frozen=True)
class ServedRow(Machine):
    """One contestant in one measurement.

    Attributes:
        requests: How many run at the same time; each has a prompt of `context` tokens.
        stacks: How many stacks or adapters they have.
        what: "decode step": one step of the engine, a token for each request. "first token": from the arrival of all of
            them to the first token of each, on average.
        tokens_s: Tokens a second of all requests together, when they decode.
        ratio: Median of the time ratios to `unpatched` within a round; `ratio_p20` and `ratio_p80` beside it.
    """

    vllm: str = ""
    model: str = ""
    dtype: str = ""
    requests: int = 0
    context: int = 0
    what: str = ""
    contestant: str = ""
    stacks: int = 0
    time_us: float = 0.0
    tokens_s: float | None = None
    ratio: float = 0.0
    ratio_p20: float = 0.0
    ratio_p80: float = 0.0
    rounds: int = 0


def lora(rank: int) -> str:
    """The name of a contestant."""
    return f"LoRA, rank {rank}"


def section(folder: Path, table: Callable[..., str]) -> list[str]:
    """What the docs say of each CSV file of the benchmark."""
    parts = []
    for file in sorted(folder.glob("serve-*.csv")):
        rows = read(file, ServedRow)
        first = rows[0]
        parts += [
            f"### Served by vLLM, {first.device}",
            f"Measured {first.date}, commit {first.commit}; vLLM {first.vllm}, torch {first.torch}, {first.cores} "
            f"cores, {first.threads} threads; {first.model}, {first.dtype}. Ratios are to the time of {UNPATCHED} "
            f"requests.",
            _table(rows, table),
        ]
    return parts


def _table(rows: Sequence[ServedRow], table: Callable[..., str]) -> str:
    lines = []
    for row in rows:
        if row.contestant == UNPATCHED:
            name, time, ratio = row.contestant, f"{row.time_us / 1000:.1f} ms", "1"
        else:
            name, time = row.contestant, f"{row.time_us / 1000:.1f} ms"
            ratio = f"{row.ratio:.2f} [{row.ratio_p20:.2f}, {row.ratio_p80:.2f}]"
        speed = "" if row.tokens_s is None else f"{row.tokens_s:.0f}"
        stacks = str(row.stacks) if row.stacks else ""
        lines.append([row.what, name, str(row.requests), str(row.context), stacks, time, speed, ratio])
    head = ["", "", "requests", "context", "stacks", "time", "tokens/s", "ratio"]
    return table(head, lines, left=2)


def missed(rows: Sequence[ServedRow]) -> list[str]:
    """Which of the limits the rows do not hold, and where a stack is not cheaper than an adapter."""
    found = []
    for row in rows:
        if row.what != DECODE or row.contestant not in HEADS:
            continue
        where = f"{row.contestant}, {row.stacks} of them, {row.requests} requests: {row.ratio:.2f}"
        if (row.requests, row.context) == (8, 512) and row.ratio > LIMITS[row.contestant]:
            found.append(f"{where}; the limit is {LIMITS[row.contestant]}")
        same = (row.what, row.requests, row.context, row.stacks)
        for other in rows:
            is_lora = other.contestant.startswith("LoRA")
            if (
                is_lora
                and (other.what, other.requests, other.context, other.stacks) == same
                and row.ratio >= other.ratio
            ):
                found.append(f"{where}; {other.contestant} has {other.ratio:.2f}")
    return found
