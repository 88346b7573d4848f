"""Where rows come from: files and stdin, as streams of UTF-8, whatever they are on the disk.

`.gz` and `.zst` are unpacked by what they contain, not by their name; other encodings become UTF-8; a byte order mark
is gone. No file is read whole. May import: errors; pyarrow where a file is `.zst`.
"""

from __future__ import annotations

import codecs
import difflib
import gzip
import io
import os
import re
import sys
import zlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, cast

from gpuctl.errors import GpuctlError, usage_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOCK = 1 << 20  # read at once
SAMPLE = 1 << 18  # looked at to tell what a file is
LONGEST = (
    1 << 26
)  # bytes of a line, or of a file that is one row: more is a mistake that would fill the memory

# What a damaged or unreadable file raises while it is read.
READ_ERRORS = (OSError, EOFError, zlib.error)

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_MARKS = (  # UTF-32's begins as UTF-16's does
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_MARKED = re.compile(rb"\xed[\xb0-\xb3][\x80-\xbf]")  # U+DC00 to U+DCFF
_NO_TEXT = frozenset({"idna", "punycode", "raw_unicode_escape", "undefined", "unicode_escape"})


@dataclass(slots=True)
class Source:
    """One file of the input, or stdin. `head` is how its text begins, as UTF-8."""

    name: str  # as the user knows it: with `:LINE` behind it where a row is wrong
    path: Path | None  # None: stdin
    compression: str | None = None
    encoding: str = "utf-8"
    head: bytes = b""
    whole: bool = False  # the head is all that there is
    once: bool = False  # a pipe: what was read of it is gone
    _rest: list[BinaryIO] = field(default_factory=list)  # of a pipe: the stream, with its head put back

    @property
    def folder(self) -> Path:
        """What the paths in it are relative to."""
        return Path() if self.path is None else self.path.parent

    def open(self) -> BinaryIO:
        """Its text from the start: lines of UTF-8."""
        stream = self.open_bytes()
        if self.encoding == "utf-8":
            return stream
        if self.encoding == "utf-8-sig":
            stream.read(len(codecs.BOM_UTF8))
            return stream
        return _buffered(_Transcoded(stream, self.encoding))

    def open_bytes(self) -> BinaryIO:
        """What it holds from the start, unpacked, as it is."""
        if not self.once:
            assert self.path is not None
            return _unpack(self.path.open("rb", BLOCK), self.compression)
        if not self._rest:
            raise RuntimeError(f"{self.name} can be read only once")
        return self._rest.pop()

    def head_lines(self) -> list[bytes]:
        """The whole lines of its head, without blank ones."""
        lines = self.head.split(b"\n")
        if not self.whole and len(lines) > 1:
            lines.pop()
        return [line for line in lines if line.strip()]


def look(name: str, path: Path | None, encoding: str | None = None) -> Source:
    """Read as much of it as tells how it is packed and encoded, and how it begins. Raises `READ_ERRORS`."""
    source = Source(name, path, once=path is None or not path.is_file())
    packed = sys.stdin.buffer if path is None else path.open("rb", BLOCK)
    magic = packed.read(4)
    source.compression = "gzip" if magic[:2] == _GZIP else "zstd" if magic == _ZSTD else None
    stream = _unpack(_chained(magic, packed), source.compression)
    try:
        head, source.whole = _sample(stream)
    except BaseException:
        if path is not None:
            packed.close()
        raise
    if source.once:
        source._rest.append(_chained(head, stream))
    else:
        stream.close()
        packed.close()
    source.encoding = encoding or next((known for mark, known in _MARKS if head.startswith(mark)), "utf-8")
    if source.encoding in ("utf-8", "utf-8-sig") and head.startswith(codecs.BOM_UTF8):
        source.encoding, head = "utf-8-sig", head[len(codecs.BOM_UTF8) :]
    elif source.encoding not in ("utf-8", "utf-8-sig"):
        head = _Transcoded(io.BytesIO(head), source.encoding).readall()
    source.head = head
    return source


def numbered_lines(stream: BinaryIO, seen: Callable[[bytes], object]) -> Iterator[tuple[int, bytes | None]]:
    """Lines, counted from 1, each shown to `seen`; None is one that is longer than `LONGEST`."""
    for number, line in enumerate(iter(partial(stream.readline, LONGEST), b""), 1):
        seen(line)
        if len(line) < LONGEST or line.endswith(b"\n"):
            yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(BLOCK)
            seen(line)
        yield number, None


def text_encoding(name: str) -> str:
    """`--encoding NAME` as Python calls it."""
    try:
        found = codecs.lookup(name).name
        " \n".encode(found)  # some are no encodings of text: base64, zip
    except (LookupError, ValueError):
        found = ""
    if not found or found in _NO_TEXT:
        near = difflib.get_close_matches(
            name, ["latin-1", "utf-8", "utf-16", "cp1252", "gb18030", "shift_jis"], n=1
        )
        example = (
            f"did you mean {near[0]!r}?"
            if near
            else "for example latin-1, cp1252, utf-16, shift_jis, gb18030"
        )
        raise usage_error(f"--encoding: {name!r} is no encoding of text; {example}")
    return found


def not_text(line: bytes) -> str | None:
    """What is wrong with a line that should be UTF-8: which byte, and where; None: nothing is."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        byte = line[error.start]
        # What another encoding could not read arrives as lone surrogates, which UTF-8 does not have.
        if _MARKED.match(line, error.start):
            marked = line[error.start : error.start + 3].decode("utf-8", "surrogatepass")
            return f"byte 0x{ord(marked) - 0xDC00:02x} is not in the encoding"
        return f"byte {error.start + 1} of the line, 0x{byte:02x}, is not UTF-8"
    return None


def shown(name: str) -> str:
    """A file's name as text: names may be any bytes."""
    return os.fsencode(name).decode(errors="replace")


def why(error: BaseException) -> str:
    """Why reading it failed, to a person."""
    if isinstance(error, EOFError):
        return "the compressed file ends too early: it was cut short"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"the file is damaged ({error})"


def unreadable(name: str, error: BaseException) -> GpuctlError:
    """Nothing of a file can be read: bad input, before anything started."""
    return usage_error(f"{name}: {why(error)}")


def need_pyarrow(what: str) -> None:
    """One clear error where the extra is not installed."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise usage_error(
            f"{what}: pyarrow is not installed",
            hint="pip install 'gpuctl[batch]' reads and writes Parquet and .zst",
        ) from None


def _sample(stream: BinaryIO) -> tuple[bytes, bool]:
    """How it begins, a whole line at least, and whether that is all. What stands before damage is told as any other."""
    head, size = b"", SAMPLE
    while len(head) < LONGEST:
        until = len(head) + size
        while len(head) < until:
            try:
                more = stream.read1(until - len(head))  # type: ignore[attr-defined]
            except READ_ERRORS:
                if not head:
                    raise
                return head, True
            if not more:
                return head, True
            head += more
        if b"\n" in head.lstrip() or b"\0" in head:
            break
        size = len(head)  # twice as much each time: a long line is not copied over and over
    return head, False


class _Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...


def _unpack(stream: BinaryIO, compression: str | None) -> BinaryIO:
    if compression == "gzip":
        return _buffered(_Gzip(stream))
    if compression == "zstd":
        need_pyarrow("a .zst file")
        return _buffered(_Zstd(stream))
    return stream


def _buffered(stream: io.RawIOBase) -> BinaryIO:
    return cast("BinaryIO", io.BufferedReader(stream, BLOCK))


def _chained(head: bytes, rest: _Readable) -> BinaryIO:
    return _buffered(_Chained(head, rest))


class _Reader(io.RawIOBase):
    """A raw stream by one method, which returns some bytes, and none only at the end."""

    def some(self) -> bytes:
        raise NotImplementedError

    def __init__(self) -> None:
        self._waiting = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]  # it is always one
        if not self._waiting:
            self._waiting = memoryview(self.some())
        count = min(len(buffer), len(self._waiting))
        buffer[:count] = self._waiting[:count]
        self._waiting = self._waiting[count:]
        return count


class _Chained(_Reader):
    """What was read already, then the rest."""

    def __init__(self, head: bytes, rest: _Readable) -> None:
        super().__init__()
        self._head, self._rest = head, rest

    def some(self) -> bytes:
        head, self._head = self._head, b""
        return head or self._rest.read(BLOCK)


class _Transcoded(_Reader):
    """Text of any encoding as UTF-8. A byte that is none becomes a lone surrogate: its line is told from others."""

    def __init__(self, stream: _Readable, encoding: str) -> None:
        super().__init__()
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)("gpuctl.undecodable")
        self._ended = False

    def some(self) -> bytes:
        text = ""
        while not text and not self._ended:
            block = self._stream.read(BLOCK)
            self._ended = not block
            text = self._decoder.decode(block, final=self._ended)
        return text.encode("utf-8", "surrogatepass")


class _Gzip(_Reader):
    """Piece by piece, so that of a file that is cut short all comes that stands before the cut."""

    def __init__(self, stream: _Readable) -> None:
        super().__init__()
        self._file = gzip.GzipFile(fileobj=cast("BinaryIO", stream))

    def some(self) -> bytes:
        return self._file.read1(BLOCK)


class _Zstd(_Reader):
    """pyarrow's decompression, with errors as other files have them."""

    def __init__(self, stream: _Readable) -> None:
        super().__init__()
        import pyarrow

        self._errors = pyarrow.ArrowException
        self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, "r"), "zstd")

    def some(self) -> bytes:
        try:
            return bytes(self._stream.read(BLOCK))
        except self._errors as error:
            raise EOFError(str(error)) from None
        except OSError as error:
            if error.errno is None and "truncated" in str(error).lower():
                raise EOFError(str(error)) from None
            raise


def _mark_undecodable(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "".join(chr(0xDC00 + byte) for byte in error.object[error.start : error.end]), error.end


codecs.register_error("gpuctl.undecodable", _mark_undecodable)
