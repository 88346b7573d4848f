"""Which files the user means: names, folders, globs and `-` become files of one kind, in their natural order.

May import: errors, batch's formats and sources.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from gpuctl.batch.formats import FILES, TABLES, TITLES, Kind, by_magic, by_name, is_text, kind_of
from gpuctl.batch.readers import Reader
from gpuctl.batch.sources import READ_ERRORS, look, shown, unreadable
from gpuctl.errors import usage_error

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gpuctl.batch.sources import Source

STDIN = "-"


@dataclass(frozen=True, slots=True)
class Found:
    """An input: tables and lines by their `readers`, or `files`, each of them a row, by their names in `folder`."""

    kind: Kind
    readers: tuple[Reader, ...] = ()
    folder: Path = field(default=Path())
    files: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()  # what was left out, in words


def find(paths: Sequence[str], kind: Kind | None, wanted: frozenset[Kind], encoding: str | None) -> Found:
    """Look at all of them. `wanted` are the kinds that the job can use, where a folder holds several."""
    if not paths:
        raise usage_error("no input: name files, a folder, a glob, or - for stdin")
    if len(paths) > 1 and STDIN in paths:
        raise usage_error("-: stdin is an input of its own, and cannot stand beside files")
    if kind in FILES and STDIN in paths:
        raise usage_error(f"--input-format {kind}: stdin is no file of its own; name files or a folder")
    folders = {path for path in paths if _is_folder_or_glob(path)}
    if not folders:
        return _of_names(paths, kind, encoding)
    everything = [file for path in paths for file in (_walk(path) if path in folders else [path])]
    return _of_folders(paths, everything, kind, wanted, encoding)


def _is_folder_or_glob(path: str) -> bool:
    if path == STDIN:
        return False
    if os.path.isdir(path):  # noqa: PTH112 (os.path takes what no path can be, too, and says no)
        return True
    return not os.path.lexists(path) and glob.has_magic(path)


def _of_names(names: Sequence[str], kind: Kind | None, encoding: str | None) -> Found:
    """What was named file by file. Several text files are what a glob of them is; one is its lines."""
    by_names = {by_name(name) for name in names}
    if kind is None and by_names in ({Kind.AUDIO}, {Kind.IMAGE}):
        kind = by_names.pop()  # thousands, maybe: they are looked at one by one as rows
    if kind in FILES:
        for name in names:
            _must_exist(name)
        return _files(kind, [Path(name) for name in names])
    readers = _read(names, kind, encoding)
    first = readers[0].kind
    if first is Kind.LINES and len(readers) > 1 and kind is None:
        first = Kind.TEXT
    if first in FILES:
        for reader in readers:
            if reader.source.once:
                raise usage_error(
                    f"{reader.source.name}: {TITLES[first]} are read from files, not from a pipe"
                )
        return _files(first, [Path(reader.source.name) for reader in readers])
    return Found(first, readers)


def _of_folders(
    paths: Sequence[str],
    names: Sequence[str],
    kind: Kind | None,
    wanted: frozenset[Kind],
    encoding: str | None,
) -> Found:
    where = ", ".join(paths)
    if not names:
        raise usage_error(f"{where}: no files there", hint="** looks into folders: 'data/**/*.txt'")
    kinds: list[Kind | None] = [_kind_in_folder(Path(name)) for name in names]
    family = [Kind.JSONL if one in TABLES else one for one in kinds]
    there = {one for one in family if one}
    if kind is not None:
        there = {Kind.JSONL if kind in TABLES else Kind.TEXT if kind is Kind.LINES else kind}
        if not there & set(family):
            raise usage_error(f"{where}: no {TITLES[kind]} among {len(names)} files")
    elif wanted and there & wanted:
        there &= wanted
    if there & {Kind.AUDIO, Kind.IMAGE}:
        there.discard(Kind.TEXT)  # a README beside the pictures
    if len(there) > 1:
        counts = Counter(one for one in family if one)
        counted = ", ".join(_counted(count, one) for one, count in sorted(counts.items()))
        formats = ", ".join(sorted({one for one in kinds if one}))
        raise usage_error(
            f"{where}: several kinds of files: {counted}",
            hint=f"a job is of one kind: run one for each, with --input-format ({formats}) or a glob: 'data/*.jsonl'",
        )
    if not there:
        raise usage_error(f"{where}: none of {len(names)} files is a table, text, audio or an image")
    (chosen,) = there
    taken = [name for name, one in zip(names, family, strict=True) if one is chosen]
    skipped = _skipped(name for name, one in zip(names, family, strict=True) if one is not chosen)
    if chosen in FILES and kind is not Kind.LINES:
        return _files(chosen, [Path(name) for name in taken], [Path(path) for path in paths], skipped)
    readers = _read(taken, kind, encoding)
    return Found(readers[0].kind, readers, skipped=skipped)


def _counted(count: int, kind: Kind) -> str:
    named = "tables" if kind in TABLES else TITLES[kind]
    return f"{count} {named if count > 1 else named.removesuffix('s')}"


def _files(
    kind: Kind, files: Sequence[Path], roots: Sequence[Path] = (), skipped: tuple[str, ...] = ()
) -> Found:
    """Files by their names in the folder that they have in common: that is what their rows are called."""
    folders = [root for root in roots if root.is_dir()]
    if len(folders) == len(roots) == 1:
        folder = folders[0]
    else:
        folder = Path(os.path.commonpath([file.absolute().parent for file in files]))
    base = folder.absolute()
    names = [str(file.absolute().relative_to(base)) for file in files]
    return Found(kind, folder=folder, files=tuple(dict.fromkeys(names)), skipped=skipped)


def _kind_in_folder(path: Path) -> Kind | None:
    named = by_name(path.name)
    if named:
        return named
    if path.suffix.lower() == ".json":
        return None  # what stands beside data: no table
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError:
        return None
    return by_magic(head) or (Kind.TEXT if head and is_text(head) else None)


def _skipped(names: Iterator[str]) -> tuple[str, ...]:
    counts = Counter(PurePath(name).suffix.lower() or PurePath(name).name for name in names)
    if not counts:
        return ()
    commonest = [f"{count} {suffix}" for suffix, count in counts.most_common(5)]
    more = f" and {len(counts) - 5} more kinds" if len(counts) > 5 else ""
    total = sum(counts.values())
    return (f"{total} other file{'s' * (total > 1)} skipped ({', '.join(commonest)}{more})",)


def _walk(path: str) -> Iterator[str]:
    """The files of a folder or a glob, in natural order: 2.txt before 10.txt. Hidden ones are nobody's data."""
    if os.path.isdir(path):  # noqa: PTH112
        yield from _folder(path)
        return
    for found in sorted(glob.iglob(path, recursive=True), key=_natural):  # noqa: PTH207 (the user's own words)
        if os.path.isfile(found) or not os.path.exists(found):  # noqa: PTH110, PTH113 (a link to nothing is told of)
            yield found


