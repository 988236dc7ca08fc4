"""The forwards of a model, thread by thread: when each begins and ends, and which sites it has reached."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import PatchStateError
from ..samples import Samples
from ..types import ForwardView, Site
from .forward import Again, Forward
from .prompts import Given, current_generation, watched_generate

# What a decoder's tokens are called, the likelier first.
_TOKENS = ("inputs_embeds", "input_ids", "decoder_inputs_embeds", "decoder_input_ids", "hidden_states")


@runtime_checkable
class Around(Protocol):
    """What is told when a module's forward begins and ends, in whatever way it ends."""

    @property
    def owner(self) -> object:
        """Whose edits it serves."""
        ...

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None: ...

    def leave(self, raised: bool) -> None: ...

    def traced(self) -> None:
        """Called instead of `enter` and `leave` while torch.compile traces."""


class _State(threading.local):
    """Where this thread is in a forward of the model."""

    depth = 0
    ran = False  # the decoder, since the model last began
    grad_enabled = False
    has_labels = False  # the model was given labels
    tokens: tuple[int, int] = (0, 0)  # b and t
    forward: Forward | None = None
    samples: Samples | None = None
    rows = 1  # of each sample

    def __init__(self) -> None:
        self.reached: set[tuple[int, Site]] = set()
        # What was known of the forwards around this one: a hook may run the model.
        self.outer: list[tuple[Forward | None, tuple[int, int], int]] = []


