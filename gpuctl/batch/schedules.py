"""Scheduled jobs: deployed once, and run over the rows as they are then. May import: everything of `batch`, and cost,
errors, reach, records, specs, target.

A schedule is `tick` of the job's App, which starts a run; each has a folder of its own in the job's Volume,
`runs/20261128T000000Z/`, that holds what the Volume of another job does. `runs.jsonl` has a line for each that ended.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpuctl.batch import jobs
from gpuctl.batch.follow import RUNNING, alive
from gpuctl.batch.jobs import Job
from gpuctl.batch.remote import Remote
from gpuctl.batch.remote_files import check_inputs
from gpuctl.batch.run import fetch
from gpuctl.cost import usd
from gpuctl.errors import EXIT_USAGE, GpuctlError, usage_error
from gpuctl.reach import environment_name, reach
from gpuctl.records import now
from gpuctl.specs.schedule import Schedule
from gpuctl.target import Target

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from gpuctl.batch.plan import Decided
    from gpuctl.batch.run import Prepared, Summary
    from gpuctl.cli.console import Console
    from gpuctl.modal_cli import Runner

_SHOWN = 10  # runs of a status that a person gets to see
_DONE = "done"


def of(job: Job) -> Schedule | None:
    """The job's schedule, where it has one."""
    return None if job.schedule is None else Schedule.from_document(job.schedule)


def next_run(job: Job, at: dt.datetime | None = None) -> dt.datetime | None:
    """When the job runs next, in UTC; None where it has no schedule, or that was ended."""
    schedule = of(job)
    if schedule is None or job.stopped_at is not None:
        return None
    return schedule.next(at or dt.datetime.now(dt.UTC), since=dt.datetime.fromisoformat(job.created_at))


def deploy(decided: Decided, what: Prepared, *, runner: Runner, console: Console, yes: bool) -> Remote:
    """Deploy the schedule, or change the one that there is."""
    spec, job, schedule = decided.spec, what.job, decided.spec.schedule
    assert schedule is not None
    environment = environment_name(spec.target, spec.environment)
    remote = Remote(job.name, reach(spec.target), spec.environment, runner, console)
    for note in decided.notes:
        console.note(note)
    for warning in decided.warnings:
        console.warn(warning)
    try:
        check_inputs(remote, spec)
    except GpuctlError as error:
        if error.exit_code != EXIT_USAGE:
            raise
        console.warn(f"{error.problems[0]}: it must be there when a run begins")
    new = remote.create()
    before = None if new else jobs.read(remote)
    if before is not None:
        old = of(before)
        if old is None:
            raise usage_error(
                f"--name: there is a job {job.name!r} without a schedule",
                hint=f"another --name, or `{remote.command('rm')}`",
            )
        if before.stopped_at is None:
            same = "is deployed again" if old == schedule else f"was scheduled {old}, and will be {schedule}"
            console.note(f"job {job.name} {same}; its runs so far stay")
    most = ""
    if decided.usd_per_hour is not None:
        cap = (
            f"at most {usd(spec.max_cost)} a run"
            if spec.max_cost is not None
            else "without a cap (--max-cost)"
        )
        most = f", {usd(decided.usd_per_hour)} an hour for each of {spec.max_containers} containers at most, {cap}"
    console.say(f"job {job.name} runs again and again, {schedule}{most}")
    if (
        not yes
        and spec.target is Target.MODAL
        and not console.confirm(
            f"Deploy it on Modal (environment '{environment}')?",
            refused="--yes: needed to deploy a schedule on Modal when there is no terminal to ask on",
        )
    ):
        if new:
            remote.delete()
        raise GpuctlError("not deployed")
    file = jobs.save(spec.target, environment, job, what.source)
    with console.spinner("uploading …"):
        remote.put(what.staged.folder, "/")
    remote.deploy(file)
    _keep(remote, dataclasses.replace(job, created_at=now()))
    return remote


def tell_deployed(remote: Remote, console: Console) -> None:
    """That it is deployed, when it runs, and what can be done with it."""
    job = jobs.read(remote)
    assert job is not None
    at = next_run(job)
    if console.json:
        console.print_document(
            {"job": job.name, "state": "scheduled", "schedule": job.schedule, "next": _iso(at)}
        )
        return
    console.done(f"scheduled: {job.name}, {of(job)}; next run {_said(at)}")
    for verb, does in (
        ("status", "its runs"),
        ("fetch", "the answers of the last"),
        ("cancel", "ends the schedule"),
    ):
        console.say(f"  {remote.command(verb)}    # {does}")


def _keep(remote: Remote, job: Job) -> None:
    """What is known of the job, in its Volume and here."""
    with tempfile.TemporaryDirectory(prefix="gpuctl-") as folder:
        document = Path(folder) / "job.json"
        document.write_text(json.dumps(job.document()), encoding="utf-8")
        remote.put(document, "/job.json")
    jobs.keep(*remote.place, job)


# -- its runs


def runs(remote: Remote) -> list[dict[str, Any]]:
    """The runs that ended, or did not begin, in their order: `run`, `state`, `problem`, `began`, `ended`, `rows`,
    `done`, `failed`, `usd`; times in seconds since 1970."""
    content = remote.read("runs.jsonl") or b""
    # Another end of a line: it is being written.
    return [json.loads(line) for line in content.splitlines() if line.endswith(b"}")]


