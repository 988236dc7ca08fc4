"""Inputs that the kit makes run on a CPU first, where the model is on a GPU.

An index out of range is an error on a CPU. On a GPU it is an assert in a kernel. After that, no call of this
process works.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .subject import COPIED, Subject
from .verdicts import Raised, attempt

_OUT_OF_RANGE = re.compile(r"\bindex\b.* out of (range|bounds)")


def rehearse(s: Subject, *batches: Mapping[str, Any]) -> None:
    """Run batches through a copy of the unpatched model on a CPU. Nothing where the model is on one, or is too large.

    Raises:
        IndexError: an index is out of range there. Other errors say nothing about the GPU, and are left to it.
    """
    if "on a CPU" not in s.kept:
        s.kept["on a CPU"] = copy.deepcopy(s.inner).cpu() if needs_rehearsal(s.inner) else None
    model: nn.Module | None = s.kept["on a CPU"]
    for batch in batches if model is not None else ():
        moved = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in batch.items()}
        with torch.no_grad():
            found = attempt(lambda moved=moved: s.run(moved, model))
        if isinstance(found, Raised) and (isinstance(found.error, IndexError) or _OUT_OF_RANGE.search(str(found))):
            raise IndexError(f"on a CPU: {found}") from found.error


def needs_rehearsal(model: nn.Module) -> bool:
    """Whether a model is on a GPU, and can be copied from it."""
    parameters = list(model.parameters())
    return any(p.device.type == "cuda" for p in parameters) and sum(p.numel() for p in parameters) <= COPIED
