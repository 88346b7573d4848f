"""The records of a file one by one: lines of JSON, rows of a table, lines of text, each with where it stands.

May import: errors, batch's formats, rows and sources; pyarrow for Parquet.
"""

from __future__ import annotations

import base64
import csv
import json
import math
import shutil
import tempfile
from collections import deque
from typing import TYPE_CHECKING, Any

from gpuctl.batch.formats import LOOKED_AT, Kind, json_object
from gpuctl.batch.rows import Problem
from gpuctl.batch.sources import BLOCK, LONGEST, need_pyarrow, not_text, numbered_lines
from gpuctl.errors import usage_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gpuctl.batch.sources import Source

    # Where it is (from 1, as an editor counts), what it is, and what is wrong with it.
    Record = tuple[int, Any, Problem | None]
    Lines = Iterator[tuple[int, bytes | None]]

_FIELD = 1 << 24  # characters of one field of a CSV file
_DEEPEST = (
    100  # lists and objects in each other: what reads or copies them on the way goes as deep into its stack
)


class Reader:
    """The records of one file. `columns` are all that there are, or, of JSONL, those of the first lines.

    There may be thousands of files: one that waits for its turn is neither open nor in memory.
    """

    def __init__(self, source: Source, kind: Kind) -> None:
        self.source = source
        self.kind = kind
        self.columns: tuple[str, ...] = ()
        self.urls: tuple[Any, ...] = ()  # which the first lines of OpenAI's Batch API name
        self._delimiter = ","
        self._pipe: Any = None  # Parquet from a pipe, which cannot be opened again
        if kind in (Kind.CSV, Kind.TSV):
            self._read_header()
        elif kind is Kind.PARQUET:
            file = _open_parquet(source)
            self.columns = tuple(file.schema_arrow.names)
            if source.once:
                self._pipe = file
            else:
                file.close()
        elif kind is Kind.LINES:
            self.columns = ("text",)
        else:
            objects = [
                value for value in map(json_object, source.head_lines()[:LOOKED_AT]) if value is not None
            ]
            self.columns = tuple(dict.fromkeys(name for value in objects for name in value))
            urls = [value["url"] for value in objects if isinstance(value.get("url"), str)]
            self.urls = tuple(dict.fromkeys(urls))
        source.head = b""
        repeated = sorted({name for name in self.columns if self.columns.count(name) > 1})
        if repeated:
            raise usage_error(
                f"{source.name}: several columns are called {repeated[0]!r}: each needs its own name"
            )

    def read(self, seen: Callable[[bytes], object]) -> Iterator[Record]:
        """All of them, in order. `seen` is shown what was read, so that one input can be told from another."""
        if self.kind is Kind.PARQUET:
            return self._rows_of_parquet(seen)
        lines = numbered_lines(self.source.open(), seen)
        if self.kind in (Kind.CSV, Kind.TSV):
            return self._rows_of_csv(lines)
        return _text_lines(lines) if self.kind is Kind.LINES else _json_lines(lines)

    # CSV and TSV

    def _read_header(self) -> None:
        csv.field_size_limit(_FIELD)
        text = self.source.head.decode(errors="replace").splitlines(keepends=True)
        delimiters = "\t" if self.kind is Kind.TSV else ",;\t"
        headers: dict[str, list[str]] = {}
        wrong = ""
        for one in delimiters:
            try:
                headers[one] = _first(csv.reader(text, delimiter=one, strict=True))
            except csv.Error as error:  # behind a name in quotes only the right one may stand
                wrong = wrong or _csv_says(error)
        if not headers:
            raise usage_error(f"{self.source.name}: the line with the names of the columns: {wrong}")
        self._delimiter = max(headers, key=lambda one: len(headers[one]))
        header = headers[self._delimiter]
        self.columns = tuple(name.strip() or f"column_{number}" for number, name in enumerate(header, 1))

    def _rows_of_csv(self, lines: Lines) -> Iterator[Record]:
        width = len(self.columns)
        taken: list[tuple[int, bytes | None]] = []  # the lines of this record
        back: deque[tuple[int, bytes | None]] = deque()  # lines of a record that was none
        wrong: list[Problem] = []

        def physical() -> Iterator[str]:
            while (item := back.popleft() if back else next(lines, None)) is not None:
                taken.append(item)
                try:
                    yield item[1].decode() if item[1] is not None else "\n"
                except UnicodeDecodeError:
                    wrong.append(_undecodable(item[1] or b""))
                    yield (item[1] or b"").decode(errors="replace")
                if item[1] is None:
                    wrong.append(TOO_LONG)

        def reader() -> Iterator[list[str]]:
            return csv.reader(physical(), delimiter=self._delimiter, strict=True)

        rows, header = reader(), True
        while True:
            taken.clear()
            wrong.clear()
            try:
                fields = next(rows, None)
            except csv.Error as error:
                # Only its first line is surely wrong. The next ones may be what a stray quote swallowed.
                yield taken[0][0], None, Problem("invalid_row", _csv_says(error))
                back.extendleft(reversed(taken[1:]))
                rows = reader()
                continue
            if fields is None:
                return
            if not fields:
                continue
            if header:
                header = False
                continue
            where = taken[0][0]
            if wrong:
                yield where, None, wrong[0]
            elif len(fields) != width:
                last = taken[-1][0]
                lines_of_it = f" (a quote joins lines {where} to {last})" if last > where else ""
                has = f"{len(fields)} field{'s' * (len(fields) != 1)}"
                says = f"{has}, where the first line names {width} column{'s' * (width != 1)}{lines_of_it}"
                yield where, None, Problem("invalid_row", says)
            else:
                yield where, dict(zip(self.columns, fields, strict=True)), None

    # Parquet

    def _rows_of_parquet(self, seen: Callable[[bytes], object]) -> Iterator[Record]:
        import pyarrow

        file = self._pipe or _open_parquet(self.source)
        schema, types = file.schema_arrow, pyarrow.types
        plain = (types.is_string, types.is_large_string, types.is_integer, types.is_boolean, types.is_null)
        other = [one.name for one in schema if not any(test(one.type) for test in plain)]
        number = 0
        try:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    for name in other:
                        row[name] = jsonable(row[name])
                    seen(json.dumps(row).encode())
                    yield number, row, None
        except pyarrow.ArrowException as error:
            raise OSError(str(error)) from None
        finally:
            file.close()


