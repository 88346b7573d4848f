"""The answers of a job, as its Volume has them, in the order of the rows. May import: batch.rows, errors."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING

from gpuctl.batch.rows import Problem, Result
from gpuctl.errors import GpuctlError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def read_results(folder: Path) -> Iterator[Result]:
    """The results of all shards in `folder`, one at a time."""
    for file in sorted(folder.glob("*.jsonl.gz")):
        with gzip.open(file, "rb") as lines:
            for line in lines:
                yield _result(file, line)


def _result(file: Path, line: bytes) -> Result:
    try:
        found = json.loads(line)
        error = found.get("error")
        return Result(
            number=found["row"],
            id=found["id"],
            answer=found.get("answer"),
            error=None if error is None else Problem(error["code"], error["message"]),
            columns=found.get("columns"),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise GpuctlError(f"{file.name} of the job's answers is damaged: {error}") from error
