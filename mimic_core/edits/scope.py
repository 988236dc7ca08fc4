"""Which decoder layer a thread is in."""

from __future__ import annotations

import threading
from typing import Any

from torch import nn

from ..errors import PatchStateError


class LayerScope:
    """Whether a thread is in one decoder layer, as hooks on the layer tell: for a module that several layers share."""

    def __init__(self) -> None:
        self._here = _Here()

    def runs(self, in_forward: bool) -> bool:
        """Whether this layer is the one that runs.

        Raises:
            PatchStateError: the module runs outside a forward of the model, so no layer's hooks have run.
        """
        if not self._here.depth and not in_forward:
            raise PatchStateError(
                "a module that several layers share runs outside a forward of the model, as gradient checkpointing "
                "does it, and nothing tells for which layer: switch that off, or edit other sites"
            )
        return self._here.depth > 0

    def enter(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of the layer."""
        self._here.depth += 1

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the layer."""
        self._here.depth = max(0, self._here.depth - 1)  # put there in the middle of a forward, it sees the end only


class _Here(threading.local):
    """Copies and pickles start outside."""

    depth = 0

    def __deepcopy__(self, memo: Any) -> _Here:
        return _Here()

    def __reduce__(self) -> tuple[type[_Here], tuple[()]]:
        return _Here, ()
