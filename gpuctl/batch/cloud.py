"""Read rows and write answers where they are, in the cloud. This runs in a container of the job, not on the user's
machine: it travels there in `code/gpuctl.zip` of the job's Volume, with `TRAVELS`, so it may import nothing else of
ours: errors, files, paths, batch's inputs, outputs, shards, results, copies, jobs.

The paths of the plan are those that the user typed: in a folder of its own, `s3://bucket/rows.jsonl` is a path like any
other (of a folder called `s3:`) once a link leads from there to where the bucket is mounted. So every message names
files as the user knows them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpuctl.batch.copies import FILE_NAME as COPIES
from gpuctl.batch.copies import with_copies
from gpuctl.batch.errors import Errors
from gpuctl.batch.formats import Kind
from gpuctl.batch.inputs import open_input, strict
from gpuctl.batch.jobs import Job
from gpuctl.batch.outputs import Format, Output, destination, needed
from gpuctl.batch.results import read_results
from gpuctl.batch.rows import Url
from gpuctl.batch.shards import stage
from gpuctl.errors import EXIT_USAGE, GpuctlError, usage_error

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from gpuctl.batch.outputs import Destination
    from gpuctl.batch.shards import Staged

PLAN = "code/plan.json"
CODE = "code/gpuctl.zip"
# What of this package travels, beside all of `batch` that this module needs.
TRAVELS = (
    "__init__.py",
    "errors.py",
    "files.py",
    "paths.py",
    *(
        f"batch/{name}.py"
        for name in (
            "__init__",
            "answers",
            "asking",
            "cloud",
            "copies",
            "errors",
            "filenames",
            "finding",
            "formats",
            "inputs",
            "jobs",
            "newfile",
            "outputs",
            "parquet",
            "pictures",
            "prompts",
            "readers",
            "requests",
            "results",
            "rows",
            "seen",
            "shards",
            "sources",
        )
    ),
)

_COMMONEST = 5  # errors that a summary names
_CHUNK = 8 << 20  # bytes that are written at once
_SLASH = re.compile(r"\b(s3|gs|volume):/(?=[^/])")


def run(
    step: str, volume: str, data: str, mounts: Mapping[str, Mapping[str, str]], stamp: str = ""
) -> dict[str, Any]:
    """Do a step of a job: `begin` (refuse an output that exists, read the rows), `check` (whether the rows are still
    those that were read), `publish` (write the answers where they belong).

    `volume` is where the job's Volume is, `data` the folder in it of this run; `mounts` says for `read` and `write`
    what is where: `{"s3://bucket/folder": "/mnt/in-0"}`. What is wrong with the input or the output comes back as
    `{"problems": [...], "hint": ..., "usage": ...}`; what may go better next time is raised.
    """
    plan = json.loads((Path(volume) / PLAN).read_bytes())
    steps = {"begin": _begin, "check": _check, "publish": _publish}
    begun = Path(data) / "begun"
    try:
        if step == "begin" and mounts["write"] and not plan["overwrite"] and not begun.exists():
            with _paths(mounts["write"]):
                _destination(plan, stamp).check(overwrite=False)
        with _paths(mounts["write" if step == "publish" else "read"]):
            told = steps[step](plan, Path(data), stamp)
        if step == "begin" and Path(data).is_dir():
            begun.touch()
        return told
    except GpuctlError as error:
        return {
            "problems": [_named(problem) for problem in error.problems],
            "hint": None if error.hint is None else _named(error.hint),
            "usage": error.exit_code == EXIT_USAGE,
        }


@contextlib.contextmanager
def _paths(mounts: Mapping[str, str]) -> Iterator[None]:
    """A working directory from which the users' paths lead to where things are."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="gpuctl-paths-") as folder:
        for uri, there in mounts.items():
            link = Path(folder) / uri
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(there)
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def _named(text: str) -> str:
    """A path as the user wrote it: pathlib takes one of two slashes away."""
    return _SLASH.sub(r"\1://", text)


# -- the rows


