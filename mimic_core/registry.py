"""Registries of objects by name. Other packages can add to them through entry points."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.metadata import EntryPoints, entry_points
from typing import Generic, TypeVar

from .errors import UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """Objects by name, from decorators and from one entry-point group.

    The name of an entry point is the registered name. Its object is loaded when the name is first looked up.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self._items: dict[str, T] = {}

    def register(self, *names: str) -> Callable[[T], T]:
        """Decorator that registers an object under one or more names.

        Raises:
            ValueError: no name was given, or another object has the name.
        """
        if not names:
            raise ValueError(f"a {self.kind} needs at least one name; give it to the register decorator")

        def add(item: T) -> T:
            # A class that is defined again, by running a notebook cell twice, replaces the old one.
            clash = [n for n in names if n in self._items and not _same_definition(self._items[n], item)]
            if clash:
                raise ValueError(f"{self.kind} {clash[0]!r} is already registered as {self._items[clash[0]]!r}")
            self._items.update(dict.fromkeys(names, item))
            return item

        return add

    def get(self, name: str) -> T:
        """The object registered under `name`.

        Raises:
            UnknownNameError: there is none, and no entry point has the name.
        """
        if name not in self._items:
            for point in _installed(self.group).select(name=name):
                self._items.setdefault(name, point.load())
        if name not in self._items:
            raise UnknownNameError(f"no {self.kind} is called {name!r}; known: {', '.join(self) or 'none'}")
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._items or name in set(self)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._items, *(point.name for point in _installed(self.group))}))


def _same_definition(old: object, new: object) -> bool:
    keys = ("__module__", "__qualname__")
    return old is new or all(getattr(old, k, None) == getattr(new, k, old) for k in keys)


def _installed(group: str) -> EntryPoints:
    """The entry points of all installed packages. Reading them takes 14 ms, so they are read when one may have come."""
    return _read(group, tuple((folder, _changed(folder)) for folder in sys.path), tuple(map(id, sys.meta_path)))


@lru_cache(maxsize=4)
def _read(group: str, path: object, finders: object) -> EntryPoints:
    return entry_points(group=group)


def _changed(folder: str) -> int:
    try:
        return os.stat(folder or ".").st_mtime_ns
    except OSError:  # it may be made later
        return 0
