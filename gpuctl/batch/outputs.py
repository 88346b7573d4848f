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
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from gpuctl.batch.answers import answer_of, as_text, dumps, srt, vtt
from gpuctl.batch.filenames import Names
from gpuctl.batch.formats import suffix_of
from gpuctl.batch.newfile import NewFile, told
from gpuctl.batch.parquet import ParquetTable
from gpuctl.batch.pictures import AsFiles, InLines
from gpuctl.batch.rows import Url
from gpuctl.batch.sources import need_pyarrow
from gpuctl.errors import GpuctlError, usage_error

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
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
    pictures: bool = False  # a folder of pictures, with the answers in a file among them
    errors_named: bool = False  # by --errors: what is there is not one of ours

    @property
    def folder(self) -> bool:
        """Whether it is a folder, with a file for each row."""
        return self.pictures or self.format in FOLDERS

    @property
    def columns(self) -> bool:
        """Whether it repeats the input's columns."""
        return self.format in TABLES

    def check(self, *, overwrite: bool) -> None:
        """Refuse now what would fail when all is answered, or would take the place of what is somebody's."""
        self._check_answers(overwrite)
        self._check_errors(overwrite)

    def _check_answers(self, overwrite: bool) -> None:
        if self.path is None:
            return
        parent = self.path.parent
        if not parent.is_dir():
            raise usage_error(f"-o {self.path}: no folder {parent}")
        if self.folder:
            if self.path.exists() and not self.path.is_dir():
                what = "pictures go into" if self.pictures else f"--format {self.format} writes"
                raise usage_error(f"-o {self.path}: a file; {what} a folder with a file per row")
            there = self.path.is_dir() and any(self.path.iterdir())
        elif self.path.is_dir():
            raise usage_error(f"-o {self.path}: a folder; --format {self.format} writes one file")
        else:
            there = self.path.is_file()
        if there and not overwrite:
            raise usage_error(f"-o {self.path}: exists", hint="--overwrite replaces it, or name another")
        if not os.access(parent, os.W_OK):
            raise usage_error(f"-o {self.path}: {parent} may not be written")

    def _check_errors(self, overwrite: bool) -> None:
        errors, beside = self.errors, "" if self.errors_named else " (beside the output)"
        if errors.is_dir():
            raise usage_error(f"--errors {errors}{beside}: a folder; rows without an answer go into a file")
        if not self.errors_named:
            if errors.is_file() and not overwrite and not _holds_errors(errors):
                raise usage_error(
                    f"--errors {errors}{beside}: exists, and holds no errors of gpuctl's",
                    hint="--overwrite replaces it, or --errors FILE names another",
                )
            return
        if self.path is not None and os.path.realpath(errors) == os.path.realpath(self.path):
            raise usage_error(
                f"--errors {errors}: is the output; rows without an answer go into a file of their own"
            )
        if errors.parent != self.path and not errors.parent.is_dir():
            raise usage_error(f"--errors {errors}: no folder {errors.parent}")
        if errors.is_file() and not overwrite:
            raise usage_error(f"--errors {errors}: exists", hint="--overwrite replaces it, or name another")

    def check_apart(self, inputs: Iterable[Path]) -> None:
        """Refuse to write to what is read: an output, or its errors file, among the input's files."""
        ours = [("-o", self.path), ("--errors", self.errors)]
        there = [(option, path, path.stat()) for option, path in ours if path is not None and path.is_file()]
        into = os.path.realpath(self.path) if self.path and self.format in FOLDERS else None
        if not there and into is None:
            return
        for file in inputs:
            with contextlib.suppress(OSError):  # what cannot be read is told as a row
                read = file.stat()
                for option, path, found in there:
                    if os.path.samestat(read, found):
                        raise usage_error(f"{option} {path}: is a file of the input; name another")
            if into is not None and file.suffix == f".{self.format}" and _is_below(file, into):
                raise usage_error(f"-o {self.path}: {file} is a file of the input, and would be written to")


def _is_below(file: Path, folder: str) -> bool:
    return os.path.realpath(file).startswith(os.path.join(folder, ""))  # noqa: PTH118


def _holds_errors(path: Path) -> bool:
    """Whether this was written by `_error_line`, as far as its first line tells; an empty file says nothing else."""
    try:
        with path.open("rb") as file:
            line = file.readline(1 << 20)
        first = json.loads(line) if line else None
    except (OSError, ValueError):
        return False
    if first is None:
        return True
    return (
        isinstance(first, dict)
        and str(first.get("id")).startswith("batch_req_")
        and first.get("response", "") is None
        and isinstance(first.get("error"), dict)
    )


def destination(
    output: str, *, url: Url, form: Format | None = None, errors: str | None = None
) -> Destination:
    """What `-o`, `--format` and `--errors` mean together. Without a format, the suffix says it."""
    for flag, given in (("--output", output), ("--errors", errors)):
        if given == "":
            raise usage_error(f"{flag}: '' names no file")
    path = None if output == STDOUT else Path(output)
    if url is Url.IMAGES:
        return _of_pictures(output, path, form, errors)
    form = form or _by_name(output, path)
    if form is None:
        raise _no_format(output)
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
        beside = path / "errors.jsonl" if form in FOLDERS else _beside(path, form)
    return Destination(path, form, beside, errors_named=errors is not None)


def _beside(path: Path, form: Format) -> Path:
    """The errors file of answers that are one file."""
    if not path.name:  # "." and "/"
        raise usage_error(f"-o {path}: a folder; --format {form} writes one file")
    return path.with_name(f"{_stem(path.name)}.errors.jsonl")


