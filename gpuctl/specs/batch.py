"""What `gpuctl batch` was asked for, checked once. May import: gpuctl.errors, batch.requests, catalog, target, specs.

`BatchSpec.from_options` takes what was typed, and raises one usage error that lists every problem of the command.
What the input's rows are is not known here: `gpuctl.batch.inputs` finds that out.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpuctl import catalog
from gpuctl.batch.requests import MOST_STEPS, size_problem
from gpuctl.errors import usage_error
from gpuctl.specs import names
from gpuctl.specs.engine_args import adapters, check_engine_args, stages
from gpuctl.specs.gpu import AUTO, GpuRequest
from gpuctl.specs.json_schema import read_schema
from gpuctl.specs.model import ModelRef
from gpuctl.specs.remote_paths import Mount, check_paths, is_remote, mounts, parse
from gpuctl.specs.resources import (
    CLOUDS,
    OWN_TAG,
    Amount,
    ResourceReader,
    VolumeMount,
    python_package,
    system_package,
)
from gpuctl.specs.schedule import Schedule, read_schedule
from gpuctl.specs.serve import default_startup_timeout
from gpuctl.target import Target

if TYPE_CHECKING:
    from collections.abc import Sequence
    from decimal import Decimal

DEFAULT_MAX_CONTAINERS = 1  # a finite bill; see --max-containers
DEFAULT_RETRIES, MOST_RETRIES = 2, 100
PREFIX = "gpuctl-batch-"  # of a job's App, Volume and Dict
LONGEST_NAME = 64 - len(PREFIX)  # Modal's names have at most 64 characters
TASKS = ("chat", "completions", "embeddings", "transcriptions", "images")
INPUT_FORMATS = ("openai", "jsonl", "csv", "tsv", "parquet", "lines", "text", "audio", "image")
FORMATS = ("openai", "jsonl", "csv", "tsv", "parquet", "json", "txt", "srt", "vtt")

# The flags that are fields of a request of text, and which of them a request of another kind does not have.
_WRITING = {
    "--max-tokens": "max_tokens",
    "--temperature": "temperature",
    "--top-p": "top_p",
    "--seed": "seed",
    "--json-schema": "response_format",
}
_NOT_OF = {"embeddings": frozenset(_WRITING.values()), "transcriptions": frozenset({"response_format"})}

_FUNCTION = re.compile(r"(?P<file>.+\.py):(?P<name>[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*)")
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{LONGEST_NAME - 1}}}")
_DAY = 24 * 3600
_TEMPERATURE = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,4})?", re.ASCII)


@dataclass(frozen=True)
class FunctionRef:
    """A function or class of the user's: the file that holds it, and its name there."""

    file: Path
    name: str

    @classmethod
    def parse(cls, text: str) -> FunctionRef | None:
        """Read `work.py:process`; None where it is nothing like that. A usage error where there is no such file."""
        match = _FUNCTION.fullmatch(text)
        if match is None:
            if text.endswith(".py"):
                raise usage_error(f"MODEL: {text!r} names a file, and no function in it: {text}:process")
            return None
        file = Path(match["file"])
        if not file.is_file():
            raise usage_error(f"MODEL: there is no file {str(file)!r}, of which {text!r} speaks")
        near = _not_in(file, match["name"].partition(".")[0])
        if near is not None:
            raise usage_error(f"MODEL: {file} has no {match['name']!r}{near}")
        return cls(file, match["name"])

    @property
    def title(self) -> str:
        return f"{self.file.name}:{self.name}"


def _not_in(file: Path, name: str) -> str | None:
    """Where nothing at the top of a file can have this name: what was meant, maybe. None: something has, or may have.

    The file is read and not run; where it makes names in a way that only tells when it runs, nobody knows.
    """
    import ast

    try:
        waiting: list[ast.AST] = [ast.parse(file.read_bytes())]
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None  # maybe of a newer Python, as the container has it
    names: dict[str, None] = {}
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names[node.name] = None
            waiting += node.decorator_list
            continue
        if isinstance(node, ast.Name):
            if node.id in ("globals", "vars", "locals", "exec", "setattr"):
                return None
            if isinstance(node.ctx, ast.Store):
                names[node.id] = None
        elif isinstance(node, ast.alias):
            names[(node.asname or node.name).partition(".")[0]] = None
        elif isinstance(node, ast.MatchAs | ast.MatchStar) and node.name:
            names[node.name] = None
        waiting += ast.iter_child_nodes(node)
    if name in names or "*" in names or "__getattr__" in names:
        return None
    found = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


