"""Volumes: plain folders, bound into containers as they are. Imports store, environments, blobs, uploads, wire.

A commit has nothing to do, since every container sees one and the same folder; and a reload neither.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import time
from typing import TYPE_CHECKING, Any

from modal_proto import api_pb2

from gpuctl.local import volume_files
from gpuctl.local.environments import Environments, check_name
from gpuctl.local.ids import is_id, new_id
from gpuctl.local.named import EPHEMERAL_SECONDS
from gpuctl.local.store import Store, Volume
from gpuctl.local.uploads import BLOCK, Finished, Uploads, WholeFile
from gpuctl.local.wire import (
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

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from gpuctl.local.blobs import Blobs

_SPARE = 1 << 20  # what an upload leaves of the disk
_ENTRIES = 1000  # per message of a listing
_SHARED = "changes are visible to other containers at once, committed or not"


_VERSIONS = (api_pb2.VOLUME_FS_VERSION_V1, api_pb2.VOLUME_FS_VERSION_V2)


class Volumes:
    """Names to folders under `folder`. The versions differ in the RPCs by which clients reach the files."""

    def __init__(self, store: Store, environments: Environments, blobs: Blobs, folder: Path) -> None:
        self._store = store
        self._environments = environments
        self._blobs = blobs
        self._folder = folder
        self._beats: dict[str, float] = {}  # when the client of an ephemeral Volume was heard of
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        blobs.serve("volume", self._block)
        # On the same disk as the Volumes, so that a file that is complete is renamed into its Volume.
        self._uploads = Uploads(folder / ".uploads")
        blobs.receive(self._uploads)

    def root(self, volume_id: str) -> Path:
        """The Volume's folder. Raises NOT_FOUND for an unknown one."""
        if not is_id(volume_id, "vo") or self._store.volume(volume_id) is None:
            raise not_found(f"Volume '{volume_id}' not found.")
        root = self._folder / volume_id
        root.mkdir(exist_ok=True)
        return root

    def inside(self, volume_id: str, path: str) -> Path:
        """A path in the Volume, which a name from the client, or a link in the Volume, cannot leave."""
        root = self.root(volume_id).resolve()
        if "\0" in path:
            raise invalid("A path cannot contain a null character.")
        with volume_files.refusing(root):
            place = root / path.lstrip("/")
            # The last part is not followed: a link is listed, read through only inside, and removed as a link.
            resolved = (
                place.parent.resolve() / place.name if place.name not in ("", "..") else place.resolve()
            )
            outward = resolved.is_symlink() and not resolved.resolve().is_relative_to(root)
        if resolved != root and not resolved.is_relative_to(root):
            raise invalid(f"Path '{path}' leaves the Volume.")
        if outward:
            raise invalid(f"Path '{path}' is a link that leaves the Volume.")
        return resolved

    def metadata(self, volume_id: str) -> Any:
        row = self._store.volume(volume_id)
        if row is None:
            raise not_found(f"Volume '{volume_id}' not found.")
        created = api_pb2.CreationInfo(created_at=row.created_at, created_by=WORKSPACE)
        version: Any = row.version
        return api_pb2.VolumeMetadata(version=version, name=row.name, creation_info=created)

    # ---- the objects

    @rpc("VolumeGetOrCreate", differs="a new Volume has version 2 unless version 1 is asked for")
    async def get_or_create(self, request: Any, _call: Call) -> Any:
        environment = self._environments.named(request.environment_name)
        name, how = request.deployment_name, request.object_creation_type
        row = self._store.volume_named(environment.id, name) if name else None
        if row is not None and how == api_pb2.OBJECT_CREATION_TYPE_CREATE_FAIL_IF_EXISTS:
            raise already_exists(f"Volume '{name}' already exists in environment '{environment.name}'.")
        if row is None:
            if name and how == api_pb2.OBJECT_CREATION_TYPE_UNSPECIFIED:
                raise not_found(f"Volume '{name}' not found in environment '{environment.name}'.")
            if name:
                check_name(name, "Volume")
            version = request.version or api_pb2.VOLUME_FS_VERSION_V2
            if version not in _VERSIONS:
                raise invalid(f"A Volume can have version 1 or 2, not {version}.")
            if options := sorted(request.create_options.experimental_options):
                raise unimplemented(
                    f"A Volume's experimental options are not served here: {', '.join(options)}"
                )
            row = Volume(new_id("vo"), environment.id, name, version, time.time())
            self._store.add_volume(row)
        self.root(row.id)
        metadata = self.metadata(row.id)
        return api_pb2.VolumeGetOrCreateResponse(
            volume_id=row.id, version=metadata.version, metadata=metadata
        )

    @rpc("VolumeGetById")
    async def get_by_id(self, request: Any, _call: Call) -> Any:
        return api_pb2.VolumeGetByIdResponse(
            volume_id=request.volume_id, metadata=self.metadata(request.volume_id)
        )

    @rpc("VolumeList")
    async def list(self, request: Any, _call: Call) -> Any:
        environment = self._environments.named(request.environment_name)
        before = request.pagination.created_before or time.time() + 1
        rows = [row for row in self._store.volumes(environment.id) if row.created_at < before]
        items = [
            api_pb2.VolumeListItem(
                label=row.name, volume_id=row.id, created_at=row.created_at, metadata=self.metadata(row.id)
            )
            for row in rows[: request.pagination.max_objects or None]
        ]
        return api_pb2.VolumeListResponse(items=items, environment_name=environment.name)

    @rpc("VolumeRename")
    async def rename(self, request: Any, _call: Call) -> Any:
        row = self._store.volume(request.volume_id)
        if row is None:
            raise not_found(f"Volume '{request.volume_id}' not found.")
        if self._store.volume_named(row.environment_id, check_name(request.name, "Volume")):
            raise already_exists(f"Volume '{request.name}' already exists.")
        self._store.rename_volume(row.id, request.name)
        return empty()

    @rpc("VolumeDelete")
    async def delete(self, request: Any, _call: Call) -> Any:
        self.root(request.volume_id)
        await asyncio.to_thread(self._remove, self._delete(request.volume_id))
        return empty()

    def _delete(self, volume_id: str) -> Path:
        """Forget it; returns what is left to remove."""
        self._store.delete_volume(volume_id)
        self._beats.pop(volume_id, None)
        return self._folder / volume_id

    @staticmethod
    def _remove(root: Path) -> None:
        shutil.rmtree(root, ignore_errors=True)

    def forget_environment(self, environment_id: str) -> None:
        """Delete all that it has."""
        for row in self._store.volumes(environment_id):
            self._remove(self._delete(row.id))

    @rpc("VolumeHeartbeat")
    async def heartbeat(self, request: Any, _call: Call) -> Any:
        self.root(request.volume_id)
        self._beats[request.volume_id] = time.monotonic()
        return empty()

    async def sweep(self) -> None:
        """Delete the ephemeral Volumes whose clients have gone without a word."""
        now = time.monotonic()
        for row in self._store.anonymous_volumes():
            if now - self._beats.setdefault(row.id, now) > EPHEMERAL_SECONDS:
                await asyncio.to_thread(self._remove, self._delete(row.id))

    @rpc("VolumeCommit", differs=_SHARED)
    async def commit(self, request: Any, _call: Call) -> Any:
        self.root(request.volume_id)
        return api_pb2.VolumeCommitResponse(skip_reload=True)

    @rpc("VolumeReload", differs=_SHARED)
    async def reload(self, request: Any, _call: Call) -> Any:
        self.root(request.volume_id)
        return empty()

    # ---- their files

    @rpc("VolumePutFiles2", differs="what the client has in a file of this machine it need not send")
    async def put_files(self, request: Any, call: Call) -> Any:
        """Called twice: the first answer names the blocks that are missing; the client sends those and asks again."""
        targets = self._targets(request)
        missing: list[Any] = []
        asked: set[bytes] = set()  # the client sends one block of a content, and names it wherever that is
        for index, file in enumerate(request.files):
            absent = []
            for number, block in enumerate(file.blocks):
                if block.contents_sha256 not in asked and not block.put_response:
                    asked.add(block.contents_sha256)
                    absent.append(number)
            upload = self._uploads.begin(file.size) if absent else ""
            for number in absent:
                sha256 = file.blocks[number].contents_sha256.hex()
                url = self._blobs.url(f"/block/{upload}/{number}/{sha256}", call)
                missing.append(
                    api_pb2.VolumePutFiles2Response.MissingBlock(
                        file_index=index, block_index=number, put_url=url
                    )
                )
        if missing:
            # Said now, because the client tries a block that finds no room again for minutes.
            self._check_room(sum(file.size for file in request.files))
            return api_pb2.VolumePutFiles2Response(missing_blocks=missing)
        files = [
            Finished([b.put_response for b in file.blocks], file.size, file.mode & 0o777 or 0o644, target)
            for file, target in zip(request.files, targets, strict=True)
        ]
        with self._refusing(request):
            await asyncio.to_thread(self._uploads.finish, files)
        return api_pb2.VolumePutFiles2Response()

    @rpc("VolumePutFiles")
    async def put_whole_files(self, request: Any, _call: Call) -> Any:
        """Version 1: files whose content came by MountPutFile, as that of mounts does."""
        targets = self._targets(request)
        contents = [self._blobs.file(file.sha256_hex) for file in request.files]
        files = [
            WholeFile(content, file.mode & 0o777 or 0o644, target)
            for file, content, target in zip(request.files, contents, targets, strict=True)
            if content is not None
        ]
        if len(files) < len(contents):
            raise conflict("The content of a file of this upload is gone; upload it again.")
        self._check_room(sum(content.stat().st_size for content in contents if content))
        with self._refusing(request):
            await asyncio.to_thread(self._uploads.copy, files)
        return empty()

    def _targets(self, request: Any) -> Sequence[Path]:
        """Where the files of an upload belong. Raises what the client makes FileExistsError of, and others."""
        paths = [file.path if hasattr(file, "path") else file.filename for file in request.files]
        targets = [self.inside(request.volume_id, path) for path in paths]
        overwrite = not request.disallow_overwrite_existing_files
        with self._refusing(request):
            for target, path in zip(targets, paths, strict=True):
                volume_files.can_take_a_file(target, path, overwrite=overwrite)
        return targets

    def _check_room(self, size: int) -> None:
        free = shutil.disk_usage(self._folder).free
        if size + _SPARE > free:
            raise conflict(
                f"No room for {size:,} bytes on this machine's disk: {self._folder} has {free:,} left."
            )

    def _refusing(self, request: Any) -> AbstractContextManager[None]:
        return volume_files.refusing(self.root(request.volume_id).resolve())

    @rpc("VolumeGetFile2", differs="ranges start and end at whole blocks")
    async def get_file(self, request: Any, call: Call) -> Any:
        path = self.inside(request.volume_id, request.path)
        if not path.is_file():
            raise not_found(f"No such file: '{request.path}'.")
        size = path.stat().st_size
        name = f"{request.volume_id}/{path.relative_to(self.root(request.volume_id).resolve())}"
        count = -(-size // BLOCK)
        urls = [self._blobs.url(f"/volume/{name}/{number}", call) for number in range(count)]
        return api_pb2.VolumeGetFile2Response(get_urls=urls, size=size, start=0, len=size)

    def _block(self, name: str, number: int) -> tuple[Path, int, int]:
        """(file, offset, length) of one block of a Volume's file."""
        volume_id, _, path = name.partition("/")
        place = self.inside(volume_id, path)
        start = number * BLOCK
        return place, start, max(0, min(BLOCK, place.stat().st_size - start))

    @rpc("VolumeListFiles2")
    async def list_files(self, request: Any, _call: Call) -> AsyncIterator[Any]:
        async for batch in self._list(request):
            yield api_pb2.VolumeListFiles2Response(entries=batch)

    @rpc("VolumeListFiles")
    async def list_files_v1(self, request: Any, _call: Call) -> AsyncIterator[Any]:
        async for batch in self._list(request):
            yield api_pb2.VolumeListFilesResponse(entries=batch)

    async def _list(self, request: Any) -> AsyncIterator[Any]:
        top = self.inside(request.volume_id, request.path)
        if not os.path.lexists(top):
            raise not_found(f"No such file or directory: '{request.path}'.")
        root = self.root(request.volume_id).resolve()
        found = volume_files.entries(top, root, recursive=request.recursive)
        if request.HasField("max_entries"):
            found = itertools.islice(found, request.max_entries)
        while batch := await asyncio.to_thread(lambda: [*itertools.islice(found, _ENTRIES)]):
            yield batch

    @rpc("VolumeRemoveFile", "VolumeRemoveFile2")
    async def remove_file(self, request: Any, _call: Call) -> Any:
        path = self.inside(request.volume_id, request.path)
        if path == self.root(request.volume_id).resolve():
            raise invalid("The root of a Volume cannot be removed; delete the Volume.")
        with self._refusing(request):
            await asyncio.to_thread(volume_files.remove, path, request.path, recursive=request.recursive)
        return empty()

    @rpc("VolumeCopyFiles", "VolumeCopyFiles2")
    async def copy_files(self, request: Any, _call: Call) -> Any:
        target = self.inside(request.volume_id, request.dst_path)
        sources = [(self.inside(request.volume_id, path), path) for path in request.src_paths]
        with self._refusing(request):
            await asyncio.to_thread(
                volume_files.copy, sources, target, request.dst_path, recursive=request.recursive
            )
        return empty()
