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


class Errors:
    """Errors so far, those together that differ in nothing but numbers and what is quoted."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, problem: Problem) -> None:
        kind = f"{problem.code}: {_OWN.sub('#', problem.message)}"
        if kind not in self._first:
            if len(self._first) == _MOST:
                return
            self._first[kind] = f"{problem.code}: {problem.message}"
        self._counts[kind] += 1

    def commonest(self, count: int) -> list[tuple[str, int]]:
        """Of each kind the first message, and how many rows have it; the commonest first."""
        return [(self._first[kind], rows) for kind, rows in self._counts.most_common(count)]
