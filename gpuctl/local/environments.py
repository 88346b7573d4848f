"""Environments: separate sets of names in one plane; and its one workspace. Imports store, wire, ids."""

from __future__ import annotations

import re
import time
from typing import Any

from modal_proto import api_pb2

from gpuctl.local.ids import new_id
from gpuctl.local.store import Environment, Store
from gpuctl.local.wire import (
    IMAGE_BUILDER_VERSION,
    WORKSPACE,
    Call,
    already_exists,
    conflict,
    empty,
    invalid,
    not_found,
    rpc,
    unimplemented,
)

DEFAULT = "main"
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_-]{0,63}")
_OBJECT_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


def check_name(name: str, kind: str) -> str:
    """Modal's rule for the names of apps, volumes and secrets, which its client checks too; `name` again."""
    if not _OBJECT_NAME.fullmatch(name) or name in (".", ".."):
        raise invalid(
            f"Invalid {kind} name: '{name}'. Names may contain only alphanumeric characters, dashes, periods, and "
            "underscores, and must be at most 64 characters long."
        )
    return name


class Environments:
    """Names of environments to rows. An empty name means the default one, as in the cloud."""

    def __init__(self, store: Store) -> None:
        self._store = store
        if not store.environments():
            store.add_environment(Environment(new_id("en"), DEFAULT, time.time()))

    def named(self, name: str) -> Environment:
        """Raises NOT_FOUND for a name that no environment has."""
        row = self._store.environment_named(name or DEFAULT) or self._store.environment(name)
        if row is None:
            raise not_found(f"Environment '{name}' not found.")
        return row

    def name_of(self, environment_id: str) -> str:
        row = self._store.environment(environment_id)
        return "" if row is None else row.name

    @rpc("EnvironmentGetOrCreate")
    async def get_or_create(self, request: Any, _call: Call) -> Any:
        name = request.deployment_name
        missing = name and self._store.environment_named(name) is None
        if missing and request.object_creation_type == api_pb2.OBJECT_CREATION_TYPE_CREATE_IF_MISSING:
            self._create(name)
        row = self.named(name)
        settings = api_pb2.EnvironmentSettings(image_builder_version=IMAGE_BUILDER_VERSION, webhook_suffix="")
        return api_pb2.EnvironmentGetOrCreateResponse(
            environment_id=row.id, metadata=api_pb2.EnvironmentMetadata(name=row.name, settings=settings)
        )

    @rpc("EnvironmentCreate", differs="roles and restrictions are not kept")
    async def create(self, request: Any, _call: Call) -> Any:
        self._create(request.name)
        return empty()

    def _create(self, name: str) -> None:
        if not _NAME.fullmatch(name) or name.lower().startswith("en-"):
            raise invalid(f"Invalid Environment name: '{name}'.")
        if self._store.environment_named(name):
            raise already_exists(f"Environment '{name}' already exists.")
        self._store.add_environment(Environment(new_id("en"), name, time.time()))

    @rpc("EnvironmentList")
    async def list(self, _request: Any, _call: Call) -> Any:
        items = [
            api_pb2.EnvironmentListItem(
                name=row.name, created_at=row.created_at, default=row.name == DEFAULT, environment_id=row.id
            )
            for row in self._store.environments()
        ]
        return api_pb2.EnvironmentListResponse(items=items)

    @rpc("EnvironmentUpdate", differs="only the name can change; the rest is refused by name")
    async def update(self, request: Any, _call: Call) -> Any:
        row = self.named(request.current_name)
        fixed = [
            field.name for field, _ in request.ListFields() if field.name not in ("current_name", "name")
        ]
        if fixed:
            raise unimplemented(f"An Environment's {' and '.join(fixed)} cannot be set here.")
        name = request.name.value if request.HasField("name") else row.name
        if name != row.name:
            if row.name == DEFAULT:
                raise conflict(f"The default Environment '{DEFAULT}' cannot be renamed.")
            if not _NAME.fullmatch(name) or self._store.environment_named(name):
                raise invalid(f"Environment name '{name}' is invalid or taken.")
            self._store.rename_environment(row.id, name)
        return api_pb2.EnvironmentListItem(
            name=name, created_at=row.created_at, default=name == DEFAULT, environment_id=row.id
        )

    @rpc("WorkspaceNameLookup")
    async def workspace(self, _request: Any, _call: Call) -> Any:
        return api_pb2.WorkspaceNameLookupResponse(workspace_name=WORKSPACE, username=WORKSPACE)

    @rpc("ClientHello")
    async def hello(self, _request: Any, _call: Call) -> Any:
        return api_pb2.ClientHelloResponse(image_builder_version=IMAGE_BUILDER_VERSION)
