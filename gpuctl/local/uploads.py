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
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gpuctl.local.senders import ClosedError, OpenFile, Senders
from gpuctl.local.wire import conflict

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

BLOCK = 8 << 20  # the client's block size of version 2 Volumes
_PIECE = 1 << 20  # read or written at once: more does not stay in a core's cache
_PROMISES = 512  # blocks of one upload: what the client waits for at its end takes some seconds
_IDLE_SECONDS = 3600.0  # an upload that nothing was heard of for so long is given up


@dataclass
class _Upload:
    path: Path
    size: int  # of the client's file
    heard_at: float
    lengths: dict[int, int] = field(default_factory=dict)  # of the blocks that have arrived
    promised: dict[int, Future[None]] = field(default_factory=dict)  # those that are being read
    lock: threading.Lock = field(default_factory=threading.Lock)  # of what is promised
    problem: OSError | None = None  # why one of these could not be kept
    source: OpenFile | None = None  # the client's own file, when it was found on this machine
    searched: bool = False  # for that
    search: threading.Lock = field(default_factory=threading.Lock)
    reads: set[int] = field(default_factory=set)  # blocks that the client was seen to read in it
    locks: dict[int, threading.Lock] = field(
        default_factory=dict
    )  # of blocks, for who reads them in that file


@dataclass(frozen=True)
class Wanted:
    """A block of an upload, as its client describes it. `length` is without the zeros at its end."""

    upload: str
    index: int
    length: int
    sha256_hex: str


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
        self._readers = ThreadPoolExecutor(os.cpu_count(), "uploads")  # of what is promised
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)

    def stop(self) -> None:
        """No more is read of what was promised: the plane ends, and with it all uploads."""
        self._readers.shutdown(wait=False, cancel_futures=True)

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
        """Whether it has arrived, or is promised."""
        upload, index = self._find(block)
        return upload is not None and (index in upload.promised or index in upload.lengths)  # as it goes on

    def _find(self, block: bytes) -> tuple[_Upload | None, int]:
        name, _, number = block.decode("ascii", errors="replace").partition(".")
        return self._uploads.get(name), int(number) if number.isdecimal() else -1

    def writer(self, upload: str, index: int) -> BlockWriter | None:
        """Where the bytes of a block go; None for an upload that is not (or no longer) under way."""
        found = self._uploads.get(upload)
        return None if found is None else BlockWriter(found, index)

    def take(self, block: Wanted, peer: tuple[str, int], to_port: int) -> bool:
        """Whether the client at the other end of that connection has the block in a file, from where it was taken.

        Blocks. Raises OSError when there is no room.
        """
        upload = self._uploads.get(block.upload)
        if upload is None or not 0 < block.length <= BLOCK:
            return False
        with upload.locks.setdefault(block.index, threading.Lock()):  # one for it may have been given up
            with upload.search:
                if not upload.searched:
                    upload.searched = True
                    for found in self._senders.open_files(peer, to_port, upload.size):
                        if _has(found, block):
                            upload.source = found
                            break
                        found.close()
                if (source := upload.source) is None:
                    return False
                if block.index not in upload.reads:
                    upload.reads |= _blocks_read(upload, source)
            return self.promise(block) or _bring(upload, block, source)

    def promise(self, block: Wanted) -> bool:
        """Whether the block is as good as taken: there is no doubt that the client would send what its file has there,
        as it was seen to read it in the midst of this very block. `finish` waits until it is taken.
        """
        upload = self._uploads.get(block.upload)
        if upload is None:
            return False
        with upload.lock:
            if block.index in upload.lengths or block.index in upload.promised:
                return True
            if upload.source is None or block.index not in upload.reads or len(upload.promised) >= _PROMISES:
                return False
            upload.promised[block.index] = self._readers.submit(_keep, upload, block, upload.source)
            return True

    def finish(self, files: Sequence[Finished]) -> None:
        """Put the files in their places. Raises CONFLICT when a block is not there (any more), and OSError."""
        names = {block.decode(errors="replace").partition(".")[0] for file in files for block in file.blocks}
        ready: list[tuple[str, Finished]] = []
        try:
            for file in files:
                for block in file.blocks:
                    self._await(block)
            for file in files:
                ready.append((self._gather(file, {name for name, _ in ready}), file))
            for name, file in ready:
                path = self._uploads[name].path
                os.truncate(path, file.size)  # blocks come without the zeros at their end
                path.chmod(file.mode)
                file.target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(file.target)
        finally:
            for name in names | {name for name, _ in ready}:
                self._drop(name)

    def _await(self, block: bytes) -> None:
        """Wait for a block that was promised. Raises CONFLICT when it does not come, or is unknown, and OSError."""
        upload, index = self._find(block)
        if upload is not None and (promise := upload.promised.get(index)) is not None:
            promise.result()
        if upload is None or index not in upload.lengths:
            if upload is not None and upload.problem is not None:
                raise upload.problem
            raise conflict(
                "A block of this upload is gone, or is not what it was before: upload the file again."
            )

    def copy(self, files: Sequence[WholeFile]) -> None:
        """Put copies in their places, each complete from the moment that it is there. Raises OSError."""
        for file in files:
            part = self._folder / secrets.token_hex(16)
            try:
                part.touch(0o600)
                _copy_file(file.content, 0, part, 0, file.content.stat().st_size)
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
                _copy_file(source.path, place * BLOCK, target, index * BLOCK, source.lengths[place])
        return home

    def _drop(self, name: str) -> None:
        if upload := self._uploads.pop(name, None):
            upload.path.unlink(missing_ok=True)
            with upload.search:
                upload.searched = True
                if upload.source is not None:
                    upload.source.close()


