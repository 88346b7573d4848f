"""Volumes: plain folders, bound into containers as they are. Imports store, environments, blobs, uploads, wire, ids.

A commit has nothing to do, since every container sees one and the same folder; and a reload neither.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from typing import TYPE_CHECKING, Any

from modal_proto import api_pb2

from gpuctl.local.environments import Environments, check_name
from gpuctl.local.ids import is_id, new_id
from gpuctl.local.named import EPHEMERAL_SECONDS
from gpuctl.local.store import Store, Volume
from gpuctl.local.uploads import BLOCK, Finished, Uploads
from gpuctl.local.wire import WORKSPACE, Call, already_exists, conflict, empty, invalid, not_found, rpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from gpuctl.local.blobs import Blobs

_SPARE = 1 << 20  # what an upload leaves of the disk
_ENTRIES = 1000  # per message of a listing
_SHARED = "changes are visible to other containers at once, committed or not"


class Volumes:
    """Names to folders under `folder`. Every Volume behaves as one of version 2."""

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
        place = root / path.lstrip("/")
        # The last part is not followed: a link is listed, read through only inside, and removed as a link.
        resolved = place.parent.resolve() / place.name if place.name not in ("", "..") else place.resolve()
        if resolved != root and not resolved.is_relative_to(root):
            raise invalid(f"Path '{path}' leaves the Volume.")
        if resolved.is_symlink() and not resolved.resolve().is_relative_to(root):
            raise invalid(f"Path '{path}' is a link that leaves the Volume.")
        return resolved

    def metadata(self, volume_id: str) -> Any:
        row = self._store.volume(volume_id)
        if row is None:
            raise not_found(f"Volume '{volume_id}' not found.")
        created = api_pb2.CreationInfo(created_at=row.created_at, created_by=WORKSPACE)
        return api_pb2.VolumeMetadata(
            version=api_pb2.VOLUME_FS_VERSION_V2, name=row.name, creation_info=created
        )

    # ---- the objects

    @rpc("VolumeGetOrCreate", differs="every Volume has version 2")
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
            row = Volume(new_id("vo"), environment.id, name, api_pb2.VOLUME_FS_VERSION_V2, time.time())
            self._store.add_volume(row)
        self.root(row.id)
        return api_pb2.VolumeGetOrCreateResponse(
            volume_id=row.id, version=api_pb2.VOLUME_FS_VERSION_V2, metadata=self.metadata(row.id)
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

    @rpc("VolumePutFiles2")
    async def put_files(self, request: Any, call: Call) -> Any:
        """Called twice: the first answer names the blocks that are missing; the client sends those and asks again."""
        targets = [self.inside(request.volume_id, file.path) for file in request.files]
        missing = []
        for index, (file, target) in enumerate(zip(request.files, targets, strict=True)):
            if target.is_dir() or target == self.root(request.volume_id):
                raise already_exists(f"'{file.path}' is a directory.")
            if request.disallow_overwrite_existing_files and target.exists():
                raise already_exists(f"'{file.path}' already exists.")
            absent = [n for n, block in enumerate(file.blocks) if not self._uploads.has(block.put_response)]
            upload = self._uploads.begin() if absent else ""
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
            size, free = sum(file.size for file in request.files), shutil.disk_usage(self._folder).free
            if size + _SPARE > free:
                raise conflict(
                    f"No room for {size:,} bytes on this machine's disk: {self._folder} has {free:,} left."
                )
            return api_pb2.VolumePutFiles2Response(missing_blocks=missing)
        files = [
            Finished([b.put_response for b in file.blocks], file.size, file.mode & 0o777 or 0o644, target)
            for file, target in zip(request.files, targets, strict=True)
        ]
        await asyncio.to_thread(self._uploads.finish, files)
        return api_pb2.VolumePutFiles2Response()

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
        top = self.inside(request.volume_id, request.path)
        if not os.path.lexists(top):
            raise not_found(f"No such file or directory: '{request.path}'.")
        root = self.root(request.volume_id).resolve()
        batch: list[Any] = []
        for count, path in enumerate(_walk(top, request.recursive)):
            if request.HasField("max_entries") and count >= request.max_entries:
                break
            batch.append(_entry(path, root))
            if len(batch) == _ENTRIES:
                yield api_pb2.VolumeListFiles2Response(entries=batch)
                batch = []
        yield api_pb2.VolumeListFiles2Response(entries=batch)

    @rpc("VolumeRemoveFile2")
    async def remove_file(self, request: Any, _call: Call) -> Any:
        path = self.inside(request.volume_id, request.path)
        if not os.path.lexists(path):
            raise not_found(f"No such file or directory: '{request.path}'.")
        if path == self.root(request.volume_id).resolve():
            raise invalid("The root of a Volume cannot be removed; delete the Volume.")
        if path.is_dir() and not path.is_symlink():
            if not request.recursive:
                raise invalid(f"'{request.path}' is a directory; remove it recursively.")
            shutil.rmtree(path)
        else:
            path.unlink()
        return empty()

    @rpc("VolumeCopyFiles2")
    async def copy_files(self, request: Any, _call: Call) -> Any:
        target = self.inside(request.volume_id, request.dst_path)
        sources = [self.inside(request.volume_id, path) for path in request.src_paths]
        if len(sources) > 1 and not target.is_dir():
            raise invalid(f"'{request.dst_path}' is not a directory.")
        for source, path in zip(sources, request.src_paths, strict=True):
            if not source.exists():
                raise not_found(f"No such file or directory: '{path}'.")
            place = target / source.name if target.is_dir() else target
            place.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                if not request.recursive:
                    raise invalid(f"'{path}' is a directory; copy it recursively.")
                shutil.copytree(source, place, symlinks=True, dirs_exist_ok=True)
            else:
                shutil.copy2(source, place)
        return empty()


def _walk(top: Path, recursive: bool) -> Iterator[Path]:
    if not top.is_dir() or top.is_symlink():
        yield top
        return
    for path in sorted(top.iterdir()):
        yield path
        if recursive and path.is_dir() and not path.is_symlink():
            yield from _walk(path, recursive)


def _entry(path: Path, root: Path) -> Any:
    stat = path.lstat()
    if path.is_symlink():
        kind = api_pb2.FileEntry.SYMLINK
    elif path.is_dir():
        kind = api_pb2.FileEntry.DIRECTORY
    else:
        kind = api_pb2.FileEntry.FILE
    size = stat.st_size if kind == api_pb2.FileEntry.FILE else 0
    return api_pb2.FileEntry(path=str(path.relative_to(root)), type=kind, mtime=int(stat.st_mtime), size=size)
