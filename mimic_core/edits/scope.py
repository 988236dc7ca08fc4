"""Find out which decoder layer runs in a thread, and which of its passes."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import PatchStateError
from ..types import Located, Site
from .frames import checkpointed
from .watch import State


@runtime_checkable
class _Runs(Protocol):
    """The owner of edits, as a scope sees it."""

    @property
    def active(self) -> bool: ...

    @property
    def state(self) -> State: ...


class LayerScope:
    """Whether one decoder layer runs in a thread. For modules that several layers share.

    A layer that runs several times in a forward can be several layers of the spec. Then it is in one of its passes.

    Attributes:
        owner: Whose edits it serves.
        path: Of the layer in the model.
        run: The pass, from 0.
        passes: How many there are.
        counts: There are several.
    """

    def __init__(self, owner: _Runs, path: str, run: int = 0, passes: int = 1) -> None:
        self.owner, self.path, self.run, self.passes = owner, path, run, passes
        self.counts = passes > 1
        self._here = _Here()
        # By tensor: the passes that it was given to, each with the number of tensors that the pass was given.
        self._begun: Any = WeakIdKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_begun": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begun = WeakIdKeyDictionary()

    @classmethod
    def of(cls, owner: _Runs, found: Located, index: int) -> LayerScope:
        """The scope of a layer of the spec."""
        layer, module_at = found.spec.layers[index], found.model.get_submodule
        module = module_at(layer.path)
        passes = {one.run for one in found.spec.layers if module_at(one.path) is module}
        return cls(owner, layer.path, layer.run, len(passes))

    def runs(self, in_forward: bool) -> bool:
        """Whether this layer is the one that runs.

        Raises:
            PatchStateError: the module runs outside a forward of the model, so no layer has begun.
        """
        again = checkpointed() if self.counts and torch.is_grad_enabled() else []
        if any(x in self._begun for x in _tensors(again)):
            return self._again(again) == self.run
        if self._here.inside or in_forward:
            return self._here.inside[-1:] == (self.run,)
        if not self.counts:
            raise PatchStateError(
                "a module that several layers share runs outside a forward of the model, as in gradient checkpointing, "
                "so it is not known which layer runs: switch off gradient checkpointing, or edit other sites"
            )
        return self._again(again) == self.run

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run = self.run
        if self.counts:
            forward, given = self.owner.state.here.run, (*args, *kwargs.values())
            run = self._again(given) if forward is None else self._next(forward.passes, given)
        self._here.inside += (run,)

    def _next(self, passes: dict[Any, int], given: Iterable[Any]) -> int:
        """The pass that begins, with these arguments."""
        run = passes.get(self, 0)
        passes[self] = run + 1
        if torch.is_grad_enabled():
            tensors = _tensors(given)
            for x in tensors:
                self._begun[x] = self._begun.get(x, frozenset()) | {(run, len(tensors))}
        return run

    def _again(self, given: Iterable[Any]) -> int:
        """The pass that runs again outside of any forward, as in gradient checkpointing: the one that was given the
        very same tensors.

        Raises:
            PatchStateError: there is none, as with a reentrant checkpoint, or more than one.
        """
        tensors = _tensors(given)
        known = [self._begun.get(x, frozenset()) for x in tensors]
        found = [run for run, count in frozenset.intersection(*known) if count == len(tensors)] if known else []
        run = found[0] if len(found) == 1 else None
        if run is None and self.owner.active:
            raise PatchStateError(
                f"{self.path} runs several times in a forward, with edits for each pass, and runs here outside a "
                f"forward of the model, so it is not known which pass this is. With gradient checkpointing, use "
                f"gradient_checkpointing_kwargs={{'use_reentrant': False}}; or use one head for all passes: "
                f"adapter=mimic_core.GenericAdapter(share_passes=True)"
            )
        return -1 if run is None else run

    def leave(self, raised: bool) -> None:
        self._here.inside = self._here.inside[:-1]

    def traced(self) -> None: ...


class _Here(threading.local):
    """The passes of the layer that a thread is inside, the innermost last: a hook in a layer may run the model.

    A copy or a pickle starts outside.
    """

    inside: tuple[int, ...] = ()

    def __deepcopy__(self, memo: Any) -> _Here:
        return _Here()

    def __reduce__(self) -> tuple[type[_Here], tuple[()]]:
        return _Here, ()


def _tensors(given: Iterable[Any]) -> list[Tensor]:
    """The tensors among arguments, each once."""
    return list({id(x): x for x in given if isinstance(x, Tensor)}.values())


def shared_modules(found: Located, sites: Iterable[Site]) -> set[tuple[nn.Module, Site]]:
    """The modules of sites that several layers share.

    Raises:
        PatchStateError: there are such modules, and two layers are the same module, so they can't be told apart.
    """
    places: Counter[tuple[nn.Module, Site]] = Counter(
        (found.module(layer.index, site), site) for site in sites for layer in found.spec.layers if site in layer.sites
    )
    shared = {place for place, layers in places.items() if layers > 1}
    first: dict[tuple[nn.Module, int], int] = {}
    for layer in found.spec.layers if shared else ():
        module = found.model.get_submodule(layer.path)
        if (index := first.setdefault((module, layer.run), layer.index)) != layer.index:
            raise PatchStateError(
                f"decoder layers {index} and {layer.index} are the same module, so it is not known which of them runs: "
                f"make a copy for each of these layers"
            )
    return shared
