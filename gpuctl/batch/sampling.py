"""A sample of rows, and what it says of all of them. May import: batch's answers.

Drawn while the rows pass by, in memory that does not depend on how many or how long they are: what is kept of a row
stands in a file. The longest rows are all taken, because a few of them can hold much of what there is, and they are
those that do not fit the context; of the rest a simple random sample without replacement (Li's Algorithm L, 1994).

How long each row is, in bytes, is known of all rows. A total over all rows (of tokens, say) is that of the longest,
counted, and for the rest the regression estimator on bytes (Cochran, Sampling Techniques, 1977, 7.1-7.3):

    total = N y + b (X - N x)    N rows with X bytes; x, y, b: means and slope of the sample
    se    = N s sqrt((1 - n/N) (1/n + (X/N - x)^2 / Sxx))    s^2: of the residuals, n - 2 degrees of freedom

What no row of the sample is like, the sample cannot tell: a kind of rows of which none was drawn makes up 3/n of them
at most, with 95 % (the rule of three). The range is widened by what those could have at most, and at least.
"""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

ROWS = 1000  # of the sample, at most
LONGEST = 50  # of them the longest rows there are
CONFIDENCE = 0.95  # that a total is within its range
# The normal distribution's own figure for 95 % is 1.96. Sums of skewed lengths are not normal yet at a sample of this
# size: with that of 99 % the range holds the total in at least 95 of 100 samples of every shape that the tests draw.
_Z = 2.576
_SEED = 20261128  # any: the same rows have the same sample, wherever they are read
_GARBAGE = 64 * 2**20  # bytes in the file that nobody needs any more, from which on it is written anew


@dataclass(frozen=True)
class Range:
    """From `low` to `high`, most likely `likely`; where the three are equal it was counted."""

    low: float
    likely: float
    high: float

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.likely + other.likely, self.high + other.high)


@dataclass(slots=True)
class _Kept:
    size: int
    at: int  # in the file
    length: int


@dataclass(frozen=True)
class Drawn:
    """A row of the sample: what was kept of it, and how long it is in bytes."""

    kept: bytes
    size: int


