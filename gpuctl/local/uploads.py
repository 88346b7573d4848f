"""Uploads of Volume files: their blocks, written in any order, each where it belongs. Imports senders, wire's errors.

The client sends the blocks of a file at once and in any order. Each goes to its own place in a file that becomes the
Volume's by a rename when all are there: nothing is written twice, and nobody sees half of it. A block that the client
has in a file on this machine need not be sent: it is read there, and counts when it has the hash that the client gave.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gpuctl.local.senders import PIECE, OpenFile, Senders
from gpuctl.local.wire import conflict

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

BLOCK = 8 << 20  # the client's block size of version 2 Volumes
_IDLE_SECONDS = 3600.0  # an upload that nothing was heard of for so long is given up


@dataclass
class _Upload:
    path: Path
    size: int  # of the client's file
    heard_at: float
    lengths: dict[int, int] = field(default_factory=dict)  # of the blocks that have arrived
    source: OpenFile | None = None  # the client's own file, when it was found on this machine
    searched: bool = False  # for that
    search: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Finished:
    """A file to make of blocks that have arrived, by the names that `name_of` gave them."""

    blocks: Sequence[bytes]
    size: int
    mode: int
    target: Path


@dataclass(frozen=True)
class WholeFile:
    """A file to make of another one, which stays."""

    content: Path
    mode: int
    target: Path


class Uploads:
    """Files under way in `folder`, which lies on the Volumes' own disk. What an earlier plane left there is removed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._uploads: dict[str, _Upload] = {}
        self._senders = Senders()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)

    def begin(self, size: int) -> str:
        """A new file, of which the client's has this size; returns its name here."""
        now = time.monotonic()
        for name, upload in list(self._uploads.items()):
            if now - upload.heard_at > _IDLE_SECONDS:
                self._drop(name)
        name = secrets.token_hex(16)
        path = self._folder / name
        path.touch(0o600)
        self._uploads[name] = _Upload(path, size, now)
        return name

    def name_of(self, upload: str, index: int) -> bytes:
        return f"{upload}.{index}".encode()

    def has(self, block: bytes) -> bool:
        upload, index = self._find(block)
        return upload is not None and index in upload.lengths

    def _find(self, block: bytes) -> tuple[_Upload | None, int]:
        name, _, number = block.decode("ascii", errors="replace").partition(".")
        return self._uploads.get(name), int(number) if number.isdecimal() else -1

    def writer(self, upload: str, index: int) -> BlockWriter | None:
        """Where the bytes of a block go; None for an upload that is not (or no longer) under way."""
        found = self._uploads.get(upload)
        return None if found is None else BlockWriter(found, index, self._senders)

    def finish(self, files: Sequence[Finished]) -> None:
        """Put the files in their places. Raises CONFLICT when a block is not there any more, and OSError."""
        ready: list[tuple[str, Finished]] = []
        for file in files:
            if not all(self.has(block) for block in file.blocks):
                raise conflict("A block of this upload is gone; upload the file again.")
        try:
            for file in files:
                ready.append((self._gather(file, {name for name, _ in ready}), file))
            for name, file in ready:
                path = self._uploads[name].path
                os.truncate(path, file.size)  # blocks come without the zeros at their end
                path.chmod(file.mode)
                file.target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(file.target)
        finally:
            used = {block.decode().partition(".")[0] for file in files for block in file.blocks}
            for name in used | {name for name, _ in ready}:
                self._drop(name)

    def copy(self, files: Sequence[WholeFile]) -> None:
        """Put copies in their places, each complete from the moment that it is there. Raises OSError."""
        for file in files:
            part = self._folder / secrets.token_hex(16)
            try:
                part.touch(0o600)
                _copy(file.content, 0, part, 0, file.content.stat().st_size)
                part.chmod(file.mode)
                file.target.parent.mkdir(parents=True, exist_ok=True)
                part.replace(file.target)
            finally:
                part.unlink(missing_ok=True)

    def _gather(self, file: Finished, taken: set[str]) -> str:
        """The upload that holds the whole file, made so: equal blocks were sent once, perhaps for another file."""
        home = ""
        for index, block in enumerate(file.blocks):
            name, _, number = block.decode().partition(".")
            if int(number) == index and name not in taken:
                home = name
                break
        home = home or self.begin(file.size)
        for index, block in enumerate(file.blocks):
            if block != self.name_of(home, index):
                source, place = self._find(block)
                assert source is not None
                target = self._uploads[home].path
                _copy(source.path, place * BLOCK, target, index * BLOCK, source.lengths[place])
        return home

    def _drop(self, name: str) -> None:
        if upload := self._uploads.pop(name, None):
            upload.path.unlink(missing_ok=True)
            with upload.search:
                upload.searched = True
                if upload.source is not None:
                    upload.source.close()


