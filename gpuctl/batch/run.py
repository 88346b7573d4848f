"""Do a bulk job: read the rows, say what it will take, upload, start, follow, fetch. May import: everything of `batch`,
and errors, paths, reach, render, specs, target, times.

Each step can be the last before the command is killed, and the same command finds what there is and goes on: the rows
of a job are uploaded whole or there is no `job.json`; what was answered stays answered; an output is there whole or
not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import threading
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpuctl import __version__
from gpuctl.batch import jobs
from gpuctl.batch.before import Watch
from gpuctl.batch.copies import FILE_NAME as COPIES
from gpuctl.batch.copies import with_copies
from gpuctl.batch.errors import Errors
from gpuctl.batch.follow import RUNNING, alive, counted, duration, follow
from gpuctl.batch.jobs import Job
from gpuctl.batch.plan import is_pipeline
from gpuctl.batch.remote import Remote
from gpuctl.batch.render import render_batch
from gpuctl.batch.results import read_results
from gpuctl.batch.rows import Url
from gpuctl.batch.shards import Staged, portions, stage
from gpuctl.batch.stamps import before_the_change, changed, changed_inputs, save_inputs, stamps
from gpuctl.batch.written import remember, writer, wrote
from gpuctl.cost import usd
from gpuctl.errors import EXIT_FAILURE, EXIT_USAGE, GpuctlError, usage_error
from gpuctl.paths import cache_dir
from gpuctl.plan import command_of
from gpuctl.reach import environment_name, reach
from gpuctl.records import now
from gpuctl.specs import names
from gpuctl.specs.batch import LONGEST_NAME, BatchSpec
from gpuctl.specs.engine_args import adapters
from gpuctl.specs.remote_paths import is_remote
from gpuctl.target import Target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from gpuctl.batch.before import Before
    from gpuctl.batch.estimate import Estimate
    from gpuctl.batch.inputs import Input
    from gpuctl.batch.outputs import Destination
    from gpuctl.batch.plan import Decided
    from gpuctl.cli.console import Console
    from gpuctl.configs import Found
    from gpuctl.modal_cli import Runner

_COMMONEST = 5  # errors that a summary names


@dataclass(frozen=True)
class Prepared:
    """A job that is ready to be uploaded: its rows in `staged.folder`, its file in `source`."""

    job: Job
    staged: Staged
    source: str
    watch: Watch | None = None  # of rows that are read here
    inputs: Mapping[str, str] = field(default_factory=dict)  # their files, as `batch.stamps` has them


@dataclass
class Summary:
    """How a job ended, for a person and for `--json`."""

    job: str
    state: str
    output: str | None
    errors_file: str | None
    status: Mapping[str, Any]
    in_run: int  # rows that ended in the last run
    commonest: list[tuple[str, int]] = field(default_factory=list)
    again: str | None = None  # the command that tries again what failed

    def document(self) -> dict[str, Any]:
        kept = ("rows", "done", "failed", "tokens_in", "tokens_out", "container_seconds", "usd", "problem")
        return {
            "job": self.job,
            "state": self.state,
            **{name: self.status[name] for name in kept},
            "ended_in_run": self.in_run,
            "seconds": round(self.status["time"] - self.status["began"], 3),
            "output": self.output,
            "errors": self.errors_file,
            "commonest_errors": [{"error": text, "rows": rows} for text, rows in self.commonest],
        }


def read_input(spec: BatchSpec, found: Found | None = None) -> tuple[Input, Destination]:
    """What the input is, and where its answers go. Its rows are read when they are iterated over. `found`: what is
    known of the model, if it was looked up.
    """
    from gpuctl.batch.formats import Kind
    from gpuctl.batch.inputs import open_input
    from gpuctl.batch.outputs import Format, destination

    form = None if spec.format is None else Format(spec.format)
    # What is asked of the rows is found in them; any format can be of transcriptions.
    like = destination(spec.output, url=Url.TRANSCRIPTIONS, form=form, errors=spec.errors)
    rows = open_input(
        spec.inputs,
        kind=None if spec.input_format is None else Kind(spec.input_format),
        url=asked(spec, found),
        prompt=spec.prompt,
        system=spec.system,
        messages_column=spec.messages_column,
        model=spec.title,
        models=_names(spec) or (),
        encoding=spec.encoding,
        keep_columns=like.columns,
    )
    where = destination(spec.output, url=rows.url, form=form, errors=spec.errors)
    if not spec.remote_output:
        where.check_apart(rows.files())
    return rows, where


def check_output(spec: BatchSpec, where: Destination, what: Prepared | None = None) -> None:
    """Refuse an output that would fail, or replace what is not this job's. `what`: None: which it is, is not known yet,
    and answers of any job may turn out to be its own."""
    environment = environment_name(spec.target, spec.environment)
    if what is None:
        where.check(overwrite=spec.overwrite or writer(spec.target, environment, where) is not None)
        return
    own = spec.overwrite or wrote(spec.target, environment, what.job.name, where)
    if not own and (other := writer(spec.target, environment, where)):
        before = before_the_change(spec.target, environment, what.job, what.inputs)
        since = f": {', '.join(before[1])} changed since" if before and before[0].name == other else ""
        raise usage_error(
            f"-o {where.path}: exists, with the answers of another job, {other}{since}",
            hint="--overwrite replaces it, or name another",
        )
    where.check(overwrite=own)


def _names(spec: BatchSpec) -> set[str] | None:
    """What rows may call the model, or an adapter, by; None: a function answers them."""
    return None if spec.model is None else {*spec.model.served_names, *adapters(spec.engine_args)}


_KINDS = {"embedding": Url.EMBEDDINGS, "speech": Url.TRANSCRIPTIONS, "image": Url.IMAGES}


def asked(spec: BatchSpec, found: Found | None = None) -> Url | None:
    """What is asked of the rows, where the work says it; else they do, and a plain one is a chat."""
    if spec.function is not None:
        return Url.FUNCTION
    if spec.task is not None:
        return Url[spec.task.upper()]
    entry = spec.model.entry if spec.model is not None else None
    if entry is None:
        is_one = found is not None and is_pipeline(found)
        return Url.IMAGES if is_one or (spec.model is not None and spec.model.folder is not None) else None
    return _KINDS.get(entry.kind)


def destination_of(job: Job) -> Destination:
    from gpuctl.batch.outputs import Format, destination

    return destination(job.output, url=Url(job.url), form=Format(job.format), errors=job.errors)


def into(job: Job, output: str) -> Job:
    """The job with its answers in another file, of the format that this is called after."""
    return dataclasses.replace(job, output=output, errors=None, format=_format_for(job, output))


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


@contextlib.contextmanager
def prepared(
    decided: Decided, rows: Input, where: Destination, *, argv: Sequence[str], console: Console
) -> Iterator[Prepared]:
    """Read the input to its end, and render. The rows are kept in a folder as long as this lasts."""
    from gpuctl.batch.inputs import strict
    from gpuctl.batch.outputs import needed

    spec = decided.spec
    defaults = spec.defaults(rows.url)
    console.say(rows.describe())
    inputs = stamps(spec.inputs, Path.cwd())
    with staging() as folder:
        watch = Watch(folder / "sample", context=decided.spec.max_model_len)
        with console.spinner("reading …"):
            staged = stage(
                strict(rows) if spec.strict else rows,
                folder / "job",
                containers=spec.max_containers,
                defaults={**needed(rows.url, where.format), **defaults},
                limit=spec.limit,
                dedupe=spec.dedupe,
                models=_names(spec),
                see=watch.see,
            )
        if not staged.rows:
            raise usage_error(f"INPUT: {', '.join(spec.inputs)} has no rows")
        if staged.bad == staged.rows:
            raise _nothing_to_answer(spec, staged)
        name = spec.name or _name(spec, staged)
        source = render_batch(
            spec,
            job=name,
            url=rows.url,
            usd_per_second=decided.usd_per_second,
            argv=tuple(command_of(argv, spec.target)),
            head=decided.head,
        )
        job = Job(
            name=name,
            work=spec.title,
            url=rows.url.value,
            rows=staged.rows,
            bad=staged.bad,
            copies=staged.copies,
            shards=staged.shards,
            digest=staged.digest,
            inputs=spec.inputs,
            output=spec.output,
            errors=spec.errors,
            format=where.format.value,
            columns=rows.columns,
            gpu=str(spec.gpu) if spec.gpu else None,
            argv=tuple(argv),
            created_at=now(),
            gpuctl_version=__version__,
        )
        if spec.remote_output:
            from gpuctl.batch.remote_files import put_code

            put_code(staged.folder, spec, job, made_for=rows.url)
        if spec.adapter is not None:
            console.note(f"--lora-modules: {spec.adapter} answers the rows that name no model")
        for warning in rows.warnings():
            console.warn(warning)
        for name in changed(inputs, stamps(spec.inputs, Path.cwd())):
            console.warn(f"{name} was written to while it was read: the job has its rows as they were then")
        yield Prepared(job, staged, source, watch, inputs)


def before_of(decided: Decided, what: Prepared, *, online: bool, console: Console) -> Before | None:
    """What is told before the job starts, reckoned when it is asked for. `online`: the hub may be asked.

    None where the rows are in the cloud, and nobody here has seen them.
    """
    if what.watch is None:
        return None
    from gpuctl.batch.before import Before

    spec = decided.spec
    ended = jobs.ended(spec.target, environment_name(spec.target, spec.environment))
    return Before(decided, what.job, what.watch, online, console, ended)


def _nothing_to_answer(spec: BatchSpec, staged: Staged) -> GpuctlError:
    """Of an input of which no row can be answered nothing is started, and nothing costs anything."""
    commonest = sorted(staged.why_bad.items(), key=lambda item: -item[1][0])[:_COMMONEST]
    none = f"none of its {staged.rows:,} rows can" if staged.rows > 1 else "its only row cannot"
    return usage_error(
        [
            f"INPUT: {', '.join(spec.inputs)}: {none} be answered",
            *(
                f"{code}: {counted(rows, 'row')}, the first of them {message[:300]}"
                for code, (rows, message) in commonest
            ),
        ]
    )


def _name(spec: BatchSpec, staged: Staged) -> str:
    """The name of a job that was given none: the same for the same work on the same rows, wherever it is started."""
    stem = Path(spec.inputs[0]).name.partition(".")[0] if spec.inputs[0] != "-" else "stdin"
    what = json.dumps(
        [spec.title, spec.model and spec.model.revision, spec.engine_args, spec.dedupe, staged.digest],
        default=str,
    )
    short = hashlib.sha256(what.encode()).hexdigest()[:8]
    return f"{names.slug(stem)[: LONGEST_NAME - 9] or 'job'}-{short}"


@contextlib.contextmanager
def staging() -> Iterator[Path]:
    """A folder of our own, in which what others of us left behind when they were killed is swept first."""
    root = cache_dir() / "batch"
    root.mkdir(mode=0o700, exist_ok=True)
    for left in root.iterdir():
        pid = left.name.partition("-")[0]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        dir=root, prefix=f"{os.getpid()}-", ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)


def start(
    decided: Decided, what: Prepared, before: Before, *, runner: Runner, console: Console, yes: bool
) -> tuple[Remote, str | None]:
    """Upload and start, or go on with the job that is there. The run to follow; None where the job has ended.

    What it may take and cost is said `before`.
    """
    spec = decided.spec
    environment = environment_name(spec.target, spec.environment)
    for note in decided.notes:
        console.note(note)
    for warning in decided.warnings:
        console.warn(warning)
    job = what.job
    bad = f", of which {job.bad:,} can have no answer" if job.bad else ""
    same = f", of which {job.copies:,} ask for what others ask for" if job.copies else ""
    console.say(f"job {job.name}: {counted(job.rows, 'row')}{bad}{same}, in {counted(job.shards, 'shard')}")
    remote = Remote(what.job.name, reach(spec.target), spec.environment, runner, console)
    name = what.job.name
    if not remote.create():
        there = remote.read_json("job.json")
        if there is not None:
            return remote, go_on(spec, what, there, remote, environment, console, yes=yes)
    earlier = before_the_change(spec.target, environment, job, what.inputs)
    if earlier is not None:
        other, files = earlier
        answers = dataclasses.replace(remote, job=other.name).command("fetch")
        console.note(
            f"{', '.join(files)} changed since job {other.name} of {other.created_at} read it: this is another job, of "
            f"all rows as they are now; `{answers}` gets the answers of that one"
        )
    try:
        estimate = before.tell()
        if (
            spec.target is Target.MODAL
            and not yes
            and not _agreed(decided, name, environment, estimate, console)
        ):
            raise GpuctlError("not started")
    except (GpuctlError, KeyboardInterrupt):
        remote.delete()
        raise
    file = jobs.save(spec.target, environment, what.job, what.source)
    save_inputs(spec.target, environment, what.job.name, what.inputs)
    upload = _Upload(remote, what)
    try:
        try:
            remote.deploy(file)
        finally:
            upload.join()
        with console.spinner("uploading the rows …"):
            upload.finish()
    except KeyboardInterrupt:
        console.warn(
            f"job {name} was not started, and nothing works on it; the same command goes on, `{remote.command('rm')}` "
            "removes what is there"
        )
        raise
    console.done(f"uploaded and deployed: {name}")
    return remote, started(remote, file)


def _agreed(decided: Decided, name: str, environment: str, estimate: Estimate, console: Console) -> bool:
    each = "" if decided.usd_per_hour is None else f"{usd(decided.usd_per_hour)} an hour for each container"
    cost = estimate.cost_said()
    costs = f", {cost} in all by the estimate ({each})" if cost else f", {each}" if each else ""
    return console.confirm(
        f"Start job '{name}' on Modal (environment '{environment}'){costs}?",
        refused="--yes: needed to start a job on Modal when there is no terminal to ask on",
    )


class _Upload(threading.Thread):
    """The rows on their way while the App is deployed; `job.json` last, so that half a job is none."""

    def __init__(self, remote: Remote, what: Prepared) -> None:
        super().__init__(daemon=True)
        self._remote = remote
        self._what = what
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            folder = self._what.staged.folder
            for portion in portions(folder):
                self._remote.put(portion, "/")
            document = folder.with_name("job.json")
            document.write_text(json.dumps(self._what.job.document()), encoding="utf-8")
            self._remote.put(document, "/job.json")
        except BaseException as error:  # told by `finish`
            self._error = error

    def finish(self) -> None:
        self.join()
        if self._error is not None:
            raise self._error


def go_on(
    spec: BatchSpec,
    what: Prepared,
    there: dict[str, Any],
    remote: Remote,
    environment: str,
    console: Console,
    *,
    yes: bool,
) -> str | None:
    """The same job is there already: follow it, go on with it, or fetch what it made."""
    job = Job.from_document(there)
    if job is None:
        raise usage_error(f"--name: what is there as job {remote.job!r} is none of this gpuctl's")
    if job.digest != what.job.digest:
        files = changed_inputs(spec.target, environment, job.name)
        since = f": {', '.join(files)} changed since it was read" if files else ""
        raise usage_error(
            f"--name: there is a job {job.name!r} of other rows ({job.rows:,}, made {job.created_at}){since}",
            hint=f"another --name, or `{remote.command('rm')}`",
        )
    file = jobs.save(spec.target, environment, what.job, what.source)
    save_inputs(spec.target, environment, what.job.name, what.inputs)
    status = remote.read_json("status.json")
    if status is not None and status["state"] == "done":
        console.note(
            f"job {job.name} of {job.created_at} is the same work on the same rows, and is done: nothing is paid twice"
        )
        return None
    if status is not None and status["state"] == RUNNING and alive(status):
        console.note(f"job {job.name} is the same work on the same rows, and runs already")
        return str(status["run"])
    if status is not None:
        check_cap(remote, status, spec.max_cost)
    ended = 0 if status is None else status["done"] + status["failed"]
    console.note(
        f"job {job.name} of {job.created_at} is the same work on the same rows: {ended:,} of {job.rows:,} are done"
    )
    if (
        not yes
        and spec.target is Target.MODAL
        and not console.confirm(
            "Go on with it?", refused="--yes: needed to go on with a job when there is no terminal to ask on"
        )
    ):
        raise GpuctlError("not started")
    return resume(remote, file)


def check_cap(remote: Remote, status: Mapping[str, Any], cap: Decimal | float | None) -> None:
    """Refuse to go on with a job that would stop at once."""
    spent = status["usd"]
    if cap is None or spent is None or spent < cap:
        return
    raise usage_error(
        f"--max-cost: {usd(Decimal(str(spent)))} are spent already, and the cap is {usd(Decimal(str(cap)))}: nothing "
        "more could be answered",
        hint=f"`{_with_more(remote, cap, spent)}` goes on, up to a higher cap",
    )


def _with_more(remote: Remote, cap: Any, spent: float) -> str:
    """The command that goes on with a cap that leaves something to spend."""
    more = Decimal(str(cap))
    while more <= Decimal(str(spent)):
        more *= 2
    return f"{remote.command('resume')} --max-cost {more:f}"


def resume(remote: Remote, file: Path, *, retry_failed: bool = False) -> str:
    """Deploy and start again: what has ended stays as it is, with `retry_failed` but for the errors."""
    remote.deploy(file)
    remote.remove("control/stop")
    return started(remote, file, retry_failed=retry_failed)


def started(remote: Remote, file: Path, *, retry_failed: bool = False) -> str:
    """Start the driver, and keep that it was; the run that it is."""
    run = remote.start(file, retry_failed=retry_failed)
    jobs.save_start(*remote.place, remote.job, run)
    return run


def finish(
    remote: Remote,
    job: Job,
    run: str | None,
    *,
    console: Console,
    on_event: Callable[[Mapping[str, Any]], None] | None = None,
    follows: bool = True,
) -> Summary:
    """Follow a job to its end, stop its App, and write what it made where that belongs."""
    if follows:
        try:
            status = follow(remote, run, console=console, on_event=on_event)
        except KeyboardInterrupt:
            console.warn(
                f"job {job.name} goes on without this terminal: `{remote.command('wait')}` follows it again, "
                f"`{remote.command('cancel')}` ends it"
            )
            raise
    else:
        found = remote.read_json("status.json")
        if found is None:
            raise GpuctlError(f"job {job.name} was never started", hint=remote.command("resume"))
        status = found
    if status["state"] != RUNNING:
        remote.stop()
        jobs.save_end(*remote.place, job.name, status)
    if status.get("phase") == "reading":  # in the cloud, and nothing was asked yet
        raise GpuctlError(
            status["problem"],
            hint=status.get("hint"),
            exit_code=EXIT_USAGE if status.get("usage") else EXIT_FAILURE,
        )
    if status["state"] == "failed":
        raise GpuctlError(
            f"job {job.name} failed: {status['problem']}",
            hint=f"`{remote.command('logs')}` tells more; `{remote.command('resume')}` "
            f"goes on after {status['done'] + status['failed']:,} of {status['rows']:,} rows",
        )
    if status["state"] == "stopped":
        cap, spent = status.get("max_usd"), status["usd"]
        capped = cap is not None and spent is not None and spent >= cap
        goes_on = _with_more(remote, cap, spent) if capped else remote.command("resume")
        raise GpuctlError(
            f"job {job.name} was stopped: {status['problem']}; "
            f"{status['done'] + status['failed']:,} of {status['rows']:,} rows are done, and kept",
            hint=f"`{goes_on}` goes on{', up to a higher cap' if capped else ''}; "
            f"`{remote.command('fetch')} --partial` fetches what there is",
        )
    if not job.rows:  # which were read in the cloud
        job = jobs.read(remote) or job
        jobs.keep(*remote.place, job)
    if is_remote(job.output):
        from gpuctl.batch.remote_files import published

        return published(remote, job, status)
    return fetch(remote, job, status, console=console)


def fetch(
    remote: Remote, job: Job, status: Mapping[str, Any], *, console: Console, home: str = ""
) -> Summary:
    """Download the answers and write the output. `home` is the folder in the Volume of a run of a schedule."""
    from gpuctl.batch.outputs import Output

    errors = Errors()
    with staging() as folder:
        with console.spinner("fetching the answers …"):
            remote.get(f"{home}answers", folder)
            if job.copies:
                remote.get(f"{home}{COPIES}", folder / COPIES)
            if job.url == Url.IMAGES and status["done"]:
                remote.get(f"{home}pictures", folder)
        where = destination_of(job)
        with Output(where, job=job.name, url=Url(job.url), columns=job.columns, pictures=folder) as output:
            results = read_results(folder / "answers")
            for result in with_copies(results, folder) if job.copies else results:
                if result.error is not None:
                    errors.add(result.error)
                output.write(result)
    if not home:  # each run of a schedule has other answers
        remember(*remote.place, job.name, where)
    return Summary(
        job=job.name,
        state=str(status["state"]),
        output=job.output,
        errors_file=str(where.errors) if output.failed else None,
        status={**status, "rows": job.rows, "done": output.answered, "failed": output.failed},
        in_run=ended_in_run(status),
        commonest=errors.commonest(_COMMONEST),
        # Bad rows stay so.
        again=f"{remote.command('resume')} --retry-failed" if output.failed > job.bad and not home else None,
    )


def ended_in_run(status: Mapping[str, Any]) -> int:
    """Rows that ended in the last run; of a job that was resumed, others did before."""
    return max(0, int(status["done"] + status["failed"] - status.get("ended_before", 0)))


def tell(summary: Summary, console: Console) -> None:
    """The end, for a person."""
    status = summary.status
    seconds = max(status["time"] - status["began"], 0.001)
    if summary.state != "done":
        # Of whole shards; how fast it was, is told at its end.
        console.done(
            f"{counted(status['done'], 'row')} answered"
            + (f", {status['failed']:,} failed" if status["failed"] else "")
            + f", of {status['rows']:,}: {summary.output} has what there is so far"
        )
        _tell_errors(summary, console)
        return
    of_run = f", {summary.in_run:,} of them in the last {duration(seconds)}"
    console.done(
        f"{counted(status['done'], 'row')} answered"
        + (f", {status['failed']:,} failed" if status["failed"] else "")
        + (of_run if status.get("ended_before") else f" in {duration(seconds)}")
        + f" ({summary.in_run / seconds:,.1f} rows/s): {summary.output}"
    )
    if status["tokens_in"]:
        million = (status["tokens_in"] + status["tokens_out"]) / 1e6
        per = f", ${status['usd'] / million:.3f} for a million" if status["usd"] else ""
        console.say(f"  {status['tokens_in']:,} tokens in, {status['tokens_out']:,} out{per}")
    if status["usd"] is not None:
        console.say(f"  ${status['usd']:.2f} for {duration(status['container_seconds'])} of containers")
    _tell_errors(summary, console)


def _tell_errors(summary: Summary, console: Console) -> None:
    if summary.errors_file is not None:
        failed = summary.status["failed"]
        rows = "1 row has" if failed == 1 else f"{failed:,} rows have"
        console.warn(f"{rows} no answer: {summary.errors_file} says why of each")
        for text, count in summary.commonest:
            console.say(f"  {count:,} x {' '.join(text.split())[:200]}")
        if summary.again is not None and summary.state == "done":
            console.say(f"  `{summary.again}` tries again those that may have one")
