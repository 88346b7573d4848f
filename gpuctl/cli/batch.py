"""`gpuctl batch MODEL INPUT … -o OUTPUT`, and what there is to do with a job. May import at the top: typer, options."""

# ruff: noqa: ARG001 - the options of `run` are read from its context: by `resume` too, which has none of them itself

from __future__ import annotations

import difflib
import os
import sys
from pathlib import Path  # noqa: TC003 - typer reads the annotations when it runs
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from gpuctl.cli.options import (
    Environment,
    Json,
    Local,
    Quiet,
    Verbose,
    Yes,
    argv_of,
    complete_gpu,
    complete_model,
    number,
    repeatable,
    runner_of,
    target_of,
    text,
)
from gpuctl.errors import usage_error

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from typer._click import Context

    from gpuctl.batch.jobs import Job
    from gpuctl.batch.plan import Decided
    from gpuctl.batch.remote import Remote
    from gpuctl.cli.console import Console
    from gpuctl.configs import Found
    from gpuctl.specs.batch import BatchSpec

CONTEXT_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"]}
_RUN = "run"
_TAIL = 100  # lines of logs, as `modal app logs` has them
_ENGINE_ARGS = "gpuctl.batch.engine_args"


_ALSO_CALLED = {  # elsewhere
    "list": "ls", "ps": "ls", "jobs": "ls", "show": "status", "info": "status", "get": "fetch", "download": "fetch",
    "stop": "cancel", "kill": "cancel", "abort": "cancel", "continue": "resume", "restart": "resume",
    "retry": "resume", "delete": "rm", "remove": "rm", "log": "logs", "follow": "wait", "watch": "wait",
}  # fmt: skip


