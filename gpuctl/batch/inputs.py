"""The input of a job, row by row: what the files hold, made into requests, with what is wrong said where it is.

Memory is flat: one row at a time, and some 15 bytes for each `custom_id`, which must not come twice. A row that cannot
be answered is a `Row` with `bad`, and the rest goes on; what makes the whole input useless is a usage error of
`open_input`. May import: errors, batch's own modules.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

from gpuctl.batch.asking import Asking
from gpuctl.batch.finding import Found, find
from gpuctl.batch.formats import TITLES, Kind
from gpuctl.batch.prompts import listed
from gpuctl.batch.readers import ENCODING, TOO_LONG
from gpuctl.batch.requests import TITLES as ASKED
from gpuctl.batch.requests import RowError, check_file
from gpuctl.batch.rows import Problem, Row, Url
from gpuctl.batch.seen import Seen
from gpuctl.batch.sources import LONGEST, READ_ERRORS, look, not_text, shown, text_encoding, why
from gpuctl.errors import usage_error

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

# What a job can use of a folder that holds several kinds.
_USABLE = {
    Url.TRANSCRIPTIONS: frozenset({Kind.AUDIO}),
    Url.COMPLETIONS: frozenset({Kind.TEXT, Kind.JSONL}),
    Url.EMBEDDINGS: frozenset({Kind.TEXT, Kind.JSONL}),
    Url.IMAGES: frozenset({Kind.TEXT, Kind.JSONL}),
}


def open_input(
    paths: Sequence[str],
    *,
    kind: Kind | None = None,
    url: Url | None = None,
    prompt: str | None = None,
    system: str | None = None,
    messages_column: str | None = None,
    model: str = "",
    models: Collection[str] = (),
    encoding: str | None = None,
    keep_columns: bool = False,
) -> Input:
    """Find out what `paths` are, and refuse what could never be answered, before a row is read.

    `kind` is `--input-format`, where what is found by itself will not do. `url` is what the job is for; without it,
    lines of OpenAI's Batch API say it, recordings are transcribed, and the rest is chat. `model` is what answers,
    `models` are other names that it knows itself and adapters by.
    `keep_columns` gives each row the columns that the output repeats.
    """
    if encoding is not None:
        encoding = text_encoding(encoding)
    found = find(paths, kind, _USABLE.get(url, frozenset()) if url else frozenset(), encoding)
    if found.kind is Kind.OPENAI and url is Url.FUNCTION:
        found = Found(Kind.JSONL, found.readers, skipped=found.skipped)
    asking = Asking(found, url, prompt, system, messages_column)
    return Input(found, asking, (model, *models) if model else (), encoding, keep_columns)


def strict(rows: Iterable[Row]) -> Iterator[Row]:
    """`--strict`: the same rows, but the first bad one is a usage error."""
    for row in rows:
        if row.bad:
            raise usage_error(row.bad.message, hint="without --strict it becomes a line of the errors file")
        yield row


class Input:
    """What is to be answered. Iterate over it for its rows; files can be read again, stdin cannot.

    `columns`, `digest` and `warnings()` are about all that was read so far.
    """

    def __init__(
        self, found: Found, asking: Asking, models: Sequence[str], encoding: str | None, keep_columns: bool
    ) -> None:
        self.kind = found.kind
        self.url = asking.url
        self._found = found
        self._asking = asking
        self._models = models
        self._encoding = encoding
        self._keep = keep_columns
        self._start()

    def describe(self) -> str:
        """What was found, in a line: `prompts.jsonl: OpenAI Batch, chat completions`."""
        found, title = self._found, TITLES[self.kind]
        if found.files:
            one = len(found.files) == 1
            where = str(found.folder / found.files[0]) if one else str(found.folder)
            what = title.removesuffix("s") if one else f"{len(found.files):,} {title}, a row each"
        else:
            first, count = found.readers[0].source, len(found.readers)
            where = first.name if count == 1 else f"{first.name} and {count - 1:,} more"
            what = title + (f" ({first.compression})" if first.compression else "")
            if first.encoding not in ("utf-8", "utf-8-sig"):
                what += f" in {first.encoding.upper()}"
            if self.kind is Kind.LINES:
                what += ", a row per line"
            elif self.kind is not Kind.OPENAI:
                what += f" with columns {listed(self._asking.columns, 8)}"
        column = self._asking.column
        asked = ASKED[self.url] + (f" of column {column}" if column else "")
        return "; ".join([f"{where}: {what}, {asked}", *found.skipped])

    def files(self) -> Iterator[Path]:
        """What is read, but for stdin."""
        for file in self._found.files:
            yield self._found.folder / file
        for reader in self._found.readers:
            if reader.source.path is not None:
                yield reader.source.path

    @property
    def digest(self) -> str:
        """A sha256 of what was read so far, in its order, and of what is asked of it."""
        return self._hash.hexdigest()

    @property
    def columns(self) -> tuple[str, ...]:
        """What the output repeats, of all rows so far, in the order in which they were first there."""
        return tuple(self._columns)

    def warnings(self) -> list[str]:
        """What a user should know of the rows so far."""
        found = []
        if self._asking.asks_the_same:
            found.append(
                "--prompt: names no column, so every row asks the same; {text} stands for column text"
            )
        if self._others:
            rows = f"{self._others:,} row{'s' * (self._others > 1)}"
            found.append(
                f"{rows} for another model ({self._other_model}): {self._models[0]} answers all of them"
            )
        return found

    def __iter__(self) -> Iterator[Row]:
        self._start()
        row = None
        for row in self._rows_of_files() if self._found.files else self._rows_of_readers():
            yield row
        if row is None:
            names = ", ".join(reader.source.name for reader in self._found.readers[:3])
            only = "blank lines" if self.kind is Kind.LINES else "the names of its columns"
            raise usage_error(f"{names}: no row to answer, only {only}")

    def _start(self) -> None:
        self._hash = hashlib.sha256(json.dumps(self._asking.options).encode())
        self._columns: dict[str, None] = {}
        self._seen = Seen()
        self._others = 0
        self._other_model = ""

    def _rows_of_readers(self) -> Iterator[Row]:
        number = 0
        lines, keep, url, make = self.kind is Kind.OPENAI, self._keep, self.url, self._asking.body
        for reader in self._found.readers:
            name, folder = reader.source.name, reader.source.folder
            unit = "row " if self.kind is Kind.PARQUET else ""
            place = 0
            self._hash.update(b"\0")
            try:
                for place, value, problem in reader.read(self._hash.update):
                    row_id = f"row-{number}"
                    body: dict[str, Any] | None = None
                    columns: dict[str, Any] | None = None
                    media: tuple[Path, ...] = ()
                    if problem is None:
                        try:
                            if lines:
                                row_id = _custom_id(value)
                                body, media = self._line(value, row_id, folder)
                            else:
                                body, media = make(value, folder)
                            if keep:
                                columns = {"custom_id": row_id} if lines else value
                                if not columns.keys() <= self._columns.keys():
                                    self._columns.update(dict.fromkeys(columns))
                        except RowError as error:
                            problem = Problem(error.code, error.message)
                    if problem is not None:
                        problem = Problem(problem.code, f"{name}:{unit}{place}: {problem.message}")
                    yield Row(number, row_id, url, body, columns, problem, media)
                    number += 1
            except READ_ERRORS as error:
                says = f"{name}:{unit}{place + 1}: {why(error)}; what stands before it is answered"
                yield Row(number, f"row-{number}", url, None, None, Problem("unreadable_file", says))
                number += 1

    def _line(
        self, value: Mapping[str, Any], row_id: str, folder: Path
    ) -> tuple[dict[str, Any], tuple[Path, ...]]:
        body, media = self._asking.line(value, folder)
        if not self._seen.add(row_id):
            raise RowError("duplicate_custom_id", f"custom_id {row_id!r} was there before")
        other = body.get("model")
        if other is not None and self._models and other not in self._models:
            self._others += 1
            self._other_model = self._other_model or str(other)
        return body, media

    def _rows_of_files(self) -> Iterator[Row]:
        """Each file a row, called by its name in the folder that all of them are in."""
        if self._keep:
            self._columns["file"] = None
        for number, file in enumerate(self._found.files):
            path, name = self._found.folder / file, shown(file)
            columns: dict[str, Any] = {"file": name}
            body: dict[str, Any] | None = None
            media: tuple[Path, ...] = ()
            problem: Problem | None = None
            self._hash.update(b"\0" + os.fsencode(file) + b"\0")
            try:
                size = check_file(path)
                if self.kind is Kind.TEXT:
                    columns["text"] = self._text_of(path, size)
                    self._hash.update(columns["text"].encode())
                else:
                    # As rsync does: to read all of it, only to know whether it changed, takes as long as to send it.
                    self._hash.update(f"{size} {path.stat().st_mtime_ns}".encode())
                body, media = self._asking.body(columns, path)
            except RowError as error:
                problem = Problem(error.code, f"{name}: {error.message}")
            except OSError as error:
                problem = Problem("unreadable_file", f"{name}: {why(error)}")
            yield Row(number, name, self.url, body, {"file": name} if self._keep else None, problem, media)

    def _text_of(self, path: Path, size: int) -> str:
        if size > LONGEST:
            raise RowError(TOO_LONG.code, TOO_LONG.message)
        try:
            with look(path.name, path, self._encoding).open() as file:
                text = file.read(LONGEST + 1)
        except READ_ERRORS as error:
            raise RowError("unreadable_file", why(error)) from None
        if len(text) > LONGEST:
            raise RowError(TOO_LONG.code, TOO_LONG.message)
        if b"\0" in text:
            raise RowError("wrong_encoding", "binary data, not text")
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            number = text.count(b"\n", 0, error.start) + 1
            line = text[text.rfind(b"\n", 0, error.start) + 1 :].partition(b"\n")[0]
            raise RowError("wrong_encoding", f"line {number}: {not_text(line)}; {ENCODING}") from None


def _custom_id(value: Mapping[str, Any]) -> str:
    custom_id = value.get("custom_id")
    if isinstance(custom_id, str) and custom_id:
        return custom_id
    what = "no custom_id" if custom_id in (None, "") else f"custom_id is {custom_id!r}, not text"
    raise RowError("invalid_row", f"{what}: each line of OpenAI's Batch API has one of its own")
