"""How a law ends, and how what a foreign model raises is caught."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


class NotApplicable(Exception):  # noqa: N818 - it is no error
    """The law says nothing about this model; the message says why."""


class BrokenLaw(AssertionError):  # noqa: N818 - it is a finding
    """The law does not hold; the message says what was seen."""


class DeviceEnded(RuntimeError):  # noqa: N818 - it is the end of every later law too
    """A GPU met an error after which no call of the process works; the message is its."""


_ENDS_A_DEVICE = re.compile("device-side assert|illegal memory access")


@dataclass(frozen=True)
class Raised:
    """An exception that came out of a foreign model or adapter, in words."""

    error: Exception

    def __str__(self) -> str:
        # torch and transformers can go on for pages; the first line says what it is.
        line = next((line for line in str(self.error).splitlines() if line.strip()), "no message")
        return f"{type(self.error).__name__}: {line[:400]}"


def attempt(action: Callable[[], T]) -> T | Raised:
    """What `action` returns, or what it raises: a foreign model or adapter may fail in any way: a finding.

    Raises:
        DeviceEnded: the GPU is of no more use, so nothing that could be tried instead would run.
    """
    try:
        return action()
    except DeviceEnded:
        raise
    except Exception as error:
        if _ENDS_A_DEVICE.search(str(error)):
            raise DeviceEnded(str(Raised(error))) from error
        return Raised(error)
