"""What a file holds, told by its content first and its name second. May import: errors, batch's sources (values)."""

from __future__ import annotations

import csv
import json
import re
from enum import StrEnum
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from gpuctl.batch.sources import not_text
from gpuctl.errors import usage_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuctl.batch.sources import Source


class Kind(StrEnum):
    """What `--input-format` takes, in the user's words."""

    OPENAI = "openai"  # JSONL of OpenAI's Batch API
    JSONL = "jsonl"
    CSV = "csv"
    TSV = "tsv"
    PARQUET = "parquet"
    LINES = "lines"  # a text file, each line a row
    TEXT = "text"  # text files, each a row
    AUDIO = "audio"
    IMAGE = "image"


TABLES = frozenset({Kind.OPENAI, Kind.JSONL, Kind.CSV, Kind.TSV, Kind.PARQUET})
FILES = frozenset({Kind.TEXT, Kind.AUDIO, Kind.IMAGE})  # of which each is a row
TITLES = {
    Kind.OPENAI: "OpenAI Batch",
    Kind.JSONL: "JSONL",
    Kind.CSV: "CSV",
    Kind.TSV: "TSV",
    Kind.PARQUET: "Parquet",
    Kind.LINES: "text",
    Kind.TEXT: "text files",
    Kind.AUDIO: "audio files",
    Kind.IMAGE: "images",
}

_SUFFIXES = {
    Kind.JSONL: ".jsonl .ndjson",
    Kind.CSV: ".csv",
    Kind.TSV: ".tsv .tab",
    Kind.PARQUET: ".parquet .pq",
    Kind.TEXT: ".txt .text .md .markdown .rst .html .htm .xml .tex .log",
    Kind.AUDIO: ".wav .mp3 .flac .ogg .oga .opus .m4a .aac .aiff .aif .wma .webm .mp4 .mpga .mpeg",
    Kind.IMAGE: ".png .jpg .jpeg .gif .webp .bmp .tif .tiff",
}
_BY_SUFFIX = {suffix: kind for kind, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}
_PACKED = (".gz", ".zst")

# How files begin.
_MARKS = {
    Kind.PARQUET: re.compile(rb"PAR1"),
    Kind.AUDIO: re.compile(
        rb"RIFF....WAVE|ID3|\xff[\xf1-\xf3\xf9-\xfb]|fLaC|OggS|....ftyp|\x1a\x45\xdf\xa3|FORM....AIF[FC]",
        re.DOTALL,
    ),
    Kind.IMAGE: re.compile(
        rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*", re.DOTALL
    ),
}
_FOREIGN = {
    re.compile(
        rb"PK\x03\x04"
    ): "a ZIP file (a spreadsheet or a document, maybe): save it as CSV, or unpack it",
    re.compile(rb"%PDF-\d"): "a PDF: take its text out of it first",
    re.compile(rb"\x1f\x8b|\x28\xb5\x2f\xfd"): "packed twice: unpack it once (gzip -d, zstd -d)",
    re.compile(rb"BZh\d1AY"): "packed with bzip2: gpuctl reads .gz and .zst",
    re.compile(rb"\xfd7zXZ"): "packed with xz: gpuctl reads .gz and .zst",
    re.compile(rb"7z\xbc\xaf"): "a 7-Zip file: unpack it",
    re.compile(rb"SQLite format 3\0"): "a SQLite database: export the table as CSV",
    re.compile(rb"\x93NUMPY"): "a NumPy array: save it as Parquet or CSV",
    re.compile(rb"ARROW1\0"): "an Arrow file: save it as Parquet",
}

LOOKED_AT = 100  # lines of the head


def suffix_of(name: str) -> str:
    """`.jsonl` of `a.jsonl.gz`, in small letters."""
    path = PurePath(name.lower())
    return PurePath(path.stem).suffix if path.suffix in _PACKED else path.suffix


def by_name(name: str) -> Kind | None:
    return _BY_SUFFIX.get(suffix_of(name))


