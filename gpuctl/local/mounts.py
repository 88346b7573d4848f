"""Mounts: files that the client sends to stand in containers and build contexts. Imports store, blobs, wire, ids."""

from __future__ import annotations

import asyncio
import posixpath
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modal_proto import api_pb2

from gpuctl.local.ids import content_id
from gpuctl.local.wire import Call, invalid, not_found, rpc, timestamp

if TYPE_CHECKING:
    from pathlib import Path

    from gpuctl.local.blobs import Blobs
    from gpuctl.local.store import Store

# Named mounts that Modal publishes for everybody. Here the image builder supplies what they hold: the client's own
# code, and Python itself.
_PUBLISHED = ("modal-client-mount-", "python-build-standalone")
_STANDALONE = re.compile(r"python-build-standalone\.\d+\.(3\.\d+)\D.*")


@dataclass(frozen=True)
class MountedFile:
    """A file on this machine and the absolute path at which it belongs."""

    host: Path
    path: str


class Mounts:
    """A mount is what it contains: the same files have the same id, so that a redeploy changes nothing."""

    def __init__(self, store: Store, blobs: Blobs) -> None:
        self._store = store
        self._blobs = blobs

    def files(self, mount_id: str) -> list[MountedFile]:
        """Raises NOT_FOUND for an unknown mount."""
        stored = self._store.mount(mount_id)
        if stored is None:
            raise not_found(f"Mount '{mount_id}' not found.")
        found = []
        for file in api_pb2.MountGetOrCreateRequest.FromString(stored).files:
            executable = file.mode & 0o100
            host = (
                self._blobs.executable(file.sha256_hex) if executable else self._blobs.file(file.sha256_hex)
            )
            if host is None:
                raise not_found(
                    f"The content of '{file.filename}' in mount '{mount_id}' is gone; deploy again."
                )
            found.append(MountedFile(host, posixpath.normpath("/" + file.filename)))
        return found

    def python_version(self, mount_id: str) -> str:
        """The Python that a published mount stands for (`add_python`), as "3.12"; empty for other mounts."""
        stored = api_pb2.MountGetOrCreateRequest.FromString(self._store.mount(mount_id) or b"")
        found = _STANDALONE.fullmatch(stored.deployment_name)
        return found.group(1) if found else ""

    def metadata(self, mount_id: str) -> Any:
        return api_pb2.MountHandleMetadata(content_checksum_sha256_hex=mount_id.encode().hex())

    @rpc("MountBatchedCheckExistence")
    async def check(self, request: Any, _call: Call) -> Any:
        missing = [h for h in request.sha256_hex_hashes if self._blobs.file(h) is None]
        return api_pb2.MountBatchedCheckExistenceResponse(
            missing_sha256_hex_hashes=missing,
            checked_at=timestamp(time.time()),
        )

    @rpc("MountPutFile")
    async def put_file(self, request: Any, _call: Call) -> Any:
        kind = request.WhichOneof("data_oneof")
        if kind == "data":
            self._blobs.put(request.sha256_hex, request.data)
        elif kind == "data_blob_id":
            await asyncio.to_thread(self._blobs.put_blob, request.sha256_hex, request.data_blob_id)
        return api_pb2.MountPutFileResponse(exists=self._blobs.file(request.sha256_hex) is not None)

    @rpc(
        "MountGetOrCreate", differs="Modal's own named mounts are empty here: the image holds what they would"
    )
    async def get_or_create(self, request: Any, _call: Call) -> Any:
        if request.deployment_name and not request.files:
            if not request.deployment_name.startswith(_PUBLISHED):
                raise not_found(f"Mount '{request.deployment_name}' not found.")
            mount_id = content_id("mo", request.deployment_name.encode())
            named = api_pb2.MountGetOrCreateRequest(deployment_name=request.deployment_name)
            self._store.add_mount(mount_id, named.SerializeToString())
        else:
            for file in request.files:
                if self._blobs.file(file.sha256_hex) is None:
                    raise invalid(f"The content of '{file.filename}' was not sent.")
            files = sorted(request.files, key=lambda file: str(file.filename))
            content = api_pb2.MountGetOrCreateRequest(files=files).SerializeToString(deterministic=True)
            mount_id = content_id("mo", content)
            self._store.add_mount(mount_id, content)
        return api_pb2.MountGetOrCreateResponse(mount_id=mount_id, handle_metadata=self.metadata(mount_id))
