"""Which errors a job's rows ended with most often. May import: batch's rows."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpuctl.batch.rows import Problem

# What differs between messages that say the same: numbers, and what is quoted.
_OWN = re.compile(r"\"[^\"]*\"|'[^']*'|[0-9]+(?:[.,:][0-9]+)*")
_MOST = 10_000  # kinds that are told apart; whoever has more has nothing in common
_MOST_OF_KIND = 100  # messages of a kind that are counted one by one


class Errors:
    """Errors so far. Those that differ in nothing but numbers and what is quoted are one kind; where its messages come
    again and again (`KeyError: 'text'` and `KeyError: 'title'`), and are not each of one row (lengths, line numbers),
    they are told apart.
    """

    def __init__(self) -> None:
        self._kinds: Counter[str] = Counter()
        self._messages: dict[str, Counter[str]] = {}

    def add(self, problem: Problem) -> None:
        kind = f"{problem.code}: {_OWN.sub('#', problem.message)}"
        messages = self._messages.get(kind)
        if messages is None:
            if len(self._messages) == _MOST:
                return
            messages = self._messages[kind] = Counter()
        self._kinds[kind] += 1
        message = f"{problem.code}: {problem.message}"
        if message in messages or len(messages) < _MOST_OF_KIND:
            messages[message] += 1

    def commonest(self, count: int) -> list[tuple[str, int]]:
        """Messages, and how many rows have them, or others of their kind; the commonest first."""
        found: list[tuple[str, int]] = []
        for kind, rows in self._kinds.items():
            messages = self._messages[kind]
            if rows == messages.total() and rows >= 2 * len(messages):
                found += messages.items()
            else:
                found.append((next(iter(messages)), rows))  # the first
        found.sort(key=lambda one: -one[1])
        return found[:count]
