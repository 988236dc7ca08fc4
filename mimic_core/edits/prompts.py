"""Where the prompt of a row is: from the caller, from `model.generate`, or from a forward alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..samples import Samples
from .replaced import ReplacedMethod


@dataclass(frozen=True)
class Given:
    """What the caller says about the forwards inside `Handle.at` and `Handle.using`.

    Attributes:
        positions: Bool mask [b t]: the tokens of each forward on which the edits act.
        prompt: Bool mask [b s] of the tokens of the prompt, counted from the beginning of the cache.
        samples: What each sample gets.
    """

    positions: Tensor | None = None
    prompt: Tensor | None = None
    samples: Samples | None = None

    @property
    def limits(self) -> bool:
        """Whether it changes what an edit of all tokens does."""
        return self.positions is not None or self.samples is not None

    def inside(self, outer: Given) -> Given:
        """This, and what `outer` says besides. Of positions and prompt only one counts: the inner one."""
        masks = self if self.positions is not None or self.prompt is not None else outer
        return Given(masks.positions, masks.prompt, self.samples or outer.samples)


@dataclass
class Generation:
    """One call of `model.generate`.

    Attributes:
        model: The model.
        width: Length of the prompt with padding and what the caller's cache held of it. None if that is not known.
        mask: The attention mask [b width] that the caller gave, or None.
        in_parts: The prompt may come in several forwards, or with candidate tokens behind it.
        assisted: Candidate tokens are checked, several in a forward.
        cached: How many tokens the caller's cache held.
        use_cache: False if each forward gets the whole row.
        rows: How many rows a sample has, which stand side by side: beams, several sequences.
        prompts: The prompts [b s] of the decoders that have run, by the object that asked.
        counted: How many tokens these decoders have got, for caches that do not count them.
        samples: What `handle.using` said, and the same for this call.
    """

    model: object
    width: int | None = None
    mask: Tensor | None = None
    in_parts: bool = False
    assisted: bool = False
    cached: int = 0
    use_cache: bool = True
    rows: int = 1
    prompts: dict[int, Tensor] = field(default_factory=dict)
    counted: dict[int, int] = field(default_factory=dict)
    samples: dict[Samples, Samples] = field(default_factory=dict)

    @staticmethod
    def of(model: Any, arguments: Mapping[str, Any]) -> Generation:
        """From the arguments of `generate`."""
        options = arguments.get("kwargs", {})
        config = arguments.get("generation_config") or getattr(model, "generation_config", None)

        def option(name: str) -> Any:
            found = options.get(name)
            return getattr(config, name, None) if found is None else found

        assistant = arguments.get("assistant_model", options.get("assistant_model"))
        lookups = [option(name) for name in ("prompt_lookup_num_tokens", "assistant_early_exit")]
        assisted = assistant is not None or any(x is not None for x in lookups)
        call = Generation(
            model,
            in_parts=assisted or option("prefill_chunk_size") is not None,
            assisted=assisted,
            use_cache=option("use_cache") is not False,
            rows=max(option("num_beams") or 1, option("num_return_sequences") or 1),
        )
        cache = options.get("past_key_values", options.get("cache"))
        call.cached = length_of(cache) or 0
        if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            call._read_prompt(model, arguments, options, config)
        return call

    def _read_prompt(self, model: Any, arguments: Mapping[str, Any], options: Mapping[str, Any], config: Any) -> None:
        ids = arguments.get("inputs")
        ids = options.get("input_ids") if ids is None else ids
        tokens = options.get("inputs_embeds")
        tokens = ids if tokens is None else tokens
        mask = options.get("attention_mask")
        if not isinstance(tokens, Tensor) or tokens.ndim < 2:
            return
        self.width = tokens.shape[1]
        if isinstance(mask, Tensor) and mask.ndim == 2:
            if mask.shape[1] == self.cached + self.width:  # only the new tokens were given
                self.width = mask.shape[1]
            self.mask = (mask != 0) if mask.shape[1] == self.width else None
        elif self.in_parts and mask is None and tokens is ids:
            # transformers then reads padding from the ids. That is its affair, so this is not known here.
            pad = getattr(config, "pad_token_id", None)
            if pad is not None and bool((ids == pad).any()):
                self.width = None

    def continued_by(self, model: Any, arguments: Mapping[str, Any]) -> Generation:
        """The state of a call of `generate` inside this one."""
        inner = Generation.of(model, arguments)
        if model is self.model:
            # Early exit: the model drafts for itself, and its text so far is not a prompt.
            return self if self.in_parts or self.prompts else inner
        if self.assisted:
            # An assistant gets the text so far again and again. Its prompt is that of the model that it assists.
            same_ids = (
                arguments.get("assistant_tokenizer", arguments.get("kwargs", {}).get("assistant_tokenizer")) is None
            )
            width, mask = (self.width, self.mask) if same_ids else (None, None)
            return Generation(model, width, mask, in_parts=True, assisted=True, cached=inner.cached, rows=self.rows)
        return inner


def length_of(cache: Any) -> int | None:
    """How many tokens a cache holds, or None if it does not say so."""
    length = getattr(cache, "get_seq_length", None)
    if length is None:
        return None
    try:
        return int(length())  # a static cache returns a tensor that grows later
    except ValueError:  # transformers: there are only layers of linear attention
        return None


_generation: ContextVar[Generation | None] = ContextVar("mimic_core_generation", default=None)


def current_generation() -> Generation | None:
    """The innermost call of `generate` that this code runs in."""
    return None if torch.compiler.is_compiling() else _generation.get()


def _wrap(original: Callable[..., Any], in_use: Callable[[], bool]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not in_use():
            return original(self, *args, **kwargs)
        arguments = signature.bind(self, *args, **kwargs).arguments
        outer = _generation.get()
        call = Generation.of(self, arguments) if outer is None else outer.continued_by(self, arguments)
        token = _generation.set(call)
        try:
            found = original(self, *args, **kwargs)
        finally:
            _generation.reset(token)
        for samples in call.samples.values():
            samples.check_kept()
        return found

    return generate


def generation_mixin() -> type:
    """The class that has `generate`."""
    from transformers.generation.utils import GenerationMixin

    return GenerationMixin


EDITED = "_mimic_core_forward"
"""Key in the `__dict__` of each module whose forward has edits or is watched."""

watched_generate = ReplacedMethod(generation_mixin, "generate", _wrap)
"""`GenerationMixin.generate`, while an edit needs to know the prompt."""
