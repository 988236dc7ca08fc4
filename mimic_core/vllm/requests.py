"""The front end of an engine: what a request may ask for, and what its cache blocks are shared with."""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..positions import Positions
from . import limits
from .places import FOUND
from .sources import SHIFTS, Source, resolve, sources_of

STRENGTH = "strength"


def begin(inner: Callable[..., None], processor: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    """Before an engine starts: check what it is asked for, and find the stacks."""
    sources = sources_of(vllm_config)
    if sources is not None:
        limits.check(vllm_config)
        found = {name: resolve(source) for name, source in sources.items()}
        # The engine's other processes get this config, and load what was found here.
        vllm_config.additional_config[SHIFTS] = {name: list(source) for name, source in found.items()}
        limits.refuse_beams()
        processor.mimic_core_stacks = found
    else:
        processor.mimic_core_stacks = None
    inner(processor, vllm_config, *args, **kwargs)


def process(
    inner: Callable[..., Any], processor: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
) -> Any:
    """Check what a request asks for, and write what was found into it."""
    from vllm.exceptions import VLLMValidationError

    stacks: dict[str, Source] | None = processor.mimic_core_stacks
    extra = getattr(params, "extra_args", None) or {}
    chosen = choice(stacks, extra)
    request = inner(processor, request_id, prompt, params, *args, **kwargs)
    if stacks is None or request.sampling_params is None:
        return request
    limits.refuse_mixed_lora(processor.vllm_config, request.lora_request)
    found = {key: value for key, value in extra.items() if key not in (SHIFTS, STRENGTH, FOUND)}
    if chosen is not None:
        found[FOUND] = list(chosen)
        if request.resumable and chosen[2]:
            raise VLLMValidationError("the prompt of this request comes in parts, and its stack needs to know its end")
    request.sampling_params.extra_args = found or None
    request.cache_salt = salt(chosen, request.cache_salt)
    return request


def choice(stacks: dict[str, Source] | None, extra: dict[str, Any]) -> tuple[str, float, tuple[Positions, ...]] | None:
    """The digest of the stack that a request asks for, the strength, and the positions. None: it asks for none.

    Raises:
        VLLMValidationError: there is no such stack, or the strength is no number.
    """
    from vllm.exceptions import VLLMValidationError

    name, strength = extra.get(SHIFTS), extra.get(STRENGTH, 1.0)
    if name is None:
        if stacks is not None and STRENGTH in extra:
            raise VLLMValidationError(f"a strength is given without a stack: name one with {SHIFTS!r}")
        return None
    if stacks is None:
        raise VLLMValidationError(
            f"this request asks for the stack {name!r}, but the engine serves none: start it with {SHIFTS!r} in its "
            f"additional_config"
        )
    if not isinstance(name, str) or name not in stacks:
        raise VLLMValidationError(
            f"no stack is called {name!r}; this engine serves {', '.join(map(repr, stacks)) or 'none'}"
        )
    if not isinstance(strength, int | float) or isinstance(strength, bool) or not math.isfinite(strength):
        raise VLLMValidationError(f"a strength is a finite number; found {strength!r}")
    return stacks[name].digest, float(strength), stacks[name].positions


def salt(chosen: tuple[str, float, tuple[Positions, ...]] | None, given: str | None) -> str | None:
    """The cache salt of a request: blocks are shared only by requests of the same stack, strength and given salt.

    What a client gives can't be the salt of another stack: it always stands behind a colon.
    """
    if chosen is None:
        return None if given is None else f":{given}"
    return f"{chosen[0]} {chosen[1]!r}:{given or ''}"