class BatchGroup(TyperGroup):
    """`gpuctl batch MODEL …` is `gpuctl batch run MODEL …`; what follows `--` is the engine's."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        own, engine = (args[: args.index("--")], args[args.index("--") + 1 :]) if "--" in args else (args, [])
        ctx.meta[_ENGINE_ARGS] = engine
        if own and own[0] not in self.commands and own[0] not in ("-h", "--help"):
            meant = difflib.get_close_matches(own[0], self.commands, n=1, cutoff=0.75)
            meant = meant or [_ALSO_CALLED[own[0]]] if own[0] in _ALSO_CALLED else meant
            if meant and not any(word.startswith(("-o", "--output")) for word in own):  # a job needs one
                raise usage_error(f"gpuctl batch: there is no command {own[0]!r}; did you mean {meant[0]}?")
            own = [_RUN, *own]
        return super().parse_args(ctx, own)


batch_app = app = typer.Typer(
    cls=BatchGroup,
    help="Answer the rows of a file with a model or a function of yours: gpuctl batch MODEL INPUT... -o OUTPUT. "
    "`gpuctl batch run --help` lists the options of that.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=CONTEXT_SETTINGS,
)


def complete_job(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    from gpuctl.batch import jobs
    from gpuctl.errors import GpuctlError
    from gpuctl.reach import environment_name

    try:
        target = target_of(bool(ctx.params.get("local")))
        known = jobs.known(target, environment_name(target, ctx.params.get("env")))
        return [
            (job.name, f"{job.work}, {job.rows:,} rows") for job in known if job.name.startswith(incomplete)
        ]
    except GpuctlError:
        return []


Events = Annotated[
    bool,
    typer.Option("--events", help="Print how far it is on stdout, as a line of JSON every two seconds."),
]
Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        show_default=False,
        help="Where the answers go. [default: where the job was to put them]",
    ),
]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="The job's name.", autocompletion=complete_job)]


@batch_app.command(_RUN, context_settings=CONTEXT_SETTINGS)
def run(
    ctx: typer.Context,
    work: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            show_default=False,
            help="An alias, org/name[@revision] of Hugging Face, a folder with a pipeline of diffusers, or a function "
            "or class of yours: work.py:process.",
            autocompletion=complete_model,
        ),
    ],
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            show_default=False,
            help="Files (OpenAI Batch or plain JSONL, CSV, TSV, Parquet, text; .gz and .zst), folders or globs of "
            "audio, image or text files, or - for what is piped in; also volume://NAME/PATH and s3://BUCKET/KEY.",
        ),
    ],
    task: Annotated[
        str | None,
        text(
            "TASK",
            "What is asked of the model: chat, completions, embeddings, transcriptions or images. "
            "[default: what the model is for, or the input's lines say; else chat]",
            ("chat", "completions", "embeddings", "transcriptions", "images"),
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            show_default=False,
            help="Where the answers go: a file, a folder (of pictures, subtitles, texts), or - for stdout.",
        ),
    ] = None,
    errors: Annotated[
        str | None,
        text("FILE", "Where rows without an answer go. [default: beside the output, .errors.jsonl]"),
    ] = None,
    format: Annotated[  # noqa: A002 - the option's name
        str | None,
        text("FORMAT", "openai, jsonl, csv or parquet. [default: by the input and the output's name]"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
    prompt: Annotated[
        str | None, text("TEMPLATE", "What to ask of each row, such as 'Summarise: {text}'. Jinja, too.")
    ] = None,
    system: Annotated[str | None, text("TEXT", "A system message before each row's.")] = None,
    messages_column: Annotated[str | None, text("COLUMN", "The column that holds a row's messages.")] = None,
    input_format: Annotated[
        str | None,
        text(
            "FORMAT",
            "What the input is, where that is not found by itself: openai, jsonl, csv, tsv, parquet, lines, text, "
            "audio or image.",
            ("openai", "jsonl", "csv", "tsv", "parquet", "lines", "text", "audio", "image"),
        ),
    ] = None,
    encoding: Annotated[str | None, text("NAME", "The input's encoding. [default: utf-8]")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Start nothing when a row of the input is malformed.")
    ] = False,
    limit: Annotated[str | None, number("Only the first N rows, for a taste.")] = None,
    dedupe: Annotated[
        bool, typer.Option("--dedupe", help="Ask what several rows ask for once, and answer it everywhere.")
    ] = False,
    max_tokens: Annotated[str | None, number("Most tokens of an answer.")] = None,
    temperature: Annotated[str | None, text("T", "Sampling temperature; 0 is greedy.")] = None,
    top_p: Annotated[
        str | None, text("P", "Sample from the likeliest tokens that make up this share.")
    ] = None,
    seed: Annotated[str | None, number("Seed of the sampling, or of the first picture of each row.")] = None,
    size: Annotated[
        str | None, text("WxH", "Of pictures: width and height in pixels. [default: the model's own]")
    ] = None,
    steps: Annotated[
        str | None, number("Of pictures: steps of the sampler. [default: the model's own]")
    ] = None,
    guidance: Annotated[
        str | None,
        text(
            "G",
            "Of pictures: how closely they keep to the prompt (guidance_scale). [default: the model's own]",
        ),
    ] = None,
    negative_prompt: Annotated[str | None, text("TEXT", "Of pictures: what is not to be on them.")] = None,
    json_schema: Annotated[str | None, text("FILE", "A JSON Schema that every answer keeps to.")] = None,
    name: Annotated[
        str | None, text("NAME", "Name of the job. [default: made from the input and the work]")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="GPU",
            help="The GPU of each container, as `gpuctl serve` takes it. [default: auto; for a function none]",
            autocompletion=complete_gpu,
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Start on GPUs on which, by the arithmetic, the model does not fit."),
    ] = False,
    max_containers: Annotated[str | None, number("Most containers at a time. [default: 1]")] = None,
    concurrency: Annotated[
        str | None,
        number("Rows at once in a container: the engine's --max-num-seqs, or calls of the function."),
    ] = None,
    batch_size: Annotated[
        str | None,
        number("Rows in a call of the function, as a list; pictures in a call of a pipeline. [default: one]"),
    ] = None,
    retries: Annotated[str | None, number("Further tries of a row that fails. [default: 2]")] = None,
    max_cost: Annotated[
        str | None, text("USD", "Stop in order when so much is spent; what is done is kept.")
    ] = None,
    max_model_len: Annotated[str | None, number("Most tokens of question and answer together.")] = None,
    cpu: Annotated[str | None, text("CORES", "Cores to reserve, or REQUEST,LIMIT.")] = None,
    memory: Annotated[str | None, text("MIB", "Memory to reserve in MiB, or REQUEST,LIMIT.")] = None,
    ephemeral_disk: Annotated[str | None, text("MIB", "Disk of a container in MiB.")] = None,
    region: Annotated[str | None, text("REGION[,...]", "Where containers may run.")] = None,
    cloud: Annotated[str | None, text("CLOUD", "Whose machines.", ("aws", "gcp", "oci", "auto"))] = None,
    startup_timeout: Annotated[str | None, number("Seconds that a container may take to start.")] = None,
    secret: Annotated[
        list[str] | None, repeatable("NAME", "A Secret of Modal's, as environment variables.")
    ] = None,
    secret_from_env: Annotated[
        list[str] | None, repeatable("VAR", "A variable of this shell, as a secret.")
    ] = None,
    env_var: Annotated[
        list[str] | None,
        repeatable("KEY=VALUE", "An environment variable in the container; not for secrets."),
    ] = None,
    volume: Annotated[list[str] | None, repeatable("NAME:PATH", "A Volume at an absolute path.")] = None,
    env: Environment = None,
    tag: Annotated[
        list[str] | None, repeatable("KEY=VALUE", "A tag of the App, for billing and lists.")
    ] = None,
    vllm_version: Annotated[str | None, text("X.Y.Z", "The engine's version.")] = None,
    pip: Annotated[list[str] | None, repeatable("PACKAGE", "A Python package to install too.")] = None,
    apt: Annotated[list[str] | None, repeatable("PACKAGE", "A Debian package to install too.")] = None,
    bucket_secret: Annotated[
        str | None,
        text("NAME", "The Secret of Modal's that opens the bucket of s3:// or gs:// paths."),
    ] = None,
    bucket_endpoint: Annotated[
        str | None,
        text("URL", "Where s3:// is, if not at Amazon: https://ACCOUNT.r2.cloudflarestorage.com."),
    ] = None,
    cron: Annotated[
        str | None,
        text(
            "EXPR", "Run it by this schedule, over the rows as they are then: '0 0 * * *' is each midnight."
        ),
    ] = None,
    timezone: Annotated[str | None, text("ZONE", "The clock of --cron. [default: UTC]")] = None,
    every: Annotated[
        str | None, text("PERIOD", "Run it every 30m, 1h or 7d, over the rows as they are then.")
    ] = None,
    local: Local = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the module that would be deployed; nothing runs.")
    ] = False,
    render: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write that module to FILE; nothing runs.")
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return when the job runs; `gpuctl batch wait` follows it.")
    ] = False,
    events: Events = False,
    yes: Yes = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Answer every row of the input, once."""
    from gpuctl.batch import remote_files
    from gpuctl.batch.rows import Url
    from gpuctl.batch.run import (
        asked,
        before_of,
        check_output,
        finish,
        prepared,
        read_input,
        start,
        tell,
    )
    from gpuctl.cli.console import Console
    from gpuctl.cli.serve import write_source

    if json and (dry_run or render or events):
        raise usage_error(
            "--json: tells how the job ended; it does not go with --dry-run, --render or --events"
        )
    spec = spec_of(ctx.params, ctx.meta.get(_ENGINE_ARGS, ()))
    if events and spec.schedule is not None:
        raise usage_error(
            "--events: a schedule is deployed, and not followed; `gpuctl batch status` shows its runs"
        )
    if (json or events) and spec.output == "-":
        raise usage_error(
            f"{'--json' if json else '--events'}: does not go with -o -: the answers would be among what it prints"
        )
    if events and (detach or dry_run or render):
        raise usage_error("--events: follows a job; it does not go with --detach, --dry-run or --render")
    console = Console(quiet=quiet, verbose=verbose, json=json)
    unset = [variable for variable in spec.secrets_from_env if variable not in os.environ]
    if unset and not (dry_run or render):
        raise usage_error([f"--secret-from-env: {variable} is not set in this shell" for variable in unset])
    argv = argv_of(ctx)
    offline = bool(dry_run or render)
    model = where = None
    if spec.remote_input:
        spec, model = _looked_up(spec, offline=offline)
        pictures = asked(spec, model) is Url.IMAGES
        decided = _decided(ctx, spec, model, argv, console, offline=offline, pictures=pictures)
        ready = remote_files.prepared(decided, argv=argv, console=console)
    else:
        # What a model of the hub is for, it says; of others it is known before anybody is asked.
        told = spec.model is None or spec.task is not None or spec.model.entry is not None
        if not told:
            spec, model = _looked_up(spec, offline=offline)
        rows, where = read_input(spec, model)
        if not (offline or spec.remote_output):
            check_output(spec, where)
        if told:
            spec, model = _looked_up(spec, offline=offline)
        pictures = rows.url is Url.IMAGES
        decided = _decided(ctx, spec, model, argv, console, offline=offline, pictures=pictures)
        ready = prepared(decided, rows, where, argv=argv, console=console)
    with ready as what:
        if where is not None and not (offline or spec.remote_output):
            check_output(spec, where, what)
        before = before_of(decided, what, online=not offline, console=console)
        if render:
            write_source(render, what.source)
        if dry_run:
            sys.stdout.write(what.source)
        if dry_run or render:
            for note in decided.notes:
                console.note(note)
            for warning in decided.warnings:
                console.warn(warning)
            if before is not None:
                before.tell()
            return
        if spec.schedule is not None:
            from gpuctl.batch import schedules

            deployed = schedules.deploy(decided, what, runner=runner_of(ctx), console=console, yes=yes)
            schedules.tell_deployed(deployed, console)
            return
        runner = runner_of(ctx)
        if before is None:
            remote, started = remote_files.start(decided, what, runner=runner, console=console, yes=yes)
        else:
            remote, started = start(decided, what, before, runner=runner, console=console, yes=yes)
    estimate = {"estimate": None if before is None else before.document()}
    if detach and started is not None:
        _tell_detached(remote, what.job, console, more=estimate)
        return
    summary = finish(
        remote,
        what.job,
        started,
        console=console,
        on_event=_print_event if events else None,
        follows=started is not None,
    )
    if json:
        console.print_document(summary.document() | estimate)
    else:
        tell(summary, console)


