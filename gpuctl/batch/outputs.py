"""The answers of a job as files, written row by row in the input's order.

Each row is one line of the answers or one line of the errors file beside it. Files are there whole or not at all, and
what is written is the same however often it is fetched. May import: errors, batch's own modules.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Any

from gpuctl.batch.answers import answer_of, as_text, dumps, srt, vtt
from gpuctl.batch.formats import by_name, suffix_of
from gpuctl.batch.newfile import NewFile, told
from gpuctl.batch.parquet import ParquetTable
from gpuctl.batch.rows import Url
from gpuctl.batch.seen import Seen
from gpuctl.batch.sources import need_pyarrow
from gpuctl.errors import usage_error

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from gpuctl.batch.rows import Result

STDOUT = "-"


class Format(StrEnum):
    """What `--format` takes."""

    OPENAI = "openai"  # lines of OpenAI's Batch API
    JSONL = "jsonl"
    CSV = "csv"
    TSV = "tsv"
    PARQUET = "parquet"
    JSON = "json"
    TXT = "txt"
    SRT = "srt"
    VTT = "vtt"


SUBTITLES = frozenset({Format.SRT, Format.VTT})
TABLES = frozenset(
    {Format.JSONL, Format.CSV, Format.TSV, Format.PARQUET}
)  # the input's columns and the answer
FOLDERS = frozenset({Format.JSON, Format.TXT, Format.SRT, Format.VTT})  # a file for each row
_BY_SUFFIX = {
    ".jsonl": Format.OPENAI,
    ".ndjson": Format.OPENAI,
    ".csv": Format.CSV,
    ".tsv": Format.TSV,
    ".parquet": Format.PARQUET,
}


@dataclass(frozen=True, slots=True)
class Destination:
    """Where the answers go, and as what. `path` None is stdout."""

    path: Path | None
    format: Format
    errors: Path

    @property
    def columns(self) -> bool:
        """Whether it repeats the input's columns."""
        return self.format in TABLES

    def check(self, *, overwrite: bool) -> None:
        """Refuse now what would fail when all is answered."""
        if self.path is None:
            return
        parent = self.path.parent
        if not parent.is_dir():
            raise usage_error(f"-o {self.path}: no folder {parent}")
        if self.format in FOLDERS:
            if self.path.exists() and not self.path.is_dir():
                raise usage_error(
                    f"-o {self.path}: a file; --format {self.format} writes a folder with a file per row"
                )
            there = self.path.is_dir() and any(self.path.iterdir())
        elif self.path.is_dir():
            raise usage_error(f"-o {self.path}: a folder; --format {self.format} writes one file")
        else:
            there = self.path.is_file()
        if there and not overwrite:
            raise usage_error(f"-o {self.path}: exists", hint="--overwrite replaces it, or name another")
        if not os.access(parent, os.W_OK):
            raise usage_error(f"-o {self.path}: {parent} may not be written")


def destination(
    output: str, *, url: Url, form: Format | None = None, errors: str | None = None
) -> Destination:
    """What `-o`, `--format` and `--errors` mean together. Without a format, the suffix says it."""
    path = None if output == STDOUT else Path(output)
    form = form or _by_name(output, path)
    if form is None:
        raise usage_error(
            f"-o {output}: no format has the suffix {PurePath(output).suffix!r}",
            hint=f"{', '.join(_BY_SUFFIX)} have one (also with .gz or .zst behind); or --format: {', '.join(Format)}",
        )
    if form in (Format.SRT, Format.VTT) and url is not Url.TRANSCRIPTIONS:
        raise usage_error(f"--format {form}: subtitles are made of recordings; this job is for {url}")
    if form in FOLDERS and path is None:
        raise usage_error(f"--format {form}: a file for each row needs a folder: -o FOLDER")
    if form is Format.PARQUET or output.lower().endswith(".zst"):
        need_pyarrow(f"-o {output}")
    if errors is not None:
        beside = Path(errors)
    elif path is None:
        beside = Path("errors.jsonl")
    else:
        beside = (
            path / "errors.jsonl" if form in FOLDERS else path.with_name(f"{_stem(path.name)}.errors.jsonl")
        )
    return Destination(path, form, beside)


