"""A Parquet file written as rows come, in little memory, though a column's type is only known at the end.

Types are what the rows so far need; where a later one needs more (a text among numbers), what was written is written
again with the wider type. May import: errors, batch's answers and sources; pyarrow.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from array import array
from typing import TYPE_CHECKING, Any, BinaryIO

from gpuctl.batch.answers import as_text
from gpuctl.batch.sources import BLOCK, need_pyarrow
from gpuctl.errors import GpuctlError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_ROWS, _CELLS = 20_000, 1 << 24  # of a row group: rows, and bytes of text and of embeddings
# What each type fits into, beside itself. `long` is for numbers that a float would round.
_FITS: dict[str, tuple[str, ...]] = {
    "null": ("null", "bool", "int", "long", "float", "text"),
    "bool": ("bool", "text"),
    "int": ("int", "long", "float", "text"),
    "long": ("long", "text"),
    "float": ("float", "text"),
    "text": ("text",),
}


class ParquetTable:
    """Rows as lists of cells, in the order of `columns`; a column of `embeddings` has lists of numbers."""

    def __init__(self, columns: Sequence[str], embeddings: str | None, folder: Path | None) -> None:
        need_pyarrow("Parquet")
        self._columns = tuple(columns)
        self._folder = folder
        self._types = {name: "floats" if name == embeddings else "null" for name in columns}
        self._cells: dict[str, list[Any]] = {name: [] for name in columns}
        self._rows = self._size = 0
        self._file: Any = None
        self._writer: Any = None

    def write(self, cells: Sequence[Any]) -> None:
        for name, cell in zip(self._columns, cells, strict=True):
            value = cell
            if self._types[name] == "floats":
                value = _vector(cell)
            elif isinstance(cell, dict | list) or (isinstance(cell, int) and not -(2**63) <= cell < 2**63):
                value = as_text(cell)
            self._cells[name].append(value)
            self._size += 4 * len(value) if isinstance(value, str | array) else 8
        self._rows += 1
        if self._rows >= _ROWS or self._size >= _CELLS:
            self._flush()

    def finish(self, stream: BinaryIO) -> None:
        """All rows, as a file, into `stream`."""
        self._flush()
        if self._writer is None:
            self._open()
        self._writer.close()
        self._file.seek(0)
        shutil.copyfileobj(self._file, stream, BLOCK)
        self.close()

    def close(self) -> None:
        """Give up what is not copied: closing writes what waits, and what fails there no longer matters."""
        for one in (self._writer, self._file):
            if one is not None:
                with contextlib.suppress(Exception):
                    one.close()

    def _flush(self) -> None:
        if not self._rows:
            return
        import pyarrow

        before = self._schema()
        for name, cells in self._cells.items():
            if self._types[name] != "floats":
                self._types[name] = _wider(self._types[name], cells)
        if self._writer is None:
            self._open()
        elif before != self._schema():
            self._write_again()
        schema = self._schema()
        arrays = [
            _lists(cells)
            if self._types[name] == "floats"
            else pyarrow.array(_as(self._types[name], cells), type=kind)
            for (name, cells), kind in zip(self._cells.items(), schema.types, strict=True)
        ]
        self._writer.write_batch(pyarrow.record_batch(arrays, schema=schema))
        for cells in self._cells.values():
            cells.clear()
        self._rows = self._size = 0

    def _schema(self) -> Any:
        import pyarrow

        types = {
            "null": pyarrow.string(),  # a column of nothing: text, as most are
            "bool": pyarrow.bool_(),
            "int": pyarrow.int64(),
            "long": pyarrow.int64(),
            "float": pyarrow.float64(),
            "text": pyarrow.string(),
            "floats": pyarrow.list_(pyarrow.float32()),
        }
        return pyarrow.schema([(name, types[kind]) for name, kind in self._types.items()])

    def _open(self) -> None:
        from pyarrow import parquet

        # Without a name, on the disk where the answers go: nothing of it stays, however this ends.
        self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        self._writer = parquet.ParquetWriter(self._file, self._schema(), compression="zstd")

    def _write_again(self) -> None:
        from pyarrow import parquet

        self._writer.close()
        with self._file as narrow:
            self._open()
            narrow.seek(0)
            for batch in parquet.ParquetFile(narrow, pre_buffer=False).iter_batches(batch_size=_ROWS):
                self._writer.write_batch(batch.cast(self._schema()))


def _wider(kind: str, cells: Sequence[Any]) -> str:
    """The type that takes these cells, too."""
    for needed in {_type(cell) for cell in cells}:
        if kind in _FITS[needed]:
            continue
        kind = needed if needed in _FITS[kind] else "text"
    return kind


def _type(cell: Any) -> str:
    if type(cell) is int and not -(2**53) <= cell <= 2**53:
        return "long"
    return {str: "text", float: "float", int: "int", bool: "bool"}.get(type(cell), "null")


def _as(kind: str, cells: list[Any]) -> list[Any]:
    if kind != "text":
        return cells
    # Half of a character has no UTF-8.
    return [None if cell is None else as_text(cell).encode(errors="replace").decode() for cell in cells]


def _vector(cell: Any) -> array[float] | None:
    """4 bytes a number, as models compute them, where a list of Python's numbers takes 32."""
    if cell is None:
        return None
    if not isinstance(cell, list) or (cell and isinstance(cell[0], list)):
        what = "several embeddings" if isinstance(cell, list) else "an embedding as base64"
        raise GpuctlError(
            f"a row was answered by {what}: no column of Parquet holds that",
            hint="-o FILE.jsonl does: the answers are kept, and `gpuctl batch fetch JOB -o FILE.jsonl` gets them",
        )
    return array("f", [float("nan") if number is None else number for number in cell])


def _lists(vectors: list[array[float] | None]) -> Any:
    """Lists of numbers without a Python object for each number."""
    import pyarrow

    numbers, ends = array("f"), [0]
    for vector in vectors:
        numbers.extend(vector or ())
        ends.append(len(numbers))
    # A list that starts nowhere is null.
    offsets = [
        None if vector is None else start for vector, start in zip([*vectors, array("f")], ends, strict=True)
    ]
    values = pyarrow.Array.from_buffers(pyarrow.float32(), len(numbers), [None, pyarrow.py_buffer(numbers)])
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets, type=pyarrow.int32()), values)
