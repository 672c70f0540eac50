"""Tables of what a config names: kinds of layers, which the layers' modules fill, and extensions add to."""

import importlib
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry], Generic[Entry]):
    """Entries by name, in the order of registration."""

    def __init__(self, what: str, module: str) -> None:
        """what: one entry, for messages; module: registers what Lattice itself has, and is imported when the table is
        first read, whoever reads it: args are to be checked without a model, and known without torch."""
        self.what, self._module = what, module
        self._complete = False
        self._entries: dict[str, Entry] = {}

    def register(self, name: str, entry: Entry) -> None:
        """Add an entry. Raises ValueError where the name is taken by another, or is no word."""
        if not name.isidentifier():
            raise ValueError(f"{self.what} {name!r}: a name is made of letters, digits and _")
        if name in self._entries and self._entries[name] is not entry:
            raise ValueError(f"{self.what} {name!r} exists already; give it another name")
        self._entries[name] = entry

    def __getitem__(self, name: str) -> Entry:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def _all(self) -> dict[str, Entry]:
        if not self._complete:
            self._complete = True  # first, as the module may read the table
            try:
                importlib.import_module(self._module)
            except BaseException:  # a KeyError would pass for an entry that is not there, and the table for whole
                self._complete = False
                raise
        return self._entries