def _begin(plan: Mapping[str, Any], data: Path, stamp: str) -> dict[str, Any]:
    """Read the rows into the folder of the run, `job.json` last; nothing to do where that is there."""
    if not plan["reads"] or (data / "job.json").exists():
        return {}
    with tempfile.TemporaryDirectory(prefix="gpuctl-rows-") as scratch:
        job, staged = _read(plan, Path(scratch) / "job")
        if plan["scheduled"] and _last_digest(data.parent, stamp) == staged.digest:
            return {"unchanged": True, "rows": staged.rows}
        shutil.rmtree(data / "input", ignore_errors=True)  # of an attempt that was cut short
        shutil.copytree(staged.folder, data, dirs_exist_ok=True)
        _write_whole(data / "job.json", job.document())
    return {"rows": staged.rows}


def _check(plan: Mapping[str, Any], data: Path, _stamp: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="gpuctl-rows-") as scratch:
        job, _ = _read(plan, Path(scratch) / "job")
    before = Job.from_document(json.loads((data / "job.json").read_bytes()))
    return {"same": before is not None and before.digest == job.digest, "rows": job.rows}


def _read(plan: Mapping[str, Any], folder: Path) -> tuple[Job, Staged]:
    """The rows as shards in `folder`, which is made, and the job that they are."""
    form = None if plan["format"] is None else Format(plan["format"])
    output = str(plan["job"]["output"])
    like = destination(output, url=Url.TRANSCRIPTIONS, form=form)
    rows = open_input(
        plan["job"]["inputs"],
        kind=None if plan["kind"] is None else Kind(plan["kind"]),
        url=None if plan["url"] is None else Url(plan["url"]),
        prompt=plan["prompt"],
        system=plan["system"],
        messages_column=plan["messages_column"],
        model=plan["job"]["work"],
        models=plan["models"] or (),
        encoding=plan["encoding"],
        keep_columns=like.columns,
    )
    if _engine(rows.url) != _engine(Url(plan["made_for"])):
        task = rows.url.rpartition("/")[2]
        raise usage_error(
            f"{', '.join(plan['job']['inputs'])}: the rows ask for {rows.url}, and the job was made for "
            f"{plan['made_for']}",
            hint=f"--task {task}: what is read in the cloud is not known when the job is made",
        )
    where = destination(output, url=rows.url, form=form)
    print(f"[batch] {_named(rows.describe())}", flush=True)
    staged = stage(
        strict(rows) if plan["strict"] else rows,
        folder,
        containers=plan["containers"],
        defaults={**needed(rows.url, where.format), **plan["defaults"]},
        limit=plan["limit"],
        dedupe=plan["dedupe"],
        models=plan["models"],
    )
    if not staged.rows:
        raise usage_error(f"INPUT: {', '.join(plan['job']['inputs'])} has no rows")
    for warning in rows.warnings():
        print(f"[batch] {warning}", flush=True)
    job = Job.from_document(
        {
            **plan["job"],
            "url": rows.url.value,
            "rows": staged.rows,
            "bad": staged.bad,
            "copies": staged.copies,
            "shards": staged.shards,
            "digest": staged.digest,
            "format": where.format.value,
            "columns": rows.columns,
        }
    )
    assert job is not None
    return job, staged


def _engine(url: Url) -> Url:
    """What the engine is started for: it writes, of whatever kind, unless that is something of its own."""
    return Url.CHAT if url is Url.COMPLETIONS else url


def _last_digest(runs: Path, stamp: str) -> str | None:
    """Of what the last run before this that ended was made of."""
    for folder in sorted(runs.iterdir(), reverse=True) if runs.is_dir() else ():
        if folder.name >= stamp:
            continue
        with contextlib.suppress(OSError, ValueError, KeyError):
            if json.loads((folder / "status.json").read_bytes())["state"] == "done":
                return str(json.loads((folder / "job.json").read_bytes())["digest"])
    return None


# -- the answers


