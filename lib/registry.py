"""Names to implementations. Every choice the command line offers comes out of a registry."""

import difflib
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from .errors import RunError

T = TypeVar("T")

LISTED = 20  # names that a message, or docs/flags.md, lists; of more, --help has them


def unknown_name(flag: str, name: str, known: Iterable[str]) -> RunError:
    """The error for a name that does not exist: the nearest match, and all that do, if they are few."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    listed = f"choose from: {', '.join(known)}" if len(known) <= LISTED else f"--help names all {len(known)}"
    return RunError(f"{flag}: '{name}' is unknown; {hint}{listed}")


class Registry(Generic[T]):
    """An ordered mapping from a name to its one implementation."""

    def __init__(self, flag: str):
        self.flag = flag  # the flag that selects from this registry, for messages
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> T:
        """Register `entry`; a name that is taken is a programming error (ValueError)."""
        if name in self._entries:
            raise ValueError(f"'{name}' is already registered for {self.flag}")
        self._entries[name] = entry
        return entry

    def register(self, name: str, make: Callable[[Callable], T] = lambda function: function):
        """Decorator form of `add`; `make` turns the function into the entry that is stored."""

        def decorate(function):
            self.add(name, make(function))
            return function

        return decorate

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise unknown_name(self.flag, name, self._entries)
        return self._entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self):
        return iter(self._entries)

    def items(self):
        return self._entries.items()
