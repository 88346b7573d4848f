"""The results of a job, as its Volume has them, in the order of the rows. May import: answers, rows, errors."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING, Any

from gpuctl.batch.answers import dumps
from gpuctl.batch.rows import Problem, Result
from gpuctl.errors import GpuctlError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def read_results(folder: Path) -> Iterator[Result]:
    """The results of all shards in `folder`, one at a time."""
    for file in sorted(folder.glob("*.jsonl.gz")):
        try:
            with gzip.open(file, "rb") as lines:
                for line in lines:
                    yield as_result(json.loads(line))
        except (ValueError, KeyError, TypeError, EOFError, gzip.BadGzipFile) as error:
            raise GpuctlError(f"{file.name} of the job's answers is damaged: {error}") from error


def as_result(line: dict[str, Any]) -> Result:
    error = line.get("error")
    return Result(
        number=line["row"],
        id=line["id"],
        answer=line.get("answer"),
        error=None if error is None else Problem(error["code"], error["message"]),
        columns=line.get("columns"),
    )


def as_line(result: Result) -> str:
    """The inverse of `as_result`, as JSON, without the columns."""
    line: dict[str, Any] = {"row": result.number, "id": result.id}
    if result.error is None:
        line["answer"] = result.answer
    else:
        line["error"] = {"code": result.error.code, "message": result.error.message}
    return dumps(line)