class Sample:
    """Rows that pass by, and those of them that were kept in `file`, which is made."""

    def __init__(self, file: Path, *, rows: int = ROWS, longest: int = LONGEST, seed: int = _SEED) -> None:
        self.rows = 0
        self.bytes = 0
        self._file = file.open("w+b", buffering=2**20)
        self._most_longest = longest
        self._most = rows - longest
        self._longest: list[tuple[int, int, _Kept]] = []  # a heap: the shortest of them first
        self._rest: list[_Kept] = []
        self._seen = 0  # of the rest
        self._random = random.Random(seed)  # noqa: S311 - a sample, no secret
        self._weight = 1.0
        self._next = 0  # of the rest, which one is taken
        self._end = 0
        self._garbage = 0

    def see(self, size: int, kept: Callable[[], bytes]) -> None:
        """A row of so many bytes; of one that is taken, what `kept()` gives is kept."""
        self.rows += 1
        self.bytes += size
        if len(self._longest) < self._most_longest:
            heapq.heappush(self._longest, (size, self.rows, self._keep(size, kept())))
        elif self._longest and size > self._longest[0][0]:
            mine = (size, self.rows, self._keep(size, kept()))
            _, _, shortest = heapq.heapreplace(self._longest, mine)
            if self._takes():
                self._put(shortest)
            else:
                self._drop(shortest)
        elif self._takes():
            self._put(self._keep(size, kept()))

    def _takes(self) -> bool:
        """Whether the next of the rest is taken: the first of them all are, later ones ever more seldom."""
        self._seen += 1
        if self._seen <= self._most:
            if self._seen == self._most:
                self._skip()
            return True
        return self._seen == self._next

    def _skip(self) -> None:
        self._weight *= math.exp(math.log(1 - self._random.random()) / self._most)
        gap = math.log(1 - self._random.random()) / math.log1p(-self._weight) if self._weight < 1 else 0
        self._next = self._seen + int(gap) + 1

    def _put(self, one: _Kept) -> None:
        if len(self._rest) < self._most:
            self._rest.append(one)
            return
        place = self._random.randrange(self._most)
        self._drop(self._rest[place])
        self._rest[place] = one
        self._skip()

    def _keep(self, size: int, content: bytes) -> _Kept:
        if self._garbage > _GARBAGE and 2 * self._garbage > self._end:
            self._compact()
        self._file.seek(self._end)
        self._file.write(content)
        one = _Kept(size, self._end, len(content))
        self._end += len(content)
        return one

    def _drop(self, one: _Kept) -> None:
        self._garbage += one.length

    def _compact(self) -> None:
        """Move what is needed to the front, in its order, which overwrites nothing that is still to be moved."""
        at = 0
        for one in sorted(self._all(), key=lambda one: one.at):
            content = self._read(one)
            self._file.seek(at)
            self._file.write(content)
            one.at = at
            at += one.length
        self._file.truncate(at)
        self._end, self._garbage = at, 0

    def _all(self) -> list[_Kept]:
        return [*(one for _, _, one in self._longest), *self._rest]

    def _read(self, one: _Kept) -> bytes:
        self._file.seek(one.at)
        return self._file.read(one.length)

    # -- what was drawn

    @property
    def longest(self) -> Iterator[Drawn]:
        """The longest rows, the longest first."""
        for size, _, one in sorted(self._longest, key=lambda entry: (-entry[0], entry[1])):
            yield Drawn(self._read(one), size)

    def rest(self, budget: int) -> Iterator[Drawn]:
        """Those of the rest that are to be looked at, in random order, so many that they have about `budget` bytes.

        How many that are is decided by what all rows are like, and not by which were drawn: each row of the rest has
        the same chance to be among them.
        """
        mean = self.rest_bytes / max(1, self._seen)
        count = min(len(self._rest), max(_LEAST, int(budget / max(1.0, mean))))
        order = list(range(len(self._rest)))
        random.Random(_SEED).shuffle(order)  # noqa: S311
        for place in order[:count]:
            one = self._rest[place]
            yield Drawn(self._read(one), one.size)

    @property
    def rest_rows(self) -> int:
        return self._seen

    @property
    def rest_bytes(self) -> int:
        return self.bytes - sum(size for size, _, _ in self._longest)

    def close(self) -> None:
        self._file.close()


_LEAST = 100  # rows of a sample, however long they are
_UNSEEN = 3.0  # divided by the rows of a sample: the share that may be like none of them


def total(
    longest: Sequence[float],
    sample: Sequence[tuple[int, float]],
    *,
    rest_rows: int,
    rest_bytes: int,
    most: float,
) -> Range:
    """The total over all rows, with the range that holds it with `CONFIDENCE`.

    `longest`: what each of the longest has, all of which were counted; `sample`: bytes and what it has, of each row of
    the rest that was counted; `most`: what all of the rest could have at most. Nothing has less than 0.
    """
    counted = float(sum(longest))
    values = sum(value for _, value in sample)
    n = len(sample)
    if n == rest_rows:
        return Range(counted + values, counted + values, counted + values)
    x = sum(size for size, _ in sample) / n
    y = values / n
    spread = sum((size - x) ** 2 for size, _ in sample)
    slope = sum((size - x) * (value - y) for size, value in sample) / spread if spread else 0.0
    mean = rest_bytes / rest_rows
    likely = max(values, rest_rows * (y + slope * (mean - x)))  # what was counted is there
    residuals = sum((value - y - slope * (size - x)) ** 2 for size, value in sample)
    leverage = (mean - x) ** 2 / spread if spread else 0.0
    finite = 1 - n / rest_rows
    error = rest_rows * math.sqrt(residuals / max(1, n - 2) * finite * (1 / n + leverage))
    unseen = _UNSEEN / n * finite
    low = max(values, likely - _Z * error - unseen * likely)
    high = likely + _Z * error + unseen * max(0.0, most - likely)
    return Range(counted + low, counted + likely, counted + high)
