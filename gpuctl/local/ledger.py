"""The ledger: calls, their inputs and outputs, in the plane's database. Imports store.

An input is answered once: the first output that is written for it stays, whatever comes after. What a caller is told
has been written before (`put` at once, the rest in batches, one transaction each), so a plane that is killed has
forgotten nothing that anybody knows. Which container has an input is not written: when the plane dies, so do they.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from gpuctl.local.store import Store

log = logging.getLogger(__name__)

# Of an index with a WHERE, SQLite makes use only where the query says the same: `key = ? AND key <> ''`.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS function_calls (
    num INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, key TEXT NOT NULL, app_id TEXT NOT NULL,
    function_id TEXT NOT NULL, kind INTEGER NOT NULL, invocation INTEGER NOT NULL, parent_input_id TEXT NOT NULL,
    created_at REAL NOT NULL, cleared_at REAL NOT NULL, settled INTEGER NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS function_calls_unsettled ON function_calls (num) WHERE settled = 0;
CREATE UNIQUE INDEX IF NOT EXISTS function_calls_by_key ON function_calls (key) WHERE key <> '';
CREATE INDEX IF NOT EXISTS function_calls_by_parent ON function_calls (parent_input_id) WHERE parent_input_id <> '';
CREATE TABLE IF NOT EXISTS call_inputs (
    call INTEGER NOT NULL, idx INTEGER NOT NULL, input BLOB NOT NULL, attempt INTEGER NOT NULL,
    not_before REAL NOT NULL, seq INTEGER, status INTEGER NOT NULL, task_id TEXT NOT NULL, output BLOB,
    PRIMARY KEY (call, idx)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS call_chunks (
    call INTEGER NOT NULL, idx INTEGER NOT NULL, chunk BLOB NOT NULL, PRIMARY KEY (call, idx)
) STRICT, WITHOUT ROWID;
"""

_BATCH_SECONDS = 0.001  # what comes in so short a time is written together,
_BUSY_SECONDS = 0.01  # and in so long a time where it comes all the time
# Of a map only so often: its caller is answered no more often than this, until the last output is there.
GATHER_SECONDS = 0.05
_FULL_SECONDS = 1.0  # how long to wait before writing again when the disk is full
_KEEP_SECONDS = 7 * 86400.0  # results, as in the cloud
_KEEP_CLEARED_SECONDS = 600.0  # those that the caller has; its acknowledgement may have got lost
_INLINE_BYTES = 16 << 10  # an input that is larger waits in the database, not in memory


@dataclass
class CallRow:
    """A function call: its inputs are numbered by `idx`, its outputs by `seq`, in the order in which they came."""

    num: int
    id: str
    app_id: str
    function_id: str
    kind: int  # api_pb2.FunctionCallType
    invocation: int  # api_pb2.FunctionCallInvocationType
    parent_input_id: str
    created_at: float
    total: int = 0  # inputs
    seq: int = 0  # of the last output that was given out, written or not
    order: list[int] = field(
        default_factory=list
    )  # the indexes of the outputs that are written, by `seq` from 1
    settled: bool = False  # as it is written: every input has its output
    news: list[asyncio.Future[None]] = field(default_factory=list)  # those who wait for an output
    chunk_news: list[asyncio.Future[None]] = field(default_factory=list)
    answered_at: float = 0.0  # when outputs of a map were last fetched, by the loop's clock

    @property
    def unfinished(self) -> int:
        """Inputs without an output that is written."""
        return self.total - len(self.order)


@dataclass(slots=True)
class Input:
    """One input that has no output yet. `data` is a serialised FunctionInput, None when it has to be read."""

    call: CallRow
    idx: int
    attempt: int
    not_before: float  # seconds since 1970
    data: bytes | None
    method: str
    crashes: int = 0  # containers that ended with it
    done: bool = False  # it has an output
    task_id: str = ""  # the container that has it
    started_at: float = 0.0  # seconds since 1970
    deadline: float = 0.0  # by the loop's clock
    condemned: bool = False  # its container was told to cancel it

    @property
    def id(self) -> str:
        return input_id(self.call.id, self.idx)


def input_id(call_id: str, idx: int) -> str:
    """The id says which input of which call it is: no table is needed to find it."""
    return f"in-{call_id[3:]}:{idx}"


def parse_input_id(text: str) -> tuple[str, int]:
    """(call id, index); ("", 0) for what is no input id."""
    head, colon, idx = text.partition(":")
    if not head.startswith("in-") or not colon or not idx.isdigit():
        return "", 0
    return "fc-" + head[3:], int(idx)


