"""Queues: partitions of items, first in, first out; and those who wait for an item. Imports named, items, wire."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from modal_proto import api_pb2

from gpuctl.local.items import PARTITION_SECONDS, QUEUE, Collection, FullError, Items
from gpuctl.local.named import Named
from gpuctl.local.wire import Call, empty, exhausted, invalid, rpc, too_large

if TYPE_CHECKING:
    from gpuctl.local.environments import Environments

LARGEST = 1 << 20  # bytes of an item, as in the cloud
_LONGEST_KEY = 64  # bytes of a partition's name
_LONGEST_WAIT = 60.0  # seconds; the client asks again after 50
_PAGE = 100


class Queues:
    """`modal.Queue` and `modal queue …`."""

    def __init__(self, items: Items, environments: Environments) -> None:
        self._items = items
        self._queues = Named(items, environments, QUEUE, "Queue")
        self._waiting: dict[tuple[str, bytes], set[asyncio.Future[None]]] = {}  # for a put to a partition

    @rpc("QueueGetOrCreate")
    async def get_or_create(self, request: Any, _call: Call) -> Any:
        row = self._queues.get_or_create(
            request.environment_name, request.deployment_name, request.object_creation_type
        )
        return api_pb2.QueueGetOrCreateResponse(queue_id=row.id, metadata=self._metadata(row))

    def _metadata(self, row: Collection) -> Any:
        return api_pb2.QueueMetadata(name=row.name, creation_info=Named.created(row))

    @rpc("QueueGetById")
    async def get_by_id(self, request: Any, _call: Call) -> Any:
        row = self._queues.require(request.queue_id)
        return api_pb2.QueueGetByIdResponse(queue_id=row.id, metadata=self._metadata(row))

    @rpc("QueueList")
    async def list(self, request: Any, _call: Call) -> Any:
        environment, rows = self._queues.page(request)
        infos = []
        for row in rows:
            partitions, total = self._items.count_items(row.id, None)
            infos.append(
                api_pb2.QueueListResponse.QueueInfo(
                    name=row.name,
                    created_at=row.created_at,
                    num_partitions=partitions,
                    total_size=min(total, request.total_size_limit or total),
                    queue_id=row.id,
                    metadata=self._metadata(row),
                )
            )
        return api_pb2.QueueListResponse(queues=infos, environment_name=environment)

    @rpc("QueueDelete")
    async def delete(self, request: Any, _call: Call) -> Any:
        row = self._queues.require(request.queue_id)
        self._items.delete(row.id)
        for queue_id, partition in list(self._waiting):
            if queue_id == row.id:  # who waits is told that it is gone
                self._wake(queue_id, partition)
        return empty()

    @rpc("QueueHeartbeat")
    async def heartbeat(self, request: Any, _call: Call) -> Any:
        self._queues.beat(request.queue_id)
        return empty()

    @rpc("QueuePut")
    async def put(self, request: Any, call: Call) -> Any:
        row, partition = self._of(request)
        if any(len(value) > LARGEST for value in request.values):
            raise too_large(f"an item of a Queue can have {LARGEST >> 20} MiB")
        seconds = float(request.partition_ttl_seconds)
        if not 0 <= seconds <= PARTITION_SECONDS:
            raise invalid(
                f"partition_ttl of {seconds:.0f} s: it can be from 1 to {PARTITION_SECONDS:.0f} seconds."
            )
        try:
            self._items.put(
                row.id,
                partition,
                request.values,
                alive_seconds=seconds or PARTITION_SECONDS,
                key=call.idempotency_key,
            )
        except FullError as error:
            raise exhausted(str(error)) from error
        self._wake(row.id, partition)
        return empty()

    @rpc("QueueGet")
    async def get(self, request: Any, call: Call) -> Any:
        row, partition = self._of(request)
        if request.n_values < 1:
            raise invalid(f"n_values of {request.n_values}: it must be at least 1.")
        deadline = _deadline(request.timeout)
        while True:
            values = self._items.take(row.id, partition, request.n_values, key=call.idempotency_key)
            if values or not await self._wait(row.id, partition, deadline):
                return api_pb2.QueueGetResponse(values=values)
            self._queues.require(row.id)

    @rpc("QueueNextItems")
    async def next_items(self, request: Any, _call: Call) -> Any:
        row, partition = self._of(request)
        try:
            last = int(request.last_entry_id or 0)
        except ValueError as error:
            raise invalid(f"'{request.last_entry_id}' is not an id of an item.") from error
        deadline = _deadline(request.item_poll_timeout)
        while True:
            found = self._items.after(row.id, partition, max(0, min(last, _LARGEST_ID)), _PAGE)
            if found or not await self._wait(row.id, partition, deadline):
                items = [api_pb2.QueueItem(value=value, entry_id=str(number)) for number, value in found]
                return api_pb2.QueueNextItemsResponse(items=items)
            self._queues.require(row.id)

    @rpc("QueueLen")
    async def len(self, request: Any, _call: Call) -> Any:
        row, partition = self._of(request)
        _, items = self._items.count_items(row.id, None if request.total else partition)
        return api_pb2.QueueLenResponse(len=items)

    @rpc("QueueClear")
    async def clear(self, request: Any, _call: Call) -> Any:
        row, partition = self._of(request)
        self._items.clear_items(row.id, None if request.all_partitions else partition)
        return empty()

    def _of(self, request: Any) -> tuple[Collection, bytes]:
        if len(request.partition_key) > _LONGEST_KEY:
            raise invalid(f"A partition's key can have {_LONGEST_KEY} bytes.")
        return self._queues.require(request.queue_id), request.partition_key

    # ---- waiting

    def _wake(self, queue_id: str, partition: bytes) -> None:
        for waiter in self._waiting.pop((queue_id, partition), ()):
            if not waiter.done():
                waiter.set_result(None)

    async def _wait(self, queue_id: str, partition: bytes, deadline: float) -> bool:
        """Whether something was put before the deadline. Nothing can be put between a look and this."""
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        key, waiter = (queue_id, partition), asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(key, set())
        waiting.add(waiter)
        try:
            await asyncio.wait_for(waiter, left)
        except TimeoutError:
            return False
        finally:
            waiting.discard(waiter)
            if not waiting and self._waiting.get(key) is waiting:
                del self._waiting[key]
        return True


_LARGEST_ID = (1 << 63) - 1


def _deadline(seconds: float) -> float:
    return time.monotonic() + (min(seconds, _LONGEST_WAIT) if seconds > 0 else 0)
