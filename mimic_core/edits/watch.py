"""The forwards of a model, thread by thread: when each begins and ends, and which sites it has reached."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from ..errors import PatchStateError
from ..samples import Samples
from ..types import ForwardView, Located
from .batches import WATCHED
from .forward import Again, Forward
from .prompts import Generation, Given, current_generation, watched_generate

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

    def traced(self) -> Any:
        """Called instead of `enter` and `leave` while torch.compile traces. Returns a context for the forward, or None.

        It has a method `end`, for when the forward is over.
        """


@dataclass(slots=True, eq=False)
class Run:
    """One forward of the decoder in one thread.

    Attributes:
        forward: What is known of its tokens, where an edit needs it.
        shape: That of the tokens, [b t ...].
        has_grad: It was started with gradients on.
        was_on: It began with the edits.
        given: What `Handle.at` and `using` said when it began, if an edit asks or they limit edits in any thread.
        generation: The call of `generate` that it is a step of, if there are samples.
        changes: `ForwardWatch.changes` when it began.
        outer: The forward that this one runs in: a hook may run the model.
        reached: The sum of the `Entry.bit` of the edits that have run.
        passes: How often the layers have begun that run several times, where edits tell their passes apart.
    """

    forward: Forward | None = None
    shape: Sequence[int] = (0, 0)
    has_grad: bool = False
    was_on: bool = True
    given: Given | None = None
    generation: Generation | None = None
    changes: int = 0
    outer: Run | None = None
    reached: int = 0
    passes: dict[Any, int] = field(default_factory=dict)


class _Here:
    """Where one thread is in a forward of the model.

    Attributes:
        ran: The decoder has run since the model last began.
        shape: That of the tokens of the last forward.
        run: The innermost forward that it is inside, or None.
        plain: The object of every forward that is in no other and of which no edit asks more. To make one for each
            decoded token costs 2 microseconds.
    """

    __slots__ = ("__weakref__", "plain", "ran", "run", "shape")

    def __init__(self) -> None:
        self.ran = True
        self.plain = Run()
        self.shape: Sequence[int] = (0, 0)
        self.run: Run | None = None


class State(threading.local):
    """An object for each thread, because each attribute of a `threading.local` has to be searched for.

    Args:
        threads: The objects of all threads; those of threads that have ended drop out.
        lock: Held while one is added.
    """

    def __init__(self, threads: WeakSet[_Here] | None = None, lock: threading.Lock | None = None) -> None:
        self.here = _Here()
        if threads is not None and lock is not None:
            with lock:
                threads.add(self.here)


class ForwardWatch:
    """The forwards of a decoder, thread by thread. A copy or a loaded pickle starts outside of any.

    Attributes:
        state: Where this thread is, as `state.here`. Attributes, because each decoded token asks.
        callers: How often `at` says what edits do, in all threads.
        had_callers: It did in a forward with gradients. A backward may run layers of it again.
        has_passes: Edits tell the passes of a layer apart, so each forward counts its own.

    Args:
        looks: Whether an edit acts at some positions, or may ask for them.
        wants_sizes: Whether an edit may be handed tokens without their batch.
        foreign: The class of a model that is none of transformers, so its arguments can mean anything.
    """

    def __init__(self, looks: bool, wants_sizes: bool, foreign: str = "") -> None:
        self._looks, self._wants_sizes, self._foreign = looks, wants_sizes, foreign
        self.has_passes = False
        self._start_outside()

    def _start_outside(self) -> None:
        self._lock = threading.Lock()  # between what other threads do and what is done for it
        self._threads: WeakSet[_Here] = WeakSet()
        self.state = State(self._threads, self._lock)
        self._off: list[int] = []  # the threads that have switched the edits off, as often as they have
        self.changes = 0  # how often the edits were switched on or off, or removed
        self.callers = 0
        self.had_callers = False
        self._releases = [method.retain(self) for method in (watched_generate, *WATCHED)]

    def close(self) -> None:
        """No edit is left."""
        self.changes += 1
        for release in self._releases:
            release()

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
        kept = ("_looks", "_wants_sizes", "_foreign", "has_passes")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_outside()

    def begin(self, arguments: Mapping[str, Any], decoder: nn.Module) -> None:
        """A forward of the decoder begins.

        Raises:
            PatchStateError: another thread has switched the edits off.
        """
        here, changes = self.state.here, self.changes  # the changes first: another thread may make one now
        outer, looks = here.run, self._looks or self.callers
        shape = shape_of_tokens(arguments) if looks or self._wants_sizes else None
        if looks or outer is not None or self.has_passes:
            run = self._run(arguments, shape, decoder, outer, looks > 0)
        else:
            run = here.plain
            run.shape = shape or here.shape
            run.has_grad, run.was_on, run.reached = torch.is_grad_enabled(), True, 0
        run.changes = changes
        # Without a lock, which costs more at each decoded token. `switch_off` too writes first what it does, and then
        # looks at the other threads. So at least one of two threads sees the other.
        here.run = run
        if self._off:
            if outer is None and threading.get_ident() not in self._off:
                here.run = None  # a forward that has not begun does not end
                raise PatchStateError(
                    "another thread is inside `handle.disabled()`, so this forward would run without its edits: "
                    "call `handle.disabled()` in the thread that runs the model, wait for the other one, or give "
                    "each thread a copy of the model"
                )
            run.was_on = False
        here.ran = True

    def _run(
        self,
        arguments: Mapping[str, Any],
        shape: Sequence[int] | None,
        decoder: nn.Module,
        outer: Run | None,
        looks: bool,
    ) -> Run:
        """One in which edits may act at some positions, or that a hook runs inside another."""
        given = self.given if looks else None
        forward = self._look(arguments, shape, decoder, given) if looks else None
        has_grad, generation = torch.is_grad_enabled(), None
        if given is not None:
            self.had_callers |= given.limits and has_grad
            generation = None if outer is not None or given.samples is None else current_generation()
        return Run(forward, shape or self._shape, has_grad, given=given, generation=generation, outer=outer)

    def _look(
        self, arguments: Mapping[str, Any], shape: Sequence[int] | None, decoder: nn.Module, given: Given | None
    ) -> Forward:
        if shape is None:
            raise PatchStateError(
                f"an edit acts at some positions, but the tokens of the decoder are not among its arguments "
                f"({', '.join(arguments)})"
            )
        # A hook may run the model inside `generate`: these tokens are another text.
        generation = None if self.in_forward else current_generation()
        return Forward(shape[0], shape[1], arguments, id(self), generation, given, decoder, self._foreign)

    def end(self) -> Run:
        """It ends, however."""
        here = self.state.here
        run = here.run
        assert run is not None
        here.run, here.shape = run.outer, run.shape
        return run

    def switch_off(self) -> None:
        """This thread wants the model without the edits.

        Raises:
            PatchStateError: another thread is in the middle of a forward with them.
        """
        here = self.state.here  # in a new thread, this takes the lock
        with self._lock:
            self._off.append(threading.get_ident())
            if len(self._off) == 1 and any(one.run is not None for one in self._threads if one is not here):
                self._off.pop()
                raise PatchStateError(
                    "another thread is in a forward of this model, which `handle.disabled()` would change half-way: "
                    "wait for it, or give each thread a copy of the model"
                )
            self.changes += 1

    def switch_on(self) -> None:
        here = threading.get_ident()
        with self._lock:
            self._off.remove(here if here in self._off else self._off[-1])
            self.changes += 1

    @property
    def is_off(self) -> bool:
        """Whether any thread has switched the edits off."""
        return bool(self._off)

    @property
    def is_in_use(self) -> bool:
        """Whether a forward runs or a thread says something about forwards."""
        with self._lock:
            inside = any(one.run is not None for one in self._threads)
        return inside or bool(self._off or self.callers or self.given is not None)

    @property
    def in_forward(self) -> bool:
        """Whether this thread is inside a forward of the model: not so while a checkpoint recomputes one."""
        return self.state.here.run is not None

    @property
    def forward(self) -> ForwardView | None:
        """What is known of the forward this thread is in, where an edit needs it."""
        run = self.state.here.run
        return _AGAIN if run is None else run.forward

    def samples(self, b: int) -> Samples | None:
        """What each of the b rows of the forward gets, if the caller said so.

        Raises:
            ShapeError: it said so for another number of rows.
        """
        run = self.state.here.run
        samples = None if run is None or run.given is None else run.given.samples
        if run is None or samples is None:
            return None
        generation = run.generation
        if generation is None:
            return samples.for_rows(b, 1)
        samples = samples.for_rows(b, generation.rows)
        if torch.is_grad_enabled():
            return samples
        if samples not in generation.samples:
            generation.samples[samples] = samples.for_call()
        return generation.samples[samples]

    @property
    def tokens(self) -> tuple[int, int]:
        """Batch and length of the last forward's tokens in this thread: a checkpoint's second run is of the first's."""
        shape = self._shape
        return shape[0], shape[1]

    @property
    def _shape(self) -> Sequence[int]:
        here = self.state.here
        return here.shape if here.run is None else here.run.shape


def foreign_class(found: Located) -> str:
    """The class of a model that is none of transformers, and whose decoder is none. Empty otherwise."""
    both = (found.model, found.adapter.decoder(found.model))
    return "" if any(isinstance(m, PreTrainedModel) for m in both) else type(found.model).__name__


def shape_of_tokens(arguments: Mapping[str, Any]) -> Sequence[int] | None:
    """The shape of a decoder's tokens, [b t ...]."""
    for name in _TOKENS:
        if isinstance(x := arguments.get(name), Tensor):
            return x.shape if x.ndim > 1 else None
    x = next(iter(arguments.values()), None)
    return x.shape if isinstance(x, Tensor) and x.ndim > 1 else None


_given: ContextVar[tuple[tuple[ForwardWatch, Given], ...]] = ContextVar("mimic_core_given", default=())
_AGAIN = Again()
