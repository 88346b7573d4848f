"""What Dicts and Queues have in common: their names, and the end of those without one. Imports items, environments."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from modal_proto import api_pb2

from gpuctl.local.environments import Environments, check_name
from gpuctl.local.ids import is_id, new_id
from gpuctl.local.items import Collection, Items
from gpuctl.local.wire import WORKSPACE, already_exists, not_found

if TYPE_CHECKING:
    from gpuctl.local.store import Environment

EPHEMERAL_SECONDS = 900.0  # an ephemeral object lives so long after a heartbeat; the client beats every 300 s


class Named:
    """Collections of one kind, by the word that errors use for it."""

    def __init__(self, items: Items, environments: Environments, kind: str, word: str) -> None:
        self._items = items
        self._environments = environments
        self._kind = kind
        self._word = word

    def require(self, collection_id: str) -> Collection:
        row = self._items.get(collection_id) if is_id(collection_id, self._kind) else None
        if row is None or row.kind != self._kind:
            raise not_found(f"{self._word} '{collection_id}' not found.")
        return row

    def get_or_create(self, environment_name: str, name: str, how: int) -> Collection:
        environment = self._environments.named(environment_name)
        if not name:
            row = self._new(environment, "", time.time() + EPHEMERAL_SECONDS)
            self._items.add(row)
            return row
        found = self._items.named(self._kind, environment.id, check_name(name, self._word))
        if found is not None:
            if how == api_pb2.OBJECT_CREATION_TYPE_CREATE_FAIL_IF_EXISTS:
                raise already_exists(
                    f"{self._word} '{name}' already exists in environment '{environment.name}'."
                )
            return found
        if how == api_pb2.OBJECT_CREATION_TYPE_UNSPECIFIED:
            raise not_found(f"{self._word} '{name}' not found in environment '{environment.name}'.")
        row = self._new(environment, name, 0)
        self._items.add(row)
        return row

    def _new(self, environment: Environment, name: str, alive_until: float) -> Collection:
        return Collection(new_id(self._kind), self._kind, environment.id, name, time.time(), alive_until)

    def beat(self, collection_id: str) -> None:
        self._items.keep_until(self.require(collection_id).id, time.time() + EPHEMERAL_SECONDS)

    def page(self, request: Any) -> tuple[str, list[Collection]]:
        """(the environment's name, the rows) that a listing asks for, newest first."""
        environment = self._environments.named(request.environment_name)
        before = request.pagination.created_before or time.time() + 1
        rows = [row for row in self._items.all(self._kind, environment.id) if row.created_at < before]
        return environment.name, rows[: request.pagination.max_objects or None]

    @staticmethod
    def created(row: Collection) -> Any:
        return api_pb2.CreationInfo(created_at=row.created_at, created_by=WORKSPACE)
