"""Install edits in a model and remove them. Patch, hook and capture all use this."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import PatchStateError, ShapeError
from ..types import ATTENTION_SITES, Located, Site
from .compiled import asked_about, runs_compiled, with_lasting_key
from .entry import Entry, SiteEdit
from .forward import AGAIN, Forward
from .interface import SLOT, AttentionSlot
from .outputs import EditedForward
from .scope import LayerScope

# The names of a decoder's argument with tokens, the most likely first.
_TOKENS = ("inputs_embeds", "input_ids", "decoder_inputs_embeds", "decoder_input_ids", "hidden_states")


class _ForwardState(threading.local):
    """The state of a forward of the model in this thread. A copy or a pickle starts with a new state."""

    depth = 0
    ran = False  # whether the decoder ran since the last forward of the model ended
    grad_enabled = False
    tokens: tuple[int, int] = (0, 0)  # b and t
    forward: Forward | None = None

    def __init__(self) -> None:
        self.reached: set[tuple[int, Site]] = set()

    def __deepcopy__(self, memo: Any) -> _ForwardState:
        return _ForwardState()

    def __reduce__(self) -> tuple[type[_ForwardState], tuple[()]]:
        return _ForwardState, ()


class Installation:
    """Edits in a model. Either all of them are installed or none.

    Edits at one site run in the order in which they were installed, also those of different owners.

    Attributes:
        active: Whether the edits run.

    Args:
        found: The model and its sites.
        edits: The edits.
        key: The object that the edits belong to; see `installed`.

    Raises:
        UnsupportedModelError: a layer lacks a site. The model is unchanged.
    """

    def __init__(self, found: Located, edits: Iterable[SiteEdit], key: object = None) -> None:
        self.key = key
        self.active = True
        self._off = 0
        self._state = _ForwardState()
        self._hooks: list[RemovableHandle] = []
        self._edited: list[nn.Module] = []
        self._forwards: list[EditedForward] = []
        self._model = model = found.model
        edits = list(edits)
        self._looks = any(edit.needs_prompt_end for edit in edits)
        self._wants_sizes = any(edit.site not in ATTENTION_SITES for edit in edits)
        self._places = frozenset((edit.layer, edit.site) for edit in edits)
        self._entries: list[Entry] = []
        places = [found.module(edit.layer, edit.site) for edit in edits]
        shared = _shared_modules(found, {edit.site for edit in edits})
        try:
            for edit, module in zip(edits, places, strict=True):
                scope = None
                if (module, edit.site) in shared:
                    scope = LayerScope()
                    self._tell(scope, found.adapter.module(model, edit.layer, "layer_out"))
                entry = Entry(edit, self, scope)
                self._entries.append(entry)
                self._attach(entry, module)
            decoder = found.adapter.decoder(model)
            self._hooks.append(decoder.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._hooks.append(with_lasting_key(decoder.register_forward_hook(self._leave, always_call=True), decoder))
            if decoder is not model:
                self._hooks.append(model.register_forward_hook(self._ended))
        except BaseException:
            self.remove()
            raise

    def _tell(self, scope: LayerScope, layer: nn.Module) -> None:
        self._hooks.append(layer.register_forward_pre_hook(scope.enter))
        self._hooks.append(layer.register_forward_hook(scope.leave, always_call=True))

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

    @property
    def installed(self) -> bool:
        """Whether the edits are in the model."""
        return bool(self._hooks)

    def switch_off(self) -> None:
        """Keep the edits installed but do not run them, until `switch_on` has been called as often."""
        self._switch(1)

    def switch_on(self) -> None:
        self._switch(-1)

    def _switch(self, by: int) -> None:
        self._off += by
        self.active = self._off == 0
        for module in self._edited:
            slot: AttentionSlot | None = module.__dict__.get(SLOT)
            if slot is not None:
                slot.refresh()
        for forward in self._forwards:
            forward.refresh()

    @property
    def in_forward(self) -> bool:
        """Whether this thread is inside a forward of the model. False while checkpointing runs layers again."""
        return self._state.depth > 0

    @property
    def forward_has_grad(self) -> bool:
        """Whether gradients were enabled when the forward of this thread began."""
        return self._state.grad_enabled

    @property
    def forward(self) -> Forward | None:
        return self._state.forward if self.in_forward else AGAIN

    def reached(self, layer: int, site: Site) -> None:
        if not torch.compiler.is_compiling():
            self._state.reached.add((layer, site))

    def unflatten(self, states: Tensor) -> Tensor:
        """Reshape [b*t c] to [b t c], for modules that get their tokens flattened.

        b and t are those of the last forward in this thread. They are also right when checkpointing runs it again.
        """
        b, t = self._state.tokens
        if b * t != states.shape[0]:
            raise ShapeError(
                f"a site returned {list(states.shape)}, but [{b} {t} c] or [{b * t} c] was expected, because the "
                f"decoder got {b} x {t} tokens"
            )
        return states.unflatten(0, (b, t))

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        state = self._state
        if state.depth == 0:
            state.reached.clear()
            state.grad_enabled = torch.is_grad_enabled()
        state.depth += 1
        state.ran = True
        if self._wants_sizes:
            state.tokens = _sizes_of_tokens(args, kwargs) or state.tokens
        if self._looks:
            # The last call counts, because it is the decoder's own: an encoder has another mask.
            state.forward = Forward.of(kwargs)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        state = self._state
        # If the hooks are installed in the middle of a forward, they see only its end.
        state.depth = max(0, state.depth - 1)
        if state.depth:
            return
        state.forward = None
        failed = output is None  # the forward raised an error, and that should reach the user
        if failed or state.reached >= self._places or not self.active or not self.installed:
            return
        self._complain(module, self._missed(state.reached))

    def _ended(self, module: nn.Module, args: Any, output: Any) -> None:
        """Check that a forward of the model has run its decoder."""
        if torch.compiler.is_compiling():
            return
        if not self._state.ran and self.active:
            self._complain(module, self._missed(set()))
        self._state.ran = False

    def _complain(self, module: nn.Module, missed: list[SiteEdit]) -> None:
        if missed:
            where = ", ".join(f"{edit.site} of layer {edit.layer}" for edit in missed[:4])
            more = f" and {len(missed) - 4} more" if len(missed) > 4 else ""
            raise PatchStateError(
                f"a forward of {type(module).__name__} never reached {where}{more}, so the edits there did nothing. "
                f"Perhaps its attention does not go through transformers' AttentionInterface, or its adapter names "
                f"wrong modules. Or something has replaced the forward of these modules since: then remove the patch "
                f"and patch again"
            )

    def _missed(self, reached: set[tuple[int, Site]]) -> list[SiteEdit]:
        """The edits that did not run, except those in code made by torch.compile, which does not report."""
        missed = [
            (entry.edit, module)
            for entry, module in zip(self._entries, self._edited, strict=True)
            if (entry.edit.layer, entry.edit.site) not in reached
        ]
        return [edit for edit, module in missed if not runs_compiled(self._model, module)]


def _sizes_of_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
    for x in (*args[:1], *map(kwargs.get, _TOKENS)):
        if isinstance(x, Tensor):
            return (x.shape[0], x.shape[1]) if x.ndim > 1 else None
    return None


def _shared_modules(found: Located, sites: Iterable[Site]) -> set[tuple[nn.Module, Site]]:
    places: Counter[tuple[nn.Module, Site]] = Counter(
        (found.module(layer.index, site), site) for site in sites for layer in found.spec.layers if site in layer.sites
    )
    return {place for place, layers in places.items() if layers > 1}


def installed(model: nn.Module) -> list[Installation]:
    """The installations in a model (without wrappers), in the order in which they were made."""
    hooks = model._forward_hooks.values()
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    return [owner for owner in owners if isinstance(owner, Installation)]