class BlockWriter:
    """Takes one block in: from the client's own file, or piece by piece. `take`, `add` and `commit` block."""

    def __init__(self, upload: _Upload, index: int, senders: Senders) -> None:
        self._upload = upload
        self._index = index
        self._senders = senders
        self._descriptor = os.open(upload.path, os.O_WRONLY)
        self._open = threading.Lock()  # a thread may still be writing when its request is given up
        self._closed = False
        self._length = 0
        self._hash = hashlib.sha256()

    def take(self, peer: tuple[str, int], to_port: int, length: int, sha256_hex: str) -> bool:
        """Whether the client at the other end of that connection has the block in a file, from where it was taken.

        Raises OSError when there is no room.
        """
        if not 0 < length <= BLOCK:
            return False
        upload = self._upload
        with upload.search:
            if not upload.searched:
                upload.searched = True
                for found in self._senders.open_files(peer, to_port, upload.size):
                    if self._is_in(found, length, sha256_hex):
                        upload.source = found
                        break
                    found.close()
            source = upload.source
        if source is None:
            return False
        for piece in source.pieces(self._index * BLOCK, length):
            self.add(piece)
        return self.commit(sha256_hex)  # also where there was less

    def add(self, data: bytes | memoryview) -> None:
        """Raises OSError when there is no room, ValueError when it is more than a block."""
        if self._length + len(data) > BLOCK:
            raise ValueError(f"a block has at most {BLOCK} bytes")
        rest = memoryview(data)
        while rest:
            piece = rest[:PIECE]
            written = self._write(piece, self._length)
            self._hash.update(piece[:written])
            self._length += written
            rest = rest[written:]

    def commit(self, sha256_hex: str) -> bool:
        """Whether it was the block with this hash; then it counts as arrived. Otherwise nothing is left of it."""
        self._upload.heard_at = time.monotonic()
        if self._hash.hexdigest() == sha256_hex:
            self._upload.lengths[self._index] = self._length
            return True
        if self._index not in self._upload.lengths:
            os.pwrite(
                self._descriptor, bytes(self._length), self._index * BLOCK
            )  # the right one may be shorter
        self._length, self._hash = 0, hashlib.sha256()
        return False

    def close(self) -> None:
        with self._open:
            self._closed = True
            os.close(self._descriptor)

    def _write(self, data: bytes | memoryview, at: int) -> int:
        with self._open:
            if self._closed:
                raise OSError("the request is over")
            return os.pwrite(self._descriptor, data, self._index * BLOCK + at)

    def _is_in(self, source: OpenFile, length: int, sha256_hex: str) -> bool:
        digest = hashlib.sha256()
        for piece in source.pieces(self._index * BLOCK, length):
            digest.update(piece)
        return digest.hexdigest() == sha256_hex


def _copy(source: Path, start: int, target: Path, at: int, length: int) -> None:
    with source.open("rb") as read, target.open("r+b") as write:
        while length:
            copied = 0
            with contextlib.suppress(OSError):
                copied = os.copy_file_range(read.fileno(), write.fileno(), length, start, at)
            if not copied:
                data = os.pread(read.fileno(), min(length, 1 << 20), start)
                if not data:
                    return
                copied = os.pwrite(write.fileno(), data, at)
            start, at, length = start + copied, at + copied, length - copied
