"""An edit: one function at one site of one layer, and its owner."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..errors import PatchStateError, ShapeError
from ..positions import Positions
from ..types import READ_ONLY_SITES, At, AttentionView, ForwardView, Site, check_token_site, tokens_of
from .forward import check_uncompiled
from .scope import LayerScope


@dataclass(frozen=True)
class SiteEdit:
    """One function at one site of one layer.

    Attributes:
        run: Gets the value and an `At`. Returns the new value, or None to keep it.
        shift: At `attn_heads`: gives the parameters of `ops.gated_shift` if `run` is exactly that, else None.
        fused: At `attn_heads`: attention and edit in one call. It returns None if it cannot run the call.
        needs_lse: `run` reads `at.lse`. At site `lse` this is not needed.
        needs_positions: `run` may read `at.positions`, so the mask and the cache of the forward are read.
        needs_at: `run` reads its `At`. If False, it gets None.
        keeps: `run` may keep what it is given after the call. So the model never writes to it later.
        positions: The tokens on which it acts; the values of the others stay as they are. A mask [b t] is for every
            forward.
    """

    layer: int
    site: Site
    run: Callable[[Tensor, At], Tensor | None]
    shift: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] | None = None
    fused: Callable[[At], Tensor | None] | None = None
    needs_lse: bool = False
    needs_positions: bool = False
    needs_at: bool = True
    keeps: bool = False
    positions: Positions | Tensor = "all"

    @property
    def is_limited(self) -> bool:
        """Whether it acts only on some tokens."""
        return isinstance(self.positions, Tensor) or self.positions != "all"

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
    def in_forward(self) -> bool: ...

    @property
    def forward(self) -> ForwardView | None: ...

    @property
    def has_callers(self) -> bool: ...

    def reached(self, layer: int, site: Site) -> None: ...

    def unflatten(self, states: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Entry:
    """An edit and its owner. It has a `scope` if several layers share the module."""

    edit: SiteEdit
    owner: Owner
    scope: LayerScope | None = None

    @property
    def is_shift_alone(self) -> bool:
        """Whether it is a gated shift that does not depend on the layer that runs."""
        return self.edit.shift is not None and self.scope is None and not self.is_limited

    @property
    def is_limited(self) -> bool:
        """Whether it acts only on some tokens. Then it must run apart from the attention."""
        return self.edit.is_limited or self.owner.has_callers

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
        # Without a forward, it began before `Handle.at`, which is not for it.
        if self.is_limited and edit.site not in READ_ONLY_SITES and owner.forward is not None:
            return self._limited(value, at)
        result = edit.run(value, at)  # pyright: ignore[reportArgumentType]
        owner.reached(edit.layer, edit.site)
        if result is not None:
            result = self._checked(result, value)
        if not edit.keeps or edit.site in _IN_CACHE or edit.site in READ_ONLY_SITES:
            return value if result is None else result
        # The model may write to what it gets, as Falcon adds to its MLP's output in place.
        return value.clone() if result is None or _shares_memory(result, value) else result

    def _limited(self, value: Tensor, at: At | None) -> Tensor:
        """The edit at some positions. The value of the other tokens stays as it is."""
        edit, owner = self.edit, self.owner
        if not isinstance(edit.positions, Tensor):
            check_uncompiled()
        check_token_site(edit.site)
        forward = owner.forward
        assert forward is not None
        chosen = forward.chosen(edit.positions, *tokens_of(edit.site, value), value.device)
        # A copy, because the function may write into it.
        given = value.clone() if edit.keeps else value
        result = edit.run(given, at)  # pyright: ignore[reportArgumentType]
        owner.reached(edit.layer, edit.site)
        result = given if result is None else self._checked(result, value)
        if chosen is None:
            return result.clone() if edit.keeps and _shares_memory(result, given) else result
        # Indexed, not with einops, because this also runs for each decoded token.
        chosen = chosen[:, None, :, None] if edit.site == "query" else chosen[..., None]
        chosen = chosen[..., None] if edit.site == "attn_heads" else chosen
        result = torch.where(chosen, result, value)
        if forward.is_guess and result.requires_grad and not torch.compiler.is_compiling():
            result.register_hook(partial(_warn_of_no_gradient, chosen, edit))
        return result

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


def _warn_of_no_gradient(chosen: Tensor, edit: SiteEdit, gradient: Tensor) -> None:
    if not bool((gradient * chosen).any()):
        warnings.warn(
            f"the gradient is exactly 0 at the tokens where an edit at {edit.site!r} of layer {edit.layer} acts "
            f"(positions {edit.positions!r}). If the rows go on with an answer, say where the prompt is: run the "
            f"model inside `with handle.at(prompt=mask)`",
            stacklevel=2,
        )


def _words(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> str:
    return f"{list(shape)} {dtype} {device}"
