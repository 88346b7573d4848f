"""`gpuctl stop NAME`. May import: typer, options, complete."""

from __future__ import annotations

from typing import Annotated

import typer

from gpuctl.cli.complete import deployment_names
from gpuctl.cli.options import Environment, Json, Local, Quiet, Verbose, Yes, runner_of, target_of


def stop(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="The deployment.", autocompletion=deployment_names)],
    yes: Yes = False,
    local: Local = False,
    env: Environment = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Stop a deployment."""
    from gpuctl.cli.console import Console
    from gpuctl.stop import stop_deployment

    console = Console(quiet=quiet, verbose=verbose, json=json)
    stopped = stop_deployment(name, target_of(local), env, yes=yes, runner=runner_of(ctx), console=console)
    if json:
        console.print_document(
            {
                "name": stopped.name,
                "target": stopped.target.value,
                "environment": stopped.environment,
                "app_id": stopped.app_id,
                "stopped_at": stopped.stopped_at,
            }
        )
