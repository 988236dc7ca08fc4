"""The possible results of a law, and how exceptions of the model are caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


class NotApplicable(Exception):  # noqa: N818 - it is not an error
    """The law cannot be checked on this model; the message says why."""


class BrokenLaw(AssertionError):  # noqa: N818 - it is a finding
    """The model breaks the law; the message says how."""


@dataclass(frozen=True)
class Raised:
    """An exception of the model or its adapter."""

    error: Exception

    def __str__(self) -> str:
        # Only the first line: messages of torch and transformers can be very long.
        line = next((line for line in str(self.error).splitlines() if line.strip()), "no message")
        return f"{type(self.error).__name__}: {line[:400]}"


def attempt(action: Callable[[], T]) -> T | Raised:
    """The result of `action`, or its exception: a model or an adapter can raise any."""
    try:
        return action()
    except Exception as error:
        return Raised(error)
