"""What a benchmark refuses."""

from __future__ import annotations


class BenchmarkError(RuntimeError):
    """A contestant computes something else than the reference, or a measurement can't be made."""
