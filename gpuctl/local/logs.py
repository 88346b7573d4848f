"""What apps print and what the plane says about them, line by line, followed and searched. Imports store, wire."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import logging
import sqlite3
import time
from itertools import groupby
from typing import TYPE_CHECKING, Any, cast

from modal_proto import api_pb2

from gpuctl.local.store import LogFilter, LogReader, LogRow, Store
from gpuctl.local.wire import Call, not_found, rpc, timestamp, unimplemented

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from gpuctl.local.variants import Variants

log = logging.getLogger(__name__)

STDOUT, STDERR, SYSTEM = (
    api_pb2.FILE_DESCRIPTOR_STDOUT,
    api_pb2.FILE_DESCRIPTOR_STDERR,
    api_pb2.FILE_DESCRIPTOR_INFO,
)
KEEP_SECONDS = 35 * 86400  # as far back as the client can ask
_FLUSH_SECONDS = 0.02  # lines are written in batches: at most so late
_STUCK_SECONDS = 1.0  # on a full disk, so long until the next try
_MOST_PENDING = 100_000  # lines that wait for room; older ones are lost
_PAGE = 1000
_LOOKS = 4  # searches that are remembered
_STATE_STOPPED = api_pb2.APP_STATE_STOPPED


class Logs:
    """The log store: `write` from the containers, `say` for the plane's own lines, and the RPCs that read them."""

    def __init__(self, store: Store, variants: Variants) -> None:
        self._store = store
        self._variants = variants
        self._reader = LogReader(store.path)
        self._pending: list[LogRow] = []
        self._looks: dict[tuple[LogFilter, int], tuple[float, list[LogRow]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._stuck = False
        self._news = asyncio.Event()
        store.prune_logs(time.time() - KEEP_SECONDS)

    def write(
        self,
        app_id: str,
        function_id: str,
        task_id: str,
        source: int,
        text: str,
        call_id: str = "",
        input_id: str = "",
    ) -> None:
        """Keep `text`, one entry per line."""
        now = time.time()
        # Split at "\n" only: a progress bar's "\r" belongs to its line.
        lines = io.StringIO(text, newline="\n")
        self._pending.extend(
            LogRow(app_id, function_id, task_id, source, now, line, call_id, input_id) for line in lines
        )
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_FLUSH_SECONDS, self.flush)

    def say(self, app_id: str, function_id: str, task_id: str, line: str) -> None:
        """A line of the plane itself, which `modal app logs --source system` shows."""
        self.write(app_id, function_id, task_id, SYSTEM, line + "\n")

    def flush(self) -> None:
        """Write what is pending and wake those who follow."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._write()
        self.wake()

    def _write(self) -> None:
        """Write what is pending. Where the disk is full it stays pending, as far as that is bearable."""
        if not self._pending:
            return
        try:
            self._store.add_logs(self._pending)
        except sqlite3.OperationalError as error:
            if not self._stuck:
                log.error("logs cannot be written, and wait: %s", error)
            self._stuck = True
            del self._pending[:-_MOST_PENDING]
            with contextlib.suppress(RuntimeError):  # where the plane is not (or no longer) running
                self._timer = asyncio.get_running_loop().call_later(_STUCK_SECONDS, self.flush)
            return
        if self._stuck:
            log.info("logs are written again")
        self._stuck = False
        self._pending = []

    def close(self) -> None:
        self.flush()
        self._reader.close()

    def wake(self) -> None:
        """Let those who follow look again: there are new lines, or an app has ended."""
        self._news.set()
        self._news = asyncio.Event()

    @rpc("AppGetLogs", differs="for a deployed app, starts with the lines since its last deployment")
    async def follow(self, request: Any, _call: Call) -> AsyncIterator[Any]:
        app_id = request.app_id or self._store.app_of_task(request.task_id) or ""
        app = self._store.app(app_id)
        if app is None:
            raise not_found(f"App '{request.app_id or request.task_id}' not found.")
        wanted = LogFilter(
            app_id,
            function_ids=self._function_ids(request),
            task_id=request.task_id,
            call_id=request.function_call_id,
            source=request.file_descriptor,
            search=request.search_text,
            # Only where the client has nothing yet; with an entry id it goes on from there.
            since=app.deployed_at or None,
        )
        first = request.last_entry_id.partition("-")[0]
        last = int(first) if first.isdecimal() else 0
        deadline = time.monotonic() + request.timeout
        while True:
            news = self._news
            self.flush_pending_of(app_id)
            rows, last = await asyncio.to_thread(self._reader.after, wanted, last, _PAGE)
            for batch in _batches(rows):
                yield batch
            if rows:
                continue
            app = self._store.app(app_id)
            if app is None or app.state == _STATE_STOPPED or self._ended(request.task_id):
                if news is not self._news:
                    continue  # its last words may have come since the look
                yield api_pb2.TaskLogsBatch(app_done=True)
                return
            left = deadline - time.monotonic()
            if left <= 0:
                return
            try:
                await asyncio.wait_for(news.wait(), left)
            except TimeoutError:
                return

    def flush_pending_of(self, app_id: str) -> None:
        """Write pending lines now if some are this app's, so that its end is not told before its last words."""
        if not self._stuck and any(row.app_id == app_id for row in self._pending):
            self._write()

    def _ended(self, task_id: str) -> bool:
        row = self._store.task(task_id) if task_id else None
        return row is not None and row.finished_at > 0

    @rpc("AppFetchLogs")
    async def fetch(self, request: Any, _call: Call) -> Any:
        self.flush()
        rows = await self._last(self._filter(request), request.limit or _PAGE)
        return api_pb2.AppFetchLogsResponse(batches=_batches(rows))

    async def _last(self, wanted: LogFilter, limit: int) -> list[LogRow]:
        """The newest rows, in order. A client that finds too few asks for a longer time up to the same moment, again
        and again; only what is older than the last look is looked at then.
        """
        key = (dataclasses.replace(wanted, since=None), limit)
        seen = self._looks.pop(key, None)
        if seen is not None and wanted.since is not None and wanted.since <= seen[0]:
            since, newer = seen
            older = dataclasses.replace(wanted, before=since)
            rows = newer
            if len(newer) < limit:
                rows = await asyncio.to_thread(self._reader.last, older, limit - len(newer)) + newer
        else:
            rows = await asyncio.to_thread(self._reader.last, wanted, limit)
        if wanted.since is not None and wanted.until is not None and wanted.until <= time.time():
            self._looks[key] = (wanted.since, rows)
            while len(self._looks) > _LOOKS:
                del self._looks[next(iter(self._looks))]
        return rows

    @rpc("AppCountLogs")
    async def count(self, request: Any, _call: Call) -> Any:
        self.flush()
        buckets: dict[int, Any] = {}
        counts = await asyncio.to_thread(self._reader.count, self._filter(request), request.bucket_secs or 60)
        for start, source, rows in counts:
            bucket = buckets.setdefault(
                start, api_pb2.AppCountLogsResponse.LogBucket(bucket_start_at=timestamp(start))
            )
            if source == STDOUT:
                bucket.stdout_logs += rows
            elif source == STDERR:
                bucket.stderr_logs += rows
            else:
                bucket.system_logs += rows
        return api_pb2.AppCountLogsResponse(app_id=request.app_id, buckets=buckets.values())

    def _function_ids(self, request: Any) -> tuple[str, ...]:
        """The function whose lines are wanted, and its variants."""
        if request.sandbox_id:
            raise unimplemented("Logs of a Sandbox are not implemented by the local control plane")
        wanted = str(request.parametrized_function_id or request.function_id)
        return (wanted, *(variant.id for variant in self._variants.of(wanted))) if wanted else ()

    def _filter(self, request: Any) -> LogFilter:
        if self._store.app(request.app_id) is None:
            raise not_found(f"App '{request.app_id}' not found.")
        return LogFilter(
            request.app_id,
            function_ids=self._function_ids(request),
            task_id=request.task_id,
            call_id=request.function_call_id,
            source=request.source,
            search=request.search_text,
            since=_seconds(request.since) if request.HasField("since") else None,
            until=_seconds(request.until) if request.HasField("until") else None,
        )


def _seconds(timestamp: Any) -> float:
    return float(timestamp.seconds + timestamp.nanos / 1e9)


def _batches(rows: Iterable[LogRow]) -> list[Any]:
    """Rows as the client wants them: runs of one container's lines."""
    batches = []
    for (task_id, function_id), group in groupby(rows, key=lambda row: (row.task_id, row.function_id)):
        lines = list(group)
        items = [
            api_pb2.TaskLogs(
                data=row.data,
                file_descriptor=cast("Any", row.source),
                timestamp=row.at,
                timestamp_ns=int(row.at * 1e9),
                container_id=task_id,
                function_call_id=row.call_id,
                input_id=row.input_id,
            )
            for row in lines
        ]
        batches.append(
            api_pb2.TaskLogsBatch(
                task_id=task_id, function_id=function_id, items=items, entry_id=f"{lines[-1].id:020d}-0"
            )
        )
    return batches
