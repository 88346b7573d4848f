"""What there is to do with a job that was started, from any machine. May import: all of `batch`, and what `run` may."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpuctl.batch import jobs, schedules
from gpuctl.batch.follow import RUNNING, alive, counted, duration, waits_for
from gpuctl.batch.remote import Remote
from gpuctl.batch.render import render_batch
from gpuctl.batch.rows import Url
from gpuctl.batch.run import check_cap, destination_of, fetch, into, resume
from gpuctl.batch.stamps import changed_inputs, files_of
from gpuctl.batch.written import wrote
from gpuctl.errors import GpuctlError, usage_error
from gpuctl.reach import environment_name, reach
from gpuctl.specs.batch import PREFIX, check_name
from gpuctl.specs.remote_paths import is_remote
from gpuctl.target import Target
from gpuctl.times import age

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from gpuctl.batch.jobs import Job
    from gpuctl.batch.plan import Decided
    from gpuctl.batch.run import Summary
    from gpuctl.cli.console import Console
    from gpuctl.modal_cli import Runner

_NAMED = 10  # jobs that an error names
_NOTHING: dict[str, Any] = {  # what a job has done that has not begun
    "run": None, "problem": None, "time": None, "began": None, "ended_before": 0, "retrying": 0, "done": 0,
    "failed": 0, "tokens_in": 0, "tokens_out": 0, "shards_ended": 0, "containers": 0, "containers_loading": 0,
    "containers_started": 0, "container_seconds": 0.0, "working_seconds": 0.0, "busy_seconds": 0.0, "busy_rows": 0,
    "usd": None, "max_usd": None,
}  # fmt: skip


def remote_of(
    name: str, target: Target, environment: str | None, *, runner: Runner, console: Console
) -> Remote:
    """A usage error where that can be no job's name, before anything is asked, or started."""
    name = name.removeprefix(PREFIX)
    check_name(name)
    return Remote(name, reach(target), environment, runner, console)


def job_of(remote: Remote) -> Job:
    """The job, from its Volume; a usage error that names those that may be meant."""
    job = jobs.read(remote)
    if job is not None:
        return job
    names = [there.job for there in _names(remote)]
    if remote.job in names:
        raise usage_error(
            f"JOB: {remote.job!r} was not started: not all that it needs was uploaded",
            hint=f"the command that made it, given again, goes on; `{remote.command('rm')}` removes what is there",
        )
    raise usage_error(
        f"JOB: there is no job {remote.job!r}; {_meant(remote.job, names)}", hint=_elsewhere(remote)
    )


def _meant(name: str, names: list[str]) -> str:
    if not names:
        return "there are none"
    like = sorted(there for there in names if there.startswith(name))
    like = like or difflib.get_close_matches(name, names, n=_NAMED)
    some, what = (like, "did you mean") if like else (names, "there are:")
    more = f", and {len(some) - _NAMED:,} more" if len(some) > _NAMED else ""
    named = (" or " if like and not more else ", ").join(some[:_NAMED])
    return f"{what} {named}{more}{'?' if like else ''}"


def _elsewhere(remote: Remote) -> str | None:
    """That this machine has a job of that name, only not where it was looked for."""
    target = remote.env.target
    found = jobs.elsewhere(remote.job, *remote.place)
    for other, environment in found:
        where = "on the control plane of this machine" if other is Target.LOCAL else "on Modal"
        how = []
        if other is not target:
            how.append("with --local" if other is Target.LOCAL else "without --local")
        if environment != environment_name(other, None):
            how.append(f"with --env {environment}")
        if how:
            return f"there is one {where}, in environment {environment!r}: {', '.join(how)}"
    return None


@dataclass(frozen=True)
class Standing:
    """A job and how far it is. `status`: None: it never ran."""

    name: str
    job: Job | None
    status: Mapping[str, Any] | None
    uploaded: bool = True  # all that it needs

    @property
    def state(self) -> str:
        """`done`, `stopped`, `failed`, `running`; `lost`: its driver died; `uploaded`: it never ran; `incomplete`: not
        even that; `scheduled`."""
        if self.job is not None and self.job.schedule is not None:
            if self.status is not None and self.status["state"] == RUNNING and alive(self.status):
                return RUNNING
            return "stopped" if self.job.stopped_at else "scheduled"
        if self.status is None:
            return "uploaded" if self.job and self.uploaded else "incomplete"
        if self.status["state"] == RUNNING and not alive(self.status):
            return "lost"
        return str(self.status["state"])

    def document(self) -> dict[str, Any]:
        kept = {} if self.status is None else {k: v for k, v in self.status.items() if k != "containers_up"}
        return {
            "job": self.name,
            **_NOTHING,
            "shards": self.job.shards if self.job else None,
            **kept,
            "state": self.state,
            "work": self.job.work if self.job else None,
            "rows": self.rows,
            "copies": self.job.copies if self.job else None,
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
            self._rows_said(),
            self.job.work if self.job else "",
            "" if status["usd"] is None else f"${status['usd']:.2f}",
            age(self.job.created_at) if self.job else "",
            *schedules.cells(self.job, self.status),
        )

    def _rows_said(self) -> str:
        """Those that are asked, and those that are answered with them."""
        if self.rows is None:
            return ""
        copies = self.job.copies if self.job else 0
        return f"{self.rows - copies:,} (+{copies:,})" if copies else f"{self.rows:,}"

    def lines(self) -> Iterator[str]:
        """For a person."""
        yield f"{self.name}: {self.state}"
        if self.job is not None:
            yield f"  {self.job.work} on {', '.join(self.job.inputs)}, into {self.job.output}"
        status = self.status
        if status is None:
            return
        copies = self.job.copies if self.job else 0
        same = f"; {copies:,} more ask for what others ask for" if copies else ""
        yield f"  {status['done']:,} rows answered, {status['failed']:,} failed, of {status['rows']:,}{same}"
        if status["tokens_in"]:
            yield f"  {status['tokens_in']:,} tokens in, {status['tokens_out']:,} out"
        spent = "" if status["usd"] is None else f", ${status['usd']:.2f}"
        up = f"; now {waits_for(status, status['done'] + status['failed'])}" if self.state == RUNNING else ""
        yield f"  {duration(status['container_seconds'])} of containers{spent}{up}"
        if self.state == RUNNING:
            yield from self._pace(status)
        if status["problem"]:
            yield f"  {status['problem']}"

    def _pace(self, status: Mapping[str, Any]) -> Iterator[str]:
        """How fast it was so far in this run, and how long the others take if they are like those."""
        ended = status["done"] + status["failed"]
        seconds, now = status["time"] - status["began"], ended - status.get("ended_before", 0)
        if seconds > 0 and now > 0 and ended < status["rows"]:
            rate = now / seconds
            left = status["rows"] - ended
            yield f"  {left:,} rows left: {duration(left / rate)} at {rate:,.2g} rows/s, as fast as so far"


