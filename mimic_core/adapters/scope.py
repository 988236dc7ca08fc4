"""Which decoder layer a thread is in."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor, nn

from ..errors import PatchStateError


class LayerScope:
    """Where a thread is in one decoder layer, as hooks on the layer tell: for a module that does not tell itself.

    Args:
        shared: The module runs in several layers; otherwise it is one that may be handed its tokens flattened.
    """

    def __init__(self, shared: bool) -> None:
        self.shared = shared
        self._here = _Here()

    def runs(self, in_forward: bool) -> bool:
        """Whether this layer is the one that runs.

        Raises:
            PatchStateError: a shared module runs outside a forward of the model, so no layer's hooks have run.
        """
        if not self.shared or self._here.depth:
            return True
        if not in_forward:
            raise PatchStateError(
                "a module that several layers share runs outside a forward of the model, as gradient checkpointing "
                "does it, and nothing tells for which layer: switch that off, or edit other sites"
            )
        return False

    def unflatten(self, states: Tensor) -> Tensor:
        """[b*t c] as [b t c], by the layer's last input: a checkpoint's second run is of the first one's size."""
        return states.unflatten(0, self._here.tokens)

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of the layer."""
        states = args[0] if args else kwargs["hidden_states"]
        self._here.tokens = tuple(states.shape[:2])
        self._here.depth += 1

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the layer."""
        self._here.depth = max(0, self._here.depth - 1)  # put there in the middle of a forward, it sees the end only


class _Here(threading.local):
    """Copies and pickles start outside."""

    depth = 0
    tokens: tuple[int, int] = (1, -1)

    def __deepcopy__(self, memo: Any) -> _Here:
        return _Here()

    def __reduce__(self) -> tuple[type[_Here], tuple[()]]:
        return _Here, ()
