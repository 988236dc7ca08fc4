"""Install edits in a model and remove them. Patch, hook and capture all use this."""

from __future__ import annotations

import copy
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import PatchStateError, ShapeError
from ..samples import Samples
from ..types import ATTENTION_SITES, ForwardView, Located
from .compiled import asked_about, runs_compiled
from .entry import Bystander, Entry, SiteEdit
from .faults import halfway, never_reached, other_passes
from .frames import by_name, is_called, is_called_anywhere
from .interface import SLOT, Attending, AttentionSlot
from .outputs import EditedForward
from .places import Places
from .prompts import Given, current_generation
from .scope import LayerScope, shared_modules
from .watch import ForwardWatch, State, foreign_class

_orders = itertools.count()


class Installation:
    """Edits in a model. Either all of them are installed or none.

    Edits at one site run in the order in which they were installed, also those of different owners.

    Attributes:
        order: Grows with each installation.
        model: The model that the edits are in.
        watch: Its forwards.
        is_plain: No call says what the edits do, and they act fully. An attribute, because each decoded token asks.
        runs_uncompiled: See `EditedForward.run`. A graph has no passes that could be counted.

    Args:
        found: The model and its sites.
        edits: The edits.
        key: The object that the edits belong to.
        parts: What of it has edits, so that none comes twice into a model.
        thread: The only thread in which they do anything; None means all.
        begins: Called with False when a forward begins that is not a part of another one. Called with True when
            torch.compile traces one with gradients: if it raises PatchStateError then, the decoder runs uncompiled.

    Raises:
        UnsupportedModelError: a layer lacks a site. The model is unchanged.
        PatchStateError: two layers are the same module. The model is unchanged.
    """

    def __init__(
        self,
        found: Located,
        edits: Iterable[SiteEdit],
        key: object = None,
        parts: Iterable[Any] = (),
        thread: int | None = None,
        begins: Callable[[bool], None] | None = None,
    ) -> None:
        self.key, self._thread, self.begins = key, thread, begins
        self.parts = list(parts)
        self.edits = edits = list(edits)
        self.order = next(_orders)
        self._strength: float | Tensor = 1.0
        self._is_full = self.is_plain = True
        self.watch = ForwardWatch(
            looks=any(edit.looks for edit in edits),
            wants_sizes=any(edit.site not in ATTENTION_SITES for edit in edits),
            foreign=foreign_class(found),
        )
        self._hooks: list[RemovableHandle] = []
        self._edited: list[nn.Module] = []
        self._forwards: list[EditedForward] = []
        self.model = model = found.model
        self._all = (1 << len(edits)) - 1  # what `Run.reached` is when all edits have run
        self._entries: list[Entry] = []
        self._passes: list[LayerScope] = []
        self.runs_uncompiled = False
        places = [found.module(edit.layer, edit.site) for edit in edits]
        shared = shared_modules(found, {edit.site for edit in edits})
        try:
            for i, (edit, module) in enumerate(zip(edits, places, strict=True)):
                scope = None
                if (module, edit.site) in shared:
                    scope = LayerScope.of(self, found, edit.layer)
                    self._forwards.append(EditedForward.claim(model.get_submodule(scope.path), around=scope))
                    self._passes += [scope] if scope.counts else []
                entry = Entry(edit, self, 1 << i, scope)
                self._entries.append(entry)
                self._attach(entry, module, found.own.get(edit.layer))
            self.watch.has_passes = self.runs_uncompiled = bool(self._passes)
            self._decoder = found.adapter.decoder(model)
            self._came_inside = is_called_anywhere(self._decoder)
            self._standing = Places(model, (self._decoder, *self._edited))
            self._forwards.append(EditedForward.claim(self._decoder, around=self))
            self._hooks.append(model.register_forward_pre_hook(self._model_begins))
            self._hooks.append(model.register_forward_hook(self._model_ends))
        except BaseException:
            self.remove()
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> Installation | _Nowhere:
        """A copy of a part of a model has no edits. PEFT makes one for its `modules_to_save`.

        Otherwise a copy of the whole model would come with it, and its edits would run beside these.
        """
        if id(self.model) not in memo and id(self._decoder) not in memo:
            memo[id(self)] = nowhere = _Nowhere()
            return nowhere
        memo[id(self)] = twin = type(self).__new__(type(self))
        copy.deepcopy(self._decoder, memo)  # before its layers: other edits in them look for it
        twin.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "is_plain": self._is_full}  # a copy is outside of any `at`

    def _attach(self, entry: Entry, module: nn.Module, own: Any) -> None:
        self._edited.append(module)
        if entry.edit.site not in ATTENTION_SITES:
            self._forwards.append(EditedForward.claim(module, entry))
            return
        slot = module.__dict__[SLOT] = module.__dict__.get(SLOT) or AttentionSlot(own)
        slot.hold((*slot.entries, entry))
        if own:
            self._forwards.append(EditedForward.claim(module, around=Attending(self, slot, module)))
        for asked in asked_about(module):
            self._forwards.append(EditedForward.claim(asked))

    def remove(self) -> None:
        """Remove all edits. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        for module in self._edited:
            slot: AttentionSlot | None = module.__dict__.get(SLOT)
            if slot is not None:
                slot.hold(tuple(e for e in slot.entries if e.owner is not self))
                if not slot.entries:
                    del module.__dict__[SLOT]
                    slot.release()
        for forward in self._forwards:
            forward.release(self)
        self._hooks, self._edited, self._forwards = [], [], []
        self.watch.close()

    @property
    def active(self) -> bool:
        """Whether the edits run."""
        return not self.watch.is_off

    @property
    def owner(self) -> Installation:
        """Itself, as what stands around the decoder's forward."""
        return self

    @property
    def installed(self) -> bool:
        """Whether the edits are in the model."""
        return bool(self._forwards)

    @property
    def is_in_use(self) -> bool:
        """Whether a forward runs, or `switch_off` or `at` says something about forwards, in any thread."""
        return self.watch.is_in_use

    def switch_off(self) -> None:
        """Keep the edits installed but do not run them, until `switch_on` has been called as often."""
        self.watch.switch_off()
        self._refresh()

    def switch_on(self) -> None:
        self.watch.switch_on()
        self._refresh()

    def _refresh(self) -> None:
        self.is_plain = not (self.watch.callers or self.watch.had_callers) and self._is_full
        for module in self._edited:
            slot: AttentionSlot | None = module.__dict__.get(SLOT)
            if slot is not None:
                slot.refresh()
        for forward in self._forwards:
            forward.refresh()

    @property
    def state(self) -> State:
        """See `ForwardWatch`."""
        return self.watch.state

    @property
    def in_forward(self) -> bool:
        """See `ForwardWatch.in_forward`."""
        return self.watch.in_forward

    @property
    def forward(self) -> ForwardView | None:
        """See `ForwardWatch.forward`."""
        return self.watch.forward

    @property
    def has_callers(self) -> bool:
        """Whether `at` says what edits do, in any thread."""
        return self.watch.callers > 0

    @property
    def had_callers(self) -> bool:
        """See `ForwardWatch.had_callers`."""
        return self.watch.had_callers

    @property
    def strength(self) -> float | Tensor:
        """The factor of the edits where a call says no other."""
        return self._strength

    @strength.setter
    def strength(self, strength: float | Tensor) -> None:
        self._strength = strength
        self._is_full = not isinstance(strength, Tensor) and strength == 1
        self._refresh()

    def samples(self, b: int) -> Samples | None:
        """See `ForwardWatch.samples`."""
        return self.watch.samples(b)

    @contextmanager
    def at(self, given: Given) -> Iterator[None]:
        """See `ForwardWatch.at`."""
        try:
            with self.watch.at(given):
                self._refresh()
                yield
        finally:
            self._refresh()

    def reached(self, bit: int) -> None:
        if torch.compiler.is_dynamo_compiling():
            return
        run = self.watch.state.here.run
        if run is not None:
            run.reached |= bit
        elif self._came_inside and self._acts_here and is_called(self._decoder):
            raise halfway("put in")

    def unflatten(self, states: Tensor) -> Tensor:
        """Reshape [b*t c] to [b t c], for modules that get their tokens flattened.

        b and t are those of the last forward in this thread. They are also right when checkpointing runs it again.
        """
        b, t = self.watch.tokens
        if b * t != states.shape[0]:
            raise ShapeError(
                f"a site returned {list(states.shape)}, but [{b} {t} c] or [{b * t} c] was expected, because the "
                f"decoder got {b} x {t} tokens"
            )
        return states.unflatten(0, (b, t))

    def check_places(self) -> None:
        """Check that the modules with edits are still where the edits belong.

        Raises:
            PatchStateError: something else stands there.
        """
        if not self._standing.kept:
            raise PatchStateError(
                f"modules were replaced since the patch, hook or capture: {self._standing.changes()}. Its edits are on "
                f"the old ones, so their result would depend on the order: remove its handle and patch again, or "
                f"change the model before the patch"
            )

    def traced(self) -> None:
        """torch.compile traces the decoder's forward.

        Raises:
            PatchStateError: see `check_places`. Then torch.compile runs the decoder uncompiled, which raises it again.
        """
        self._standing.traced()
        if self._is_out_of_place():
            raise PatchStateError("modules were replaced since the patch")
        if self.begins is not None and torch.is_grad_enabled() and (refusal := self._refusal()):
            raise PatchStateError(refusal)

    @torch.compiler.assume_constant_result  # the graph checks which modules it calls
    def _is_out_of_place(self) -> bool:
        return not self._standing.kept

    @torch.compiler.assume_constant_result
    def _refusal(self) -> str:
        assert self.begins is not None
        try:
            self.begins(True)
        except PatchStateError as error:
            return str(error)
        return ""

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The decoder's forward begins.

        Raises:
            PatchStateError: see `check_places`, and `ForwardWatch.begin`.
        """
        if not self._standing.kept:
            self.check_places()
        watch, decoder = self.watch, self._decoder
        if self.begins is not None and watch.state.here.run is None and not watch.is_off:
            self.begins(False)
        watch.begin(by_name(type(decoder).forward, args, kwargs) if args else kwargs, decoder)

    def leave(self, raised: bool) -> None:
        """The decoder's forward ends.

        Raises:
            PatchStateError: a site was not reached, or the edits have changed meanwhile and not for all layers.
        """
        run = self.watch.end()
        if raised or not self._acts_here:
            return
        missed = run.was_on and run.reached != self._all
        if self.watch.changes != run.changes and (missed or (not run.was_on and (run.reached or self.active))):
            raise halfway("removed, or switched on or off,")
        if run.given is not None and run.given.limits and self.watch.given is not run.given:
            raise halfway("taken out of `handle.at` or `handle.using`")
        for scope in self._passes if run.was_on else ():
            if (ran := run.passes.get(scope, 0)) != scope.passes:
                raise other_passes(scope.path, ran, scope.passes)
        if missed:
            self._complain(self._missed(run.reached))

    @property
    def _acts_here(self) -> bool:
        return self._thread is None or self._thread == threading.get_ident()

    def _model_begins(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            self.traced()  # the decoder may be another one
            return
        if "_is_replica" in module.__dict__:  # getattr of a module searches for long
            raise PatchStateError(
                "nn.DataParallel runs copies of a patched model that share its edits, on other devices: use "
                "DistributedDataParallel, or one device"
            )
        self.watch.state.here.ran = False

    def _model_ends(self, module: nn.Module, args: Any, output: Any) -> None:
        """Check that a forward of the model has run its decoder."""
        if torch.compiler.is_compiling():
            self.traced()
            return
        if not self.watch.state.here.ran and self.active:
            self.check_places()
            self._complain(self._missed(0))

    @property
    def _depth(self) -> float:
        """How many layers the decoder runs. Assisted decoding with early exit sets fewer for a draft."""
        if self._passes:
            return math.inf  # its layers are fewer than those of the spec
        layers = getattr(getattr(self._decoder, "config", None), "num_hidden_layers", None)
        return layers if isinstance(layers, int) and current_generation() is not None else math.inf

    def _complain(self, missed: list[SiteEdit]) -> None:
        if missed:
            raise never_reached(self.model, missed)

    def _missed(self, reached: int) -> list[SiteEdit]:
        """The edits that did not run, except those in code made by torch.compile, which does not report."""
        return [
            entry.edit
            for entry, module in zip(self._entries, self._edited, strict=True)
            if not entry.bit & reached and entry.edit.layer < self._depth and not runs_compiled(self.model, module)
        ]


class _Nowhere(Bystander):
    """The owner of edits in a copy of a part of a patched model. They never run."""

    active = in_forward = False


def installed(*modules: nn.Module) -> list[Installation]:
    """The installations with edits in these modules, in the order in which they were made."""
    found: dict[int, Installation] = {}
    for module in modules:
        slot: AttentionSlot | None = module.__dict__.get(SLOT)
        entries = (*(slot.entries if slot is not None else ()), *EditedForward.entries_in(module))
        for owner in (entry.owner for entry in entries):
            if isinstance(owner, Installation):
                found[id(owner)] = owner
    return sorted(found.values(), key=lambda one: one.order)
