"""Install edits in a model and remove them. Patch, hook and capture all use this."""

from __future__ import annotations

import copy
import itertools
import math
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import PatchStateError, ShapeError
from ..types import ATTENTION_SITES, ForwardView, Located, Site
from .compiled import asked_about, runs_compiled
from .entry import Entry, SiteEdit
from .interface import SLOT, AttentionSlot
from .outputs import EditedForward
from .places import Places
from .prompts import Given, current_generation
from .scope import LayerScope
from .watch import ForwardWatch, by_name

_orders = itertools.count()


class Installation:
    """Edits in a model. Either all of them are installed or none.

    Edits at one site run in the order in which they were installed, also those of different owners.

    Attributes:
        order: Grows with each installation.

    Args:
        found: The model and its sites.
        edits: The edits.
        key: The object that the edits belong to; see `installed`.

    Raises:
        UnsupportedModelError: a layer lacks a site. The model is unchanged.
        PatchStateError: edits with the same key are at one of the sites. The model is unchanged.
    """

    def __init__(self, found: Located, edits: Iterable[SiteEdit], key: object = None) -> None:
        edits = list(edits)
        self.key = key
        self.order = next(_orders)
        self._watch = ForwardWatch(
            looks=any(edit.looks for edit in edits),
            wants_sizes=any(edit.site not in ATTENTION_SITES for edit in edits),
        )
        self._hooks: list[RemovableHandle] = []
        self._edited: list[nn.Module] = []
        self._forwards: list[EditedForward] = []
        self._model = model = found.model
        self._places = frozenset((edit.layer, edit.site) for edit in edits)
        self._entries: list[Entry] = []
        places = [found.module(edit.layer, edit.site) for edit in edits]
        if key is not None and any(owner.key is key for owner in installed(*places)):
            raise PatchStateError(
                "these shifts are already in this model; remove their handle first, or build another stack"
            )
        shared = _shared_modules(found, {edit.site for edit in edits})
        _check_layers(found, shared)
        try:
            for edit, module in zip(edits, places, strict=True):
                scope = None
                if (module, edit.site) in shared:
                    scope = LayerScope(self)
                    layer = found.adapter.module(model, edit.layer, "layer_out")
                    self._forwards.append(EditedForward.claim(layer, around=scope))
                entry = Entry(edit, self, scope)
                self._entries.append(entry)
                self._attach(entry, module)
            self._decoder = found.adapter.decoder(model)
            self._standing = Places(model, (self._decoder, *self._edited))
            self._forwards.append(EditedForward.claim(self._decoder, around=self))
            self._hooks.append(model.register_forward_pre_hook(self._model_begins, with_kwargs=True))
            self._hooks.append(model.register_forward_hook(self._model_ends))
        except BaseException:
            self.remove()
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> Installation | _Nowhere:
        """A copy of a part of a model has no edits. PEFT makes one for its `modules_to_save`.

        Otherwise a copy of the whole model would come with it, and its edits would run beside these.
        """
        if id(self._model) not in memo and id(self._decoder) not in memo:
            memo[id(self)] = nowhere = _Nowhere()
            return nowhere
        memo[id(self)] = twin = type(self).__new__(type(self))
        copy.deepcopy(self._decoder, memo)  # before its layers: other edits in them look for it
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def _attach(self, entry: Entry, module: nn.Module) -> None:
        inside = entry.edit.site in ATTENTION_SITES
        self._edited.append(module)
        if not inside:
            self._forwards.append(EditedForward.claim(module, entry))
            return
        slot = module.__dict__.get(SLOT) or AttentionSlot()
        module.__dict__[SLOT] = slot
        slot.hold((*slot.entries, entry))
        self._forwards += [EditedForward.claim(asked) for asked in asked_about(module)]

    def remove(self) -> None:
        """Remove all edits. A second call does nothing."""
        if self._forwards:
            self._watch.ended_by = threading.get_ident()
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
        self._watch.close()

    @property
    def active(self) -> bool:
        """Whether the edits run."""
        return not self._watch.is_off

    @property
    def owner(self) -> Installation:
        """Itself, as what stands around the decoder's forward."""
        return self

    @property
    def installed(self) -> bool:
        """Whether the edits are in the model."""
        return bool(self._forwards)

    def switch_off(self) -> None:
        """Keep the edits installed but do not run them, until `switch_on` has been called as often."""
        self._watch.switch_off()
        self._refresh()

    def switch_on(self) -> None:
        self._watch.switch_on()
        self._refresh()

    def _refresh(self) -> None:
        for module in self._edited:
            slot: AttentionSlot | None = module.__dict__.get(SLOT)
            if slot is not None:
                slot.refresh()
        for forward in self._forwards:
            forward.refresh()

    @property
    def in_forward(self) -> bool:
        """See `ForwardWatch.in_forward`."""
        return self._watch.in_forward

    @property
    def forward_has_grad(self) -> bool:
        """See `ForwardWatch.forward_has_grad`."""
        return self._watch.forward_has_grad

    @property
    def forward(self) -> ForwardView | None:
        """See `ForwardWatch.forward`."""
        return self._watch.forward

    @property
    def has_callers(self) -> bool:
        """See `ForwardWatch.has_callers`."""
        return self._watch.has_callers

    @contextmanager
    def at(self, given: Given) -> Iterator[None]:
        """See `ForwardWatch.at`."""
        try:
            with self._watch.at(given):
                self._refresh()
                yield
        finally:
            self._refresh()

    def reached(self, layer: int, site: Site) -> None:
        if not torch.compiler.is_compiling():
            self._watch.reached(layer, site)

    def unflatten(self, states: Tensor) -> Tensor:
        """Reshape [b*t c] to [b t c], for modules that get their tokens flattened.

        b and t are those of the last forward in this thread. They are also right when checkpointing runs it again.
        """
        b, t = self._watch.tokens
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
        if self._is_out_of_place():
            raise PatchStateError("modules were replaced since the patch")

    @torch.compiler.assume_constant_result  # the graph checks which modules it calls
    def _is_out_of_place(self) -> bool:
        return not self._standing.kept

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The decoder's forward begins.

        Raises:
            PatchStateError: see `check_places`, and `ForwardWatch.begin`.
        """
        self.check_places()
        self._watch.begin(by_name(type(self._decoder).forward, args, kwargs))

    def leave(self, raised: bool) -> None:
        """The decoder's forward ends.

        Raises:
            PatchStateError: a site was not reached, or another thread has removed the edits meanwhile.
        """
        reached = self._watch.end()
        if raised or reached is None:
            return
        if self._watch.was_cut_short:
            raise PatchStateError(
                "another thread removed a patch, hook or capture during this forward, so only some layers were edited: "
                "remove it when no forward runs, or give each thread a copy of the model"
            )
        if not reached >= self._places and self.active and self.installed:
            self._complain(self._missed(reached))

    def _model_begins(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        if getattr(module, "_is_replica", False):
            raise PatchStateError(
                "nn.DataParallel runs copies of a patched model that share its edits, on other devices: use "
                "DistributedDataParallel, or one device"
            )
        self._watch.model_begins(has_labels=kwargs.get("labels") is not None)

    def _model_ends(self, module: nn.Module, args: Any, output: Any) -> None:
        """Check that a forward of the model has run its decoder."""
        if torch.compiler.is_compiling():
            return
        self._watch.model_ends()
        if not self._watch.decoder_ran and self.active:
            self.check_places()
            self._complain(self._missed(set()))

    @property
    def _depth(self) -> float:
        """How many layers the decoder runs. Assisted decoding with early exit sets fewer for a draft."""
        layers = getattr(getattr(self._decoder, "config", None), "num_hidden_layers", None)
        return layers if isinstance(layers, int) and current_generation() is not None else math.inf

    def _complain(self, missed: list[SiteEdit]) -> None:
        if missed:
            where = ", ".join(f"{edit.site} of layer {edit.layer}" for edit in missed[:4])
            more = f" and {len(missed) - 4} more" if len(missed) > 4 else ""
            raise PatchStateError(
                f"a forward of {type(self._model).__name__} never reached {where}{more}, so the edits there did "
                f"nothing. Perhaps its attention does not go through transformers' AttentionInterface, or its adapter "
                f"names wrong modules. Or something has replaced the forward of these modules since: then remove the "
                f"patch and patch again. Or torch.compile could not compile the edits: then run the model uncompiled"
            )

    def _missed(self, reached: set[tuple[int, Site]]) -> list[SiteEdit]:
        """The edits that did not run, except those in code made by torch.compile, which does not report."""
        missed = [
            (entry.edit, module)
            for entry, module in zip(self._entries, self._edited, strict=True)
            if (entry.edit.layer, entry.edit.site) not in reached and entry.edit.layer < self._depth
        ]
        return [edit for edit, module in missed if not runs_compiled(self._model, module)]


def _check_layers(found: Located, shared: set[tuple[nn.Module, Site]]) -> None:
    """Check that the layers that share a module can be told apart.

    Raises:
        PatchStateError: two layers are the same module.
    """
    if not shared:
        return
    first: dict[nn.Module, int] = {}
    for layer in found.spec.layers:
        module = found.model.get_submodule(layer.path)
        if (index := first.setdefault(module, layer.index)) != layer.index:
            raise PatchStateError(
                f"decoder layers {index} and {layer.index} are the same module, so it is not known which of them runs: "
                f"make a copy for each of these layers"
            )


class _Nowhere:
    """The owner of edits in a copy of a part of a patched model. They never run."""

    active = in_forward = has_callers = False
    forward = None

    def reached(self, layer: int, site: Site) -> None: ...

    def unflatten(self, states: Tensor) -> Tensor:
        return states


def _shared_modules(found: Located, sites: Iterable[Site]) -> set[tuple[nn.Module, Site]]:
    places: Counter[tuple[nn.Module, Site]] = Counter(
        (found.module(layer.index, site), site) for site in sites for layer in found.spec.layers if site in layer.sites
    )
    return {place for place, layers in places.items() if layers > 1}


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
