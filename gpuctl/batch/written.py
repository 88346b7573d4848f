"""What this machine wrote as a job's answers. May import: batch.jobs, batch.outputs (values), batch.stamps, files.

`output.json` beside what is known of a job tells what the files were like. As long as they still are, nothing but
answers of that job is in them, which it has: it may write them again, all of them in place of some.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from gpuctl.batch import jobs
from gpuctl.batch.stamps import stamps
from gpuctl.files import write_private

if TYPE_CHECKING:
    from gpuctl.batch.outputs import Destination
    from gpuctl.target import Target

_WRITTEN = "output.json"
_KEPT = 20  # outputs of a job, the newest


def remember(target: Target, environment: str, name: str, where: Destination) -> None:
    """Keep what was written; what cannot be kept is not."""
    now = _stamp(where)
    if now is None:
        return
    with contextlib.suppress(OSError):
        path, stamp = now
        kept = {**_kept(target, environment, name)}
        kept.pop(path, None)
        newest = dict([*kept.items(), (path, stamp)][-_KEPT:])
        write_private(jobs.folder_of(target, environment, name) / _WRITTEN, json.dumps(newest))


def wrote(target: Target, environment: str, name: str, where: Destination) -> bool:
    """Whether what is there is what was written of this job."""
    now = _stamp(where)
    return now is not None and _kept(target, environment, name).get(now[0]) == now[1]


def writer(target: Target, environment: str, where: Destination) -> str | None:
    """The job of which the answers are that are there."""
    for job in jobs.known(target, environment):
        if wrote(target, environment, job.name, where):
            return job.name
    return None


def _stamp(where: Destination) -> tuple[str, str] | None:
    if where.path is None:
        return None
    path = str(where.path.absolute())
    found = stamps([path], Path("/"))
    return (path, found[path]) if path in found else None


def _kept(target: Target, environment: str, name: str) -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError):
        document = json.loads(
            (jobs.folder_of(target, environment, name) / _WRITTEN).read_text(encoding="utf-8")
        )
        if isinstance(document, dict):
            return {str(path): str(stamp) for path, stamp in document.items()}
    return {}