def lines(remote: Remote, job: Job) -> Iterator[str]:
    """For a person: when it runs, and how the last runs went."""
    if job.stopped_at is not None:
        yield f"  {of(job)}; ended at {job.stopped_at}, `{remote.command('resume')}` goes on"
    else:
        yield f"  {of(job)}; next run {_said(next_run(job))}"
    found = runs(remote)
    if len(found) > _SHOWN:
        yield f"  {len(found):,} runs, of which the last:"
    for run in found[-_SHOWN:]:
        failed = f", {run['failed']:,} failed" if run["failed"] else ""
        spent = "" if run["usd"] is None else f", ${run['usd']:.2f}"
        rows = f", {run['done']:,} rows answered{failed}{spent}" if run["rows"] else ""
        problem = f": {run['problem']}" if run["problem"] else ""
        yield f"  {run['run']} {run['state']}{rows}{problem}"


def fetch_run(remote: Remote, job: Job, stamp: str | None, output: str | None, *, overwrite: bool) -> Summary:
    """The answers of a run, into a file of this machine; `stamp`: None: those of the last that is done."""
    from gpuctl.batch.run import destination_of, into

    if output is None:
        raise usage_error(
            f"--output: needed: each run of job {job.name!r} wrote its answers to {job.output}; name a file of this "
            "machine"
        )
    found = runs(remote)
    done = [run["run"] for run in found if run["state"] == _DONE]
    if stamp is None and not done:
        raise GpuctlError(f"no run of job {job.name} is done", hint=remote.command("status"))
    wanted = stamp or done[-1]
    document = remote.read_json(f"runs/{wanted}/job.json") if "/" not in wanted else None
    status = remote.read_json(f"runs/{wanted}/status.json") if document is not None else None
    of_run = None if document is None else Job.from_document(document)
    if of_run is None or status is None:
        there = f"done are: {', '.join(done[-5:])}" if done else "none is done"
        raise usage_error(f"--run: job {job.name!r} has no run {wanted!r} with rows; {there}")
    if status["state"] == RUNNING and alive(status):
        raise GpuctlError(f"run {wanted} of job {job.name} is not done", hint=remote.command("status"))
    of_run = into(of_run, output)
    destination_of(of_run).check(overwrite=overwrite)
    return fetch(remote, of_run, status, console=remote.console, home=f"runs/{wanted}/")


# -- its end


def cancel(remote: Remote, job: Job, *, at_once: bool) -> None:
    """End the schedule; a run that is under way ends in order, or, `at_once`, as it is."""
    if job.stopped_at is not None:
        remote.console.note(f"the schedule of job {job.name} was ended already, at {job.stopped_at}")
        remote.stop()
        return
    _keep(remote, dataclasses.replace(job, stopped_at=now()))
    status = remote.read_json("status.json")
    if not at_once and _runs(status):
        assert status is not None
        with tempfile.TemporaryDirectory(prefix="gpuctl-") as folder:
            word = Path(folder) / "stop"
            word.write_text("cancelled\n", encoding="utf-8")
            remote.put(word, f"/runs/{status['run']}/control/stop")
        with remote.console.spinner("ending: rows that are being answered are waited for …"):
            while _runs(remote.read_json("status.json")):
                time.sleep(1)
    remote.stop()
    remote.console.done(
        f"job {job.name} runs no more; `{remote.command('resume')}` goes on with its schedule"
    )


def _runs(status: Mapping[str, Any] | None) -> bool:
    return status is not None and status["state"] == RUNNING and alive(status)


def resume(remote: Remote, job: Job, *, yes: bool) -> None:
    """Deploy a schedule again that was ended."""
    if job.stopped_at is None:
        remote.console.note(f"job {job.name} runs by its schedule: {of(job)}")
        return
    file = jobs.folder_of(*remote.place, job.name) / jobs.FILE_NAME
    if not file.exists():
        raise GpuctlError(
            f"job {job.name} was deployed from another machine, and its file is there",
            hint="the command that deployed it does so again, from any machine",
        )
    if (
        not yes
        and remote.env.target is Target.MODAL
        and not remote.console.confirm(
            f"Run job '{job.name}' again and again, {of(job)}?",
            refused="--yes: needed to deploy a schedule when there is no terminal to ask on",
        )
    ):
        raise GpuctlError("not deployed")
    remote.deploy(file)
    _keep(remote, dataclasses.replace(job, created_at=now(), stopped_at=None))


def _said(at: dt.datetime | None) -> str:
    return "never" if at is None else at.strftime("%Y-%m-%d %H:%M UTC")


def _iso(at: dt.datetime | None) -> str | None:
    return None if at is None else at.strftime("%Y-%m-%dT%H:%M:%SZ")


def document(job: Job | None, status: Mapping[str, Any] | None) -> dict[str, Any]:
    """`schedule`, `next` and `last` of `batch ls --json` and `batch status --json`."""
    if job is None or job.schedule is None:
        return {"schedule": None, "next": None, "last": None}
    last = None
    if status is not None:
        ended = dt.datetime.fromtimestamp(status["time"], dt.UTC)
        last = {"run": status["run"], "state": status["state"], "time": _iso(ended)}
    return {"schedule": job.schedule, "next": _iso(next_run(job)), "last": last}


def cells(job: Job | None, status: Mapping[str, Any] | None) -> tuple[str, str]:
    """NEXT and LAST of `batch ls`."""
    if job is None or job.schedule is None:
        return "", ""
    last = ""
    if status is not None:
        last = f"{_said(dt.datetime.fromtimestamp(status['time'], dt.UTC))} ({status['state']})"
    return "" if job.stopped_at else _said(next_run(job)), last
