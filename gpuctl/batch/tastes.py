"""What a job that has ended says of one that is to start: the same work on fewer rows of the same input. May import:
batch (estimate's values, jobs).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpuctl.batch.estimate import Measured

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from gpuctl.batch.jobs import Job

# Options that change how much is done, or where it goes, and not how long a row takes.
_WITH_VALUE = {
    "--limit", "--output", "--errors", "--name", "--max-containers", "--max-cost", "--retries", "--tag",
    "--startup-timeout",
}  # fmt: skip
_ALONE = {
    "--yes", "-y", "--json", "--quiet", "-q", "--verbose", "-v", "--detach", "--events", "--overwrite", "--strict",
    "--force", "--dry-run", "--local", "run",
}  # fmt: skip


def taste_of(job: Job, ended: Iterable[tuple[Job, Mapping[str, Any]]]) -> Measured | None:
    """The one with the most rows of those that tell how long a row of `job` takes; None: there is none."""
    found = [measured for other, status in ended if (measured := _measured(job, other, status)) is not None]
    return max(found, key=lambda one: one.rows, default=None)


def _measured(job: Job, other: Job, status: Mapping[str, Any]) -> Measured | None:
    same = (job.work, job.url, job.inputs, job.gpu) == (other.work, other.url, other.inputs, other.gpu)
    if not same or other.rows >= job.rows or list(_core(job.argv)) != list(_core(other.argv)):
        return None
    working, started = status.get("working_seconds"), status.get("containers_started")
    rows = status.get("done", 0) + status.get("failed", 0) - other.bad
    if status.get("state") != "done" or not working or not started or rows < 1:
        return None
    return Measured(
        job=other.name,
        rows=rows,
        starting=max(0.0, status["container_seconds"] - working) / started,
        working=working,
        busy=(status.get("busy_seconds", 0.0), status.get("busy_rows", 0)),
    )


def _core(argv: Sequence[str]) -> Iterator[str]:
    """The words of a command that say what is done to each row."""
    words = iter(argv)
    for word in words:
        if word == "--":
            yield word
            yield from words
        elif word == "-o" or word in _WITH_VALUE:
            next(words, None)
        elif not (
            word in _ALONE
            or word.partition("=")[0] in _WITH_VALUE
            or (word.startswith("-o") and not word.startswith("--"))
        ):
            yield word