@dataclass(frozen=True)
class Output:
    """One output as it is kept: `data` is a serialised FunctionGetOutputsItem."""

    seq: int
    data: bytes


class Ledger:
    """Every call that is not forgotten. One per plane, used from the loop's thread."""

    def __init__(self, store: Store) -> None:
        self._db = store.extend(_SCHEMA)
        self._calls: dict[str, CallRow] = {}  # those in use
        self._outputs: list[tuple[int, int, str, bytes, int, int, CallRow]] = []
        self._attempts: list[tuple[int, float, int, int]] = []
        self._chunks: list[tuple[int, int, bytes, CallRow]] = []
        self._cleared: list[tuple[float, int]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._flushed_at = 0.0  # by the loop's clock

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # a full disk has rolled back already
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    # ---- calls

    def add(self, call: CallRow, key: str, items: Sequence[tuple[int, bytes]]) -> tuple[CallRow, bool]:
        """A new call with its first inputs; (the call, False) that was made with this key, if there is one.

        A client that got no answer asks again with the same key.
        """
        if key:
            row = self._db.execute(
                "SELECT id FROM function_calls WHERE key = ? AND key <> ''", [key]
            ).fetchone()
            if row is not None:
                known = self.call(str(row[0]))
                assert known is not None
                return known, False
        with self._transaction():
            cursor = self._db.execute(
                "INSERT INTO function_calls (id, key, app_id, function_id, kind, invocation, parent_input_id, "
                "created_at, cleared_at, settled) VALUES (?, ?, ?, ?, ?, ?, ?, ?, 0, 0)",
                [
                    call.id,
                    key,
                    call.app_id,
                    call.function_id,
                    call.kind,
                    call.invocation,
                    call.parent_input_id,
                    call.created_at,
                ],
            )
            call.num = int(cursor.lastrowid or 0)
            self._insert(call, items)
        call.total = len(items)
        self._calls[call.id] = call
        return call, True

    def put(self, call: CallRow, items: Sequence[tuple[int, bytes]]) -> set[int]:
        """More inputs; returns the indexes of those that are new, for the client may send some twice."""
        numbers = [idx for idx, _ in items]
        rows = self._db.execute(
            "SELECT idx FROM call_inputs WHERE call = ? AND idx BETWEEN ? AND ?",
            [call.num, min(numbers), max(numbers)],
        )
        known = {int(row[0]) for row in rows}
        with self._transaction():
            if call.settled:
                self._db.execute("UPDATE function_calls SET settled = 0 WHERE num = ?", [call.num])
            self._insert(call, [item for item in items if item[0] not in known] if known else items)
        call.settled = False
        new = set(numbers) - known
        call.total += len(new)
        return new

    def _insert(self, call: CallRow, items: Sequence[tuple[int, bytes]]) -> None:
        num = call.num
        self._db.executemany(
            "INSERT INTO call_inputs VALUES (?, ?, ?, 0, 0, NULL, 0, '', NULL)",
            [(num, idx, data) for idx, data in items],
        )

    def call(self, call_id: str) -> CallRow | None:
        """The call with this id."""
        call = self._calls.get(call_id)
        if call is not None:
            return call
        row = self._db.execute("SELECT * FROM function_calls WHERE id = ?", [call_id]).fetchone()
        return None if row is None else self._load(row)

    def _load(self, row: Any) -> CallRow:
        self.flush()
        (total,) = self._db.execute(
            "SELECT count(*) FROM call_inputs WHERE call = ?", [row["num"]]
        ).fetchone()
        order = self._db.execute(
            "SELECT idx FROM call_inputs WHERE call = ? AND seq IS NOT NULL ORDER BY seq", [row["num"]]
        ).fetchall()
        call = CallRow(
            num=row["num"],
            id=row["id"],
            app_id=row["app_id"],
            function_id=row["function_id"],
            kind=row["kind"],
            invocation=row["invocation"],
            parent_input_id=row["parent_input_id"],
            created_at=row["created_at"],
            total=total,
            seq=len(order),
            order=[entry[0] for entry in order],
            settled=bool(row["settled"]),
        )
        self._calls[call.id] = call
        return call

    def children(self, parent_input_id: str) -> list[CallRow]:
        """The calls that this input made."""
        rows = self._db.execute(
            "SELECT * FROM function_calls WHERE parent_input_id = ? AND parent_input_id <> ''",
            [parent_input_id],
        ).fetchall()
        return [self._calls.get(row["id"]) or self._load(row) for row in rows]

    def unfinished_calls(self) -> list[CallRow]:
        """The calls that have inputs without an output, oldest first."""
        rows = self._db.execute(
            "SELECT * FROM function_calls WHERE settled = 0 "
            "AND EXISTS (SELECT 1 FROM call_inputs WHERE call = num AND seq IS NULL) ORDER BY num"
        ).fetchall()
        return [self._calls.get(row["id"]) or self._load(row) for row in rows]

    def unfinished_inputs(self, call: CallRow) -> list[Input]:
        """Those of its inputs that have no output yet, as they were written, in order."""
        self.flush()
        rows = self._db.execute(
            "SELECT idx, attempt, not_before, input FROM call_inputs WHERE call = ? AND seq IS NULL ORDER BY idx",
            [call.num],
        )
        return [Input(call, row[0], row[1], row[2], bytes(row[3]), "") for row in rows]

    def input_data(self, item: Input) -> bytes:
        """The input as it was sent."""
        if item.data is not None:
            return item.data
        row = self._db.execute(
            "SELECT input FROM call_inputs WHERE call = ? AND idx = ?", [item.call.num, item.idx]
        ).fetchone()
        return b"" if row is None else bytes(row[0])

    @staticmethod
    def kept_in_memory(data: bytes) -> bytes | None:
        """`data` if it is small enough to keep with the input."""
        return data if len(data) <= _INLINE_BYTES else None

    # ---- outputs

    def finish(self, item: Input, status: int, data: Callable[[], bytes], task_id: str = "") -> bool:
        """Answer an input; False when it has an answer. `data()` is a serialised FunctionGetOutputsItem."""
        if item.done:
            return False
        item.done = True
        call = item.call
        call.seq += 1
        self._outputs.append((call.seq, status, task_id, data(), call.num, item.idx, call))
        self._soon(call.answered_at + GATHER_SECONDS if call.seq < call.total else 0.0)
        return True

    def retry(self, item: Input) -> None:
        """Keep the attempt that an input is at, and when the next may start."""
        self._attempts.append((item.attempt, item.not_before, item.call.num, item.idx))
        self._soon()

    def add_chunks(self, call: CallRow, chunks: Iterable[tuple[int, bytes]]) -> None:
        """What a generator yielded, numbered from 1; a number that is there already stays as it is."""
        self._chunks.extend((call.num, idx, data, call) for idx, data in chunks)
        self._soon()

    def _soon(self, due: float = 0.0) -> None:
        """Write what is pending in a moment, or at a time when somebody is to be told of it."""
        if due and self._timer is not None:
            return
        loop = asyncio.get_running_loop()
        at = max(loop.time() + _BATCH_SECONDS, self._flushed_at + _BUSY_SECONDS, due)
        if self._timer is not None:
            if self._timer.when() <= at:
                return
            self._timer.cancel()
        self._timer = loop.call_at(at, self._flush_later)

    def _flush_later(self) -> None:
        self._timer = None
        self._flushed_at = asyncio.get_running_loop().time()
        try:
            self.flush()
        except sqlite3.Error as error:
            log.warning("outputs cannot be written now: %s", error)
            self._flushed_at += _FULL_SECONDS
            self._soon()

    def flush(self) -> None:
        """Write what is pending, then wake those who wait. Raises sqlite3.Error on a full disk; nothing is lost."""
        if not (self._outputs or self._attempts or self._chunks or self._cleared):
            return
        outputs, attempts, chunks = self._outputs, self._attempts, self._chunks
        settled: list[CallRow] = []
        with self._transaction():
            # Chunks first: an output says how many of them there are.
            if chunks:
                self._db.executemany(
                    "INSERT OR IGNORE INTO call_chunks VALUES (?, ?, ?)", [c[:3] for c in chunks]
                )
            if attempts:
                self._db.executemany(
                    "UPDATE call_inputs SET attempt = ?, not_before = ? WHERE call = ? AND idx = ? AND seq IS NULL",
                    attempts,
                )
            if outputs:
                self._db.executemany(
                    "UPDATE call_inputs SET seq = ?, status = ?, task_id = ?, output = ?, input = x'' "
                    "WHERE call = ? AND idx = ? AND seq IS NULL",
                    [o[:6] for o in outputs],
                )
                done: dict[int, list[CallRow]] = {}
                for output in outputs:
                    done.setdefault(output[4], []).append(output[6])
                settled = [calls[0] for calls in done.values() if calls[0].unfinished == len(calls)]
                self._db.executemany(
                    "UPDATE function_calls SET settled = 1 WHERE num = ?", [[call.num] for call in settled]
                )
            if self._cleared:
                self._db.executemany("UPDATE function_calls SET cleared_at = ? WHERE num = ?", self._cleared)
        self._outputs, self._attempts, self._chunks, self._cleared = [], [], [], []
        for call in settled:
            call.settled = True
        for entry in outputs:
            entry[6].order.append(entry[5])
        for call in {id(entry[6]): entry[6] for entry in outputs}.values():
            wake(call.news)
        for call in {id(entry[3]): entry[3] for entry in chunks}.values():
            wake(call.chunk_news)

    def outputs_after(self, call: CallRow, seq: int, limit: int) -> list[Output]:
        """Outputs in the order in which they came."""
        indexes = call.order[seq : seq + limit]
        if not indexes:
            return []
        marks = ",".join("?" * len(indexes))
        rows = self._db.execute(
            f"SELECT seq, output FROM call_inputs WHERE call = ? AND idx IN ({marks})",  # noqa: S608
            [call.num, *indexes],
        )
        return [Output(row[0], row[1]) for row in sorted(rows, key=lambda row: row[0])]

    def outputs_of(self, call: CallRow, first: int, last: int) -> list[Output]:
        """The outputs of the inputs `first` to `last`, both included, as far as they are there."""
        rows = self._db.execute(
            "SELECT seq, output FROM call_inputs WHERE call = ? AND idx BETWEEN ? AND ? AND seq IS NOT NULL "
            "ORDER BY idx",
            [call.num, first, last],
        )
        return [Output(row[0], row[1]) for row in rows]

    def statuses(self, call: CallRow, limit: int) -> list[tuple[int, int, str]]:
        """(index, status or 0, task id) of its inputs, of the first `limit` at most."""
        self.flush()
        rows = self._db.execute(
            "SELECT idx, status, task_id FROM call_inputs WHERE call = ? ORDER BY idx LIMIT ?",
            [call.num, limit],
        )
        return [(row[0], row[1], row[2]) for row in rows]

    def counts(self, call: CallRow) -> dict[int, int]:
        """Status, 0 for no output → how many inputs."""
        self.flush()
        rows = self._db.execute(
            "SELECT status, count(*) FROM call_inputs WHERE call = ? GROUP BY status", [call.num]
        )
        return {int(row[0] or 0): int(row[1]) for row in rows}

    def chunks_after(self, call: CallRow, idx: int, limit: int) -> list[bytes]:
        """What a generator yielded after the `idx`th, in order and without a gap."""
        rows = self._db.execute(
            "SELECT idx, chunk FROM call_chunks WHERE call = ? AND idx > ? ORDER BY idx LIMIT ?",
            [call.num, idx, limit],
        )
        found = []
        for number, row in enumerate(rows, start=idx + 1):
            if row[0] != number:
                break
            found.append(row[1])
        return found

    # ---- forgetting

    def cleared(self, call: CallRow) -> None:
        """The caller has all that it wants: the call may be forgotten in a while."""
        self._cleared.append((time.time(), call.num))  # written with whatever comes next

    def prune(self, now: float) -> None:
        """Forget the calls that nobody can want any more, and drop from memory those that nobody uses."""
        self.flush()
        rows = self._db.execute(
            "SELECT num FROM function_calls "
            "WHERE created_at < ? OR (settled = 1 AND cleared_at > 0 AND cleared_at < ?) LIMIT 5000",
            [now - _KEEP_SECONDS, now - _KEEP_CLEARED_SECONDS],
        ).fetchall()
        with self._transaction():
            for table, column in (
                ("call_inputs", "call"),
                ("call_chunks", "call"),
                ("function_calls", "num"),
            ):
                self._db.executemany(
                    f"DELETE FROM {table} WHERE {column} = ?",  # noqa: S608
                    [(row[0],) for row in rows],
                )
        gone = {row[0] for row in rows}
        self._calls = {
            call_id: call
            for call_id, call in self._calls.items()
            if call.num not in gone and (call.unfinished or call.news or call.chunk_news)
        }


def wake(waiting: list[asyncio.Future[None]]) -> None:
    """Let all of them look again."""
    for future in waiting:
        if not future.done():
            future.set_result(None)
    waiting.clear()


async def wait_on(waiting: list[asyncio.Future[None]], seconds: float) -> None:
    """Until `wake` is called on the list, or the time is over."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waiting.append(future)
    try:
        async with asyncio.timeout(seconds):
            await future
    except TimeoutError:
        pass
    finally:
        if future in waiting:
            waiting.remove(future)
