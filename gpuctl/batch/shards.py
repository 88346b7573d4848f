"""Rows become the files of a job: shards, what travels with them, and `job.json`. May import: rows, answers, errors.

A shard is what an attempt answers: small enough that starting it again costs little, large enough that what it costs
itself (a call, two commits of the Volume: about a second, while the rows of other shards go on) is far below 1 % of its
work. Where its work is quicker than that, a call brings several, which share that cost.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import itertools
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gpuctl.batch.answers import dumps
from gpuctl.batch.copies import Copies
from gpuctl.batch.rows import Url
from gpuctl.errors import GpuctlError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
    from pathlib import Path

    from gpuctl.batch.rows import Row

# Rows of a shard at most. Where they are few, shards are smaller, so that every container gets some.
LARGEST = 1000
SMALLEST = 16
_SHARDS_PER_CONTAINER = 8
_FIRST = 4096  # rows that are read before the size of the shards is chosen
_TOGETHER = 1000  # files that are uploaded by one command, which has memory for each of them


@dataclass
class Staged:
    """What was written: `rows` in `shards` files, of which `bad` can have no answer; `digest` is of all of them."""

    folder: Path
    rows: int = 0
    bad: int = 0
    shards: int = 0
    characters: int = 0  # of the requests
    digest: str = ""
    urls: set[Url] = field(default_factory=set)
    why_bad: dict[str, list[Any]] = field(default_factory=dict)  # by code: how many, and what the first is
    copies: int = 0  # rows that are answered by another's answer, and are in no shard


def stage(
    rows: Iterable[Row],
    folder: Path,
    *,
    containers: int,
    defaults: Mapping[str, Any],
    limit: int | None = None,
    dedupe: bool = False,
    models: Collection[str] | None = None,
    see: Callable[[Url, Any], None] | None = None,
) -> Staged:
    """Write the rows into `folder/input`, which is made. `defaults` are put into each request that lacks them; with
    `dedupe` a request that an earlier row has is not asked again. `models` are the names that the engine knows: a
    request for another (`gpt-4o`, of a file made for somebody else's API) is one for the job's model. `see` is shown
    each request that travels.

    A GpuctlError where the disk is full.
    """
    staged = Staged(folder)
    (folder / "input").mkdir(parents=True)
    digest = hashlib.sha256()
    shard: list[bytes] = []
    size = LARGEST
    first: list[list[bytes]] = []
    travel = 0  # rows in shards
    copies = Copies(folder) if dedupe else contextlib.nullcontext()
    try:
        with copies as found:
            for row in itertools.islice(rows, limit):
                staged.rows += 1
                line = _line(row, defaults, folder, staged)
                if models is not None and row.body is not None and "model" in row.body:
                    named = row.body["model"]
                    if not isinstance(named, str) or named not in models:
                        del line["body"]["model"]
                text = dumps(line).encode() + b"\n"
                digest.update(text)
                if found is not None and row.bad is None and not row.media and found.take(line):
                    staged.copies = found.count
                    continue
                shard.append(text)
                travel += 1
                if see is not None and row.bad is None and row.url is not Url.FUNCTION:
                    see(row.url, line["body"])
                staged.characters += len(text)
                if len(shard) >= size:
                    if travel <= _FIRST:
                        first.append(shard)
                    else:
                        _write(staged, first, shard)
                    shard = []
        if travel <= _FIRST:
            lines = [line for some in first for line in some] + shard
            size = max(SMALLEST, min(LARGEST, -(-len(lines) // (containers * _SHARDS_PER_CONTAINER))))
            first, shard = [lines[at : at + size] for at in range(0, len(lines), size)], []
        _write(staged, first, shard)
    except OSError as error:
        raise GpuctlError(
            f"cannot keep the rows in {folder}: {error.strerror}",
            hint="make room there, or name another folder: export XDG_CACHE_HOME=/path",
        ) from error
    staged.digest = digest.hexdigest()
    return staged


def portions(folder: Path) -> Iterator[Path]:
    """What was staged in `folder` as folders of few enough files, each to be uploaded before the next is made.

    Where there are more files than that, those of a portion are moved to it, and removed when the next is asked for.
    """
    files = sorted(file for file in folder.rglob("*") if not file.is_dir())
    if len(files) <= _TOGETHER:
        yield folder
        return
    for start in range(0, len(files), _TOGETHER):
        portion = folder.with_name(f"{folder.name}-{start}")
        for file in files[start : start + _TOGETHER]:
            there = portion / file.relative_to(folder)
            there.parent.mkdir(parents=True, exist_ok=True)
            file.rename(there)
        yield portion
        shutil.rmtree(portion)


def _line(row: Row, defaults: Mapping[str, Any], folder: Path, staged: Staged) -> dict[str, Any]:
    """A row as it stands in a shard."""
    line: dict[str, Any] = {"row": row.number, "id": row.id}
    if row.bad is not None:
        line["bad"] = {"code": row.bad.code, "message": row.bad.message}
        staged.bad += 1
        staged.why_bad.setdefault(row.bad.code, [0, row.bad.message])[0] += 1
    else:
        body = row.body
        if row.url is not Url.FUNCTION and body is not None:
            body = {**defaults, **body}
        line |= {"url": row.url, "body": body}
        staged.urls.add(row.url)
        if row.media:
            line["media"] = [_travel(row, n, folder) for n in range(len(row.media))]
    if row.columns is not None:
        line["columns"] = row.columns
    return line


def _travel(row: Row, n: int, folder: Path) -> str:
    """Put a file beside the shards; where it will be in the Volume."""
    source = row.media[n]
    name = f"media/{row.number // LARGEST:06}/{row.number:09}-{n}{source.suffix.lower()}"
    there = folder / name
    there.parent.mkdir(parents=True, exist_ok=True)
    try:
        there.hardlink_to(source.resolve())
    except OSError:  # another file system
        shutil.copyfile(source, there)
    return name


def _write(staged: Staged, first: list[list[bytes]], last: list[bytes]) -> None:
    for lines in (*first, last):
        if lines:
            file = staged.folder / "input" / f"{staged.shards:06}.jsonl.gz"
            # mtime=0: the same rows are the same file, which is not uploaded twice.
            file.write_bytes(gzip.compress(b"".join(lines), compresslevel=1, mtime=0))
            staged.shards += 1
    first.clear()
