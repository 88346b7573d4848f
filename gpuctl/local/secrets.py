"""Secrets: rows in the store, values in files that only the user can read. Imports store, environments, wire, ids.

Values are in files of their own because a database keeps what it deletes for a while, and a file does not. They are
never logged, and no RPC returns one.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import time
from typing import TYPE_CHECKING, Any

from modal_proto import api_pb2

from gpuctl.local.environments import Environments, check_name
from gpuctl.local.ids import content_id, is_id, new_id
from gpuctl.local.store import Secret, Store
from gpuctl.local.wire import WORKSPACE, Call, already_exists, empty, not_found, rpc

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_ANONYMOUS = (api_pb2.OBJECT_CREATION_TYPE_ANONYMOUS_OWNED_BY_APP, api_pb2.OBJECT_CREATION_TYPE_EPHEMERAL)


class Secrets:
    """Names to environment variables. `key` makes the ids of anonymous secrets, which say nothing of their values."""

    def __init__(self, store: Store, environments: Environments, folder: Path, key: bytes) -> None:
        self._store = store
        self._environments = environments
        self._folder = folder
        self._key = key
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def values(self, secret_ids: Iterable[str]) -> dict[str, str]:
        """The variables of several secrets, later ones winning. Raises NOT_FOUND for one that is gone."""
        variables: dict[str, str] = {}
        ids = list(secret_ids)
        for secret_id in ids:
            variables.update(self._read(secret_id))
        self._store.touch_secrets(ids, time.time())
        return variables

    def _read(self, secret_id: str) -> dict[str, str]:
        if not is_id(secret_id, "st") or self._store.secret(secret_id) is None:
            raise not_found(f"Secret '{secret_id}' not found.")
        values: dict[str, str] = json.loads((self._folder / secret_id).read_text())
        return values

    def _write(self, secret_id: str, values: dict[str, str]) -> None:
        part = self._folder / f".{secrets.token_hex(8)}"
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(values, file)
        part.replace(self._folder / secret_id)

    @rpc("SecretGetOrCreate")
    async def get_or_create(self, request: Any, _call: Call) -> Any:
        environment = self._environments.named(request.environment_name)
        how, values = request.object_creation_type, dict(request.env_dict)
        if how in _ANONYMOUS:
            # The same variables in the same app are the same secret, so that a redeploy changes nothing.
            content = json.dumps([request.app_id, environment.id, values], sort_keys=True).encode()
            secret_id = content_id("st", hmac.new(self._key, content, hashlib.sha256).digest())
            row = self._store.secret(secret_id) or Secret(
                secret_id, environment.id, "", request.app_id, time.time(), 0
            )
            self._save(row, values)
        else:
            row = self._named(environment.id, environment.name, request.deployment_name, how, values)
        missing = sorted(set(request.required_keys) - set(self._read(row.id)))
        if missing:
            raise not_found(f"Secret is missing key(s): {', '.join(missing)}")
        return api_pb2.SecretGetOrCreateResponse(secret_id=row.id, metadata=self._metadata(row))

    def _named(
        self, environment_id: str, environment: str, name: str, how: int, values: dict[str, str]
    ) -> Secret:
        row = self._store.secret_named(environment_id, check_name(name, "Secret"))
        if how == api_pb2.OBJECT_CREATION_TYPE_UNSPECIFIED:
            if row is None:
                raise not_found(f"Secret '{name}' not found in environment '{environment}'.")
            return row
        if row is not None and how == api_pb2.OBJECT_CREATION_TYPE_CREATE_FAIL_IF_EXISTS:
            raise already_exists(f"Secret '{name}' already exists in environment '{environment}'.")
        if row is not None and how == api_pb2.OBJECT_CREATION_TYPE_CREATE_IF_MISSING:
            return row
        row = row or Secret(new_id("st"), environment_id, name, "", time.time(), 0)
        self._save(row, values)
        return row

    def _save(self, row: Secret, values: dict[str, str]) -> None:
        self._write(row.id, values)
        self._store.add_secret(row)

    def _metadata(self, row: Secret) -> Any:
        return api_pb2.SecretMetadata(
            name=row.name,
            creation_info=api_pb2.CreationInfo(created_at=row.created_at, created_by=WORKSPACE),
            keys=sorted(self._read(row.id)),
            environment_name=self._environments.name_of(row.environment_id),
            last_used_at=row.last_used_at,
        )

    @rpc("SecretList")
    async def list(self, request: Any, _call: Call) -> Any:
        environment = self._environments.named(request.environment_name)
        before = request.pagination.created_before or time.time() + 1
        rows = [row for row in self._store.secrets(environment.id) if row.created_at < before]
        items = [
            api_pb2.SecretListItem(
                label=row.name,
                created_at=row.created_at,
                last_used_at=row.last_used_at,
                environment_name=environment.name,
                secret_id=row.id,
                metadata=self._metadata(row),
            )
            for row in rows[: request.pagination.max_objects or None]
        ]
        return api_pb2.SecretListResponse(items=items, environment_name=environment.name)

    @rpc("SecretGetInfo")
    async def info(self, request: Any, _call: Call) -> Any:
        row = self._store.secret(request.secret_id)
        if row is None:
            raise not_found(f"Secret '{request.secret_id}' not found.")
        return api_pb2.SecretGetInfoResponse(metadata=self._metadata(row))

    @rpc("SecretUpdate")
    async def update(self, request: Any, _call: Call) -> Any:
        values = self._read(request.secret_id)
        for change in request.updates:
            if change.HasField("value"):
                values[change.key] = change.value
            else:
                values.pop(change.key, None)
        self._write(request.secret_id, values)
        return empty()

    @rpc("SecretDelete")
    async def delete(self, request: Any, _call: Call) -> Any:
        self._read(request.secret_id)
        self._delete(request.secret_id)
        return empty()

    def _delete(self, secret_id: str) -> None:
        self._store.delete_secret(secret_id)
        (self._folder / secret_id).unlink(missing_ok=True)

    def forget_environment(self, environment_id: str) -> None:
        """Delete all that it has."""
        for row in self._store.secrets(environment_id):
            self._delete(row.id)
