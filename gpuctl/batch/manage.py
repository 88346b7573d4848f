"""What there is to do with a job that was started, from any machine. May import: all of `batch`, and what `run` may."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpuctl.batch import jobs, schedules
from gpuctl.batch.follow import RUNNING, alive, counted, duration
from gpuctl.batch.jobs import Job
from gpuctl.batch.remote import Remote
from gpuctl.batch.render import render_batch
from gpuctl.batch.rows import Url
from gpuctl.batch.run import destination_of, fetch, resume
from gpuctl.batch.stamps import changed_inputs
from gpuctl.errors import GpuctlError, usage_error
from gpuctl.reach import environment_name, reach
from gpuctl.specs.batch import PREFIX
from gpuctl.specs.remote_paths import is_remote
from gpuctl.target import Target
from gpuctl.times import age

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from gpuctl.batch.plan import Decided
    from gpuctl.batch.run import Summary
    from gpuctl.cli.console import Console
    from gpuctl.modal_cli import Runner


def remote_of(
    name: str, target: Target, environment: str | None, *, runner: Runner, console: Console
) -> Remote:
    return Remote(name.removeprefix(PREFIX), reach(target), environment, runner, console)


def job_of(remote: Remote) -> Job:
    """The job, from its Volume; a usage error that names the jobs that there are."""
    document = remote.read_json("job.json")
    job = None if document is None else Job.from_document(document)
    if job is not None:
        return job
    names = [there.job for there in _names(remote)]
    there = f"there are: {', '.join(names)}" if names else "there are none"
    raise usage_error(f"JOB: there is no job {remote.job!r}; {there}")


@dataclass(frozen=True)
class Standing:
    """A job and how far it is. `status`: None: it never ran."""

    name: str
    job: Job | None
    status: Mapping[str, Any] | None

    @property
    def state(self) -> str:
        """`done`, `stopped`, `failed`, `running`; `lost`: its driver died; `uploaded`: it never ran; `scheduled`."""
        if self.job is not None and self.job.schedule is not None:
            if self.status is not None and self.status["state"] == RUNNING and alive(self.status):
                return RUNNING
            return "stopped" if self.job.stopped_at else "scheduled"
        if self.status is None:
            return "uploaded" if self.job else "incomplete"
        if self.status["state"] == RUNNING and not alive(self.status):
            return "lost"
        return str(self.status["state"])

    def document(self) -> dict[str, Any]:
        kept = {} if self.status is None else {k: v for k, v in self.status.items() if k != "containers_up"}
        return {
            "job": self.name,
            **kept,
            "state": self.state,
            "work": self.job.work if self.job else None,
            "rows": self.rows,
            "inputs": list(self.job.inputs) if self.job else None,
            "output": self.job.output if self.job else None,
            "created_at": self.job.created_at if self.job else None,
            **schedules.document(self.job, self.status),
        }

    @property
    def rows(self) -> int | None:
        """Of a schedule: those of its last run."""
        if self.job is None:
            return None
        return self.job.rows if self.job.schedule is None or self.status is None else self.status["rows"]

    def cells(self) -> tuple[str, ...]:
        status = self.status or {"done": 0, "failed": 0, "usd": None}
        return (
            self.name,
            self.state,
            f"{status['done']:,}",
            f"{status['failed']:,}",
            "" if self.rows is None else f"{self.rows:,}",
            self.job.work if self.job else "",
            "" if status["usd"] is None else f"${status['usd']:.2f}",
            age(self.job.created_at) if self.job else "",
            *schedules.cells(self.job, self.status),
        )

    def lines(self) -> Iterator[str]:
        """For a person."""
        yield f"{self.name}: {self.state}"
        if self.job is not None:
            yield f"  {self.job.work} on {', '.join(self.job.inputs)}, into {self.job.output}"
        status = self.status
        if status is None:
            return
        yield f"  {status['done']:,} rows answered, {status['failed']:,} failed, of {status['rows']:,}"
        if status["tokens_in"]:
            yield f"  {status['tokens_in']:,} tokens in, {status['tokens_out']:,} out"
        spent = "" if status["usd"] is None else f", ${status['usd']:.2f}"
        up = f"; {status['containers']} up" if self.state == RUNNING else ""
        yield f"  {duration(status['container_seconds'])} of containers{spent}{up}"
        if status["problem"]:
            yield f"  {status['problem']}"


def status_of(remote: Remote) -> Standing:
    job = job_of(remote)
    return Standing(job.name, job, remote.read_json("status.json"))


def listed(target: Target, environment: str | None, *, runner: Runner, console: Console) -> list[Standing]:
    """All jobs of the Environment: newest first, those of other machines last."""
    known = {job.name: job for job in jobs.known(target, environment_name(target, environment))}
    there = _names(remote_of("", target, environment, runner=runner, console=console))
    order = list(known)
    there.sort(key=lambda remote: order.index(remote.job) if remote.job in known else len(order))

    def standing(remote: Remote) -> Standing:
        job = known.get(remote.job)
        # Of rows that are read in the cloud, and of schedules, only the Volume knows.
        document = None if job and job.rows else remote.read_json("job.json")
        if document is not None:
            job = Job.from_document(document) or job
        return Standing(remote.job, job, remote.read_json("status.json"))

    with ThreadPoolExecutor(8) as pool:  # each is a process that waits for an answer
        return list(pool.map(standing, there))


def _names(any_remote: Remote) -> list[Remote]:
    """Every job that has a Volume."""
    done = any_remote.run("volume", "list", "--json")
    if done.returncode != 0:
        raise any_remote.failed("the Volumes cannot be listed", done)
    rows = json.loads(done.stdout)
    names = [str(row.get("name") or row.get("Name") or "") for row in rows]
    return [
        dataclasses.replace(any_remote, job=name.removeprefix(PREFIX))
        for name in names
        if name.startswith(PREFIX)
    ]


def with_output(job: Job, output: str | None, *, overwrite: bool) -> Job:
    """The job with another output, which must not exist yet; answers that are written in the cloud, are there."""
    if output is not None and is_remote(output):
        raise usage_error(
            f"--output: {output!r} is in the cloud; answers are fetched into a file of this machine"
        )
    if output is None and is_remote(job.output):
        return job
    if output is not None:
        job = dataclasses.replace(job, output=output, errors=None, format=_format_for(job, output))
    destination_of(job).check(overwrite=overwrite)
    return job


def _format_for(job: Job, output: str) -> str:
    """What the job's answers are in this file: what its name says, where they can be that."""
    from gpuctl.batch.outputs import FOLDERS, TABLES, Format, format_of

    kept, named = Format(job.format), format_of(output)
    if named is None or named in FOLDERS or named is kept or job.url == Url.IMAGES:
        return kept
    if kept in TABLES:
        return Format.JSONL if named is Format.OPENAI else named
    if named is Format.OPENAI:
        return named
    raise usage_error(
        f"--output: {output!r} would be {named}, and job {job.name!r} is of {kept}: it kept no columns of the input",
        hint="-o FILE.jsonl takes its answers as OpenAI's lines",
    )


