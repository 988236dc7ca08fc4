"""Methods of vLLM that are called by a function of ours."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

# The methods that have a hook in this process. Empty: vLLM has not loaded the plugin.
PUT: set[str] = set()


def around(owner: Any, name: str, hook: Callable[..., Any]) -> None:
    """Let a method, or a function of a module, be called by `hook(method, self, ...)`, unless it is already."""
    inner = getattr(owner, name)
    if getattr(inner, "hook", None) is hook:
        return

    @functools.wraps(inner)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return hook(inner, self, *args, **kwargs)

    call.__dict__["hook"] = hook
    setattr(owner, name, call)
    PUT.add(f"{owner.__name__}.{name}")
