"""One forward of the decoder, as an edit that acts at some positions sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn
from torch.nn.functional import pad

from ..errors import MimicError, PatchStateError, ShapeError
from ..positions import Positions, select
from ..types import ForwardView
from .frames import has_labels
from .prompts import Generation, Given, length_of

_SAY_IT = (
    "say where it is: run the model inside `with handle.at(prompt=mask)`, with a bool mask [b s] of the tokens of the "
    "prompt counted from the beginning of the cache, or `with handle.at(positions=mask)`, with a bool mask [b t] of "
    "tokens of this forward"
)
# What arguments with a cache are called.
_CACHES = ("past_key_values", "cache", "cache_params", "past_key_value", "layer_past", "state")


class Forward(ForwardView):
    """The tokens of one forward of the decoder, and which of them belong to a prompt.

    Args:
        start: How many tokens the cache held before.
        b, t: Samples and tokens.
        arguments: The arguments of the decoder by name.
        key: Who asks, for what is remembered in `generation`.
        generation: The call of `generate` that it is a part of.
        given: What the caller says.
        decoder: The decoder, to find out whether a model around it was given labels.
        foreign: See `ForwardWatch`.
    """

    def __init__(
        self,
        b: int,
        t: int,
        arguments: Mapping[str, Any],
        key: int = 0,
        generation: Generation | None = None,
        given: Given | None = None,
        decoder: nn.Module | None = None,
        foreign: str = "",
    ) -> None:
        self._b, self._t = b, t
        self._given = given or Given()
        self._arguments = arguments
        self._masks: dict[Positions, Tensor] = {}
        self._error: MimicError | None = None
        self._has_grad = torch.is_grad_enabled()
        self._is_alone = self._given.prompt is None and generation is None
        # It is found now, because the decoder adds the new tokens to its cache.
        try:
            if foreign and generation is None:
                raise PatchStateError(
                    f"{foreign} is none of transformers' models, so it is not known which of its arguments say what is "
                    f"padding, prompt or cache: say which tokens are meant with a bool mask [b t], in "
                    f"`handle.at(positions=mask)` or as `where=mask` of a capture"
                )
            self._start = self._held(generation, key)
            self._begins = self._begin_samples()
            self._prompt = self._find_prompt(generation, key, decoder)
        except (PatchStateError, ShapeError) as error:
            self._error = error  # raised when an edit asks

    @property
    def is_guess(self) -> bool:
        """Whether the row was taken for the prompt because nobody said more."""
        return self._is_alone and self._given.positions is None

    @property
    def has_mask(self) -> bool:
        return self._given.positions is not None

    def tokens(self, positions: Positions, b: int, t: int, device: torch.device) -> Tensor:
        check_uncompiled()
        if self._given.positions is not None:
            return _fitting(self._given.positions, b, t, device)
        if positions == "all":
            return torch.ones(b, t, dtype=torch.bool, device=device)
        if self._error is not None:
            raise self._error
        if positions == "generated" and self._is_alone:
            raise PatchStateError(
                f"an edit acts on the tokens after the prompt, but this forward is outside model.generate, where the "
                f"whole row counts as the prompt; {_SAY_IT}"
            )
        if (b, t) != (self._b, self._t):
            raise ShapeError(f"the decoder's arguments have [b t] = {[self._b, self._t]}, but a site has {[b, t]}")
        if positions not in self._masks:
            self._masks[positions] = self._select(positions)
        found = self._masks[positions]
        if found.device != device:
            found = self._masks[positions] = found.to(device)
        return found

    def chosen(self, positions: Positions | Tensor, b: int, t: int, device: torch.device) -> Tensor | None:
        if self._given.positions is not None and self._has_grad and not torch.is_grad_enabled():
            raise PatchStateError(
                "the forward runs with gradients, this layer without: reentrant gradient checkpointing runs it again "
                "outside `handle.at(positions=...)`; use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        if isinstance(positions, Tensor) and self._given.positions is None:
            return _fitting(positions, b, t, device)
        if isinstance(positions, str) and positions == "all" and self._given.positions is None:
            return None
        return self.tokens(positions, b, t, device)  # pyright: ignore[reportArgumentType]

    def _select(self, positions: Positions) -> Tensor:
        start, end = self._start, self._start + self._t
        prompt, begins = self._prompt, self._begins
        length = max(end, prompt.shape[1])
        real = torch.ones(self._b, length, dtype=torch.bool, device=prompt.device)
        if positions == "generated":
            real[:, start:end] = self._real().to(prompt.device)
        if begins is None:
            begins = torch.zeros_like(real)
        rows = (pad(x, (0, length - x.shape[1])) for x in (prompt, real, begins.to(prompt.device)))
        return select(positions, *rows)[:, start:end]

    def _held(self, generation: Generation | None, key: int) -> int:
        """How many tokens the cache holds."""
        for name, x in self._arguments.items():
            if isinstance(x, Tensor):
                continue
            length = length_of(x)
            if length is None and (hasattr(x, "get_seq_length") or (name in _CACHES and x is not None)):
                if isinstance(x, tuple | list) and not x:
                    continue
                if generation is None or not generation.use_cache or generation.assisted:
                    raise PatchStateError(
                        f"the decoder has a {type(x).__name__}, which does not say how many tokens it holds, so it is "
                        f"not known where the prompt ends: use model.generate with a cache of another kind (not "
                        f"continuous batching), or say which tokens are meant with handle.at(positions=mask) [b t]"
                    )
                length = generation.counted.get(key, 0)
            if length is not None:
                break
        else:
            length = 0
        if generation is not None:
            generation.counted[key] = generation.counted.get(key, 0) + self._t
        return length

    def _find_prompt(self, generation: Generation | None, key: int, decoder: nn.Module | None) -> Tensor:
        if self._given.prompt is not None:
            return self._fitting(self._given.prompt, in_generate=generation is not None)
        if generation is not None:
            return self._generated(generation, key)
        if decoder is not None and has_labels(decoder):
            raise PatchStateError(
                f"the model was given labels, so its rows go on after the prompt, and it is not known where the prompt "
                f"ends; {_SAY_IT}"
            )
        if self._start:
            raise PatchStateError(
                f"this forward continues a cache with {self._start} tokens, outside model.generate, so it is not known "
                f"where the prompt ends; {_SAY_IT}"
            )
        return self._real()

    def _fitting(self, prompt: Tensor, in_generate: bool) -> Tensor:
        """A prompt [b s] for the rows of this forward: in `generate` a sample can have several."""
        if prompt.shape[0] == self._b:
            return prompt
        times, rest = divmod(self._b, prompt.shape[0])
        if rest or not in_generate:
            raise ShapeError(f"the mask of the prompt has {prompt.shape[0]} rows, but the decoder runs with {self._b}")
        return repeat(prompt, "b s -> (b n) s", n=times)

    def _generated(self, generation: Generation, key: int) -> Tensor:
        """The prompt in a forward of `generate`."""
        start, end = self._start, self._start + self._t
        prompt = generation.prompts.get(key)
        if prompt is None:
            prompt = generation.prompts[key] = self._first(generation)
        elif generation.in_parts and start < prompt.shape[1] < end and not generation.assisted:
            raise _unclear(
                f"tokens {start} to {end - 1} of a row are run in one forward, but its prompt has {prompt.shape[1]}"
            )
        elif not generation.in_parts:
            again = start == 0 and end >= prompt.shape[1] and not generation.use_cache
            if not again and (self._t > 1 or start < prompt.shape[1]):
                raise _unclear(
                    f"after the prompt of {prompt.shape[1]} tokens, a forward ran with {self._t} tokens and "
                    f"{start} in the cache"
                )
        return self._fitting(prompt, in_generate=True)

    def _first(self, generation: Generation) -> Tensor:
        """The prompt, in the first forward of `generate`."""
        start, end, mask = self._start, self._start + self._t, generation.mask
        if generation.in_parts:
            if generation.width is None:
                raise _unclear("the tokens that `generate` got, and which of them are padding, are not known")
            if start != generation.cached or (end > generation.width and not generation.assisted):
                raise _unclear(
                    f"its first forward ran tokens {start} to {end - 1} of a row, but `generate` got a prompt of "
                    f"{generation.width} tokens and a cache with {generation.cached}"
                )
            if mask is None:
                return torch.ones(self._b, generation.width, dtype=torch.bool)
            return self._fitting(mask, in_generate=True)
        if mask is not None and mask.shape[1] == end:
            return self._fitting(mask, in_generate=True)
        real = self._real()
        # What the caller's cache holds is a part of the prompt. A virtual prefix, as of PEFT, is not.
        return torch.cat([real.new_full((self._b, start), generation.cached > 0), real], dim=1)

    def _begin_samples(self) -> Tensor | None:
        """The first token of each sample that is packed into a row: its position starts over."""
        positions = self._arguments.get("position_ids")
        if not isinstance(positions, Tensor) or self._start:
            return None
        if positions.ndim == 3 and positions.shape[0] == 4:  # text positions, and those in time, height and width
            positions = positions[0]
        if positions.ndim != 2 or positions.shape[1] != self._t:
            return None
        try:
            real = self._real().to(positions.device)
        except ShapeError:
            return None
        positions = positions.expand(self._b, -1)
        # The position of the last real token before. Padding can have any position.
        last = torch.where(real, torch.arange(self._t, device=real.device), -1).cummax(1).values
        last = pad(last, (1, -1), value=-1)
        before = torch.where(last < 0, -1, positions.gather(1, last.clamp(min=0)))
        return real & ((positions < before) | ((positions == 0) & (before == 0)))

    def _real(self) -> Tensor:
        """Which tokens of this forward are not padding, [b t]."""
        mask, b, t, start = self._arguments.get("attention_mask"), self._b, self._t, self._start
        if isinstance(mask, Mapping):  # one mask for each kind of layer; all mask the same padding
            mask = next((m for m in mask.values() if m is not None), None)
        if mask is None or (start and (not isinstance(mask, Tensor) or mask.ndim != 2)):
            return torch.ones(b, t, dtype=torch.bool)
        if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
            found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ShapeError(f"positions need an attention mask [b t] or [b h t s] in the decoder; found {found}")
        if mask.ndim == 4:  # a token attends to itself if it is not padding
            mask = _is_attended(mask[:, 0].diagonal(dim1=1, dim2=2))
        if mask.shape[0] not in (1, b) or mask.shape[1] < start + t or (not start and mask.shape[1] != t):
            raise ShapeError(
                f"the decoder's attention mask has [b t] = {list(mask.shape)}, but its hidden states have {[b, t]}"
                + (f" and its cache {start} tokens" if start else "")
            )
        return (mask != 0)[:, start : start + t].expand(b, t)


def check_uncompiled() -> None:
    """Check that torch.compile does not trace.

    Raises:
        PatchStateError: it does.
    """
    if torch.compiler.is_compiling():
        raise PatchStateError("positions and samples are not available inside torch.compile; run the model uncompiled")


class Again(ForwardView):
    """Code that runs outside a forward of the decoder."""

    def tokens(self, positions: Positions, b: int, t: int, device: torch.device) -> Tensor:
        check_uncompiled()
        raise PatchStateError(
            "positions were asked for outside a forward, where the attention mask is not known: in code made by "
            "torch.compile, or where gradient checkpointing runs layers again; run the model without them"
        )

    def chosen(self, positions: Positions | Tensor, b: int, t: int, device: torch.device) -> Tensor | None:
        # With a mask of the caller for this forward, all tokens would be wrong: then `has_callers` is True.
        return (
            _fitting(positions, b, t, device) if isinstance(positions, Tensor) else self.tokens(positions, b, t, device)
        )


def _fitting(positions: Tensor, b: int, t: int, device: torch.device) -> Tensor:
    if positions.shape != (b, t):
        raise ShapeError(
            f"positions were given as a mask [b t] = {list(positions.shape)}, but the decoder runs with {[b, t]} tokens"
        )
    return positions.to(device)


def _unclear(found: str) -> PatchStateError:
    return PatchStateError(f"it is not known where the prompt of this `generate` ends: {found}; {_SAY_IT}")


def _is_attended(mask: Tensor) -> Tensor:
    """What an attention mask says of the token itself: bool, or a number that is added to the logit.

    Raises:
        ShapeError: the number is too low for a bias and too high for a masked token, whose weight must be exactly 0.
    """
    if mask.dtype == torch.bool:
        return mask
    masked = mask <= -1000.0  # masks in use have -1e4, -1e9 or the lowest number. exp(-1000) is 0 in all dtypes
    if bool((~masked & (mask < -100.0)).any()):
        raise ShapeError(
            f"the decoder's attention mask has {mask[~masked].min():g} at a token itself, which may be padding or a "
            f"bias; use torch.finfo(dtype).min for padding, or a bool mask"
        )
    return ~masked
