"""Find out which decoder layer runs in a thread."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import PatchStateError
from ..types import Located, Site


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


def shared_modules(found: Located, sites: Iterable[Site]) -> set[tuple[nn.Module, Site]]:
    """The modules of sites that several layers share.

    Raises:
        PatchStateError: there are such modules, and two layers are the same module, so they can't be told apart.
    """
    places: Counter[tuple[nn.Module, Site]] = Counter(
        (found.module(layer.index, site), site) for site in sites for layer in found.spec.layers if site in layer.sites
    )
    shared = {place for place, layers in places.items() if layers > 1}
    first: dict[nn.Module, int] = {}
    for layer in found.spec.layers if shared else ():
        module = found.model.get_submodule(layer.path)
        if (index := first.setdefault(module, layer.index)) != layer.index:
            raise PatchStateError(
                f"decoder layers {index} and {layer.index} are the same module, so it is not known which of them runs: "
                f"make a copy for each of these layers"
            )
    return shared
