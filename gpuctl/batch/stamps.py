"""Whether an input is as it was, without reading it. May import: batch.jobs, files, specs.remote_paths.

By names, sizes and times, as rsync and make do: what was written again is taken for changed, also where it is the same
text. `inputs.json` beside what is known of a job tells what the files were like that it read on this machine.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from gpuctl.batch import jobs
from gpuctl.files import write_private
from gpuctl.specs.remote_paths import is_remote

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from gpuctl.batch.jobs import Job
    from gpuctl.target import Target

_INPUTS = "inputs.json"


def stamps(inputs: Sequence[str], folder: Path) -> dict[str, str]:
    """Of each that is in files of this machine, as it was typed in `folder`, what changes when they do."""
    found = {}
    for typed in inputs:
        if typed == "-" or is_remote(typed):
            continue
        whole = hashlib.sha256()
        files = 0
        for path in _files(folder / typed):
            try:
                one = path.stat()
            except OSError:
                continue
            if stat.S_ISREG(one.st_mode):
                files += 1
                whole.update(f"{path}\0{one.st_size}\0{one.st_mtime_ns}\n".encode(errors="surrogateescape"))
        if files:
            found[typed] = whole.hexdigest()
    return found


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The inputs that are there both times, and not the same."""
    return [typed for typed, one in before.items() if now.get(typed, one) != one]


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        for folder, folders, names in os.walk(path):
            folders.sort()
            yield from (Path(folder, name) for name in sorted(names))
    elif path.exists():
        yield path
    else:
        yield from map(Path, sorted(glob.iglob(str(path), recursive=True)))  # noqa: PTH207 - of any folder


def save_inputs(target: Target, environment: str, name: str, stamps: Mapping[str, str]) -> None:
    """Keep what the files were like that a job read; what cannot be kept is not."""
    with contextlib.suppress(OSError):
        document = {"folder": str(Path.cwd()), "stamps": dict(stamps)}
        write_private(jobs.folder_of(target, environment, name) / _INPUTS, json.dumps(document))


def changed_inputs(target: Target, environment: str, name: str) -> list[str]:
    """The files that a job read on this machine, and that were written since."""
    kept = _inputs(target, environment, name)
    return [] if kept is None else changed(kept[1], stamps(list(kept[1]), kept[0]))


def files_of(target: Target, environment: str, name: str) -> Iterator[Path]:
    """The files of this machine that a job read, as far as they are there."""
    kept = _inputs(target, environment, name)
    if kept is not None:
        for typed in kept[1]:
            yield from _files(kept[0] / typed)


def _inputs(target: Target, environment: str, name: str) -> tuple[Path, dict[str, str]] | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        text = (jobs.folder_of(target, environment, name) / _INPUTS).read_text(encoding="utf-8")
        document = json.loads(text)
        return Path(document["folder"]), {str(typed): str(one) for typed, one in document["stamps"].items()}
    return None


def before_the_change(
    target: Target, environment: str, job: Job, now: Mapping[str, str]
) -> tuple[Job, list[str]] | None:
    """The last job of the same command on files that were changed since, and these; None: there is none."""
    for other in jobs.known(target, environment):
        if other.name == job.name or other.schedule is not None or _asks(other) != _asks(job):
            continue
        kept = _inputs(target, environment, other.name)
        if kept is not None and kept[0] == Path.cwd() and (files := changed(kept[1], now)):
            return other, files
    return None


# What only says how to show or to ask.
_TALK = frozenset({
    "run", "--yes", "-y", "--json", "--quiet", "-q", "--verbose", "-v", "--detach", "--events", "--overwrite",
})  # fmt: skip


def _asks(job: Job) -> tuple[str, ...]:
    return tuple(word for word in job.argv if word not in _TALK)
