"""How a law ends, and how what a foreign model raises is caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


class NotApplicable(Exception):  # noqa: N818 - it is no error
    """The law says nothing about this model; the message says why."""


class BrokenLaw(AssertionError):  # noqa: N818 - it is a finding
    """The law does not hold; the message says what was seen."""


@dataclass(frozen=True)
class Raised:
    """An exception that came out of a foreign model or adapter, in words."""

    error: Exception

    def __str__(self) -> str:
        # torch and transformers can go on for pages; the first line says what it is.
        line = next((line for line in str(self.error).splitlines() if line.strip()), "no message")
        return f"{type(self.error).__name__}: {line[:400]}"


def attempt(action: Callable[[], T]) -> T | Raised:
    """What `action` returns, or what it raises: a foreign model or adapter may fail in any way: a finding."""
    try:
        return action()
    except Exception as error:
        return Raised(error)