def by_magic(head: bytes) -> Kind | None:
    """What has a mark at its beginning, and is no text that happens to begin so ("ID3 is a way to learn trees")."""
    found = next((kind for kind, mark in _MARKS.items() if mark.match(head)), None)
    return None if found is None or is_text(head) else found


def is_text(head: bytes) -> bool:
    """UTF-8 without the byte that no text has; it may be cut in the middle of a character."""
    if b"\0" in head:
        return False
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4 and "unexpected end" in error.reason
    return True


def kind_of(source: Source) -> Kind:
    """What a file that was named (not found in a folder) holds. Refuses what is none of them, and says what it is."""
    name, head = source.name, source.head
    marked = by_magic(head)
    if marked:
        return marked
    for mark, what in _FOREIGN.items():
        if mark.match(head):
            raise usage_error(f"{name}: {what}")
    named = by_name(name)
    if b"\0" in head:
        if named in (Kind.AUDIO, Kind.IMAGE):
            return named
        wide = head[1::2].count(0) > len(head) // 4 or head[::2].count(0) > len(head) // 4
        raise usage_error(
            f"{name}: binary data, not text",
            hint="if it is UTF-16 without a mark: --encoding utf-16-le" if wide else _readable(),
        )
    if named is Kind.PARQUET:
        raise usage_error(f"{name}: not a Parquet file: it does not begin with PAR1")
    if named in (Kind.AUDIO, Kind.IMAGE):
        return named
    lines = source.head_lines()[:LOOKED_AT]
    objects = [value for value in map(json_object, lines) if value is not None]
    if objects and (named is Kind.JSONL or 2 * len(objects) >= len(lines)):
        batch = any("custom_id" in value and ("body" in value or "url" in value) for value in objects)
        return Kind.OPENAI if batch else Kind.JSONL
    if named is Kind.JSONL or suffix_of(name) == ".json":
        says, hint = _no_jsonl(name, head, lines)
        raise usage_error(says, hint=hint)
    if named in (Kind.CSV, Kind.TSV):
        return named
    return _table_without_a_name(source) if named is None else Kind.LINES


def _readable() -> str:
    return f"gpuctl reads {', '.join(TITLES.values())}; --input-format says which of {', '.join(Kind)} it is"


def _no_jsonl(name: str, head: bytes, lines: Sequence[bytes]) -> tuple[str, str]:
    if lines and not is_text(lines[0]):
        return (
            f"{name}: no line of its first {len(lines)} is a JSON object in UTF-8; line 1: {not_text(lines[0])}",
            "--encoding says what it is, for example latin-1",
        )
    start = head.lstrip()[:1]
    if start == b"[":
        return (
            f"{name}: one JSON array, where a line per row is needed",
            f"jq -c '.[]' {name} makes JSONL of it",
        )
    if start == b"{":
        return (
            f"{name}: line 1 is no whole JSON object",
            f"jq -c . {name} puts each object on a line of its own",
        )
    first = lines[0][:60].decode(errors="replace") if lines else ""
    return f"{name}: none of the first {len(lines)} lines is a JSON object; line 1 is {first!r}", _readable()


def json_object(line: bytes) -> dict[str, Any] | None:
    if not line.lstrip().startswith(b"{"):
        return None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _table_without_a_name(source: Source) -> Kind:
    """stdin, or `data` without a suffix: a table where all records have the same columns, and the first names them."""
    lines = [line.decode(errors="replace") for line in source.head_lines()[:LOOKED_AT]]
    for kind, delimiters in ((Kind.TSV, "\t"), (Kind.CSV, ",;")):
        for delimiter in delimiters:
            try:
                rows = list(csv.reader(lines, delimiter=delimiter, strict=True))
            except csv.Error:
                continue
            names = [name.strip() for name in rows[0]] if rows else []
            if len(rows) > 1 and len(names) > 1 and {len(row) for row in rows} == {len(names)}:
                plain = all(re.fullmatch(r"[^\W\d][\w -]{0,40}", name) for name in names)
                if plain and len(set(names)) == len(names):
                    return kind
    return Kind.LINES
