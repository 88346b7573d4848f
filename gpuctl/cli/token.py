"""`gpuctl token [NAME]`: what an endpoint wants, alone on stdout. May import: typer, options, complete."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from gpuctl.cli.complete import deployment_names
from gpuctl.cli.options import Environment, Local, Verbose, Yes, runner_of, target_of


def token(
    ctx: typer.Context,
    name: Annotated[
        str | None, typer.Argument(help="The deployment.", autocompletion=deployment_names)
    ] = None,
    new: Annotated[bool, typer.Option("--new", help="Make another, and forget the one kept here.")] = False,
    yes: Yes = False,
    local: Local = False,
    env: Environment = None,
    verbose: Verbose = False,
) -> None:
    """Print the token that an endpoint wants: one per Modal workspace, and one for this machine."""
    from gpuctl.cli.console import Console
    from gpuctl.tokens import endpoint_token

    console = Console(verbose=verbose)
    # Not `target_of`: without a name, "nothing asked for" differs from "Modal asked for".
    asked = target_of(local) if local or os.environ.get("GPUCTL_TARGET") else None
    made = endpoint_token(name, asked, env, new=new, yes=yes, runner=runner_of(ctx), console=console)
    console.answer(made.bearer)
