"""`gpuctl cost [NAME]`: what was spent. May import: typer, options, complete."""

from __future__ import annotations

from typing import Annotated

import typer

from gpuctl.cli.complete import deployment_names
from gpuctl.cli.options import Environment, Json, Local, Quiet, Verbose, runner_of, target_of


def cost(
    ctx: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(
            show_default=False,
            help="An App, by name or id; without it everything in the workspace.",
            autocompletion=deployment_names,
        ),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="From then on: 12h, 7d, or an ISO time in UTC. [default: the beginning of the month]",
            show_default=False,
        ),
    ] = None,
    tag: Annotated[
        str | None,
        typer.Option(
            metavar="KEY[=VALUE]",
            help="KEY: a sum for each of the tag's values; KEY=VALUE: only what has that tag.",
            show_default=False,
        ),
    ] = None,
    local: Local = False,
    env: Environment = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show what was spent on Modal, by App or by tag: billed for full hours, estimated for what is newer."""
    from gpuctl.billing import spending
    from gpuctl.cli.console import Console

    console = Console(quiet=quiet, verbose=verbose, json=json)
    spent = spending(
        name,
        since=since,
        tag=tag,
        target=target_of(local),
        environment=env,
        runner=runner_of(ctx),
        console=console,
    )
    if json:
        console.print_document(spent.document())
        return
    console.table(spent.header(), list(spent.cells()))
    for note in spent.notes():
        console.note(note)
