"""The route without a compiler: torch's attention kernels that give an LSE, and plain torch around them."""

from . import cpu, cuda

__all__ = ["cpu", "cuda"]