def _no_format(output: str) -> GpuctlError:
    one = suffix_of(output).removeprefix(".")
    if one in FOLDERS:
        return usage_error(
            f"-o {output}: --format {one} writes a file for each row, into a folder",
            hint=f"-o FOLDER --format {one}; .jsonl, .csv, .tsv or .parquet is one file for all",
        )
    return usage_error(
        f"-o {output}: no format has the suffix {PurePath(output).suffix!r}",
        hint=f"{', '.join(_BY_SUFFIX)} have one (also with .gz or .zst behind); or --format: {', '.join(Format)}",
    )


def _of_pictures(output: str, path: Path | None, form: Format | None, errors: str | None) -> Destination:
    """Pictures: files of a folder, with the lines that name them; or in OpenAI's lines, as its API has them."""
    if path is not None and _is_folder(output, path):
        form = form or Format.OPENAI
        if form in FOLDERS:
            raise usage_error(
                f"--format {form}: pictures are PNG files; --format is of the file that says which is whose: "
                f"{', '.join(sorted({Format.OPENAI, *TABLES}))}"
            )
        if form is Format.PARQUET:
            need_pyarrow(f"--format {form}")
        beside = Path(errors) if errors else path / "errors.jsonl"
        return Destination(path, form, beside, pictures=True, errors_named=errors is not None)
    form = form or _by_name(output, path)
    if form is not Format.OPENAI:
        what = f"--format {form}" if form else f"the suffix {PurePath(output).suffix!r}"
        raise usage_error(
            f"-o {output}: {what} has no place for pictures",
            hint="-o FOLDER/ for files, with --format csv or parquet for the file that says which is whose; "
            "or -o answers.jsonl for OpenAI's lines with b64_json in them",
        )
    if output.lower().endswith(".zst"):
        need_pyarrow(f"-o {output}")
    beside = Path("errors.jsonl") if path is None else _beside(path, form)
    return Destination(path, form, Path(errors) if errors else beside, errors_named=errors is not None)


def needed(url: Url, form: Format) -> dict[str, str]:
    """What each request must ask for, that the output can be made of its answer: subtitles are of timed segments."""
    return {"response_format": "verbose_json"} if url is Url.TRANSCRIPTIONS and form in SUBTITLES else {}


def format_of(output: str) -> Format | None:
    """What the name of an output says of its format; None: nothing."""
    return None if output == STDOUT else _by_name(output, Path(output))


def _by_name(output: str, path: Path | None) -> Format | None:
    if path is None or (path.exists() and not path.is_file() and not path.is_dir()):
        return Format.OPENAI  # stdout, a pipe
    if _is_folder(output, path):
        return Format.TXT
    return _BY_SUFFIX.get(suffix_of(output))


def _is_folder(output: str, path: Path) -> bool:
    """Whether it is one, or is called as one is."""
    return path.is_dir() or output.endswith("/") or not (path.suffix or path.exists())


def _stem(name: str) -> str:
    """`answers` of `answers.jsonl.gz`."""
    suffix = suffix_of(name)
    return name[: name.lower().rindex(suffix)] if suffix and not name.lower().startswith(suffix) else name


class Output:
    """Takes results in the order of the rows. As a context: all is there when it ends, nothing when it fails.

    `columns` are those of all rows (`Input.columns`), `job` is what the ids are made of. `pictures`: the folder in
    which the files are that answers name.
    """

    def __init__(
        self,
        where: Destination,
        *,
        job: str,
        url: Url,
        columns: Sequence[str] = (),
        pictures: Path | None = None,
    ) -> None:
        self.destination = where
        self.answered = self.failed = 0
        self._job = job
        self._errors: NewFile | None = None
        with told(where.path):
            if url is Url.IMAGES:
                assert pictures is not None
                self._writer = _picture_writer(where, job, columns, pictures)
            else:
                self._writer = _writer(where.path, where.format, job, url, columns)

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


def _writer(path: Path | None, form: Format, job: str, url: Url, columns: Sequence[str]) -> _Writer:
    match form:
        case Format.OPENAI:
            return _OpenAI(NewFile(path), job)
        case Format.JSONL:
            return _Jsonl(NewFile(path), url, columns)
        case Format.CSV | Format.TSV:
            return _Csv(NewFile(path), url, columns, "," if form is Format.CSV else "\t")
        case Format.PARQUET:
            return _Parquet(NewFile(path), url, columns)
        case _:
            assert path is not None
            return _Folder(path, url, form)


def _picture_writer(where: Destination, job: str, columns: Sequence[str], source: Path) -> _Writer:
    if not where.pictures:
        return _WithPictures(_writer(where.path, where.format, job, Url.IMAGES, columns), InLines(source))
    assert where.path is not None
    where.path.mkdir(exist_ok=True)
    name = "answers." + ("jsonl" if where.format is Format.OPENAI else where.format)
    lines = _writer(where.path / name, where.format, job, Url.IMAGES, columns)
    return _WithPictures(lines, AsFiles(source, where.path))


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


class _WithPictures(_Writer):
    """Lines, and the pictures that they speak of: in them, or as files."""

    def __init__(self, lines: _Writer, pictures: InLines | AsFiles) -> None:
        self._lines = lines
        self._place = pictures.place

    def write(self, result: Result) -> None:
        self._lines.write(self._place(result))

    def finish(self) -> None:
        self._lines.finish()

    def abandon(self) -> None:
        self._lines.abandon()


class _Folder(_Writer):
    """A file for each row, called as the row is: `talks/1.mp3` becomes `talks/1.srt`."""

    def __init__(self, folder: Path, url: Url, form: Format) -> None:
        self._folder = folder
        self._url = url
        self._form = form
        self._names = Names(str(form))
        folder.mkdir(exist_ok=True)

    def write(self, result: Result) -> None:
        (name,) = self._names.of(result)
        path = self._folder / name
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

    def finish(self) -> None:
        pass

    def abandon(self) -> None:
        pass
