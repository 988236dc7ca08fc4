"""A method of a class that is replaced while somebody needs it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any


class ReplacedMethod:
    """Replaces a method for as long as any of its holders lives. The last one to go restores it.

    Args:
        find: Returns the class. It is called late, so that importing this package does not import the class.
        name: The name of the method.
        wrap: Gets the original function, and a function that says whether the replacement is still in use. If somebody
            else has wrapped it since, it stays below and must then only call the original.
    """

    def __init__(
        self,
        find: Callable[[], type],
        name: str,
        wrap: Callable[[Callable[..., Any], Callable[[], bool]], Callable[..., Any]],
    ) -> None:
        self._find, self._name, self._wrap = find, name, wrap
        self._lock = threading.RLock()  # reentrant: garbage collection can call _drop while this thread holds the lock
        self.holders = 0
        self._inherits = False
        self._below: Callable[..., Any] | None = None
        self._live: Callable[..., Any] | None = None

    def retain(self, holder: object) -> Callable[[], object]:
        """Keep the replacement in place until the returned function is called or `holder` is garbage-collected."""
        with self._lock:
            self.holders += 1
            if self.holders == 1:
                place = self._find()
                self._inherits = self._name not in vars(place)
                self._below = below = getattr(place, self._name)
                self._live = made = self._wrap(below, lambda: self._live is made)
                setattr(place, self._name, made)
        finalizer = weakref.finalize(holder, self._drop)
        finalizer.atexit = False
        return finalizer

    def _drop(self) -> None:
        with self._lock:
            self.holders -= 1
            if self.holders == 0:
                # If somebody has wrapped it after us, ours stays below and only calls the original.
                place = self._find()
                if getattr(place, self._name) is self._live:
                    if self._inherits:
                        delattr(place, self._name)
                    else:
                        setattr(place, self._name, self._below)
                self._live = None


def retain_all(replaced: Iterable[ReplacedMethod], holder: object) -> Callable[[], object]:
    """As `ReplacedMethod.retain`, for several."""
    releases = [one.retain(holder) for one in list(replaced)]  # all are found before one is replaced

    def release() -> None:
        for one in releases:
            one()

    return release