class BlockWriter:
    """Takes one block in, piece by piece, as it is sent. `add` and `commit` block."""

    def __init__(self, upload: _Upload, index: int) -> None:
        self._upload = upload
        self._index = index
        self._descriptor = os.open(upload.path, os.O_WRONLY)
        self._open = threading.Lock()  # a thread may still be writing when its request is given up
        self._closed = False
        self._length = 0
        self._hash = hashlib.sha256()

    def add(self, data: bytes) -> None:
        """Raises OSError when there is no room, ValueError when it is more than a block."""
        if self._length + len(data) > BLOCK:
            raise ValueError(f"a block has at most {BLOCK} bytes")
        self._hash.update(data)
        rest = memoryview(data)
        while rest:
            written = self._write(rest, self._length)
            self._length += written
            rest = rest[written:]

    def commit(self, sha256_hex: str) -> bool:
        """Whether it was the block with this hash; then it counts as arrived. Otherwise nothing is left of it."""
        self._upload.heard_at = time.monotonic()
        if self._hash.hexdigest() == sha256_hex:
            self._upload.lengths[self._index] = self._length
            return True
        _clear(self._descriptor, self._upload, self._index, self._length)
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


def _blocks_read(upload: _Upload, source: OpenFile) -> set[int]:
    """Those in whose midst the client now reads. At a block's start and at the file's end may also be who has just
    opened the file, or has read all of it and sends what it made of that.
    """
    return {at // BLOCK for at in source.positions() if at % BLOCK and at < upload.size}


def _keep(upload: _Upload, block: Wanted, source: OpenFile) -> None:
    """Keep a promise. A block that is not what it was is found missing at the end."""
    with upload.locks.setdefault(block.index, threading.Lock()):
        try:
            if block.index not in upload.lengths:
                _bring(upload, block, source)
        except OSError as error:
            upload.problem = error
    with upload.lock:
        del upload.promised[block.index]


def _bring(upload: _Upload, block: Wanted, source: OpenFile) -> bool:
    """Whether that file had the block, which is then in its place. What is hashed is what was written."""
    at = block.index * BLOCK
    target = os.open(upload.path, os.O_RDWR)
    try:
        with contextlib.suppress(ClosedError), source.reading() as file:
            _copy(file, at, target, at, block.length)
        digest, length = _sha256(target, at, block.length)
        upload.heard_at = time.monotonic()
        if digest == block.sha256_hex:
            upload.lengths[block.index] = length
            return True
        _clear(target, upload, block.index, block.length)
        return False
    finally:
        os.close(target)


def _clear(target: int, upload: _Upload, index: int, length: int) -> None:
    """Remove what was written of a wrong block: the right one may be shorter."""
    if index not in upload.lengths:
        os.pwrite(target, bytes(length), index * BLOCK)


def _sha256(file: int, start: int, length: int) -> tuple[str, int]:
    """That of a part of a file, and how much there is of it. Raises OSError."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(length, _PIECE)))
    done = 0
    while done < length and (got := os.preadv(file, [buffer[: length - done]], start + done)):
        digest.update(buffer[:got])
        done += got
    return digest.hexdigest(), done


def _has(source: OpenFile, block: Wanted) -> bool:
    with contextlib.suppress(OSError, ClosedError), source.reading() as file:
        return _sha256(file, block.index * BLOCK, block.length)[0] == block.sha256_hex
    return False


def _copy(source: int, start: int, target: int, at: int, length: int) -> None:
    """A part of a file to another, as much as there is of it or can be read. Raises OSError of the writing."""
    while length:
        copied = 0
        with contextlib.suppress(OSError):  # not between these two; or what is met again below
            copied = os.copy_file_range(source, target, length, start, at)
        if not copied:
            try:
                data = os.pread(source, min(length, _PIECE), start)
            except OSError:
                return
            if not data:
                return
            copied = os.pwrite(target, data, at)
        start, at, length = start + copied, at + copied, length - copied


def _copy_file(source: Path, start: int, target: Path, at: int, length: int) -> None:
    with source.open("rb") as read, target.open("r+b") as write:
        _copy(read.fileno(), start, write.fileno(), at, length)
