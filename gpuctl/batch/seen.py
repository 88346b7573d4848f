"""Which names were there before, among millions, in little memory. Imports the standard library."""

from __future__ import annotations

from array import array

_TABLES = 256  # each grows on its own, so that no moment needs all of them twice


class Seen:
    """A set of texts that keeps 8 bytes of each: 5 million take some 60 MB, where a set of them takes 600.

    What it keeps is Python's own hash of 64 bits, which differs in each process, so that nobody can make two texts
    that it takes for one. By chance it does so in one of a million runs over 5 million texts.
    """

    __slots__ = ("_counts", "_tables")

    def __init__(self) -> None:
        self._tables = [array("q", bytes(8 * 16)) for _ in range(_TABLES)]
        self._counts = [0] * _TABLES

    def add(self, text: str) -> bool:
        """Whether it is new."""
        value = hash(text) or 1  # 0 is an empty place
        which = value & (_TABLES - 1)
        table = self._tables[which]
        size = len(table)
        place = (value >> 8) % size
        while kept := table[place]:
            if kept == value:
                return False
            place = place + 1 if place + 1 < size else 0
        table[place] = value
        self._counts[which] += 1
        if 4 * self._counts[which] > 3 * size:
            self._tables[which] = _grown(table)
        return True


def _grown(table: array[int]) -> array[int]:
    size = len(table) * 3 // 2
    larger = array("q", bytes(8 * size))
    for value in table:
        if value:
            place = (value >> 8) % size
            while larger[place]:
                place = place + 1 if place + 1 < size else 0
            larger[place] = value
    return larger
