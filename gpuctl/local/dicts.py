"""Dicts: keys and values as the client serialised them. Imports named, items, wire."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modal_proto import api_pb2

from gpuctl.local.items import DICT, Collection, Items
from gpuctl.local.named import Named
from gpuctl.local.wire import Call, empty, invalid, rpc, too_large

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gpuctl.local.environments import Environments

MOST_ENTRIES = 10_000  # in one update, as in the cloud
LARGEST = 100 << 20  # bytes of a key and its value
_LONGEST_LEN = 100_000  # what len() says at most


class Dicts:
    """`modal.Dict` and `modal dict …`."""

    def __init__(self, items: Items, environments: Environments) -> None:
        self._items = items
        self._dicts = Named(items, environments, DICT, "Dict")

    @rpc("DictGetOrCreate")
    async def get_or_create(self, request: Any, call: Call) -> Any:
        row = self._dicts.get_or_create(
            request.environment_name, request.deployment_name, request.object_creation_type
        )
        if request.data:
            self._set(row.id, request.data, call, if_missing=False)
        return api_pb2.DictGetOrCreateResponse(dict_id=row.id, metadata=self._metadata(row))

    def _metadata(self, row: Collection) -> Any:
        return api_pb2.DictMetadata(name=row.name, creation_info=Named.created(row))

    @rpc("DictGetById")
    async def get_by_id(self, request: Any, _call: Call) -> Any:
        row = self._dicts.require(request.dict_id)
        return api_pb2.DictGetByIdResponse(dict_id=row.id, metadata=self._metadata(row))

    @rpc("DictList")
    async def list(self, request: Any, _call: Call) -> Any:
        environment, rows = self._dicts.page(request)
        infos = [
            api_pb2.DictListResponse.DictInfo(
                name=row.name, created_at=row.created_at, dict_id=row.id, metadata=self._metadata(row)
            )
            for row in rows
        ]
        return api_pb2.DictListResponse(dicts=infos, environment_name=environment)

    @rpc("DictDelete")
    async def delete(self, request: Any, _call: Call) -> Any:
        self._items.delete(self._dicts.require(request.dict_id).id)
        return empty()

    @rpc("DictHeartbeat")
    async def heartbeat(self, request: Any, _call: Call) -> Any:
        self._dicts.beat(request.dict_id)
        return empty()

    @rpc("DictUpdate")
    async def update(self, request: Any, call: Call) -> Any:
        row = self._dicts.require(request.dict_id)
        created = self._set(row.id, request.updates, call, if_missing=request.if_not_exists)
        return api_pb2.DictUpdateResponse(created=created)

    def _set(self, dict_id: str, updates: Any, call: Call, *, if_missing: bool) -> bool:
        if len(updates) > MOST_ENTRIES:
            raise invalid(f"{len(updates):,} entries in one update of a Dict; it can have {MOST_ENTRIES:,}.")
        if any(len(entry.key) + len(entry.value) > LARGEST for entry in updates):
            raise too_large(f"an entry of a Dict can have {LARGEST >> 20} MiB")
        entries = {entry.key: entry.value for entry in updates}
        return self._items.update_entries(dict_id, entries, if_missing=if_missing, key=call.idempotency_key)

    @rpc("DictGet")
    async def get(self, request: Any, _call: Call) -> Any:
        value = self._items.entry(self._dicts.require(request.dict_id).id, request.key)
        return api_pb2.DictGetResponse(found=value is not None, value=value)

    @rpc("DictContains")
    async def contains(self, request: Any, _call: Call) -> Any:
        found = self._items.has_entry(self._dicts.require(request.dict_id).id, request.key)
        return api_pb2.DictContainsResponse(found=found)

    @rpc("DictPop")
    async def pop(self, request: Any, call: Call) -> Any:
        row = self._dicts.require(request.dict_id)
        value = self._items.pop_entry(row.id, request.key, key=call.idempotency_key)
        return api_pb2.DictPopResponse(found=value is not None, value=value)

    @rpc("DictLen")
    async def len(self, request: Any, _call: Call) -> Any:
        count = self._items.count_entries(self._dicts.require(request.dict_id).id)
        return api_pb2.DictLenResponse(len=min(count, _LONGEST_LEN))

    @rpc("DictClear")
    async def clear(self, request: Any, _call: Call) -> Any:
        self._items.clear_entries(self._dicts.require(request.dict_id).id)
        return empty()

    @rpc("DictContents")
    async def contents(self, request: Any, _call: Call) -> AsyncIterator[Any]:
        row = self._dicts.require(request.dict_id)
        # The client names an entry that it cannot read by its key, so it always gets that.
        for key, value in self._items.entries(row.id, values=request.values):
            yield api_pb2.DictEntry(key=key, value=value)
