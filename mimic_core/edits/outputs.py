"""Edits of a module's output or first argument: its `forward` is replaced in that one object while it has edits.

A forward hook would run after earlier hooks, so these would see the output without the edits. It is also slower: in a
tiny Llama on a slow core, LIVE added 68 microseconds a layer with hooks and 59 this way.

It also works with torch.compile. A graph does not check whether its modules have new hooks or other new entries in
their `__dict__`. But for every module it calls, it checks whether `forward` was replaced in that object. So graphs of
an edited model are not used, graphs of other models are, and without the edits the old graphs are used again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PatchStateError, UnsupportedModelError
from ..ops.native import ops_for
from ..types import INPUT_SITES
from .entry import Entry
from .prompts import EDITED
from .watch import Around

_FORWARD, _KEY = "forward", EDITED


class EditedForward:
    """Replaces the forward of one module: it edits the first argument, runs the forward that was there, and edits the
    output.

    It also tells others when the forward begins and ends. A forward hook can't do this: torch calls no hook after a
    `KeyboardInterrupt`. With neither edits nor others to tell, it only marks a module with edits inside its attention.
    Then it puts the bound forward of the class there, which costs no time. If somebody replaces the forward later, as
    accelerate does, that one calls this one, so the edits still run.

    Attributes:
        around: Who is told when the forward begins and ends.
        below: The function that had replaced the module's forward before, or None if it was that of the class.
    """

    # No `__dict__`: a decoded token reads from the objects of all layers, so they should be small.
    __slots__ = (
        "_around_alone",
        "_before",
        "_claims",
        "_covered",
        "_entries",
        "_first",
        "_on",
        "_only",
        "_sees_calls",
        "_stands",
        "around",
        "below",
        "module",
    )

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.below: Callable[..., Any] | None = module.__dict__.get(_FORWARD)
        self._covered: EditedForward | None = module.__dict__.get(_KEY)
        self._claims = 0
        self._stands: Callable[..., Any] | None = None
        self._hold((), ())

    def _hold(self, entries: tuple[Entry, ...], around: tuple[Around, ...]) -> None:
        self._entries, self.around = entries, around
        self._sees_calls = any(getattr(one, "sees_calls", False) for one in around)
        self.refresh()
        if self._stands is None or self._is_on_top:
            # A bound method in both cases. For other callables, a graph checks that it is the same object.
            of_class = type(self.module).forward
            marks = not entries and not around and self.below is None
            self._stands = MethodType(of_class, self.module) if marks else MethodType(_run_as(of_class), self)
            self.module.__dict__[_FORWARD] = self._stands

    @property
    def _is_on_top(self) -> bool:
        # Compared by ==: in a copy of the module they are two equal objects.
        return self.module.__dict__.get(_FORWARD) == self._stands

    def __getstate__(self) -> tuple[None, dict[str, Any]]:
        # The owners in a copy are on, even if those copied were off. They may not be complete yet: `run` looks.
        state = {name: getattr(self, name) for name in self.__slots__}
        return None, {**state, "_on": None, "_only": None, "_around_alone": None}

    @property
    def of_inputs(self) -> EditedForward | None:
        """This one if it edits the first argument, or the one that does and was covered by a forward of somebody else.

        Later edits join it: what is on top runs first, and they must come after.
        """
        if any(_at_input(entry) for entry in self._entries):
            return self
        return None if self._covered is None else self._covered.of_inputs

    def refresh(self) -> None:
        """Read again which edits are active."""
        on = [entry for entry in self._entries if entry.owner.active]
        self._before = tuple(entry for entry in on if _at_input(entry))
        names = inspect.signature(type(self.module).forward).parameters if self._before else ()
        self._first = next(iter([*names][1:]), "")  # after self
        self._on: tuple[Entry, ...] | None = tuple(entry for entry in on if not _at_input(entry))
        # A fast path for the most common patch of an output, because the overhead matters in decoding.
        self._only = None
        if (
            len(on) == len(self._on) == 1
            and (one := self._on[0]).is_addition_alone
            and self.below is None
            and not self.around
        ):
            assert one.edit.addition is not None
            self._only = one.edit.addition, one.owner.state, one.bit
        # And one for what stands around the decoder.
        self._around_alone = self.around[0] if len(self.around) == 1 and not on and self.below is None else None

    def run(self, *args: Any, **kwargs: Any) -> Any:
        around = self.around
        if not around:
            return self._edited(args, kwargs)
        if torch.compiler.is_compiling():
            if any(getattr(one, "runs_uncompiled", False) for one in around):
                return _uncompiled(self, args, kwargs)  # pyright: ignore[reportCallIssue]
            inside = None
            for one in around:
                inside = one.traced() or inside  # those of one module see the same
            if inside is None:
                return self._edited(args, kwargs)
            with inside:
                output = self._edited(args, kwargs)
            inside.end()
            return output
        if self._sees_calls:
            return _uncompiled(self, args, kwargs)  # pyright: ignore[reportCallIssue]
        return self._within(args, kwargs)

    def _within(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run it, and tell who stands around it."""
        around, entered = self.around, 0
        try:
            for one in around:
                one.enter(args, kwargs)
                entered += 1
            output = self._edited(args, kwargs)
        except BaseException:  # also an interrupt: otherwise the next forward would count as a part of this one
            for one in around[:entered]:
                one.leave(raised=True)
            raise
        error = None
        for one in around:
            try:
                one.leave(raised=False)
            except PatchStateError as found:
                error = error or found
        if error is not None:
            raise error
        return output

    def _edited(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module, below = self.module, self.below
        if self._on is None:
            self.refresh()
        if self._before:
            args, kwargs = self._given(args, kwargs)
        # Not a stored bound method, which cannot be pickled with its module.
        return self.edit(type(module).forward(module, *args, **kwargs) if below is None else below(*args, **kwargs))

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with the edits of the first."""
        value = args[0] if args else kwargs.get(self._first)
        if not isinstance(value, Tensor):
            raise UnsupportedModelError(
                f"{type(self.module).__name__} got a {type(value).__name__} as its first argument, but the module of a "
                f"site that is an input must get a tensor"
            )
        for entry in self._before:
            if entry.scope is None or entry.active:
                value = _edited(value, entry, self.module)
        return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, self._first: value})

    def edit(self, output: Any) -> Any:
        """The output of what was there, with the edits."""
        module = self.module
        if self._on is None:
            self.refresh()
        for entry in self._on or ():
            if entry.scope is not None and not entry.active:
                continue
            if output.__class__ is Tensor and output.ndim != 2:
                output = entry.apply(output, module)
            else:
                output = _edited(output, entry, module)
        return output

    @staticmethod
    def claim(module: nn.Module, entry: Entry | None = None, around: Around | None = None) -> EditedForward:
        """Get or create the one for an edit, on top in a module. It stays until `release` has been called as often."""
        found = module.__dict__.get(_KEY)
        if found is not None and entry is not None and _at_input(entry) and (joined := found.of_inputs) is not None:
            found = joined
        elif found is None or not found._is_on_top:
            found = module.__dict__[_KEY] = EditedForward(module)
        found._claims += 1
        if entry is not None:
            found._hold((*found._entries, entry), found.around)
        if around is not None:
            found._hold(found._entries, (*found.around, around))
        return found

    @staticmethod
    def entries_in(module: nn.Module) -> tuple[Entry, ...]:
        """The edits of a module's output."""
        found = module.__dict__.get(_KEY)
        return () if found is None else found._entries

    def release(self, owner: object) -> None:
        """Remove the edits of an owner. With the last claim, restore the module's forward."""
        self._claims -= 1
        entries = tuple(entry for entry in self._entries if entry.owner is not owner)
        self._hold(entries, tuple(one for one in self.around if one.owner is not owner))
        if self._claims:
            return
        # If somebody else has replaced the forward since, this one stays underneath and has no effect.
        if self._is_on_top and self.below is None:
            del self.module.__dict__[_FORWARD]
        elif self._is_on_top:
            self.module.__dict__[_FORWARD] = self.below
        if self.module.__dict__.get(_KEY) is self:
            del self.module.__dict__[_KEY]


def _at_input(entry: Entry) -> bool:
    return entry.edit.site in INPUT_SITES


@torch.compiler.disable
def _uncompiled(forward: EditedForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A forward whose edits see the calls inside it. Code made by torch.compile would not show them.

    That something inside of it is compiled by itself is prevented as well: torch.compile does so where it could not
    compile this forward.
    """
    if torch.compiler.is_compiling():
        raise PatchStateError(
            f"{type(forward.module).__name__} attends without transformers' interface, or runs layers several times, "
            f"and has edits there, which can't be exported"
        )
    return forward._within(args, kwargs)


def _told(module: nn.Module, around: Around, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward of a module's class, with one to tell."""
    around.enter(args, kwargs)
    try:
        output = type(module).forward(module, *args, **kwargs)
    except BaseException:  # also an interrupt: see `_within`
        around.leave(raised=True)
        raise
    around.leave(raised=False)
    return output


_told_uncompiled: Any = torch.compiler.disable(_told)  # see `_uncompiled`


@cache
def _run_as(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`EditedForward.run` with the signature of `forward`, because transformers and its Trainer read it."""

    @wraps(forward)
    def run(self: EditedForward, *args: Any, **kwargs: Any) -> Any:
        only = self._only
        if only is None:
            around = None if torch.compiler.is_compiling() else self._around_alone
            if around is None:
                return self.run(*args, **kwargs)
            told = _told_uncompiled if self._sees_calls else _told
            return told(self.module, around, args, kwargs)
        module = self.module
        output = type(module).forward(module, *args, **kwargs)
        # Not flattened tokens [b*t c]: a checkpoint, which runs this outside a forward, must save the same shapes.
        if output.__class__ is Tensor and output.ndim != 2 and (ops := ops_for(output)) is not None:
            parameters, state, bit = only
            run = state.here.run
            if run is not None:
                result = ops.norm_preserving_add(output, parameters.get("vector"), parameters.get("scale"))
                if result is not None:
                    run.reached |= bit
                    return result
        return self.edit(output)

    run.__name__ = "run"  # pickle finds it by this name
    return run


def below_edits(module: object) -> Any:
    """A module's forward without the edits on top of it."""
    forward = getattr(module, _FORWARD, None)
    edited = getattr(forward, "__self__", None)
    return edited.below if isinstance(edited, EditedForward) else forward


def _edited(output: Any, entry: Entry, module: nn.Module) -> Any:
    """A module's output with an edit. If it is a tuple, its first element is edited."""
    if isinstance(output, tuple):
        parts = (_edited(output[0], entry, module), *output[1:])
        return type(output)(*parts) if hasattr(output, "_fields") else parts
    if not isinstance(output, Tensor):
        raise UnsupportedModelError(
            f"{type(module).__name__} returned a {type(output).__name__}, but the module of a site must return a "
            f"tensor or a tuple"
        )
    if output.ndim != 2:
        return entry.apply(output, module)
    return entry.apply(entry.owner.unflatten(output), module).flatten(0, 1)
