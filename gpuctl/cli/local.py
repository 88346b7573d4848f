"""`gpuctl local up|down|status|logs|env|exec`: the control plane of this machine. May import: typer, errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pathlib import Path

# A command of a group does not inherit its group's.
CONTEXT_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"]}

local_app = app = typer.Typer(
    help="The control plane of this machine: Modal's API, for the modal client, without an account.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=CONTEXT_SETTINGS,
)

# Variables that choose an account in the cloud, what is in it, or a container; others say how the client behaves.
_OF_THE_ACCOUNT = (
    *(
        "MODAL_SERVER_URL",
        "MODAL_TOKEN_",
        "MODAL_OAUTH_",
        "MODAL_PROFILE",
        "MODAL_CONFIG_PATH",
        "MODAL_ENVIRONMENT",
    ),
    *("MODAL_TASK_", "MODAL_IMAGE_ID", "MODAL_IS_REMOTE", "MODAL_OVERRIDE_HEADERS", "MODAL_STREAMS_URL"),
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but problems.")]


def _folders() -> tuple[Path, Path]:
    from gpuctl.paths import cache_dir, state_dir

    return state_dir() / "local", cache_dir() / "local"


@local_app.command(context_settings=CONTEXT_SETTINGS)
def up(
    port: Annotated[
        str | None,
        typer.Option(metavar="PORT", help="The port on 127.0.0.1; by default last time's, or a free one."),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Start it; it goes on in the background until `gpuctl local down`."""
    from gpuctl.local import client

    number = None if port is None else _whole("--port", port, 1, 65535, "a port")
    plane = client.up(*_folders(), port=number)
    if json:
        _print_json({"up": True, "pid": plane.pid, "url": plane.url, "state_dir": str(plane.state_dir)})
    elif not quiet:
        typer.echo(f"The local control plane is up: {plane.url} (pid {plane.pid}).", err=True)
        typer.echo('For the modal client in this shell: eval "$(gpuctl local env)"', err=True)


@local_app.command(context_settings=CONTEXT_SETTINGS)
def down(quiet: Quiet = False) -> None:
    """Stop it and every container; apps, volumes, secrets and logs stay for the next `up`."""
    from gpuctl.local import client

    state_dir, _ = _folders()
    was_up = client.running(state_dir) is not None
    client.down(state_dir)
    if not quiet:
        typer.echo(
            "The local control plane is down." if was_up else "The local control plane was not up.", err=True
        )


@local_app.command(context_settings=CONTEXT_SETTINGS)
def status(json: Json = False) -> None:
    """Say whether it is up, and where; exit code 1 when it is not."""
    from gpuctl.local import client

    state_dir, cache_dir = _folders()
    plane = client.running(state_dir)
    if json:
        document = {"up": plane is not None, "state_dir": str(state_dir), "cache_dir": str(cache_dir)}
        _print_json(
            document | ({"pid": plane.pid, "url": plane.url} if plane else {"pid": None, "url": None})
        )
    elif plane:
        typer.echo(f"up: {plane.url} (pid {plane.pid}), state in {state_dir}")
    elif client.coming_back(state_dir):
        typer.echo(f"coming back by itself: it was killed; state in {state_dir}")
    else:
        typer.echo(f"down; state in {state_dir}")
    if plane is None:
        raise typer.Exit(1)


@local_app.command(context_settings=CONTEXT_SETTINGS)
def logs(
    tail: Annotated[str, typer.Option("--tail", "-n", metavar="N", help="How many lines.")] = "100",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes.")] = False,
) -> None:
    """Show the control plane's own log (an app's: `gpuctl logs NAME`)."""
    import time
    from collections import deque

    from gpuctl.errors import GpuctlError
    from gpuctl.local.client import LOG_FILE

    lines = _whole("--tail", tail, 0, 10**9, "a number of lines")
    path = _folders()[0] / LOG_FILE
    if not path.exists():
        raise GpuctlError("the local control plane was never up", hint="start it: gpuctl local up")
    with path.open(errors="replace") as file:
        for line in deque(file, maxlen=lines):
            typer.echo(line, nl=False)
        while follow:
            line = file.readline()
            if line:
                typer.echo(line, nl=False)
            else:
                time.sleep(0.2)


@local_app.command(context_settings=CONTEXT_SETTINGS)
def env() -> None:
    """Print shell commands that point the modal client here: eval "$(gpuctl local env)"."""
    import shlex

    for name, value in _plane_env().items():
        typer.echo(f"export {name}={shlex.quote(value)}")


@local_app.command(
    "exec",
    context_settings={
        **CONTEXT_SETTINGS,
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
    },
)
def exec_(
    command: Annotated[
        list[str], typer.Argument(help="The command, after --: gpuctl local exec -- modal run app.py")
    ],
) -> None:
    """Run a command with the modal client pointed here; the plane is started where needed."""
    import os

    from gpuctl.errors import usage_error
    from gpuctl.local import client
    from gpuctl.modal_cli import MODAL

    plane = client.ensure_up(*_folders())
    if command[0] == "modal":  # the one that gpuctl was tested with, also where none is on PATH
        command = [*MODAL, *command[1:]]
    own = {name: value for name, value in os.environ.items() if not name.startswith(_OF_THE_ACCOUNT)}
    try:
        os.execvpe(command[0], command, own | plane.client_env())  # noqa: S606
    except OSError as error:
        raise usage_error(f"{command[0]}: {error.strerror}") from error


def _plane_env() -> dict[str, str]:
    from gpuctl.errors import GpuctlError
    from gpuctl.local import client

    plane = client.running(_folders()[0])
    if plane is None:
        raise GpuctlError("the local control plane is not up", hint="start it: gpuctl local up")
    return plane.client_env()


def _whole(flag: str, text: str, least: int, most: int, what: str) -> int:
    from gpuctl.errors import usage_error

    if not (text.isascii() and text.isdecimal() and len(text) <= 10 and least <= int(text) <= most):
        raise usage_error(f"{flag}: {text!r} is not {what}: a whole number from {least} to {most}")
    return int(text)


def _print_json(document: dict[str, object]) -> None:
    import json

    typer.echo(json.dumps(document))