def needed(url: Url, form: Format) -> dict[str, str]:
    """What each request must ask for, that the output can be made of its answer: subtitles are of timed segments."""
    return {"response_format": "verbose_json"} if url is Url.TRANSCRIPTIONS and form in SUBTITLES else {}


def _by_name(output: str, path: Path | None) -> Format | None:
    if path is None or (path.exists() and not path.is_file() and not path.is_dir()):
        return Format.OPENAI  # stdout, a pipe
    if path.is_dir() or output.endswith("/") or not (path.suffix or path.exists()):
        return Format.TXT
    return _BY_SUFFIX.get(suffix_of(output))


def _stem(name: str) -> str:
    """`answers` of `answers.jsonl.gz`."""
    suffix = suffix_of(name)
    return name[: name.lower().rindex(suffix)] if suffix and not name.lower().startswith(suffix) else name


class Output:
    """Takes results in the order of the rows. As a context: all is there when it ends, nothing when it fails.

    `columns` are those of all rows (`Input.columns`), `job` is what the ids are made of.
    """

    def __init__(self, where: Destination, *, job: str, url: Url, columns: Sequence[str] = ()) -> None:
        self.destination = where
        self.answered = self.failed = 0
        self._job = job
        self._errors: NewFile | None = None
        with told(where.path):
            self._writer = _writer(where, job, url, columns)

    def write(self, result: Result) -> None:
        if result.error is None:
            try:
                self._writer.write(result)
            except OSError:
                with told(self.destination.path):
                    raise
            self.answered += 1
        else:
            with told(self.destination.errors):
                if self._errors is None:
                    self._errors = NewFile(self.destination.errors)
                self._errors.stream.write(_error_line(self._job, result))
            self.failed += 1

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._abandon()
            return
        try:
            with told(self.destination.errors):
                if self._errors is not None:
                    self._errors.commit()
                else:
                    self.destination.errors.unlink(
                        missing_ok=True
                    )  # of an earlier run, which these answers replace
            with told(self.destination.path):
                self._writer.finish()
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        self._writer.abandon()
        if self._errors is not None:
            self._errors.abandon()


def _error_line(job: str, result: Result) -> bytes:
    """As OpenAI's error file has it."""
    error = result.error
    assert error is not None
    line = {
        "id": f"batch_req_{job}_{result.number}",
        "custom_id": result.id,
        "response": None,
        "error": {"code": error.code, "message": error.message},
    }
    return dumps(line).encode() + b"\n"


def _writer(where: Destination, job: str, url: Url, columns: Sequence[str]) -> _Writer:
    match where.format:
        case Format.OPENAI:
            return _OpenAI(NewFile(where.path), job)
        case Format.JSONL:
            return _Jsonl(NewFile(where.path), url, columns)
        case Format.CSV | Format.TSV:
            return _Csv(NewFile(where.path), url, columns, "," if where.format is Format.CSV else "\t")
        case Format.PARQUET:
            return _Parquet(NewFile(where.path), url, columns)
        case _:
            assert where.path is not None
            return _Folder(where.path, url, where.format)


class _Writer:
    """Answers into one file."""

    def __init__(self, file: NewFile) -> None:
        self._file = file
        self._stream = file.stream

    def write(self, result: Result) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        self._file.commit()

    def abandon(self) -> None:
        self._file.abandon()


class _OpenAI(_Writer):
    def __init__(self, file: NewFile, job: str) -> None:
        super().__init__(file)
        self._job = job

    def write(self, result: Result) -> None:
        number = f"{self._job}_{result.number}"
        # The same names in each line: only what differs is encoded.
        self._stream.write(
            f'{{"id":"batch_req_{number}","custom_id":{dumps(result.id)},"response":{{"status_code":200,'
            f'"request_id":"req_{number}","body":{dumps(result.answer)}}},"error":null}}\n'.encode()
        )


