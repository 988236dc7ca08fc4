"""Add, replace, list and remove stacks of an engine that runs."""

from __future__ import annotations

import os
from typing import Any

from ..errors import PatchStateError, UnknownNameError
from .sources import Source, check_name, resolve


def names(llm: Any) -> list[str]:
    """The names of the stacks that a `vllm.LLM` serves.

    Raises:
        PatchStateError: it serves none, and was not started for it.
    """
    return list(_stacks(llm))


def add(llm: Any, name: str, source: str | os.PathLike[str]) -> None:
    """Load a stack into a running `vllm.LLM`, or replace one. Requests that run go on with the one they began with.

    Raises:
        CheckpointError: there is no stack at `source`, or it does not fit the model.
        UnknownNameError: `name` is no name.
        PatchStateError: the engine was not started with `engine_args`.
    """
    stacks = _stacks(llm)
    found = resolve(os.fspath(source))
    llm.collective_rpc("mimic_core_add", args=(check_name(name), *found))
    stacks[name] = found


def remove(llm: Any, name: str) -> None:
    """Take a stack out of a running `vllm.LLM`. Requests that run go on with it.

    Raises:
        UnknownNameError: there is no such stack.
        PatchStateError: the engine was not started with `engine_args`.
    """
    stacks = _stacks(llm)
    if name not in stacks:
        raise UnknownNameError(
            f"no stack is called {name!r}; this engine serves {', '.join(map(repr, stacks)) or 'none'}"
        )
    del stacks[name]


def _stacks(llm: Any) -> dict[str, Source]:
    stacks = llm.llm_engine.input_processor.mimic_core_stacks
    if stacks is None:
        raise PatchStateError(
            "this engine was not started to serve stacks: pass **mimic_core.vllm.engine_args() to vllm.LLM"
        )
    return stacks