def _folder(path: str) -> Iterator[str]:
    try:
        with os.scandir(path) as entries:
            inside = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise unreadable(path, error) from None
    for entry in sorted(inside, key=lambda entry: _natural(entry.name)):
        if entry.is_dir(follow_symlinks=False):
            yield from _folder(entry.path)
        elif entry.is_file() or entry.is_symlink():  # a link to a folder, or to nothing, is told of
            yield entry.path


def _natural(name: str) -> tuple[str, str]:
    return re.sub(
        r"\d+", lambda digits: f"{len(digits[0].lstrip('0')):04}{digits[0].lstrip('0')}", name
    ), name


def _look(name: str, encoding: str | None) -> Source:
    if name != STDIN:
        _must_exist(name)
    try:
        return look("stdin", None, encoding) if name == STDIN else look(shown(name), Path(name), encoding)
    except READ_ERRORS as error:
        raise unreadable(name, error) from None


def _must_exist(name: str) -> None:
    path = Path(name)
    if os.path.lexists(path):
        return
    try:
        there = os.listdir(path.parent)  # noqa: PTH208 (names are all that is wanted)
    except OSError:
        there = []
    near = difflib.get_close_matches(path.name, there[:1000], n=1)
    raise usage_error(f"{name}: no such file" + (f"; did you mean {path.parent / near[0]}?" if near else ""))


def _read(names: Sequence[str], kind: Kind | None, encoding: str | None) -> tuple[Reader, ...]:
    """A reader for each file, all of one kind. Parts that wrote nothing are usual among many: they are left out."""
    readers: list[Reader] = []
    for name in names:
        source = _look(name, encoding)
        if source.head.strip():
            readers.append(Reader(source, kind or kind_of(source)))
    if not readers:
        raise usage_error(f"{', '.join(names[:3])}{' …' * (len(names) > 3)}: empty, no row to answer")
    first = readers[0]
    for other in readers:
        if other.kind is not first.kind:
            says = f"{first.source.name} is {TITLES[first.kind]}, {other.source.name} is {TITLES[other.kind]}"
            raise usage_error(
                f"mixed formats: {says}",
                hint="a job has one: run one for each, or say --input-format where it was not recognised",
            )
    return tuple(readers)