def _destination(plan: Mapping[str, Any], stamp: str, job: Job | None = None) -> Destination:
    """Where the answers of a run belong; the folder of that is made."""
    output, errors = (
        None if text is None else with_stamp(str(text), stamp)
        for text in (plan["job"]["output"], plan["job"]["errors"])
    )
    assert output is not None
    text = job.format if job is not None else plan["format"]
    form = None if text is None else Format(text)
    made_for = (
        Url.IMAGES if plan["made_for"] == Url.IMAGES else Url.TRANSCRIPTIONS
    )  # any format can be of those
    url = Url(job.url) if job is not None else made_for
    where = destination(output, url=url, form=form, errors=errors)
    assert where.path is not None
    for path in (where.path, where.errors):
        path.parent.mkdir(parents=True, exist_ok=True)
    return where


def with_stamp(text: str, stamp: str) -> str:
    """`{time}` and `{date}` of an output are those of the run `20261128T000000Z`."""
    if not stamp:
        return text
    date = f"{stamp[:4]}-{stamp[4:6]}-{stamp[6:8]}"
    return text.replace("{time}", stamp).replace("{date}", date)


def _publish(plan: Mapping[str, Any], data: Path, stamp: str) -> dict[str, Any]:
    """Write the answers and the errors, and say how many. Written again, they are the same."""
    job = Job.from_document(json.loads((data / "job.json").read_bytes()))
    assert job is not None
    where = _destination(plan, stamp, job)
    assert where.path is not None
    errors = Errors()
    with tempfile.TemporaryDirectory(prefix="gpuctl-answers-") as scratch:
        here = dataclasses.replace(
            where, path=Path(scratch) / where.path.name, errors=Path(scratch) / f"errors-{where.errors.name}"
        )
        with Output(here, job=job.name, url=Url(job.url), columns=job.columns, pictures=data) as output:
            if job.copies:
                shutil.copyfile(data / COPIES, Path(scratch) / COPIES)
            results = read_results(data / "answers")
            for result in with_copies(results, Path(scratch)) if job.copies else results:
                if result.error is not None:
                    errors.add(result.error)
                output.write(result)
        assert here.path is not None
        buckets = plan["output_in_bucket"]
        if here.errors.exists():
            _place(here.errors, where.errors, in_bucket=buckets)
        else:
            _remove(where.errors)
        if where.folder:
            for file in sorted(path for path in here.path.rglob("*") if path.is_file()):
                _place(file, where.path / file.relative_to(here.path), in_bucket=buckets)
        else:
            _place(here.path, where.path, in_bucket=buckets)
    told = {
        "output": _named(str(where.path)),
        "errors": _named(str(where.errors)) if output.failed else None,
        "done": output.answered,
        "failed": output.failed,
        "commonest": errors.commonest(_COMMONEST),
    }
    _write_whole(data / "published.json", told)
    return told


def _place(source: Path, there: Path, *, in_bucket: bool) -> None:
    """Copy a file to where it belongs, whole or not at all: in a Volume under another name first; an object of a
    bucket, which can be neither renamed nor added to, is written in one go, from its start to its end, and is there
    (or replaced) when it is closed. Raises OSError.
    """
    there.parent.mkdir(parents=True, exist_ok=True)
    to = there if in_bucket else there.with_name(f".{there.name[:200]}.part")
    with source.open("rb") as content, to.open("wb") as file:
        shutil.copyfileobj(content, file, _CHUNK)
        file.flush()
        if not in_bucket:
            os.fsync(file.fileno())
    if to != there:
        to.replace(there)


def _remove(file: Path) -> None:
    """The errors of an earlier run, which these answers replace; where nothing may be deleted, it is emptied."""
    try:
        file.unlink(missing_ok=True)
    except OSError:
        file.write_bytes(b"")


def _write_whole(file: Path, document: Mapping[str, Any]) -> None:
    part = file.with_name(f".{file.name}.part")
    with part.open("wb") as opened:
        opened.write(json.dumps(document).encode())
        opened.flush()
        os.fsync(opened.fileno())
    part.replace(file)
