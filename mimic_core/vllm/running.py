"""Add, replace, list and remove stacks of an engine that runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..errors import CheckpointError, PatchStateError, UnknownNameError
from .sources import Source, check_name, resolve

# The method that the plugin gives to vLLM's workers. It returns why a stack can't be loaded, or None.
ADD = "mimic_core_add"


def names(llm: Any) -> list[str]:
    """The names of the stacks that a `vllm.LLM` serves.

    Raises:
        PatchStateError: the engine was not started with `engine_args`.
    """
    return list(stacks_of(llm.llm_engine))


def add(llm: Any, name: str, source: str | os.PathLike[str]) -> None:
    """Load a stack into a running `vllm.LLM`, or replace one. Requests that run go on with the one they began with.

    Raises:
        CheckpointError: there is no stack at `source`, or it can't be served.
        UnknownNameError: `name` is no name.
        PatchStateError: the engine was not started with `engine_args`.
    """
    stacks = stacks_of(llm.llm_engine)
    found = resolve(os.fspath(source))
    failed(llm.collective_rpc(ADD, args=(check_name(name), *found[:2])))
    stacks[name] = found


def remove(llm: Any, name: str) -> None:
    """Take a stack out of a running `vllm.LLM`. Requests that run go on with it.

    Raises:
        UnknownNameError: there is no such stack.
        PatchStateError: the engine was not started with `engine_args`.
    """
    forget(stacks_of(llm.llm_engine), name)


def forget(stacks: dict[str, Source], name: str) -> None:
    """Take a name away. What the workers hold of it stays, because requests may run with it."""
    if name not in stacks:
        raise UnknownNameError(
            f"no stack is called {name!r}; this engine serves {', '.join(map(repr, stacks)) or 'none'}"
        )
    del stacks[name]


def failed(problems: Sequence[str | None]) -> None:
    """Raise CheckpointError if a worker said why it can't load a stack."""
    for problem in filter(None, problems):
        raise CheckpointError(problem)


def stacks_of(engine: Any) -> dict[str, Source]:
    """The stacks that an engine gives to requests, by name."""
    stacks = engine.input_processor.mimic_core_stacks
    if stacks is None:
        raise PatchStateError(
            "this engine was not started to serve stacks: pass **mimic_core.vllm.engine_args() to vllm.LLM"
        )
    return stacks
