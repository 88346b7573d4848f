"""Jobs that were started: what is known of each on this machine. May import: errors, files, paths, target.

`STATE/batch/TARGET/ENVIRONMENT/JOB/` has `job.json`, of which the job's Volume has a copy, and `job.py`, the file that
was deployed. A job of another machine has neither, and is known by its Volume alone. `inputs.json`: see `stamps`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gpuctl.files import write_private
from gpuctl.paths import state_dir

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from gpuctl.batch.remote import Remote
    from gpuctl.target import Target

FILE_NAME = "job.py"
_RUN = "run.json"  # the last that was started from here
_END = "end.json"
SCHEMA = 1


@dataclass(frozen=True)
class Job:
    """What a job is to do. Holds no credential. Times are ISO 8601 in UTC."""

    name: str
    work: str  # the model's repository, or the user's function
    url: str
    rows: int
    bad: int  # rows of the input that can have no answer
    copies: int  # rows that are answered by another's answer, and are in no shard
    shards: int
    digest: str  # sha256 of the rows
    inputs: tuple[str, ...]  # as they were typed
    output: str
    errors: str | None
    format: str
    columns: tuple[str, ...]  # of the input, where the output repeats them
    gpu: str | None
    argv: tuple[str, ...]
    created_at: str
    gpuctl_version: str
    schedule: dict[str, Any] | None = None  # specs.schedule's document: the rows are read anew for each run
    stopped_at: str | None = None  # when the schedule was ended
    changes: dict[str, str] = field(default_factory=dict)  # options that `resume` gave it: {"max_cost": "5"}
    schema: int = SCHEMA

    def document(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Job | None:
        """The inverse of `document`; fields that a later gpuctl added are passed over. None: it is no job's."""
        known = {field.name for field in dataclasses.fields(cls)}
        values = {key: value for key, value in document.items() if key in known}
        try:
            values["inputs"] = tuple(values["inputs"])
            values["columns"] = tuple(values["columns"])
            values["argv"] = tuple(values["argv"])
            return cls(**values)
        except (KeyError, TypeError):
            return None


def folder_of(target: Target, environment: str, job: str) -> Path:
    return state_dir() / "batch" / target.value / environment / job


def save(target: Target, environment: str, job: Job, source: str) -> Path:
    """Keep a job, and the file that is to be deployed; where that is."""
    folder = folder_of(target, environment, job.name)
    write_private(folder / FILE_NAME, source)
    keep(target, environment, job)
    return folder / FILE_NAME


def keep(target: Target, environment: str, job: Job) -> None:
    """Keep what is known of a job whose file is here."""
    write_private(folder_of(target, environment, job.name) / "job.json", json.dumps(job.document(), indent=2))


def read(remote: Remote) -> Job | None:
    """What the job's Volume says of it."""
    document = remote.read_json("job.json")
    return None if document is None else Job.from_document(document)


def get(target: Target, environment: str, name: str) -> Job | None:
    with contextlib.suppress(OSError, ValueError):
        text = (folder_of(target, environment, name) / "job.json").read_text(encoding="utf-8")
        return Job.from_document(json.loads(text))
    return None


def save_start(target: Target, environment: str, name: str, run: str) -> None:
    """Keep that a driver works on a job; what cannot be kept is not."""
    with contextlib.suppress(OSError):
        write_private(folder_of(target, environment, name) / _RUN, json.dumps({"run": run}))


def was_started(target: Target, environment: str, name: str) -> bool:
    """Whether this machine started a job, of those that it knows."""
    return (folder_of(target, environment, name) / _RUN).exists()


def save_end(target: Target, environment: str, name: str, status: Mapping[str, Any]) -> None:
    """Keep how a job ended, of one that was started here; what cannot be kept is not."""
    folder = folder_of(target, environment, name)
    if (folder / "job.json").exists():
        with contextlib.suppress(OSError):
            write_private(folder / _END, json.dumps(dict(status)))


def ended(target: Target, environment: str) -> Iterator[tuple[Job, dict[str, Any]]]:
    """The jobs of this machine that were followed to their end, and how each ended; the newest first."""
    for job in known(target, environment):
        with contextlib.suppress(OSError, ValueError):
            text = (folder_of(target, environment, job.name) / _END).read_text(encoding="utf-8")
            status = json.loads(text)
            if isinstance(status, dict):
                yield job, status


def known(target: Target, environment: str) -> Iterator[Job]:
    """The jobs of this machine, newest first."""
    root = state_dir() / "batch" / target.value / environment
    jobs = [get(target, environment, folder.name) for folder in root.iterdir()] if root.is_dir() else []
    yield from sorted((job for job in jobs if job), key=lambda job: job.created_at, reverse=True)


def elsewhere(name: str, target: Target, environment: str) -> list[tuple[Target, str]]:
    """Where else this machine started a job of that name."""
    found = []
    for other in type(target):
        root = state_dir() / "batch" / other.value
        for folder in sorted(root.iterdir()) if root.is_dir() else ():
            place = (other, folder.name)
            if place != (target, environment) and get(*place, name) is not None:
                found.append(place)
    return found


def forget(target: Target, environment: str, name: str) -> None:
    shutil.rmtree(folder_of(target, environment, name), ignore_errors=True)
