"""Many strings without an object for each: one run of bytes, and numbers that say where each ends.

A Python string takes some 50 bytes beside its letters, and a list 8 more for it; here it takes 4.
"""

import hashlib
from array import array
from collections.abc import Container, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

# Names of files may hold bytes that are no text; Python has them as lone surrogates.
ENCODING = ("utf-8", "surrogatepass")


class Texts(Sequence):
    """Strings that can be appended to and read, and take their UTF-8 bytes and 4 or 8 more."""

    def __init__(self, lines: Iterable[str] = ()):
        self._bytes, self._ends = bytearray(), array("q", [0])
        for line in lines:
            self.append(line)

    def append(self, line: str) -> None:
        self._bytes += line.encode(*ENCODING)
        self._ends.append(len(self._bytes))

    def pack(self) -> "Texts":
        """Return itself, numbers as short as they can be; nothing can be appended after."""
        self._ends = shortest(self._ends)
        return self

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        place = range(len(self))[index]
        return self.part(place, place + 1)[0]

    def part(self, start: int, stop: int) -> list[str]:
        """Return the strings from `start` to before `stop`, faster than one by one."""
        ends = self._ends[start : stop + 1].tolist()
        return [self._bytes[a:b].decode(*ENCODING) for a, b in pairwise(ends)]

    def __eq__(self, other: object) -> bool:
        return same(self, other)

    __hash__ = None


def same(ours: Sequence, theirs: object) -> bool:
    """Return whether the other is a sequence of the same items."""
    if not isinstance(theirs, Sequence) or isinstance(theirs, (str, bytes)):
        return NotImplemented
    return len(ours) == len(theirs) and all(a == b for a, b in zip(ours, theirs, strict=True))


def shortest(numbers: Any) -> np.ndarray:
    """Return whole numbers from 0 as an array of the shortest unsigned integers that hold them."""
    values = np.asarray(numbers)
    return values.astype(np.min_scalar_type(int(values.max()) if len(values) else 0))


def id_list(example: str | int) -> Any:
    """Return an empty sequence to append ids like `example` to: `Texts`, or 8 bytes an integer."""
    return Texts() if isinstance(example, str) else array("q")


class Gathered(Mapping):
    """Captions by image, in whatever order they come: a mapping to lists of strings."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._texts, self._owner = Texts(), array("q")
        self._order: np.ndarray | None = None  # of captions by image, once somebody asks

    def add(self, name: Hashable, *captions: str) -> None:
        """Add captions of an image to those it has; without any, the image is known all the same"""
        number = self._numbers.setdefault(name, len(self._numbers))
        self._order = None
        for caption in captions:
            self._texts.append(caption)
            self._owner.append(number)

    def __getitem__(self, name: Hashable) -> list[str]:
        number = self._numbers[name]
        if self._order is None:
            owner = np.frombuffer(self._owner, np.int64) if self._owner else np.empty(0, np.int64)
            self._order = shortest(np.argsort(owner, kind="stable"))
            counts = np.bincount(owner, minlength=len(self._numbers))
            self._starts = shortest(np.append(0, np.cumsum(counts)))
            del owner  # a view on it would keep it from growing
        places = self._order[self._starts[number] : self._starts[number + 1]]
        return [self._texts[place] for place in places.tolist()]

    def __iter__(self) -> Iterator:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, name: object) -> bool:
        return name in self._numbers


class Places:
    """In which row each of many ids is: a dict's work in 8 bytes an id and the row's number."""

    def __init__(self, ids: Iterable[str | int], without: Container = ()):
        """`without`: ids that shall not be found."""
        self._ids: Any = None
        hashes, kept = array("Q"), array("q")
        for row, one in enumerate(ids):
            if self._ids is None:
                self._ids = id_list(one)
            self._ids.append(one)
            if one not in without:
                hashes.append(_hash(one))
                kept.append(row)
        values = np.array(hashes, np.uint64)
        order = np.argsort(values)
        self._hashes, self._rows = values[order], shortest(np.array(kept, np.int64)[order])

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, one: str | int) -> int | None:
        """Return the row of an id, None where it is not there."""
        wanted = np.uint64(_hash(one))
        place = int(np.searchsorted(self._hashes, wanted))
        while place < len(self._hashes) and self._hashes[place] == wanted:
            row = int(self._rows[place])
            if self._ids[row] == one:  # two ids may share a hash
                return row
            place += 1
        return None


def _hash(one: str | int) -> int:
    text = str(one).encode(*ENCODING)
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
