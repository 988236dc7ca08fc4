"""Find out which decoder layer runs in a thread."""

from __future__ import annotations

import threading
from typing import Any

from ..errors import PatchStateError


class LayerScope:
    """Whether one decoder layer runs in a thread. For modules that several layers share."""

    def __init__(self, owner: object) -> None:
        self.owner = owner
        self._here = _Here()

    def runs(self, in_forward: bool) -> bool:
        """Whether this layer is the one that runs.

        Raises:
            PatchStateError: the module runs outside a forward of the model, so no layer has begun.
        """
        if not self._here.depth and not in_forward:
            raise PatchStateError(
                "a module that several layers share runs outside a forward of the model, as in gradient checkpointing, "
                "so it is not known which layer runs: switch off gradient checkpointing, or edit other sites"
            )
        return self._here.depth > 0

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._here.depth += 1

    def leave(self, raised: bool) -> None:
        self._here.depth -= 1

    def traced(self) -> None: ...


class _Here(threading.local):
    """A copy or a pickle starts outside the layer."""

    depth = 0

    def __deepcopy__(self, memo: Any) -> _Here:
        return _Here()

    def __reduce__(self) -> tuple[type[_Here], tuple[()]]:
        return _Here, ()