def fetch_of(remote: Remote, output: str | None, *, overwrite: bool, partial: bool) -> Summary:
    """The answers of a job that has ended; with `partial` those of the shards that have."""
    job = with_output(job_of(remote), output, overwrite=overwrite)
    if is_remote(job.output):
        raise usage_error(
            f"--output: needed: the answers of job {job.name!r} are in {job.output}; name a file of this machine"
        )
    status = remote.read_json("status.json")
    state = Standing(job.name, job, status).state
    if status is None or (state != "done" and not partial):
        raise GpuctlError(
            f"job {job.name} is not done ({state})",
            hint=f"`{remote.command('wait')}` waits for it, --partial fetches what there is"
            if state == RUNNING
            else f"`{remote.command('resume')}` goes on with it, --partial fetches what there is",
        )
    if not status["shards_ended"]:  # their answers come together
        goes_on = remote.command("wait" if state == RUNNING else "resume")
        raise GpuctlError(
            f"job {job.name}: no shard of it has ended, so there is nothing to fetch yet",
            hint=f"`{goes_on}` goes on; what is done ({counted(status['done'], 'row')}) is kept",
        )
    return fetch(remote, job, status, console=remote.console)


def cancel_job(remote: Remote, *, now: bool) -> None:
    """Ask the driver to end, and wait until it has; `now`: stop the App."""
    job = job_of(remote)
    if job.schedule is not None:
        schedules.cancel(remote, job, at_once=now)
        return
    state = Standing(job.name, job, remote.read_json("status.json")).state
    if state in ("done", "stopped", "failed"):
        remote.console.note(f"job {job.name} has ended already ({state})")
        remote.stop()
        return
    if not now and state == RUNNING:
        with tempfile.TemporaryDirectory(prefix="gpuctl-") as folder:
            word = Path(folder) / "stop"
            word.write_text("cancelled\n", encoding="utf-8")
            remote.put(word, "/control/stop")
        with remote.console.spinner("ending: rows that are being answered are waited for …"):
            while Standing(job.name, job, remote.read_json("status.json")).state == RUNNING:
                time.sleep(1)
    remote.stop()
    remote.console.done(f"job {job.name} is stopped; `{remote.command('resume')}` goes on")


