"""The backends without a compiler: torch's attention kernels that return an LSE, and plain torch around them."""

from . import cpu, cuda

__all__ = ["cpu", "cuda"]