ENCODING = "--encoding says what it is, for example latin-1"
TOO_LONG = Problem("row_too_large", f"longer than {LONGEST >> 20} MiB: no row is")


def jsonable(value: Any) -> Any:
    """What a column of Parquet holds, as JSON has it: bytes as base64, times as ISO 8601, no number as null."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case bytes():
            return base64.b64encode(value).decode()
        case list() | tuple():
            return [jsonable(one) for one in value]
        case dict():
            return {str(key): jsonable(one) for key, one in value.items()}
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _open_parquet(source: Source) -> Any:
    need_pyarrow(f"{source.name}: Parquet")
    import pyarrow
    from pyarrow import parquet

    file: Any = source.path
    if source.once or source.compression:
        # Its index stands at its end: what cannot be sought in goes to a file that has no name.
        file = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the reader)
        with source.open_bytes() as stream:
            shutil.copyfileobj(stream, file, BLOCK)
    try:
        return parquet.ParquetFile(file, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise usage_error(f"{source.name}: not a whole Parquet file: {error}") from None


def _json_lines(lines: Lines) -> Iterator[Record]:
    # What `json.loads` does, without the half of its time that is not parsing.
    scan = json.JSONDecoder(parse_constant=_refuse_constant).scan_once  # type: ignore[attr-defined]
    for number, line in lines:
        if line is None:
            yield number, None, TOO_LONG
            continue
        try:
            text = line.decode().strip(" \t\r\n")
            if not text:
                continue
            value, end = scan(text, 0)
            if end != len(text):
                raise json.JSONDecodeError("Extra data", text, end)
            if text.count("{") + text.count("[") > _DEEPEST and _depth(value) > _DEEPEST:
                raise RecursionError
            if "\\ud" in text or "\\uD" in text:  # half of a character has no UTF-8
                json.dumps(value, ensure_ascii=False).encode()
        except UnicodeDecodeError:
            yield number, None, _undecodable(line)
        except UnicodeEncodeError:
            yield (
                number,
                None,
                Problem("invalid_json", "half of a character (a lone surrogate, \\ud800 to \\udfff)"),
            )
        except StopIteration as stop:  # this is how the scanner says it
            yield (
                number,
                None,
                Problem("invalid_json", f"not JSON: a value is missing at column {stop.value + 1}"),
            )
        except json.JSONDecodeError as error:
            yield number, None, Problem("invalid_json", f"not JSON: {error.msg} at column {error.colno}")
        except ValueError as error:
            yield number, None, Problem("invalid_json", f"not JSON: {error}")
        except RecursionError:
            yield number, None, Problem("invalid_json", "JSON that is nested too deep")
        else:
            if type(value) is dict:
                yield number, value, None
            else:
                yield number, None, Problem("invalid_row", f"a JSON object is needed, not {_called(value)}")


def _depth(value: Any) -> int:
    """How many lists and objects are in each other."""
    level, depth = [value], 0
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number there; null is")


def _called(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _text_lines(lines: Lines) -> Iterator[Record]:
    for number, line in lines:
        if line is None:
            yield number, None, TOO_LONG
            continue
        try:
            text = line.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            yield number, None, _undecodable(line)
            continue
        if text and not text.isspace():
            yield number, {"text": text}, None


def _undecodable(line: bytes) -> Problem:
    return Problem("wrong_encoding", f"{not_text(line)}; {ENCODING}")


def _csv_says(error: csv.Error) -> str:
    says = str(error)
    if says == "unexpected end of data":
        return "a quote is opened here and never closed"
    if "field larger than" in says:
        return f"a field of more than {_FIELD >> 20} million characters: maybe a quote that is never closed"
    if "new-line character" in says:
        return "a carriage return (\\r) without a line feed, outside of quotes: tr '\\r' '\\n' makes lines of them"
    if "expected after" in says:
        return "not CSV: a quote that stands neither around a whole field nor doubled within one"
    return f"not CSV: {says}"


def _first(rows: Iterator[list[str]]) -> list[str]:
    return next((row for row in rows if row), [])
