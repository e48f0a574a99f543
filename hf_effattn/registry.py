"""Named choices: feature maps, patterns, mechanisms and architectures register here and are found by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """A dictionary of named things whose lookup error tells which names exist.

    Args:
        kind: What the entries are, in words for error messages ("feature map", "pattern", ...).
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorate a class or function to enter it under `name`; a name can be taken once."""
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is registered already")

        def enter(entry: T) -> T:
            self._entries[name] = entry
            return entry

        return enter

    def get(self, name: str) -> T:
        """Return the entry called `name`, or raise a ValueError that lists the names there are."""
        if not isinstance(name, str):
            raise TypeError(f"a {self.kind} is chosen by its name, one of {self.names()}; got {name!r}")
        if name not in self._entries:
            raise ValueError(f"unknown {self.kind} {name!r}; valid: {', '.join(self.names())}")
        return self._entries[name]

    def names(self) -> list[str]:
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())
