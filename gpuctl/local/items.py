"""What Dicts and Queues hold: their tables and the SQL of them, in the plane's own database. Imports store.

Every method is one transaction, so a plane that is killed has done all of a change or nothing of it. A change that
may not happen twice takes the key by which the client names a call and its retries: the answer is kept under it, and
a retry gets that answer again. So nothing is put twice, or taken and lost, when the plane dies between the two.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from gpuctl.local.store import Store

DICT, QUEUE = "di", "qu"  # the prefixes of their ids
ENTRY_SECONDS = 7 * 86400.0  # a Dict's entry expires after so long without a read or a write, as in the cloud
PARTITION_SECONDS = 86400.0  # a Queue's partition after so long without a put, unless the put says otherwise
PARTITION_ITEMS, PARTITION_BYTES = 5_000, 64 << 20  # the cloud's limits
PARTITIONS = 100_000
_TOUCH_SECONDS = 3600.0  # a read is written down at most so often
_ANSWER_SECONDS = 600.0  # how long a client can go on retrying one call
_PAGE_BYTES = 4 << 20

_SCHEMA = """
CREATE TABLE IF NOT EXISTS collections (
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, environment_id TEXT NOT NULL, name TEXT NOT NULL,
    created_at REAL NOT NULL, alive_until REAL NOT NULL
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS collections_by_name ON collections (kind, environment_id, name) WHERE name <> '';
CREATE TABLE IF NOT EXISTS dict_entries (
    number INTEGER PRIMARY KEY AUTOINCREMENT, dict_id TEXT NOT NULL, used_at REAL NOT NULL, key BLOB NOT NULL,
    value BLOB NOT NULL -- last: what stands behind a large value is slow to read
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS dict_entries_by_key ON dict_entries (dict_id, key);
CREATE INDEX IF NOT EXISTS dict_entries_by_use ON dict_entries (used_at);
CREATE TABLE IF NOT EXISTS queue_partitions (
    queue_id TEXT NOT NULL, name BLOB NOT NULL, items INTEGER NOT NULL, bytes INTEGER NOT NULL,
    alive_until REAL NOT NULL, PRIMARY KEY (queue_id, name)
) STRICT;
CREATE TABLE IF NOT EXISTS queue_items (
    number INTEGER PRIMARY KEY AUTOINCREMENT, queue_id TEXT NOT NULL, partition BLOB NOT NULL, value BLOB NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS queue_items_in_order ON queue_items (queue_id, partition, number);
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, at REAL NOT NULL, answer BLOB NOT NULL) STRICT;
CREATE INDEX IF NOT EXISTS answers_by_age ON answers (at);
"""


@dataclass(frozen=True)
class Collection:
    """A Dict or a Queue. `alive_until` is 0 for one with a name; an ephemeral one ends then, unless it is renewed."""

    id: str
    kind: str
    environment_id: str
    name: str
    created_at: float
    alive_until: float


class FullError(Exception):
    """A partition has no room for what was to be put; nothing of it was."""


class Items:
    """The tables, in `store`'s database. `now` is the clock, in seconds since 1970."""

    def __init__(self, store: Store, now: Callable[[], float] = time.time) -> None:
        self._db = store.extend(_SCHEMA)
        self._transaction = store.transaction
        self._now = now

    # ---- the collections themselves

    def add(self, row: Collection) -> None:
        self._db.execute(
            "INSERT INTO collections VALUES (?, ?, ?, ?, ?, ?)",
            [row.id, row.kind, row.environment_id, row.name, row.created_at, row.alive_until],
        )

    def get(self, collection_id: str) -> Collection | None:
        return self._one("SELECT * FROM collections WHERE id = ?", [collection_id])

    def named(self, kind: str, environment_id: str, name: str) -> Collection | None:
        return self._one(
            "SELECT * FROM collections WHERE kind = ? AND environment_id = ? AND name = ? AND name <> ''",
            [kind, environment_id, name],
        )

    def all(self, kind: str, environment_id: str) -> list[Collection]:
        """Those with a name, newest first."""
        rows = self._db.execute(
            "SELECT * FROM collections WHERE kind = ? AND environment_id = ? AND name <> '' "
            "ORDER BY created_at DESC",
            [kind, environment_id],
        )
        return [Collection(**dict(row)) for row in rows]

    def keep_until(self, collection_id: str, at: float) -> None:
        self._db.execute(
            "UPDATE collections SET alive_until = ? WHERE id = ? AND name = ''", [at, collection_id]
        )

    def delete(self, collection_id: str) -> None:
        """It and all that it holds."""
        with self._transaction():
            self._delete(collection_id)

    def forget_environment(self, environment_id: str) -> None:
        with self._transaction():
            for (found,) in self._db.execute(
                "SELECT id FROM collections WHERE environment_id = ?", [environment_id]
            ).fetchall():
                self._delete(found)

    def _delete(self, collection_id: str) -> None:
        self._db.execute("DELETE FROM dict_entries WHERE dict_id = ?", [collection_id])
        self._db.execute("DELETE FROM queue_items WHERE queue_id = ?", [collection_id])
        self._db.execute("DELETE FROM queue_partitions WHERE queue_id = ?", [collection_id])
        self._db.execute("DELETE FROM collections WHERE id = ?", [collection_id])

    def sweep(self) -> None:
        """Remove what has expired."""
        now = self._now()
        with self._transaction():
            gone = "SELECT id FROM collections WHERE alive_until BETWEEN 1 AND ?"
            for (found,) in self._db.execute(gone, [now]).fetchall():
                self._delete(found)
            self._db.execute("DELETE FROM dict_entries WHERE used_at < ?", [now - ENTRY_SECONDS])
            gone = "SELECT queue_id, name FROM queue_partitions WHERE alive_until <= ?"
            for queue_id, name in self._db.execute(gone, [now]).fetchall():
                self._clear_partition(queue_id, name)
            self._db.execute("DELETE FROM answers WHERE at < ?", [now - _ANSWER_SECONDS])

    def _one(self, sql: str, values: Sequence[object]) -> Collection | None:
        row = self._db.execute(sql, values).fetchone()
        return None if row is None else Collection(**dict(row))

    # ---- what may not happen twice

    def _once(self, key: str, change: Callable[[], bytes]) -> bytes:
        """The answer that this call got when it was made before, else that of `change`. Within a transaction."""
        row = key and self._db.execute("SELECT answer FROM answers WHERE key = ?", [key]).fetchone()
        if row:
            return bytes(row[0])
        answer = change()
        if key:
            self._db.execute("INSERT INTO answers VALUES (?, ?, ?)", [key, self._now(), answer])
        return answer

    # ---- Dicts

    def entry(self, dict_id: str, key: bytes) -> bytes | None:
        """The value of a key, which counts as a use of it."""
        now = self._now()
        row = self._db.execute(
            "SELECT number, value, used_at FROM dict_entries WHERE dict_id = ? AND key = ? AND used_at >= ?",
            [dict_id, key, now - ENTRY_SECONDS],
        ).fetchone()
        if row is None:
            return None
        if row["used_at"] < now - _TOUCH_SECONDS:
            self._db.execute("UPDATE dict_entries SET used_at = ? WHERE number = ?", [now, row["number"]])
        return bytes(row["value"])

    def has_entry(self, dict_id: str, key: bytes) -> bool:
        return (
            self._db.execute(
                "SELECT 1 FROM dict_entries WHERE dict_id = ? AND key = ? AND used_at >= ?",
                [dict_id, key, self._now() - ENTRY_SECONDS],
            ).fetchone()
            is not None
        )

    def count_entries(self, dict_id: str) -> int:
        row = self._db.execute(
            "SELECT count(*) FROM dict_entries WHERE dict_id = ? AND used_at >= ?",
            [dict_id, self._now() - ENTRY_SECONDS],
        ).fetchone()
        return int(row[0])

    def update_entries(
        self, dict_id: str, entries: Mapping[bytes, bytes], *, if_missing: bool, key: str
    ) -> bool:
        """Set them all; with `if_missing` only those that are not there. Whether any of them was new."""

        def change() -> bytes:
            now = self._now()
            created = False
            for name, value in entries.items():
                there = self.has_entry(dict_id, name)
                created = created or not there
                if not (there and if_missing):
                    self._db.execute(
                        "INSERT INTO dict_entries (dict_id, key, value, used_at) VALUES (?, ?, ?, ?) "
                        "ON CONFLICT (dict_id, key) DO UPDATE SET value = excluded.value, used_at = excluded.used_at",
                        [dict_id, name, value, now],
                    )
            return b"1" if created else b""

        with self._transaction():
            return bool(self._once(key, change))

    def pop_entry(self, dict_id: str, name: bytes, *, key: str) -> bytes | None:
        def change() -> bytes:
            value = self.entry(dict_id, name)
            self._db.execute("DELETE FROM dict_entries WHERE dict_id = ? AND key = ?", [dict_id, name])
            return b"" if value is None else b"1" + value

        with self._transaction():
            answer = self._once(key, change)
        return answer[1:] if answer else None

    def clear_entries(self, dict_id: str) -> None:
        self._db.execute("DELETE FROM dict_entries WHERE dict_id = ?", [dict_id])

    def entries(self, dict_id: str, *, values: bool) -> Iterator[tuple[bytes, bytes]]:
        """Keys and, where wanted, values, oldest first. Changes meanwhile may or may not be seen."""
        last, fresh = 0, self._now() - ENTRY_SECONDS
        columns = "number, key, value" if values else "number, key, x''"
        while True:
            rows = self._db.execute(
                f"SELECT {columns} FROM dict_entries WHERE dict_id = ? AND number > ? AND used_at >= ? "  # noqa: S608
                "ORDER BY number LIMIT ?",
                [dict_id, last, fresh, 16 if values else 1000],  # values may be large
            ).fetchall()
            if not rows:
                return
            for number, name, value in rows:
                last = number
                yield bytes(name), bytes(value)

    # ---- Queues

    def put(
        self, queue_id: str, partition: bytes, values: Sequence[bytes], *, alive_seconds: float, key: str
    ) -> None:
        """Append all of them, or none: FullError where they do not fit."""

        def change() -> bytes:
            now = self._now()
            held, size = self._partition(queue_id, partition)
            if held + len(values) > PARTITION_ITEMS:
                raise FullError(f"The partition holds {held:,} items; it can hold {PARTITION_ITEMS:,}.")
            more = sum(map(len, values))
            if size + more > PARTITION_BYTES:
                raise FullError(f"The partition holds {size:,} bytes; it can hold {PARTITION_BYTES:,}.")
            if not held:
                (count,) = self._db.execute(
                    "SELECT count(*) FROM queue_partitions WHERE queue_id = ?", [queue_id]
                ).fetchone()
                if count >= PARTITIONS:
                    raise FullError(f"The Queue has {count:,} partitions; it can have {PARTITIONS:,}.")
            self._db.executemany(
                "INSERT INTO queue_items (queue_id, partition, value) VALUES (?, ?, ?)",
                [(queue_id, partition, value) for value in values],
            )
            self._db.execute(
                "INSERT OR REPLACE INTO queue_partitions VALUES (?, ?, ?, ?, ?)",
                [queue_id, partition, held + len(values), size + more, now + alive_seconds],
            )
            return b""

        with self._transaction():
            self._once(key, change)

    def take(self, queue_id: str, partition: bytes, most: int, *, key: str) -> list[bytes]:
        """Remove the first `most` items and return them."""

        def change() -> bytes:
            held, size = self._partition(queue_id, partition)
            if not held:
                return b""
            rows = self._db.execute(
                "SELECT number, value FROM queue_items WHERE queue_id = ? AND partition = ? ORDER BY number LIMIT ?",
                [queue_id, partition, most],
            ).fetchall()
            self._db.execute(
                "DELETE FROM queue_items WHERE queue_id = ? AND partition = ? AND number <= ?",
                [queue_id, partition, rows[-1][0]],
            )
            taken = [bytes(value) for _, value in rows]
            self._db.execute(
                "UPDATE queue_partitions SET items = ?, bytes = ? WHERE queue_id = ? AND name = ?",
                [held - len(taken), size - sum(map(len, taken)), queue_id, partition],
            )
            return json.dumps([len(value) for value in taken]).encode() + b"\n" + b"".join(taken)

        # Whoever waits asks again and again: what was empty is not an answer to keep.
        if not self._answered(key) and not self._partition(queue_id, partition)[0]:
            return []
        with self._transaction():
            answer = self._once(key, change)
        head, _, rest = answer.partition(b"\n")
        values = []
        for length in json.loads(head or b"[]"):
            values.append(rest[:length])
            rest = rest[length:]
        return values

    def _answered(self, key: str) -> bool:
        found = key and self._db.execute("SELECT 1 FROM answers WHERE key = ?", [key]).fetchone()
        return bool(found)

    def after(self, queue_id: str, partition: bytes, number: int, most: int) -> list[tuple[int, bytes]]:
        """The items behind `number`, which stay; (number, value), at least one where there is one."""
        if not self._partition(queue_id, partition)[0]:
            return []
        rows = self._db.execute(
            "SELECT number, value FROM queue_items WHERE queue_id = ? AND partition = ? AND number > ? "
            "ORDER BY number LIMIT ?",
            [queue_id, partition, number, most],
        )
        found: list[tuple[int, bytes]] = []
        size = 0
        for at, value in rows:
            size += len(value)
            if found and size > _PAGE_BYTES:
                break
            found.append((int(at), bytes(value)))
        return found

    def count_items(self, queue_id: str, partition: bytes | None) -> tuple[int, int]:
        """(partitions, items) of one partition, or of all with None."""
        row = self._db.execute(
            "SELECT count(*), coalesce(sum(items), 0) FROM queue_partitions "
            "WHERE queue_id = ? AND alive_until > ? AND items > 0 AND (? IS NULL OR name = ?)",
            [queue_id, self._now(), partition, partition],
        ).fetchone()
        return int(row[0]), int(row[1])

    def clear_items(self, queue_id: str, partition: bytes | None) -> None:
        """Of one partition, or of all with None."""
        with self._transaction():
            if partition is not None:
                self._clear_partition(queue_id, partition)
            else:
                self._db.execute("DELETE FROM queue_items WHERE queue_id = ?", [queue_id])
                self._db.execute("DELETE FROM queue_partitions WHERE queue_id = ?", [queue_id])

    def _clear_partition(self, queue_id: str, partition: bytes) -> None:
        where = [queue_id, partition]
        self._db.execute("DELETE FROM queue_items WHERE queue_id = ? AND partition = ?", where)
        self._db.execute("DELETE FROM queue_partitions WHERE queue_id = ? AND name = ?", where)

    def _partition(self, queue_id: str, partition: bytes) -> tuple[int, int]:
        """(items, bytes) that it holds; one that has expired holds nothing."""
        row = self._db.execute(
            "SELECT items, bytes, alive_until FROM queue_partitions WHERE queue_id = ? AND name = ?",
            [queue_id, partition],
        ).fetchone()
        if row is None:
            return 0, 0
        if row["alive_until"] <= self._now():
            self._clear_partition(queue_id, partition)
            return 0, 0
        return int(row["items"]), int(row["bytes"])
