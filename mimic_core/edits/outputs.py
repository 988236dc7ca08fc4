"""The way to a module's output: its `forward`, replaced in that one object while any edit is in it.

A forward hook would come after the hooks that were there before it: those of others would see the output without the
edits. It is slower too: in a tiny Llama LIVE added 68 microseconds a layer by hooks and 59 so, on a slow core.

torch.compile notices this way too. A graph does not ask whether its modules have got hooks since it was made, nor what
stands in their `__dict__`. It does ask, of every module it calls, whether `forward` was replaced in that very object.
So the graphs of an edited model no longer fit, those of others do, and when the edits are gone the old ones fit again.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .entry import Entry

_FORWARD, _KEY = "forward", "_mimic_core_forward"


class EditedForward:
    """What stands in a module's own `__dict__` for its forward: the one that was there, then the edits of its output.

    Without edits of the output it marks a module in whose forward something else is edited. Then the class's own stands
    there, bound, which costs nothing. Whoever replaces a module's forward later, as accelerate does, keeps this one
    underneath, and the edits with it.

    Attributes:
        below: What had replaced the module's forward before; None: nothing, its class has it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.below: Callable[..., Any] | None = module.__dict__.get(_FORWARD)
        self._claims = 0
        self._stands: Callable[..., Any] | None = None
        self._hold(())

    def _hold(self, entries: tuple[Entry, ...]) -> None:
        self._entries = entries
        self.refresh()
        if self._stands is None or self._is_on_top:
            # A method in either case: of any other callable a graph asks whether it is the very same object.
            marks = not entries and self.below is None
            self._stands = MethodType(type(self.module).forward, self.module) if marks else self.run
            self.module.__dict__[_FORWARD] = self._stands

    @property
    def _is_on_top(self) -> bool:
        # Equal, not the same: a copy of the module has made two of it.
        return self.module.__dict__.get(_FORWARD) == self._stands

    def refresh(self) -> None:
        """Look again at which edits are on."""
        self._on = tuple(entry for entry in self._entries if entry.owner.active)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward with the edits."""
        module, below = self.module, self.below
        # The class is asked at each call: a bound method that is kept can't be pickled with its module.
        output = type(module).forward(module, *args, **kwargs) if below is None else below(*args, **kwargs)
        for entry in self._on:
            if entry.scope is not None and not entry.active:
                continue
            if output.__class__ is Tensor and output.ndim != 2:
                output = entry.apply(output, module)
            else:
                output = _edited(output, entry, module)
        return output

    @staticmethod
    def claim(module: nn.Module, entry: Entry | None = None) -> EditedForward:
        """The one on top in a module, put there if need be. It stays until `release` was called as often."""
        found = module.__dict__.get(_KEY)
        if found is None or not found._is_on_top:
            found = module.__dict__[_KEY] = EditedForward(module)
        found._claims += 1
        if entry is not None:
            found._hold((*found._entries, entry))
        return found

    def release(self, owner: object) -> None:
        """Take an owner's edits out, and with the last claim the whole."""
        self._claims -= 1
        self._hold(tuple(entry for entry in self._entries if entry.owner is not owner))
        if self._claims:
            return
        # Covered by somebody else's, it stays underneath and passes through.
        if self._is_on_top and self.below is None:
            del self.module.__dict__[_FORWARD]
        elif self._is_on_top:
            self.module.__dict__[_FORWARD] = self.below
        if self.module.__dict__.get(_KEY) is self:
            del self.module.__dict__[_KEY]


def below_edits(module: object) -> Any:
    """A module's forward without the edits on top of it."""
    forward = getattr(module, _FORWARD, None)
    edited = getattr(forward, "__self__", None)
    return edited.below if isinstance(edited, EditedForward) else forward


def _edited(output: Any, entry: Entry, module: nn.Module) -> Any:
    """A module's output with an edit: of the first element, where it is a tuple."""
    if isinstance(output, tuple):
        parts = (_edited(output[0], entry, module), *output[1:])
        return type(output)(*parts) if hasattr(output, "_fields") else parts
    if not isinstance(output, Tensor):
        raise UnsupportedModelError(
            f"{type(module).__name__} returned a {type(output).__name__}; a site must return a tensor or a tuple"
        )
    if output.ndim != 2:
        return entry.apply(output, module)
    return entry.apply(entry.owner.unflatten(output), module).flatten(0, 1)