def check_started(remote: Remote, job: Job) -> None:
    """Refuse to wait for a job of which this machine knows that nothing works on it."""
    here = jobs.get(*remote.place, job.name) is not None
    if here and not jobs.was_started(*remote.place, job.name) and remote.read_json("status.json") is None:
        raise GpuctlError(
            f"job {job.name} was not started yet", hint=f"`{remote.command('resume')}` starts it"
        )


def status_of(remote: Remote) -> Standing:
    job = job_of(remote)
    return Standing(job.name, job, remote.read_json("status.json"))


def listed(target: Target, environment: str | None, *, runner: Runner, console: Console) -> list[Standing]:
    """All jobs of the Environment: newest first, those of other machines last."""
    known = {job.name: job for job in jobs.known(target, environment_name(target, environment))}
    there = _names(Remote("", reach(target), environment, runner, console))
    order = list(known)
    there.sort(key=lambda remote: order.index(remote.job) if remote.job in known else len(order))

    ends = {job.name: status for job, status in jobs.ended(target, environment_name(target, environment))}

    def standing(remote: Remote) -> Standing:
        job, end = known.get(remote.job), ends.get(remote.job)
        if job and job.rows and end and end["state"] == "done" and not end["failed"]:
            return Standing(remote.job, job, end)  # to which nothing can be added
        status = remote.read_json("status.json")
        # Of rows that are read in the cloud, and of schedules, only the Volume knows; and whether all is there.
        there = None if job and job.rows and status else jobs.read(remote)
        return Standing(remote.job, there or job, status, uploaded=status is not None or there is not None)

    said = f"asking about {counted(len(there), 'job')} …"
    with console.spinner(said), ThreadPoolExecutor(8) as pool:  # each is a process that waits for an answer
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


def check_output_name(output: str | None) -> None:
    """Refuse what no answers are fetched into, whatever job they are of."""
    if output is not None and is_remote(output):
        raise usage_error(
            f"--output: {output!r} is in the cloud; answers are fetched into a file of this machine"
        )
    if output == "":
        raise usage_error("--output: '' names no file")


def with_output(remote: Remote, job: Job, output: str | None, *, overwrite: bool) -> Job:
    """The job with another output, which must not exist yet, but for what this job wrote there itself; answers that
    are written in the cloud, are there."""
    check_output_name(output)
    if output is None and is_remote(job.output):
        return job
    if output is not None:
        job = into(job, output)
    if job.output == "-" and remote.console.json:
        raise usage_error(
            "--json: does not go with answers on stdout (-o -), which are no part of a document"
        )
    where = destination_of(job)
    where.check_apart(files_of(*remote.place, job.name))
    where.check(overwrite=overwrite or wrote(*remote.place, job.name, where))
    return job


def fetch_of(remote: Remote, output: str | None, *, overwrite: bool, partial: bool) -> Summary:
    """The answers of a job that has ended; with `partial` those of the shards that have."""
    job = with_output(remote, job_of(remote), output, overwrite=overwrite)
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


def changes_of(remote: Remote) -> dict[str, str]:
    """The options that a job was resumed with, as far as this machine knows."""
    kept = jobs.get(*remote.place, remote.job)
    return {} if kept is None else kept.changes


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
    if status is not None:
        check_cap(remote, status, status.get("max_usd") if decided is None else decided.spec.max_cost)
    for name in changed_inputs(*remote.place, job.name):
        remote.console.warn(
            f"{name} changed since job {job.name} of {job.created_at} read it: `resume` goes on with the rows as they "
            "were then; the command that started it, given again, makes a job of the rows as they are now"
        )
    file = jobs.folder_of(*remote.place, job.name) / jobs.FILE_NAME
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
        jobs.save(*remote.place, job, source)
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
    job = jobs.get(*remote.place, name)
    job = job or jobs.read(remote)
    if job is None and name not in [there.job for there in _names(remote)]:
        job = job_of(remote)  # which says that there is none
    if job is None:
        what = "of which not all was uploaded"
    elif job.schedule is not None:
        what = "its schedule and the answers of all runs"
    else:
        what = f"its {job.rows:,} rows and their answers"
    if not yes and not remote.console.confirm(
        f"Delete job '{name}', {what}?",
        refused="--yes: needed to delete a job when there is no terminal to ask on",
    ):
        raise GpuctlError("not deleted")
    remote.stop()
    remote.delete()
    jobs.forget(*remote.place, name)
    remote.console.done(f"job {name} is deleted")