# What only says how to show or to ask, and no part of what a job is.
_TALK = ("local", "dry_run", "render", "detach", "events", "yes", "json", "quiet", "verbose")


def spec_of(params: Mapping[str, Any], engine_args: Sequence[str]) -> BatchSpec:
    """The spec, from the parameters of `run` as they were typed."""
    from gpuctl.specs.batch import BatchSpec

    options = {name: value for name, value in params.items() if name not in _TALK}
    for name in ("secret", "secret_from_env", "env_var", "volume", "tag", "pip", "apt"):
        options[name] = options[name] or ()
    return BatchSpec.from_options(**options, engine_args=engine_args, target=target_of(bool(params["local"])))


def _spec_again(ctx: typer.Context, job: Job) -> BatchSpec:
    """The spec of a job that was started, with the options that were changed since."""
    from gpuctl.cli import command

    words = list(job.argv[1:])
    own, engine = (
        (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    )
    if own and own[0] == _RUN:
        own = own[1:]
    group = command().get_command(ctx, "batch")
    assert isinstance(group, TyperGroup)
    made = group.commands[_RUN].make_context(_RUN, own, parent=ctx.parent)
    return spec_of({**made.params, **job.changes}, engine)


def _looked_up(spec: BatchSpec, *, offline: bool) -> tuple[BatchSpec, Found | None]:
    """What is known of the model: `offline`, as a dry run knows it, else at its exact commit, which the spec has."""
    import dataclasses

    from gpuctl.configs import of_deployment, of_ref
    from gpuctl.deploy import check_tools
    from gpuctl.hub import resolve_revision

    if not offline:
        check_tools(spec.target)
    model = spec.model
    if model is None:
        return spec, None
    if offline:
        return spec, of_ref(model, online=False)
    revision = None if model.repo is None else resolve_revision(model.repo, model.revision)
    found = of_deployment(model, revision, force=spec.force)
    if revision is not None:
        spec = dataclasses.replace(spec, model=dataclasses.replace(model, revision=revision))
    return spec, found


def _decided(
    ctx: typer.Context,
    spec: BatchSpec,
    found: Found | None,
    argv: tuple[str, ...],
    console: Console,
    *,
    offline: bool,
    pictures: bool,
) -> Decided:
    """What the job runs on. `found`: what is known of the model; `pictures`: whether the rows ask for them."""
    from gpuctl.batch.plan import decide
    from gpuctl.plan import with_target
    from gpuctl.prices import from_catalogue, rates
    from gpuctl.target import Target

    runner = runner_of(ctx)
    if spec.target is Target.LOCAL:
        prices = from_catalogue("nobody was asked")
    elif offline:
        prices = rates(spec.target)
    else:
        prices = rates(spec.target, runner=runner, console=console)
    return decide(spec, found, prices, argv=with_target(argv, spec.target), pictures=pictures)


def _check_events(events: bool, *, json: bool, output: str | None) -> None:
    if events and json:
        raise usage_error("--json: tells how the job ended; it does not go with --events")
    if events and output == "-":
        raise usage_error("--events: does not go with -o -: the answers would be among what it prints")


def _print_event(status: Any) -> None:
    import json

    print(json.dumps(status, separators=(",", ":")), flush=True)


def _tell_detached(
    remote: Remote, job: Job, console: Console, *, runs: bool = True, more: Mapping[str, Any] | None = None
) -> None:
    """`runs`: False: it is done, which was said."""
    if console.json:
        state = "running" if runs else "done"
        console.print_document({"job": job.name, "state": state, "rows": job.rows, **(more or {})})
    if not runs:
        return
    console.say(f"job {job.name} runs. It needs this machine no more:")
    for verb, does in (
        ("wait", "follows it, and fetches the answers"),
        ("status", "how far it is"),
        ("cancel", "ends it"),
    ):
        console.say(f"  {remote.command(verb)}    # {does}")


def _remote(ctx: typer.Context, name: str, local: bool, env: str | None, console: Console) -> Remote:
    from gpuctl.batch.manage import remote_of

    return remote_of(name, target_of(local), env, runner=runner_of(ctx), console=console)


@batch_app.command("ls", context_settings=CONTEXT_SETTINGS)
def list_jobs(
    ctx: typer.Context,
    local: Local = False,
    env: Environment = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """List the jobs, of this machine and of others, and how far each is."""
    from gpuctl.batch.manage import listed
    from gpuctl.cli.console import Console

    console = Console(quiet=quiet, verbose=verbose, json=json)
    rows = listed(target_of(local), env, runner=runner_of(ctx), console=console)
    if json:
        console.print_document([row.document() for row in rows])
        return
    if not rows:
        console.say("no jobs")
        return
    titles = ("JOB", "STATE", "DONE", "FAILED", "ROWS", "WORK", "COST", "STARTED", "NEXT", "LAST")
    scheduled = any(row.job is not None and row.job.schedule is not None for row in rows)
    columns = len(titles) if scheduled else len(titles) - 2
    console.table(titles[:columns], [row.cells()[:columns] for row in rows])


@batch_app.command(context_settings=CONTEXT_SETTINGS)
def status(
    ctx: typer.Context,
    job: JobName,
    local: Local = False,
    env: Environment = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Tell how far a job is."""
    from gpuctl.batch.manage import status_of
    from gpuctl.batch.schedules import lines, runs
    from gpuctl.cli.console import Console

    console = Console(quiet=quiet, verbose=verbose, json=json)
    remote = _remote(ctx, job, local, env, console)
    found = status_of(remote)
    scheduled = found.job is not None and found.job.schedule is not None
    if json:
        console.print_document({**found.document(), **({"runs": runs(remote)} if scheduled else {})})
        return
    for line in found.lines():
        console.answer(line)
    if found.job is not None and scheduled:
        for line in lines(remote, found.job):
            console.answer(line)


@batch_app.command(context_settings=CONTEXT_SETTINGS)
def logs(
    ctx: typer.Context,
    job: JobName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as they come.")] = False,
    tail: Annotated[str | None, number("The last N lines. [default: 100]")] = None,
    local: Local = False,
    env: Environment = None,
    verbose: Verbose = False,
) -> None:
    """Show what a job's containers printed."""
    import functools

    from gpuctl.batch import jobs
    from gpuctl.batch.logs import MOST_LINES, followed, last
    from gpuctl.batch.manage import job_of
    from gpuctl.cli.console import Console
    from gpuctl.reach import environment_name

    if tail is not None and not (len(tail) < 10 and tail.isdecimal() and 0 < int(tail) <= MOST_LINES):
        raise usage_error(f"--tail: {tail!r} is not a number of lines from 1 to {MOST_LINES}")
    if follow and tail is not None:
        raise usage_error("--follow: shows what comes, so not together with --tail")
    console = Console(verbose=verbose)
    remote = _remote(ctx, job, local, env, console)
    if jobs.get(remote.env.target, environment_name(remote.env.target, env), remote.job) is None:
        job_of(remote)  # of another machine, or of none
    if follow:
        followed(remote, functools.partial(print, flush=True))
        return
    lines = last(remote, _TAIL if tail is None else int(tail))
    for line in lines:
        print(line)
    if not lines:
        console.say(f"job {remote.job}: its containers have printed nothing")


@batch_app.command(context_settings=CONTEXT_SETTINGS)
def wait(
    ctx: typer.Context,
    job: JobName,
    output: Output = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
    events: Events = False,
    local: Local = False,
    env: Environment = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Follow a job until it ends, and fetch its answers."""
    from gpuctl.batch.manage import check_output_name, check_started, job_of, with_output
    from gpuctl.batch.run import finish, tell
    from gpuctl.cli.console import Console

    check_output_name(output)
    _check_events(events, json=json, output=output)
    console = Console(quiet=quiet, verbose=verbose, json=json)
    remote = _remote(ctx, job, local, env, console)
    found = job_of(remote)
    if found.schedule is not None:
        raise usage_error(
            f"JOB: {found.name!r} runs again and again, and has no end to wait for",
            hint=f"`{remote.command('status')}` shows its runs, `{remote.command('fetch')}` gets the answers of one",
        )
    found = with_output(remote, found, output, overwrite=overwrite)
    _check_events(events, json=json, output=found.output)
    check_started(remote, found)
    summary = finish(remote, found, None, console=console, on_event=_print_event if events else None)
    if json:
        console.print_document(summary.document())
    else:
        tell(summary, console)


@batch_app.command(context_settings=CONTEXT_SETTINGS)
def fetch(
    ctx: typer.Context,
    job: JobName,
    output: Output = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
    partial: Annotated[
        bool, typer.Option("--partial", help="What there is, of a job that has not ended, too: whole shards.")
    ] = False,
    run: Annotated[
        str | None,
        text("RUN", "Of a scheduled job, the run, as `status` calls it. [default: the last that is done]"),
    ] = None,
    local: Local = False,
    env: Environment = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Fetch the answers of a job that has ended."""
    from gpuctl.batch.manage import check_output_name, fetch_of, job_of
    from gpuctl.batch.run import tell
    from gpuctl.batch.schedules import fetch_run
    from gpuctl.cli.console import Console

    check_output_name(output)
    if json and output == "-":
        raise usage_error(
            "--json: does not go with answers on stdout (-o -), which are no part of a document"
        )
    console = Console(quiet=quiet, verbose=verbose, json=json)
    remote = _remote(ctx, job, local, env, console)
    found = job_of(remote)
    if found.schedule is not None:
        summary = fetch_run(remote, found, run, output, overwrite=overwrite)
    elif run is not None:
        raise usage_error(f"--run: job {found.name!r} has no schedule, and so no runs of one")
    else:
        summary = fetch_of(remote, output, overwrite=overwrite, partial=partial)
    if json:
        console.print_document(summary.document())
    else:
        tell(summary, console)


@batch_app.command(context_settings=CONTEXT_SETTINGS)
def cancel(
    ctx: typer.Context,
    job: JobName,
    now: Annotated[
        bool, typer.Option("--now", help="At once: rows that are being answered are lost, and nothing else.")
    ] = False,
    local: Local = False,
    env: Environment = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """End a job in order; what is done is kept, and `resume` goes on."""
    from gpuctl.batch.manage import cancel_job
    from gpuctl.cli.console import Console

    console = Console(quiet=quiet, verbose=verbose)
    cancel_job(_remote(ctx, job, local, env, console), now=now)


@batch_app.command(context_settings=CONTEXT_SETTINGS)
def resume(
    ctx: typer.Context,
    job: JobName,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try rows again that ended with an error, too.")
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="GPU", help="Another GPU.", autocompletion=complete_gpu, show_default=False),
    ] = None,
    max_containers: Annotated[str | None, number("Another most of containers at a time.")] = None,
    concurrency: Annotated[str | None, number("Another number of rows at once in a container.")] = None,
    max_cost: Annotated[
        str | None, text("USD", "Another cap: on all that the job costs, what was spent before included.")
    ] = None,
    retries: Annotated[str | None, number("Another number of further tries.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return when the job runs.")] = False,
    events: Events = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
    output: Output = None,
    yes: Yes = False,
    local: Local = False,
    env: Environment = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Go on with a job where it stopped, also with another GPU or more containers."""
    import dataclasses

    from gpuctl.batch.manage import changes_of, check_output_name, job_of, resume_job, with_output
    from gpuctl.batch.rows import Url
    from gpuctl.batch.run import finish, tell
    from gpuctl.cli.console import Console
    from gpuctl.specs.batch import check_changes

    check_output_name(output)
    _check_events(events, json=json, output=output)
    if events and detach:
        raise usage_error("--events: follows a job; it does not go with --detach")
    given = {
        option: value
        for option, value in (
            ("gpu", gpu),
            ("max_containers", max_containers),
            ("concurrency", concurrency),
            ("max_cost", max_cost),
            ("retries", retries),
        )
        if value is not None
    }
    check_changes(**given)
    console = Console(quiet=quiet, verbose=verbose, json=json)
    remote = _remote(ctx, job, local, env, console)
    found = job_of(remote)
    if found.schedule is not None:
        from gpuctl.batch import schedules

        others = [name for name, is_given in (("retry_failed", retry_failed), ("events", events)) if is_given]
        others += [*given, *(["output"] if output else [])]
        if others:
            raise usage_error(
                f"--{others[0].replace('_', '-')}: {found.name!r} is scheduled; the command that deployed it "
                "changes it, with other options"
            )
        schedules.resume(remote, found, yes=yes)
        schedules.tell_deployed(remote, console)
        return
    if not detach:
        found = with_output(remote, found, output, overwrite=overwrite)
        _check_events(events, json=json, output=found.output)
    decided = None
    if given:
        # What an earlier `resume` changed stays as that has it.
        found = dataclasses.replace(found, changes=changes_of(remote) | given)
        spec, model = _looked_up(_spec_again(ctx, found), offline=False)
        pictures = found.url == Url.IMAGES
        decided = _decided(ctx, spec, model, found.argv, console, offline=False, pictures=pictures)
    started = resume_job(remote, found, decided, retry_failed=retry_failed, yes=yes)
    if detach:
        _tell_detached(remote, found, console, runs=started is not None)
        return
    summary = finish(
        remote,
        found,
        started,
        console=console,
        on_event=_print_event if events else None,
        follows=started is not None,
    )
    if json:
        console.print_document(summary.document())
    else:
        tell(summary, console)


@batch_app.command("rm", context_settings=CONTEXT_SETTINGS)
def remove(
    ctx: typer.Context,
    job: JobName,
    yes: Yes = False,
    local: Local = False,
    env: Environment = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Delete a job with its rows and answers; what was fetched stays."""
    from gpuctl.batch.manage import remove_job
    from gpuctl.cli.console import Console

    console = Console(quiet=quiet, verbose=verbose)
    remove_job(_remote(ctx, job, local, env, console), yes=yes)
