"""The possible results of a law, and how exceptions of the model are caught."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


class NotApplicable(Exception):  # noqa: N818 - it is not an error
    """The law cannot be checked on this model; the message says why."""


class BrokenLaw(AssertionError):  # noqa: N818 - it is a finding
    """The model breaks the law; the message says how."""


class DeviceEnded(RuntimeError):  # noqa: N818 - it is the end of every later law too
    """A GPU met an error after which no call of the process works; the message is its."""


_ENDS_A_DEVICE = re.compile("device-side assert|illegal memory access")


@dataclass(frozen=True)
class Raised:
    """An exception of the model or its adapter."""

    error: Exception

    def __str__(self) -> str:
        # Only the first line: messages of torch and transformers can be very long.
        line = next((line for line in str(self.error).splitlines() if line.strip()), "no message")
        return f"{type(self.error).__name__}: {line[:400]}"


def attempt(action: Callable[[], T]) -> T | Raised:
    """The result of `action`, or its exception: a model or an adapter can raise any.

    Raises:
        DeviceEnded: the GPU can't be used any more.
    """
    try:
        return action()
    except DeviceEnded:
        raise
    except Exception as error:
        if _ENDS_A_DEVICE.search(str(error)):
            raise DeviceEnded(str(Raised(error))) from error
        return Raised(error)
