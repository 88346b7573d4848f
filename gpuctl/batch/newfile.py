"""A file that is there whole or not at all, and as it was before until then. May import: errors, batch's sources.

`.gz` and `.zst` are packed by the name. Where the disk is full, one error says so, and nothing is lost or half there.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import os
import secrets
import stat
import sys
from typing import TYPE_CHECKING, BinaryIO, cast

from gpuctl.batch.sources import BLOCK, need_pyarrow
from gpuctl.errors import GpuctlError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class NewFile:
    """Write to `stream`, then `commit` or `abandon`. `path` None is stdout; a device or a pipe is written at once."""

    def __init__(self, path: Path | None, *, durable: bool = True) -> None:
        self.path = path
        self._durable = durable
        self._part: Path | None = None
        self._target = path
        if path is None:
            self._bottom = open(sys.stdout.fileno(), "wb", BLOCK, closefd=False)  # noqa: SIM115
        elif path.exists() and not path.is_file():
            self._bottom = path.open("wb", BLOCK)
        else:
            self._target = target = path.resolve()  # of a link, what it points to
            self._part = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.part")
            self._bottom = self._part.open("xb", BLOCK)
            with contextlib.suppress(FileNotFoundError):
                os.fchmod(self._bottom.fileno(), stat.S_IMODE(target.stat().st_mode))
        self.stream: BinaryIO = _packed(self._bottom, path.suffix.lower() if path else "")

    def commit(self) -> None:
        """All is written: it takes the name, or, where even this fails, nothing is changed."""
        try:
            if self.stream is not self._bottom:
                self.stream.close()
            self._bottom.flush()
            if self._part is not None and self._durable:
                os.fsync(self._bottom.fileno())
            self._bottom.close()
            if self._part is not None and self._target is not None:
                self._part.replace(self._target)
                if self._durable:
                    _sync_folder(self._target.parent)
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Leave everything as it was."""
        if self._part is not None:
            self._part.unlink(missing_ok=True)  # first: closing writes what waits, and may fail
        for stream in (self.stream, self._bottom):
            with contextlib.suppress(Exception):  # of the disk, of what packs: it is given up
                stream.close()


@contextlib.contextmanager
def told(path: Path | None) -> Iterator[None]:
    """A full disk, a folder that may not be written: one error that says what became of the file."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise refused(path, error) from None


def refused(path: Path | None, error: OSError) -> GpuctlError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    says = error.strerror or str(error)
    return GpuctlError(
        f"{path or 'stdout'}: {says}; it was not written, and what was there before is as it was",
        hint=("make room, or write it elsewhere; " if full else "")
        + "the answers are kept, and can be fetched again",
    )


def _packed(stream: BinaryIO, suffix: str) -> BinaryIO:
    if suffix == ".gz":
        return cast(
            "BinaryIO", gzip.GzipFile("", "wb", 6, stream, mtime=0)
        )  # the same answers are the same bytes
    if suffix == ".zst":
        need_pyarrow("a .zst file")
        import pyarrow

        return cast(
            "BinaryIO", pyarrow.CompressedOutputStream(pyarrow.PythonFile(_KeptOpen(stream), "w"), "zstd")
        )
    return stream


class _KeptOpen:
    """pyarrow closes what it writes to; here it still has to reach the disk."""

    closed = False

    def __init__(self, stream: BinaryIO) -> None:
        self.write, self.flush, self.tell = stream.write, stream.flush, stream.tell

    def close(self) -> None:
        pass


def _sync_folder(folder: Path) -> None:
    """That it has a new name is on the disk, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
