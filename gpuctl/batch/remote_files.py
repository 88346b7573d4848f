"""Jobs whose rows or answers are in the cloud: what this machine does for them. May import: everything of `batch`, and
errors, paths, plan, reach, records, specs, target.

The rows are read where they are, by the same code as here: `cloud`, which travels to the job's Volume in a zip, with a
plan of what to do. So the rendered file needs gpuctl no more than that of another job does, where the rows travel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import re
import zipfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gpuctl
from gpuctl import __version__
from gpuctl.batch import jobs
from gpuctl.batch.cloud import CODE, PLAN, TRAVELS
from gpuctl.batch.jobs import Job
from gpuctl.batch.render import render_batch
from gpuctl.batch.rows import Url
from gpuctl.batch.run import Prepared, Summary, asked, ended_in_run, go_on, staging, started
from gpuctl.batch.shards import Staged
from gpuctl.cost import usd
from gpuctl.errors import GpuctlError, usage_error
from gpuctl.plan import command_of
from gpuctl.reach import environment_name, own, reach
from gpuctl.records import now
from gpuctl.specs import names
from gpuctl.specs.batch import LONGEST_NAME, PREFIX
from gpuctl.specs.engine_args import adapters
from gpuctl.specs.remote_paths import VOLUME, is_remote, parse
from gpuctl.target import Target

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from gpuctl.batch.plan import Decided
    from gpuctl.batch.remote import Remote
    from gpuctl.cli.console import Console
    from gpuctl.modal_cli import Runner
    from gpuctl.specs.batch import BatchSpec

_ABSENT = re.compile(r"not found|no such file|does not exist|No Volume named", re.IGNORECASE)


# -- what travels


def put_code(folder: Path, spec: BatchSpec, job: Job, *, made_for: Url) -> None:
    """Write into `folder`, which is uploaded, what reads the rows and writes the answers, and the plan of that."""
    code, plan = folder / CODE, folder / PLAN
    code.parent.mkdir(parents=True, exist_ok=True)
    code.write_bytes(_zipped())
    plan.write_text(json.dumps(_plan(spec, job, made_for), indent=1), encoding="utf-8")


def _zipped() -> bytes:
    """The modules that travel. The same code is the same bytes, which are not uploaded twice."""
    package = Path(gpuctl.__file__).parent
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in TRAVELS:
            entry = zipfile.ZipInfo(f"gpuctl/{name}", (2026, 1, 1, 0, 0, 0))
            archive.writestr(entry, (package / name).read_bytes(), zipfile.ZIP_DEFLATED)
    return content.getvalue()


def _plan(spec: BatchSpec, job: Job, made_for: Url) -> dict[str, Any]:
    """What `cloud.run` is to do; all of it is JSON."""
    return {
        "reads": spec.remote_input,
        "scheduled": spec.schedule is not None,
        "overwrite": spec.overwrite or spec.schedule is not None,
        "output_in_bucket": is_remote(spec.output) and parse("--output", spec.output).in_bucket,
        "kind": spec.input_format,
        "url": url.value if (url := asked(spec)) else Url.IMAGES if made_for is Url.IMAGES else None,
        "made_for": made_for.value,
        "prompt": spec.prompt,
        "system": spec.system,
        "messages_column": spec.messages_column,
        "encoding": spec.encoding,
        "strict": spec.strict,
        "limit": spec.limit,
        "dedupe": spec.dedupe,
        "defaults": spec.defaults(made_for),
        "containers": spec.max_containers,
        "models": None
        if spec.model is None
        else sorted({*spec.model.served_names, *adapters(spec.engine_args)}),
        "format": spec.format,
        "job": job.document(),
    }


# -- a job whose rows are in the cloud


@contextlib.contextmanager
def prepared(decided: Decided, *, argv: Sequence[str], console: Console) -> Iterator[Prepared]:
    """A job that is ready to be started, its rows still where they are: all that is known of them is where that is."""
    from gpuctl.batch.outputs import Format, destination

    spec = decided.spec
    url = asked(spec, decided.found) or Url.CHAT
    form = None if spec.format is None else Format(spec.format)
    where = destination(spec.output, url=url, form=form, errors=spec.errors)
    if not spec.remote_output:
        where.check(overwrite=spec.overwrite)
    name = spec.name or _name(spec)
    if f"{PREFIX}{name}" in {mount.place for mounts in spec.mounts for mount in mounts}:
        raise usage_error(
            f"INPUT: volume://{PREFIX}{name} is the job's own Volume; give the job another --name"
        )
    source = render_batch(
        spec,
        job=name,
        url=url,
        usd_per_second=decided.usd_per_second,
        argv=tuple(command_of(argv, spec.target)),
        head=decided.head,
    )
    job = Job(
        name=name,
        work=spec.title,
        url=url.value,
        rows=0,
        bad=0,
        copies=0,
        shards=0,
        digest="",
        inputs=spec.inputs,
        output=spec.output,
        errors=spec.errors,
        format=where.format.value,
        columns=(),
        gpu=str(spec.gpu) if spec.gpu else None,
        argv=tuple(argv),
        created_at=now(),
        gpuctl_version=__version__,
        schedule=None if spec.schedule is None else spec.schedule.document(),
    )
    console.say(f"rows: {', '.join(spec.inputs)}, read in the cloud")
    with staging() as folder:
        (folder / "job").mkdir()
        put_code(folder / "job", spec, job, made_for=url)
        yield Prepared(job, Staged(folder / "job"), source)


def _name(spec: BatchSpec) -> str:
    """The name of a job that was given none: the same for the same work on what is in the same place."""
    requests = (spec.prompt, spec.system, spec.messages_column, spec.limit, spec.dedupe, spec.sampling)
    what = json.dumps([spec.title, spec.engine_args, spec.inputs, spec.output, requests], default=str)
    path = parse("INPUT", spec.inputs[0])
    stem = Path(path.path.rstrip("/")).name.partition(".")[0] or path.place
    short = hashlib.sha256(what.encode()).hexdigest()[:8]
    return f"{names.slug(stem)[: LONGEST_NAME - 9] or 'job'}-{short}"


def start(
    decided: Decided, what: Prepared, *, runner: Runner, console: Console, yes: bool
) -> tuple[Remote, str | None]:
    """Start a job whose rows are in the cloud, or go on with it. The run to follow; None where the job has ended."""
    from gpuctl.batch.remote import Remote

    spec, job = decided.spec, what.job
    environment = environment_name(spec.target, spec.environment)
    for note in decided.notes:
        console.note(note)
    for warning in decided.warnings:
        console.warn(warning)
    remote = Remote(job.name, reach(spec.target), spec.environment, runner, console)
    check_inputs(remote, spec)
    new = remote.create()
    there = None if new else remote.read_json("job.json")
    if there is not None and "schedule" in there and there["schedule"] is not None:
        raise usage_error(
            f"--name: {job.name!r} is a scheduled job",
            hint=f"another --name, or `{remote.command('rm')}`",
        )
    if there is None:
        if spec.target is Target.MODAL and not yes:
            each = (
                ""
                if decided.usd_per_hour is None
                else f", {usd(decided.usd_per_hour)} an hour for each container"
            )
            if not console.confirm(
                f"Start job '{job.name}' on Modal (environment '{environment}'){each}?",
                refused="--yes: needed to start a job on Modal when there is no terminal to ask on",
            ):
                if new:
                    remote.delete()
                raise GpuctlError("not started")
        file = _deploy(remote, spec, environment, what)
        return remote, started(remote, file)
    before = Job.from_document(there)
    if before is None:
        raise usage_error(f"--name: what is there as job {job.name!r} is none of this gpuctl's")
    file = jobs.save(spec.target, environment, before, what.source)
    with console.spinner("looking whether the rows are still the same …"):
        same = remote.ask(file, "check")
    if "problems" in same:
        raise GpuctlError(same["problems"], hint=same.get("hint"), exit_code=2 if same.get("usage") else 1)
    if not same["same"]:
        raise usage_error(
            f"{', '.join(spec.inputs)}: has changed since job {before.name!r} of {before.created_at} read it "
            f"({before.rows:,} rows then, {same['rows']:,} now)",
            hint=f"another --name makes a job of the new rows; `{remote.command('rm')}` deletes the old one",
        )
    return remote, go_on(
        spec, dataclasses.replace(what, job=before), there, remote, environment, console, yes=yes
    )


def _deploy(remote: Remote, spec: BatchSpec, environment: str, what: Prepared) -> Path:
    """Upload what travels, and deploy."""
    file = jobs.save(spec.target, environment, what.job, what.source)
    with remote.console.spinner("uploading …"):
        remote.put(what.staged.folder, "/")
    remote.deploy(file)
    remote.console.done(f"deployed: {what.job.name}")
    return file


def check_inputs(remote: Remote, spec: BatchSpec) -> None:
    """Refuse at once what is not there: of Volumes, which can be looked into from here."""
    for text in spec.inputs:
        path = parse("INPUT", text)
        if path.scheme != VOLUME:
            continue
        sure = path.path if not re.search(r"[*?\[]", path.path) else path.folder
        done = remote.run("volume", "ls", path.place, "/" + sure.rstrip("/"), "--json")
        if done.returncode == 0:
            continue
        said = done.stderr + done.stdout
        if not _ABSENT.search(said):
            raise remote.failed(f"{text} cannot be looked at", done)
        local = f"{own('gpuctl')} local exec -- " if spec.target is Target.LOCAL else ""
        where = f"in environment {environment_name(spec.target, spec.environment)!r}"
        raise usage_error(
            f"INPUT: {text}: there is no such file or folder, or no Volume {path.place!r} {where}",
            hint=f"{local}modal volume ls {path.place} shows what there is; "
            f"{local}modal volume put {path.place} FILE / puts a file there",
        )


# -- how it ended


def published(remote: Remote, job: Job, status: Mapping[str, Any], *, stamp: str = "") -> Summary:
    """How a job ended whose answers were written in the cloud."""
    told = remote.read_json(f"runs/{stamp}/published.json" if stamp else "published.json")
    if told is None:
        raise GpuctlError(
            f"job {job.name}: the answers were not written to {job.output}",
            hint=f"`{remote.command('resume')}` writes them; `{remote.command('fetch')} -o FILE` fetches them",
        )
    return Summary(
        job=job.name,
        state=str(status["state"]),
        output=told["output"],
        errors_file=told["errors"],
        status={**status, "rows": job.rows, "done": told["done"], "failed": told["failed"]},
        in_run=ended_in_run(status),
        commonest=Counter(dict(told["commonest"])).most_common(),
    )