@dataclass(frozen=True)
class BatchSpec:
    """A valid request for a bulk job. Seconds and MiB; None: left to Modal's or the engine's own default.

    Exactly one of `model` and `function` is there. `inputs` are as they were typed; `gpu` is None where there is
    none, or where it is yet to be chosen (`auto`).
    """

    model: ModelRef | None
    function: FunctionRef | None
    task: str | None
    inputs: tuple[str, ...]
    output: str
    errors: str | None
    format: str | None
    overwrite: bool
    prompt: str | None
    system: str | None
    messages_column: str | None
    input_format: str | None
    encoding: str | None
    strict: bool
    limit: int | None
    dedupe: bool
    sampling: tuple[tuple[str, Any], ...]  # put into each request that does not say it itself
    name: str | None
    gpu: GpuRequest | None
    auto: bool
    force: bool
    max_containers: int
    concurrency: int | None
    batch_size: int | None  # rows in a call of a function, pictures in one of a pipeline
    retries: int
    max_cost: Decimal | None  # USD
    max_model_len: int | None
    cpu: Amount | None
    memory: Amount | None
    ephemeral_disk: int | None
    region: tuple[str, ...]
    cloud: str | None
    startup_timeout: int
    secrets: tuple[str, ...]
    secrets_from_env: tuple[str, ...]
    env_vars: tuple[tuple[str, str], ...]
    volumes: tuple[VolumeMount, ...]
    environment: str | None
    tags: tuple[tuple[str, str], ...]
    vllm_version: str
    pip: tuple[str, ...]
    apt: tuple[str, ...]
    engine_args: tuple[str, ...]
    target: Target
    bucket_secret: str | None = None
    bucket_endpoint: str | None = None
    schedule: Schedule | None = None

    @classmethod
    def from_options(
        cls,
        *,
        work: str,
        task: str | None = None,
        inputs: Sequence[str],
        output: str | None = None,
        errors: str | None = None,
        format: str | None = None,  # noqa: A002 - the option's name
        overwrite: bool = False,
        prompt: str | None = None,
        system: str | None = None,
        messages_column: str | None = None,
        input_format: str | None = None,
        encoding: str | None = None,
        strict: bool = False,
        limit: str | None = None,
        dedupe: bool = False,
        max_tokens: str | None = None,
        temperature: str | None = None,
        top_p: str | None = None,
        seed: str | None = None,
        size: str | None = None,
        steps: str | None = None,
        guidance: str | None = None,
        negative_prompt: str | None = None,
        json_schema: str | None = None,
        name: str | None = None,
        gpu: str | None = None,
        force: bool = False,
        max_containers: str | None = None,
        concurrency: str | None = None,
        batch_size: str | None = None,
        retries: str | None = None,
        max_cost: str | None = None,
        max_model_len: str | None = None,
        cpu: str | None = None,
        memory: str | None = None,
        ephemeral_disk: str | None = None,
        region: str | None = None,
        cloud: str | None = None,
        startup_timeout: str | None = None,
        secret: Sequence[str] = (),
        secret_from_env: Sequence[str] = (),
        env_var: Sequence[str] = (),
        volume: Sequence[str] = (),
        env: str | None = None,
        tag: Sequence[str] = (),
        vllm_version: str | None = None,
        pip: Sequence[str] = (),
        apt: Sequence[str] = (),
        engine_args: Sequence[str] = (),
        target: Target = Target.MODAL,
        bucket_secret: str | None = None,
        bucket_endpoint: str | None = None,
        cron: str | None = None,
        timezone: str | None = None,
        every: str | None = None,
    ) -> BatchSpec:
        """Check what was typed (texts as they came; None: not given) and put the defaults in."""
        read = ResourceReader()
        function = read.parsed(FunctionRef.parse, work)
        model = None
        if function is None and not read.problems:
            model = read.parsed(lambda text: ModelRef.of_folder(text) or ModelRef.parse(text), work)
        if not inputs:
            read.problem("INPUT: nothing given; name a file, a folder, or - for what is piped in")
        if "" in inputs:
            read.problem("INPUT: '' names no file")
        if output is None:
            read.problem("--output: needed: where the answers go, such as -o answers.jsonl")
        for flag, file in (("--output", output), ("--errors", errors)):
            if file == "":
                read.problem(f"{flag}: '' names no file")
        answers = output or "-"
        if answers != "-" and any(_same_file(answers, name) for name in inputs):
            read.problem(f"--output: {answers!r} is the input; the answers need a file of their own")
        read.one_of("--format", format, FORMATS)
        auto = (model is not None and target is Target.MODAL) if gpu is None else gpu.strip().lower() == AUTO
        if auto and function is not None:
            read.problem(f"--gpu: auto chooses by the model, and {work} is none; name one, such as L4")
        gpu_request = None if gpu is None or auto else read.parsed(GpuRequest.parse, gpu)
        if "--local" in engine_args:
            read.problem("-- --local: use --local before the --: what follows that goes to vLLM")
        if function is not None:
            for flag, given in (
                ("--task", task),
                ("--prompt", prompt),
                ("--system", system),
                ("--messages-column", messages_column),
                ("--max-tokens", max_tokens),
                ("--temperature", temperature),
                ("--top-p", top_p),
                ("--seed", seed),
                ("--size", size),
                ("--steps", steps),
                ("--guidance", guidance),
                ("--negative-prompt", negative_prompt),
                ("--json-schema", json_schema),
                ("--max-model-len", max_model_len),
                ("--vllm-version", vllm_version),
                ("--", engine_args or None),
            ):
                if given is not None:
                    read.problem(
                        f"{flag}: is for a model, and {work} is a function, which gets the rows as they are"
                    )
        if name is not None and not _NAME.fullmatch(name):
            read.problem(
                f"--name: {name!r} is no name of a job: letters, digits, '.', '_' or '-', {LONGEST_NAME} at most"
            )
        read.rule("--env", env, names.environment_name)
        build = catalog.vllm().cpu if target is Target.LOCAL else catalog.vllm().cuda
        from_env = read.many("--secret-from-env", secret_from_env, names.variable)
        app_tags = read.tags(tag)
        if OWN_TAG[0] not in dict(app_tags):
            app_tags = (OWN_TAG, *app_tags)
        sampling = _sampling(
            read,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            json_schema=json_schema,
        ) + _picture(read, size=size, steps=steps, guidance=guidance, negative_prompt=negative_prompt)
        read.problems += check_engine_args(engine_args)
        schedule = read_schedule(read, cron=cron, timezone=timezone, every=every)
        check_paths(
            read,
            inputs=inputs,
            output=answers,
            errors=errors,
            bucket_secret=bucket_secret,
            bucket_endpoint=bucket_endpoint,
            scheduled=schedule is not None,
            local=target is Target.LOCAL,
        )
        spec = cls(
            model=model,
            function=function,
            task=read.one_of("--task", task, TASKS),
            inputs=tuple(inputs),
            output=answers,
            errors=errors,
            format=format,
            overwrite=overwrite,
            prompt=prompt,
            system=system,
            messages_column=messages_column,
            input_format=read.one_of("--input-format", input_format, INPUT_FORMATS),
            encoding=encoding,
            strict=strict,
            limit=read.optional_whole("--limit", limit, unit="rows"),
            dedupe=dedupe,
            sampling=sampling,
            name=name,
            gpu=gpu_request,
            auto=auto,
            force=force,
            max_containers=read.whole("--max-containers", max_containers, DEFAULT_MAX_CONTAINERS),
            concurrency=read.optional_whole("--concurrency", concurrency),
            batch_size=read.optional_whole("--batch-size", batch_size, unit="rows"),
            retries=read.whole("--retries", retries, DEFAULT_RETRIES, at_least=0, at_most=MOST_RETRIES),
            max_cost=read.dollars("--max-cost", max_cost),
            max_model_len=read.optional_whole("--max-model-len", max_model_len, unit="tokens"),
            cpu=read.amount("--cpu", cpu, whole=False, unit="cores, as in 4, 2.5 or REQUEST,LIMIT"),
            memory=read.amount(
                "--memory", memory, whole=True, unit="MiB, as in 16384 (16 GiB) or REQUEST,LIMIT"
            ),
            ephemeral_disk=read.optional_whole("--ephemeral-disk", ephemeral_disk, unit="MiB"),
            region=read.regions(region),
            cloud=read.one_of("--cloud", cloud, CLOUDS),
            startup_timeout=read.whole(
                "--startup-timeout",
                startup_timeout,
                default_startup_timeout(model.download_gib if model else 0.0),
                at_most=_DAY,
                unit="seconds",
            ),
            secrets=read.many("--secret", secret, names.object_name),
            secrets_from_env=from_env,
            env_vars=read.env_vars(env_var, set_by_file=build.env if model else {}, from_env=from_env),
            volumes=read.volumes(volume),
            environment=env,
            tags=app_tags,
            vllm_version=read.version("--vllm-version", vllm_version),
            pip=read.many("--pip", pip, python_package),
            apt=read.many("--apt", apt, system_package),
            engine_args=tuple(engine_args),
            target=target,
            bucket_secret=bucket_secret,
            bucket_endpoint=bucket_endpoint,
            schedule=schedule,
        )
        if read.problems:
            raise usage_error(read.problems)
        return spec

    def check_for(self, *, pictures: bool) -> None:
        """Refuse options that are not for what the rows ask for, which is known when they were looked at."""
        if self.model is None:
            return
        fields = dict(self.sampling)
        given: tuple[tuple[str, object], ...]
        if pictures:
            what = f"is for a model that writes, and {self.title} makes pictures"
            given = (
                ("--max-tokens", fields.get("max_tokens")),
                ("--temperature", fields.get("temperature")),
                ("--top-p", fields.get("top_p")),
                ("--json-schema", fields.get("response_format")),
                ("--concurrency", self.concurrency),
                ("--max-model-len", self.max_model_len),
                (
                    "--vllm-version",
                    None if self.vllm_version == catalog.vllm().version else self.vllm_version,
                ),
                ("--", self.engine_args or None),
            )
        else:
            what = "is for pictures (--task images), and these rows ask for none"
            given = (
                ("--size", fields.get("size")),
                ("--steps", fields.get("num_inference_steps")),
                ("--guidance", fields.get("guidance_scale")),
                ("--negative-prompt", fields.get("negative_prompt")),
            )
        problems = [f"{flag}: {what}" for flag, value in given if value is not None]
        if not pictures and self.batch_size is not None:
            problems.append(
                "--batch-size: is for a function, or for pictures; the engine batches by itself, up to --concurrency"
            )
        if problems:
            raise usage_error(problems)
        if pictures:
            self.check_gpus()

    def defaults(self, url: str) -> dict[str, Any]:
        """The fields of each request that does not say them itself. A flag that tells nothing to what is asked of the
        rows is refused: nobody would see that it did nothing.
        """
        fields = dict(self.sampling)
        asked = url.rpartition("/")[2]
        problems = [
            f"{flag}: is for a model that writes, and these rows ask for {asked}"
            for flag, name in _WRITING.items()
            if name in fields and name in _NOT_OF.get(asked, ())
        ]
        if problems:
            raise usage_error(problems)
        if asked == "transcriptions" and "max_tokens" in fields:
            fields["max_completion_tokens"] = fields.pop("max_tokens")  # as vLLM calls it there
        if self.adapter is not None:
            fields["model"] = self.adapter
        return fields

    @property
    def adapter(self) -> str | None:
        """Of one adapter, its name: it answers the rows that name no model. Of several, rows say which."""
        named = adapters(self.engine_args)
        return named[0] if len(named) == 1 else None

    def check_gpus(self) -> None:
        """Refuse several GPUs for what runs on one."""
        if self.gpu is not None and any(choice.count > 1 for choice in self.gpu.choices):
            raise usage_error(
                f"--gpu: {self.gpu}: a pipeline of diffusers runs on one GPU; --max-containers takes several"
            )

    @property
    def title(self) -> str:
        """What does the work, in messages."""
        if self.function is not None:
            return self.function.title
        assert self.model is not None
        return self.model.title

    @property
    def remote_input(self) -> bool:
        """Whether the rows are read in the cloud, where they are."""
        return any(is_remote(path) for path in self.inputs)

    @property
    def remote_output(self) -> bool:
        """Whether the answers are written in the cloud."""
        return is_remote(self.output)

    @property
    def mounts(self) -> tuple[list[Mount], list[Mount]]:
        """What of the cloud is mounted to read the rows, and to write the answers."""
        outputs = [text for text in (self.output, self.errors) if text is not None and is_remote(text)]
        return mounts(
            [parse("INPUT", text) for text in self.inputs if is_remote(text)],
            [parse("--output", text) for text in outputs],
        )

    @property
    def pipeline_parallel(self) -> int:
        """Stages that the model's layers are dealt out to, as the engine's arguments say."""
        return stages(self.engine_args)

    @property
    def engine_build(self) -> catalog.Build:
        """How the engine's image is built for the device of the target."""
        engine = catalog.vllm()
        return engine.cpu if self.target is Target.LOCAL else engine.cuda