def resume_job(
    remote: Remote, job: Job, decided: Decided | None, *, retry_failed: bool, yes: bool
) -> str | None:
    """Go on with a job; the run to follow, None where there is nothing left to do. `decided`: on what else."""
    status = remote.read_json("status.json")
    state = Standing(job.name, job, status).state
    again = retry_failed and status is not None and status["failed"]
    if state == "done" and not again:
        remote.console.note(f"job {job.name} is done: there is nothing to go on with")
        return None
    if state == RUNNING and status is not None:
        remote.console.note(f"job {job.name} runs already")
        return str(status["run"])
    environment = environment_name(remote.env.target, remote.environment)
    for name in changed_inputs(remote.env.target, environment, job.name):
        remote.console.warn(
            f"{name} changed since job {job.name} of {job.created_at} read it: `resume` goes on with the rows as they "
            "were then; the command that started it, given again, makes a job of the rows as they are now"
        )
    file = jobs.folder_of(remote.env.target, environment, job.name) / jobs.FILE_NAME
    if decided is not None:
        for text in decided.notes:
            remote.console.note(text)
        for text in decided.warnings:
            remote.console.warn(text)
        source = render_batch(
            decided.spec,
            job=job.name,
            url=Url(job.url),
            usd_per_second=decided.usd_per_second,
            argv=job.argv,
            head=("Resumed with other options than this command has.", *decided.head),
        )
        jobs.save(remote.env.target, environment, job, source)
    elif not file.exists():
        raise GpuctlError(
            f"job {job.name} was started on another machine, and its file is there",
            hint="the command that started it goes on with it, on any machine that has its input",
        )
    if (
        not yes
        and remote.env.target is Target.MODAL
        and not remote.console.confirm(
            f"Go on with job '{job.name}'?",
            refused="--yes: needed to go on with a job when there is no terminal to ask on",
        )
    ):
        raise GpuctlError("not resumed")
    return resume(remote, file, retry_failed=retry_failed)


def remove_job(remote: Remote, *, yes: bool) -> None:
    """Stop a job and delete all of it but what was fetched."""
    name = remote.job
    job = jobs.get(
        remote.env.target, environment_name(remote.env.target, remote.environment), name
    ) or job_of(remote)
    if not yes and not remote.console.confirm(
        f"Delete job '{job.name}', its schedule and the answers of all runs?"
        if job.schedule is not None
        else f"Delete job '{job.name}', its {job.rows:,} rows and their answers?",
        refused="--yes: needed to delete a job when there is no terminal to ask on",
    ):
        raise GpuctlError("not deleted")
    remote.stop()
    remote.delete()
    jobs.forget(remote.env.target, environment_name(remote.env.target, remote.environment), name)
    remote.console.done(f"job {name} is deleted")
