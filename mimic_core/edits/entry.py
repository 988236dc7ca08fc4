"""An edit: one function at one site of one layer, and its owner."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..errors import PatchStateError, ShapeError
from ..positions import Positions
from ..samples import Samples, by_row, partly
from ..types import READ_ONLY_SITES, At, AttentionView, ForwardView, Site, check_token_site, tokens_of
from .forward import check_uncompiled
from .scope import LayerScope
from .watch import State

Run = Callable[[Tensor, At], Tensor | None]


@dataclass(frozen=True, slots=True)
class SiteEdit:
    """One function at one site of one layer.

    Attributes:
        run: Gets the value and an `At`. Returns the new value, or None to keep it.
        shift: At `attn_heads`: gives the parameters of `ops.gated_shift` if `run` is exactly that, else None.
        addition: At the output of a module: the parameters of `ops.norm_preserving_add` if `run` is exactly that.
        fused: At `attn_heads`: attention and edit in one call. It returns None if it cannot run the call.
        needs_lse: `run` reads `at.lse`. At site `lse` this is not needed.
        needs_positions: `run` may read `at.positions`, so the mask and the cache of the forward are read.
        needs_at: `run` reads its `At`. If False, it gets None.
        keeps: `run` may keep what it is given after the call. So the model never writes to it later.
        positions: The tokens on which it acts; the values of the others stay as they are. A mask [b t] is for every
            forward.
        picks: The edit of one kind of heads of a `StackSet`. It gets what each row of a forward gets, and returns the
            function to run and the rows [b] on which it acts (None: all), or None if no row gets such a head. `run`
            is then not used.
        shared: What the strength passes through, if the process has only some attention heads at the site: its gradient
            is that of all of them.
        is_limited: It acts only on some tokens.
        is_apart: It may act on some tokens or samples only, so it runs apart from the attention.
    """

    layer: int
    site: Site
    run: Run
    shift: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] | None = None
    addition: Mapping[str, Tensor | None] | None = None
    fused: Callable[[At], Tensor | None] | None = None
    needs_lse: bool = False
    needs_positions: bool = False
    needs_at: bool = True
    keeps: bool = False
    positions: Positions | Tensor = "all"
    picks: Callable[[Samples, torch.device], tuple[Run, Tensor | None] | None] | None = None
    shared: Callable[[Tensor], Tensor] | None = None

    is_limited: bool = field(init=False)
    is_apart: bool = field(init=False)

    def __post_init__(self) -> None:
        # Worked out once, because each decoded token asks. torch.compile can't trace a cached_property.
        limited = isinstance(self.positions, Tensor) or self.positions != "all"
        apart = limited or self.picks is not None
        found = {"is_limited": limited, "is_apart": apart}
        for name, value in found.items():
            object.__setattr__(self, name, value)

    @property
    def looks(self) -> bool:
        """Whether the prompts of a forward must be known."""
        return self.needs_positions or self.is_limited


@runtime_checkable
class Owner(Protocol):
    """The owner of an edit: it says whether the edit is active, and is told when the edit has run."""

    @property
    def active(self) -> bool: ...

    @property
    def state(self) -> State: ...

    @property
    def in_forward(self) -> bool: ...

    @property
    def forward(self) -> ForwardView | None: ...

    @property
    def has_callers(self) -> bool: ...

    @property
    def had_callers(self) -> bool: ...

    @property
    def is_plain(self) -> bool:
        """There are and were no callers, and the strength is 1."""
        ...

    @property
    def strength(self) -> float | Tensor: ...

    def samples(self, b: int) -> Samples | None: ...

    def reached(self, bit: int) -> None: ...

    def unflatten(self, states: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Entry:
    """An edit and its owner. It has a `scope` if several layers share the module.

    `bit` is a power of two, which no other entry of the owner has: see `Run.reached`.
    """

    edit: SiteEdit
    owner: Owner
    bit: int
    scope: LayerScope | None = None

    @property
    def is_shift_alone(self) -> bool:
        """Whether it is a gated shift that does not depend on the layer that runs."""
        return self.edit.shift is not None and self.scope is None and not self.is_apart

    @property
    def is_addition_alone(self) -> bool:
        """Whether it is a norm-preserving addition that does not depend on the layer that runs."""
        return self.edit.addition is not None and self.scope is None and not self.is_apart

    @property
    def is_apart(self) -> bool:
        """Whether it may act on some tokens or samples only, or not fully: it must run apart from the attention."""
        return self.edit.is_apart or not self.owner.is_plain

    @property
    def active(self) -> bool:
        return self.owner.active and (self.scope is None or self.scope.runs(self.owner.in_forward))

    def apply(self, value: Tensor, module: nn.Module, attention: AttentionView | None = None) -> Tensor:
        edit, owner = self.edit, self.owner
        if edit.keeps and edit.site in _IN_CACHE:
            value = value.clone()
        at = None
        if edit.needs_at:
            forward = owner.forward if edit.needs_positions or owner.has_callers else None
            at = At(edit.layer, edit.site, module, attention, forward, value, edit.keeps)
        if self.is_apart and edit.site not in READ_ONLY_SITES:
            return self._apart(value, at)
        result = edit.run(value, at)  # pyright: ignore[reportArgumentType]
        owner.reached(self.bit)
        if result is not None:
            result = self._checked(result, value)
        if not edit.keeps or edit.site in _IN_CACHE or edit.site in READ_ONLY_SITES:
            return value if result is None else result
        # The model may write to what it gets, as Falcon adds to its MLP's output in place.
        return value.clone() if result is None or _shares_memory(result, value) else result

    def _apart(self, value: Tensor, at: At | None) -> Tensor:
        """The edit at some positions or samples, or not fully. What it does not change stays bit for bit as it is."""
        edit, owner = self.edit, self.owner
        self._check_known()
        samples, run, chosen = owner.samples(value.shape[0]), edit.run, None
        if edit.picks is not None and (samples is None or samples.stacks is None):
            raise PatchStateError(_SAY_WHICH)
        owner.reached(self.bit)
        if edit.picks is not None and samples is not None:
            picked = edit.picks(samples, value.device)
            if picked is None:
                return value
            run, rows = picked
            chosen = None if rows is None else by_row(rows, value)
        chosen = self._at_positions(value, chosen)
        # A copy, because the function may write into it.
        given = value.clone() if edit.keeps else value
        result = run(given, at)  # pyright: ignore[reportArgumentType]
        result = given if result is None else self._checked(result, value)
        strength = owner.strength if samples is None or samples.strength is None else samples.strength
        if isinstance(strength, Tensor) and edit.shared is not None:
            strength = edit.shared(strength)
        if isinstance(strength, Tensor) or strength != 1:
            result = partly(value, result, strength)
        elif chosen is None:
            return result.clone() if edit.keeps and _shares_memory(result, given) else result
        if chosen is None:
            return result
        result = torch.where(chosen, result, value)
        is_guess = edit.is_limited and owner.forward is not None and owner.forward.is_guess
        if is_guess and result.requires_grad and not torch.compiler.is_compiling():
            result.register_hook(partial(_warn_of_no_gradient, chosen, edit))
        return result

    def _check_known(self) -> None:
        """Check that it is known which forward this is.

        Raises:
            PatchStateError: it is not.
        """
        edit, owner = self.edit, self.owner
        named = edit.is_limited and not isinstance(edit.positions, Tensor)
        if owner.has_callers or edit.picks is not None or named:
            check_uncompiled()
        if (owner.has_callers or owner.had_callers) and not owner.in_forward and not torch.compiler.is_compiling():
            raise PatchStateError(
                "a layer runs outside a forward, as gradient checkpointing does in the backward, and it is not known "
                "what `handle.at` or `handle.using` said in its forward: run the model without checkpointing"
            )

    def _at_positions(self, value: Tensor, rows: Tensor | None) -> Tensor | None:
        """The values on which the edit acts, by its positions and `rows`: a mask with the axes of `value`, or None."""
        edit, forward = self.edit, self.owner.forward
        if not edit.is_limited and (forward is None or not forward.has_mask):
            return rows
        check_token_site(edit.site)
        assert forward is not None
        chosen = forward.chosen(edit.positions, *tokens_of(edit.site, value), value.device)
        if chosen is None:
            return rows
        # Indexed, not with einops, because this also runs for each decoded token.
        chosen = chosen[:, None, :, None] if edit.site == "query" else chosen[..., None]
        chosen = chosen[..., None] if edit.site == "attn_heads" else chosen
        return chosen if rows is None else chosen & rows

    def _checked(self, result: Tensor, value: Tensor) -> Tensor:
        site, layer = self.edit.site, self.edit.layer
        if site in READ_ONLY_SITES:
            raise PatchStateError(
                f"site {site!r} can only be read, not edited: the function at layer {layer} must return None"
            )
        if not isinstance(result, Tensor):
            raise ShapeError(f"the edit at {site!r} of layer {layer} returned a {type(result).__name__}, not a tensor")
        if result.shape != value.shape or result.dtype != value.dtype or result.device != value.device:
            found, wanted = ((tuple(x.shape), x.dtype, x.device) for x in (result, value))
            raise ShapeError(
                f"the edit at {site!r} of layer {layer} must return the shape, dtype and device it was given: "
                f"{_words(*wanted)}; found {_words(*found)}"
            )
        return result


_IN_CACHE = ("key", "value")  # Views of the cache: a static cache writes the next tokens into the same memory.


def _shares_memory(one: Tensor, other: Tensor) -> bool:
    if one is other or torch.compiler.is_compiling():
        return one is other
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


_SAY_WHICH = (
    "a set of stacks is in the model, and it is not known which stack each sample gets: run the model inside "
    "`with handle.using('name')`, or `with handle.using(['name', None])` with a name or None for each sample"
)


def _warn_of_no_gradient(chosen: Tensor, edit: SiteEdit, gradient: Tensor) -> None:
    if not bool((gradient * chosen).any()):
        warnings.warn(
            f"the gradient is exactly 0 at the tokens where an edit at {edit.site!r} of layer {edit.layer} acts "
            f"(positions {edit.positions!r}). If the rows go on with an answer, say where the prompt is: run the "
            f"model inside `with handle.at(prompt=mask)`",
            stacklevel=2,
        )


class Bystander:
    """An owner that is told everything and does nothing."""

    active = in_forward = True
    has_callers = had_callers = False
    is_plain = True
    strength = 1.0
    state = State()
    forward = None

    def samples(self, b: int) -> Samples | None: ...

    def reached(self, bit: int) -> None: ...

    def unflatten(self, states: Tensor) -> Tensor:
        return states


def _words(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> str:
    return f"{list(shape)} {dtype} {device}"
