"""`--dedupe`: the same request is asked once, and answered everywhere. May import: rows, results, errors.

A row whose request an earlier one has does not travel: `copies.jsonl.gz` in the job's Volume has a line for each,
`{"row": 17, "id": "b", "of": 3}`, with its `columns` where the output repeats them. What was seen, and the answers that
are still wanted, are in databases on the disk, so that memory stays flat over millions of rows.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import sqlite3
from typing import TYPE_CHECKING, Any

from gpuctl.batch.answers import dumps
from gpuctl.batch.results import as_line, as_result

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

    from gpuctl.batch.rows import Result

FILE_NAME = "copies.jsonl.gz"


class Copies:
    """Finds rows that ask for the same, and writes them into `folder`, while rows are read. As a context."""

    def __init__(self, folder: Path) -> None:
        self.count = 0
        self._file = gzip.GzipFile(folder / FILE_NAME, "wb", compresslevel=1)
        self._path = folder.with_name("seen.db")
        self._seen = _database(self._path)
        self._seen.execute("CREATE TABLE seen (request BLOB PRIMARY KEY, row INTEGER) WITHOUT ROWID")

    def take(self, line: dict[str, Any]) -> bool:
        """Whether this row (as a line of a shard) is a copy, and is written; else its request is remembered."""
        asked = dumps([line["url"], line["body"]]).encode()
        request = hashlib.sha256(asked).digest()[:16]
        if self._seen.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (request, line["row"])).rowcount:
            return False
        (first,) = self._seen.execute("SELECT row FROM seen WHERE request = ?", (request,)).fetchone()
        copy = {name: line[name] for name in ("row", "id", "columns") if name in line}
        self._file.write(dumps({**copy, "of": first}).encode() + b"\n")
        self.count += 1
        return True

    def __enter__(self) -> Copies:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._seen.close()
        self._path.unlink()


def with_copies(results: Iterator[Result], folder: Path) -> Iterator[Result]:
    """All results in the order of the rows, those of the copies that `folder` has among them."""
    file = folder / FILE_NAME
    wanted = _Numbers()
    for copy in _read(file):
        wanted.add(copy["of"])
    kept = _database(folder / "kept.db")
    kept.execute("CREATE TABLE kept (row INTEGER PRIMARY KEY, line TEXT)")
    copies = _read(file)
    next_copy = next(copies, None)
    for result in results:
        while next_copy is not None and next_copy["row"] < result.number:
            yield from _copied(kept, next_copy)
            next_copy = next(copies, None)
        if result.number in wanted:
            kept.execute("INSERT INTO kept VALUES (?, ?)", (result.number, as_line(result)))
        yield result
    while next_copy is not None:
        yield from _copied(kept, next_copy)
        next_copy = next(copies, None)
    kept.close()


class _Numbers:
    """A set of numbers of rows, a bit for each row: a megabyte for eight million."""

    def __init__(self) -> None:
        self._bits = bytearray()

    def add(self, number: int) -> None:
        byte, bit = divmod(number, 8)
        if byte >= len(self._bits):
            self._bits.extend(bytes(byte + 1024 - len(self._bits)))
        self._bits[byte] |= 1 << bit

    def __contains__(self, number: int) -> bool:
        byte, bit = divmod(number, 8)
        return byte < len(self._bits) and bool(self._bits[byte] >> bit & 1)


def _read(file: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(file) as lines:
        for line in lines:
            yield json.loads(line)


def _copied(kept: sqlite3.Connection, copy: dict[str, Any]) -> Iterator[Result]:
    """Nothing where the row that it is a copy of has not ended: of a job that was fetched in part."""
    for (line,) in kept.execute("SELECT line FROM kept WHERE row = ?", (copy["of"],)):
        first = as_result(json.loads(line))
        yield dataclasses.replace(first, number=copy["row"], id=copy["id"], columns=copy.get("columns"))


_CACHE_KIB = 32 * 1024  # of a database's pages: most of what is looked for among millions of requests


def _database(path: Path) -> sqlite3.Connection:
    """One that is quick, and is thrown away: nothing of it is ever committed."""
    database = sqlite3.connect(path, isolation_level=None)
    settings = (
        "journal_mode = OFF",
        "synchronous = OFF",
        "locking_mode = EXCLUSIVE",
        f"cache_size = -{_CACHE_KIB}",
    )
    for setting in settings:
        database.execute(f"PRAGMA {setting}")
    database.execute("BEGIN")
    return database
