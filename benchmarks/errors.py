"""The error of the benchmarks."""

from __future__ import annotations


class BenchmarkError(RuntimeError):
    """A contestant gives another result than the reference, or a measurement is not possible."""