class _Table(_Writer):
    """The input's columns, then the answer."""

    def __init__(self, file: NewFile, url: Url, columns: Sequence[str]) -> None:
        super().__init__(file)
        self._url = url
        self._columns = tuple(columns)
        name, number = "answer", 2
        while name in self._columns:
            name, number = f"answer_{number}", number + 1
        self._answer = name

    def cells(self, result: Result) -> list[Any]:
        row = result.columns or {}
        unknown = row.keys() - set(self._columns)
        assert not unknown, f"columns that nobody announced: {unknown}"
        return [*(row.get(name) for name in self._columns), answer_of(self._url, result.answer)]


class _Jsonl(_Table):
    def write(self, result: Result) -> None:
        answer = answer_of(self._url, result.answer)
        self._stream.write(dumps({**(result.columns or {}), self._answer: answer}).encode() + b"\n")


class _Csv(_Table):
    """As RFC 4180 has it, in UTF-8. Lists and objects are JSON."""

    def __init__(self, file: NewFile, url: Url, columns: Sequence[str], delimiter: str) -> None:
        super().__init__(file, url, columns)
        self._text = io.TextIOWrapper(
            file.stream, encoding="utf-8", errors="replace", newline="", write_through=False
        )
        self._csv = csv.writer(self._text, delimiter=delimiter)
        self._csv.writerow([*self._columns, self._answer])

    def write(self, result: Result) -> None:
        self._csv.writerow([as_text(cell) for cell in self.cells(result)])

    def finish(self) -> None:
        self._text.flush()
        self._text.detach()
        super().finish()

    def abandon(self) -> None:
        super().abandon()
        with contextlib.suppress(OSError, ValueError):
            self._text.close()


class _Parquet(_Table):
    def __init__(self, file: NewFile, url: Url, columns: Sequence[str]) -> None:
        super().__init__(file, url, columns)
        embeddings = self._answer if url is Url.EMBEDDINGS else None
        self._table = ParquetTable([*self._columns, self._answer], embeddings, file.path and file.path.parent)

    def write(self, result: Result) -> None:
        self._table.write(self.cells(result))

    def finish(self) -> None:
        self._table.finish(self._stream)
        super().finish()

    def abandon(self) -> None:
        self._table.close()
        super().abandon()


class _Folder(_Writer):
    """A file for each row, called as the row is: `talks/1.mp3` becomes `talks/1.srt`."""

    def __init__(self, folder: Path, url: Url, form: Format) -> None:
        self._folder = folder
        self._url = url
        self._form = form
        self._taken = Seen()
        folder.mkdir(exist_ok=True)

    def write(self, result: Result) -> None:
        path = self._folder / self._name(result)
        path.parent.mkdir(parents=True, exist_ok=True)
        file = NewFile(path, durable=False)  # many small ones: the disk may take its time
        try:
            file.stream.write(self._content(result).encode(errors="replace"))
        except BaseException:
            file.abandon()
            raise
        file.commit()

    def _content(self, result: Result) -> str:
        match self._form:
            case Format.SRT:
                return srt(result.id, result.answer)
            case Format.VTT:
                return vtt(result.id, result.answer)
            case Format.TXT:
                return as_text(answer_of(self._url, result.answer)).strip() + "\n"
            case _:
                return json.dumps(json.loads(dumps(result.answer)), ensure_ascii=False, indent=2) + "\n"

    def _name(self, result: Result) -> Path:
        """A place in the folder and nowhere else, whatever a row calls itself, and one that is its own."""
        parts = [
            part for part in PurePosixPath(result.id.replace("\0", "")).parts if part not in ("/", "//", "..")
        ]
        *folders, name = [part.encode(errors="replace")[:200].decode(errors="ignore") for part in parts] or [
            "row"
        ]
        stem = PurePath(name).stem if by_name(name) else name
        for one in (stem, name, f"{name}-{result.number}"):
            path = Path(*folders, f"{one}.{self._form}")
            if self._taken.add(str(path)):
                return path
        return Path(f"row-{result.number}.{self._form}")

    def finish(self) -> None:
        pass

    def abandon(self) -> None:
        pass