def check_name(name: str) -> None:
    """Refuse what can be no job's name."""
    if not _NAME.fullmatch(name):
        raise usage_error(
            f"JOB: {name!r} is no name of a job: letters, digits, '.', '_' or '-', {LONGEST_NAME} at most"
        )


def check_changes(
    *,
    gpu: str | None = None,
    max_containers: str | None = None,
    concurrency: str | None = None,
    max_cost: str | None = None,
    retries: str | None = None,
) -> None:
    """Refuse what a job cannot be resumed with, whatever job it is."""
    read = ResourceReader()
    if gpu is not None and gpu.strip().lower() != AUTO:
        read.parsed(GpuRequest.parse, gpu)
    read.optional_whole("--max-containers", max_containers)
    read.optional_whole("--concurrency", concurrency)
    read.dollars("--max-cost", max_cost)
    read.optional_whole("--retries", retries, at_least=0, at_most=MOST_RETRIES)
    if read.problems:
        raise usage_error(read.problems)


def _same_file(one: str, other: str) -> bool:
    try:
        return Path(one).samefile(other)
    except OSError:
        return False


def _sampling(
    read: ResourceReader,
    *,
    max_tokens: str | None,
    temperature: str | None,
    top_p: str | None,
    seed: str | None,
    json_schema: str | None,
) -> tuple[tuple[str, Any], ...]:
    """The fields of a request that the flags stand for."""
    fields: dict[str, Any] = {
        "max_tokens": read.optional_whole("--max-tokens", max_tokens, unit="tokens"),
        "temperature": _number(read, "--temperature", temperature, most=100.0, such=0.7),
        "top_p": read.share("--top-p", top_p),
        "seed": read.optional_whole("--seed", seed, at_least=0),
        "response_format": None if json_schema is None else _schema(read, json_schema),
    }
    return tuple((name, value) for name, value in fields.items() if value is not None)


def _picture(
    read: ResourceReader,
    *,
    size: str | None,
    steps: str | None,
    guidance: str | None,
    negative_prompt: str | None,
) -> tuple[tuple[str, Any], ...]:
    """The same, of pictures."""
    if size is not None:
        read.rule("--size", size, size_problem)
    fields: dict[str, Any] = {
        "size": size,
        "num_inference_steps": read.optional_whole("--steps", steps, at_most=MOST_STEPS),
        "guidance_scale": _number(read, "--guidance", guidance, most=100.0, such=7.5),
        "negative_prompt": negative_prompt,
    }
    return tuple((name, value) for name, value in fields.items() if value is not None)


def _number(read: ResourceReader, flag: str, text: str | None, *, most: float, such: float) -> float | None:
    if text is None:
        return None
    if _TEMPERATURE.fullmatch(text.strip()) and float(text) <= most:
        return float(text)
    read.problem(f"{flag}: {text!r} is not a number from 0 to {most:g}, such as {such:g}")
    return None


def _schema(read: ResourceReader, path: str) -> dict[str, Any] | None:
    """`--json-schema FILE` as OpenAI's API says it."""
    schema, wrong = read_schema(path)
    if wrong is None:
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    read.problem(f"--json-schema: {wrong}")
    return None
