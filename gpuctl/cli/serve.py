"""`gpuctl serve`: read the options, plan, and show the plan or execute it.

Numbers are read as texts, so that one error can name every problem of a command (`ServeSpec.from_options`).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path  # noqa: TC003 - typer reads the annotations when it runs
from typing import TYPE_CHECKING, Annotated

import typer

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
    from gpuctl.cli.console import Console
    from gpuctl.modal_cli import Runner
    from gpuctl.prices import Rates
    from gpuctl.target import Target


def serve(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            show_default=False,
            help="An alias (tiny, llama3, qwen3, …; complete it with TAB), or org/name[@revision] of Hugging Face.",
            autocompletion=complete_model,
        ),
    ],
    engine_args: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="-- VLLM_ARGS",
            show_default=False,
            help="Whatever follows -- goes to vLLM untouched.",
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="GPU",
            help="The GPU: H100, H100:2 (two in one container), H100! (nothing better in its place), "
            "H100,A100-80GB:2 (in order of preference), any, or auto: the cheapest that fits. "
            "[default: auto; with --local none]",
            autocompletion=complete_gpu,
            show_default=False,
        ),
    ] = None,
    drop_unfit: Annotated[
        bool, typer.Option("--drop-unfit", help="Leave out of --gpu those on which the model does not fit.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Deploy on GPUs on which, by the arithmetic, the model does not fit."),
    ] = False,
    name: Annotated[
        str | None, text("NAME", "Name of the App. [default: the alias, or the model's own name]")
    ] = None,
    concurrency: Annotated[
        str | None,
        number(
            "Requests that one container takes at once. It is three things: the load per container that autoscaling "
            "aims at, the hard limit (above it Modal answers 429), and the engine's own --max-num-seqs. [default: 32]"
        ),
    ] = None,
    min_containers: Annotated[
        str | None, number("Containers kept up without requests; they cost money all the time. [default: 0]")
    ] = None,
    max_containers: Annotated[
        str | None, number("Most containers at a time: it bounds the bill. [default: 1]")
    ] = None,
    buffer_containers: Annotated[
        str | None, number("Idle containers kept ready beyond the load while there is one.")
    ] = None,
    max_hourly_cost: Annotated[
        str | None,
        text(
            "USD",
            "Most that all containers together may cost in an hour: it lowers --max-containers, or refuses. "
            "By your account's prices, else list prices; CPU and memory as reserved, or at their limits.",
        ),
    ] = None,
    scaledown: Annotated[
        str | None,
        number("Seconds without a request after which a container ends, 2 to 3600. [default: 300]"),
    ] = None,
    max_model_len: Annotated[
        str | None,
        number(
            "Most tokens of question and answer together. [default: the longest that fits, up to the model's own]"
        ),
    ] = None,
    cpu: Annotated[str | None, text("CORES", "Cores to reserve, or REQUEST,LIMIT.")] = None,
    memory: Annotated[str | None, text("MIB", "Memory to reserve in MiB, or REQUEST,LIMIT.")] = None,
    ephemeral_disk: Annotated[str | None, text("MIB", "Disk of a container in MiB.")] = None,
    region: Annotated[
        str | None,
        text(
            "REGION[,...]", "Where containers may run. [default: anywhere; Modal charges more for a choice]"
        ),
    ] = None,
    routing_region: Annotated[
        str | None,
        text(
            "REGION",
            "Where requests come in: us-east, us-west, eu-west or ap-south. [default: us-east]",
            ("us-east", "us-west", "eu-west", "ap-south"),
        ),
    ] = None,
    cloud: Annotated[
        str | None, text("CLOUD", "Whose machines: aws, gcp, oci or auto.", ("aws", "gcp", "oci", "auto"))
    ] = None,
    startup_timeout: Annotated[
        str | None,
        number(
            "Seconds that a container may take until it answers. "
            "[default: 600 and 20 for each GiB of weights; 3600 if their size is unknown]"
        ),
    ] = None,
    secret: Annotated[
        list[str] | None,
        repeatable("NAME", "A Secret of Modal's, as environment variables in the container."),
    ] = None,
    secret_from_env: Annotated[
        list[str] | None,
        repeatable(
            "VAR", "A variable of this shell, as a secret: its value is read when deploying, never written."
        ),
    ] = None,
    env_var: Annotated[
        list[str] | None,
        repeatable("KEY=VALUE", "An environment variable in the container; not for secrets."),
    ] = None,
    volume: Annotated[
        list[str] | None, repeatable("NAME:PATH", "A Volume at an absolute path; made when missing.")
    ] = None,
    env: Environment = None,
    tag: Annotated[
        list[str] | None, repeatable("KEY=VALUE", "A tag of the App, for billing and lists.")
    ] = None,
    deploy_tag: Annotated[str | None, text("TAG", "A tag of this deployment, such as a version.")] = None,
    strategy: Annotated[
        str | None,
        text(
            "STRATEGY",
            "How a redeploy replaces containers: rolling or recreate. [default: rolling]",
            ("rolling", "recreate"),
        ),
    ] = None,
    auth: Annotated[
        bool, typer.Option("--auth/--no-auth", help="Whether requests need a token (gpuctl token).")
    ] = True,
    vllm_version: Annotated[str | None, text("X.Y.Z", "The engine's version. [default: 0.32.0]")] = None,
    pip: Annotated[
        list[str] | None, repeatable("PACKAGE", "A Python package to install too, such as NAME==VERSION.")
    ] = None,
    apt: Annotated[list[str] | None, repeatable("PACKAGE", "A Debian package to install too.")] = None,
    local: Local = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the module that would be deployed; nothing runs.")
    ] = False,
    render: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write that module to FILE; nothing runs. Deploy it with modal deploy."
        ),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Whether to wait until a chat request completes.")
    ] = True,
    yes: Yes = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Deploy a model on a GPU, and wait until it answers: an OpenAI-compatible endpoint.

    Without --local it is deployed to Modal; with it, the same file to the control plane of this machine.
    """
    from gpuctl.cli.console import Console
    from gpuctl.configs import of_deployment, of_ref
    from gpuctl.plan import plan_serve
    from gpuctl.specs.serve import ServeSpec

    if json and (dry_run or render):
        raise usage_error("--json: tells what was deployed; it does not go with --dry-run or --render")
    spec = ServeSpec.from_options(
        model=model,
        gpu=gpu,
        drop_unfit=drop_unfit,
        force=force,
        name=name,
        concurrency=concurrency,
        min_containers=min_containers,
        max_containers=max_containers,
        buffer_containers=buffer_containers,
        max_hourly_cost=max_hourly_cost,
        scaledown=scaledown,
        max_model_len=max_model_len,
        cpu=cpu,
        memory=memory,
        ephemeral_disk=ephemeral_disk,
        region=region,
        routing_region=routing_region,
        cloud=cloud,
        startup_timeout=startup_timeout,
        secret=secret or (),
        secret_from_env=secret_from_env or (),
        env_var=env_var or (),
        volume=volume or (),
        env=env,
        tag=tag or (),
        deploy_tag=deploy_tag,
        strategy=strategy,
        auth=auth,
        vllm_version=vllm_version,
        pip=pip or (),
        apt=apt or (),
        engine_args=engine_args or (),
        target=target_of(local),
    )
    argv = argv_of(ctx)
    console = Console(quiet=quiet, verbose=verbose, json=json)

    known = of_ref(spec.model, online=False)
    if dry_run or render:
        plan = plan_serve(spec, known, argv=argv, rates=_rates(spec.target))
        if render:
            write_source(render, plan.source)
        plan.tell(console)
        if dry_run:
            sys.stdout.write(plan.source)
        return

    unset = [variable for variable in spec.secrets_from_env if variable not in os.environ]
    if unset:
        raise usage_error([f"--secret-from-env: {variable} is not set in this shell" for variable in unset])

    # What cannot fit is refused before anybody is asked anything, where nobody need be asked to know.
    if known.whole and (spec.model.alias or spec.model.pinned):
        plan_serve(spec, known, argv=argv, rates=_rates(spec.target))

    from gpuctl.deploy import check_tools, execute
    from gpuctl.hub import resolve_revision

    repo = spec.model.repo
    check_tools(spec.target)
    revision = None if repo is None else resolve_revision(repo, spec.model.revision)
    runner = runner_of(ctx)
    found = of_deployment(spec.model, revision, force=spec.force)
    execute(
        plan_serve(
            spec,
            found,
            argv=argv,
            revision=revision,
            rates=_rates(spec.target, runner=runner, console=console),
        ),
        runner=runner,
        console=console,
        wait=wait,
        yes=yes,
    )


def _rates(target: Target, *, runner: Runner | None = None, console: Console | None = None) -> Rates | None:
    """The prices to reckon with; None on this machine, which has none."""
    from gpuctl.target import Target

    if target is Target.LOCAL:
        return None
    from gpuctl.prices import rates

    return rates(target, runner=runner, console=console)


def write_source(path: Path, source: str) -> None:
    """Replace the file whole, or leave it and its folder as they are."""
    import tempfile

    temporary = None
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        if path.exists() and not path.is_file():  # /dev/stdout, a pipe: there is nothing to replace
            path.write_text(source, encoding="utf-8")
            return
        path = path.resolve()  # a link goes on pointing to where it points
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = file.name
            file.write(source)
        os.chmod(temporary, mode)  # noqa: PTH101 - a name, not a Path
        os.replace(temporary, path)  # noqa: PTH105
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):  # noqa: PTH110
            os.unlink(temporary)  # noqa: PTH108
        raise usage_error(f"--render: cannot write {str(path)!r}: {error.strerror or error}") from error


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