class ForwardWatch:
    """The forwards of a decoder, thread by thread. A copy or a loaded pickle starts outside of any.

    Attributes:
        callers: How often `at` says what edits do, in all threads.
        had_callers: It did in a forward with gradients. A backward may run layers of it again.

    Args:
        looks: Whether an edit acts at some positions, or may ask for them.
        wants_sizes: Whether an edit may be handed tokens without their batch.
    """

    def __init__(self, looks: bool, wants_sizes: bool) -> None:
        self._looks, self._wants_sizes = looks, wants_sizes
        self._start_outside()

    def _start_outside(self) -> None:
        self._state = _State()
        # The threads inside a forward, and those that have switched the edits off, as often as they have.
        self._inside: set[int] = set()
        self._off: list[int] = []
        self.ended_by: int | None = None
        self._lock = threading.Lock()  # between what other threads do and what is done for it
        self.callers = 0
        self.had_callers = False
        self._release = watched_generate.retain(self)

    def close(self) -> None:
        """No edit is left."""
        self._release()

    @contextmanager
    def at(self, given: Given) -> Iterator[None]:
        """In this thread, forwards have these positions, this prompt or these samples."""
        with self._lock:
            self.callers += given.limits
        outer = self.given
        token = _given.set((*_given.get(), (self, given if outer is None else given.inside(outer))))
        try:
            yield
        finally:
            _given.reset(token)
            with self._lock:
                self.callers -= given.limits

    @property
    def given(self) -> Given | None:
        """What the caller says about forwards in this thread."""
        return next((given for watch, given in reversed(_given.get()) if watch is self), None)

    def __getstate__(self) -> dict[str, Any]:
        return {"_looks": self._looks, "_wants_sizes": self._wants_sizes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_outside()

    def begin(self, arguments: Mapping[str, Any]) -> None:
        """A forward of the decoder begins.

        Raises:
            PatchStateError: another thread has switched the edits off.
        """
        state, here = self._state, threading.get_ident()
        # What can raise comes first, because a forward that has not begun does not end. The mask is the decoder's own,
        # which comes last: an encoder has another one.
        sizes = _sizes_of_tokens(arguments) if self._wants_sizes or self._looks or self.callers else None
        forward = self._look(arguments, sizes) if self._looks or self.callers else None
        if state.depth == 0:
            with self._lock:
                if self._off and here not in self._off:
                    raise PatchStateError(
                        "another thread is inside `handle.disabled()`, so this forward would run without its edits: "
                        "call `handle.disabled()` in the thread that runs the model, wait for the other one, or give "
                        "each thread a copy of the model"
                    )
                self._inside.add(here)
            state.reached.clear()
            state.grad_enabled = torch.is_grad_enabled()
        given = self.given
        state.samples = None if given is None else given.samples
        self.had_callers |= given is not None and given.limits and torch.is_grad_enabled()
        state.outer.append((state.forward, state.tokens, state.rows))
        state.depth += 1
        state.ran = True
        state.forward = forward
        state.tokens = sizes or state.tokens
        generation = None if state.depth > 1 or state.samples is None else current_generation()
        state.rows = 1 if generation is None else generation.rows

    def _look(self, arguments: Mapping[str, Any], sizes: tuple[int, int] | None) -> Forward:
        if sizes is None:
            raise PatchStateError(
                f"an edit acts at some positions, but the tokens of the decoder are not among its arguments "
                f"({', '.join(arguments)})"
            )
        # A hook may run the model inside `generate`: these tokens are another text.
        generation = None if self._state.depth else current_generation()
        return Forward(*sizes, arguments, id(self), generation, self.given, self._state.has_labels)

    def end(self) -> set[tuple[int, Site]] | None:
        """It ends, however. Returns what it has reached, where it is the outermost."""
        state = self._state
        state.depth -= 1
        forward, tokens, rows = state.outer.pop()
        if state.depth:
            state.forward, state.tokens, state.rows = forward, tokens, rows
            return None
        state.forward = state.samples = None
        self._inside.discard(threading.get_ident())
        return state.reached

    def model_begins(self, has_labels: bool) -> None:
        self._state.ran, self._state.has_labels = False, has_labels

    def model_ends(self) -> None:
        self._state.has_labels = False

    @property
    def decoder_ran(self) -> bool:
        """Whether the decoder has, in this thread, since the model began."""
        return self._state.ran

    def switch_off(self) -> None:
        """This thread wants the model without the edits.

        Raises:
            PatchStateError: another thread is in the middle of a forward with them.
        """
        here = threading.get_ident()
        with self._lock:
            if not self._off and self._inside - {here}:
                raise PatchStateError(
                    "another thread is in a forward of this model, which `handle.disabled()` would change half-way: "
                    "wait for it, or give each thread a copy of the model"
                )
            self._off.append(here)

    def switch_on(self) -> None:
        here = threading.get_ident()
        with self._lock:
            self._off.remove(here if here in self._off else self._off[-1])

    @property
    def is_off(self) -> bool:
        """Whether any thread has switched the edits off."""
        return bool(self._off)

    @property
    def was_cut_short(self) -> bool:
        """Whether another thread has taken the edits out."""
        return self.ended_by is not None and self.ended_by != threading.get_ident()

    @property
    def is_in_use(self) -> bool:
        """Whether a forward runs or a thread says something about forwards."""
        return bool(self._inside or self._off or self.callers or self.given is not None)

    @property
    def in_forward(self) -> bool:
        """Whether this thread is inside a forward of the model: not so while a checkpoint recomputes one."""
        return self._state.depth > 0

    @property
    def forward_has_grad(self) -> bool:
        """Whether the forward this thread is in was started with gradients on."""
        return self._state.grad_enabled

    @property
    def forward(self) -> ForwardView | None:
        """What is known of the forward this thread is in, where an edit needs it."""
        return self._state.forward if self.in_forward else _AGAIN

    def samples(self, b: int) -> Samples | None:
        """What each of the b rows of the forward gets, if the caller said so.

        Raises:
            ShapeError: it said so for another number of rows.
        """
        state = self._state
        return None if state.samples is None else state.samples.for_rows(b, state.rows)

    @property
    def tokens(self) -> tuple[int, int]:
        """Batch and length of the last forward's tokens in this thread: a checkpoint's second run is of the first's."""
        return self._state.tokens

    def reached(self, layer: int, site: Site) -> None:
        self._state.reached.add((layer, site))


def _sizes_of_tokens(arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    """Batch and length of a decoder's tokens."""
    for x in (*map(arguments.get, _TOKENS), *[*arguments.values()][:1]):
        if isinstance(x, Tensor):
            return (x.shape[0], x.shape[1]) if x.ndim > 1 else None
    return None


def by_name(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a method of a module, without `self`."""
    return {**dict(zip(_names(forward), args, strict=False)), **kwargs} if args else kwargs


@cache
def _names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


_given: ContextVar[tuple[tuple[ForwardWatch, Given], ...]] = ContextVar("mimic_core_given", default=())
_AGAIN = Again()
