"""Options that several verbs share, declared once: spelled and explained the same everywhere.

May import: typer, `gpuctl.errors`, `gpuctl.target`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpuctl.errors import usage_error
from gpuctl.target import Target

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuctl.modal_cli import Runner

Local = Annotated[
    bool, typer.Option("--local", help="Use the control plane of this machine (also: GPUCTL_TARGET=local).")
]
Environment = Annotated[
    str | None, typer.Option("--env", "-e", metavar="NAME", help="The Modal Environment to work in.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only the answer, warnings and errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also show the commands that are run.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]


def text(metavar: str, help_: str, values: Sequence[str] = ()) -> Any:
    """An option that takes one text; `values` are what the shell completes, where there are few."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return typer.Option(
        metavar=metavar, help=help_, show_default=False, autocompletion=complete if values else None
    )


def number(help_: str) -> Any:
    """An option that takes a whole number, read as text: the spec names all problems of a command at once."""
    return text("N", help_)


def repeatable(metavar: str, help_: str) -> Any:
    """An option that may be given more than once."""
    return text(metavar, f"{help_} Repeatable.")


def complete_model(incomplete: str) -> list[tuple[str, str]]:
    """The catalogue's aliases, and the user's own; other names of a model when they are begun."""
    from gpuctl import catalog
    from gpuctl.errors import GpuctlError

    try:
        models = catalog.models().values()
    except GpuctlError:  # the user's own file; any command that is run will say what is wrong with it
        models = catalog.builtin_models().values()
    return [
        (name, model.repo or model.note or "")
        for model in models
        for name in (model.alias, *(model.also if incomplete else ()))
        if name.startswith(incomplete)
    ]


def complete_gpu(incomplete: str) -> list[tuple[str, str]]:
    """The types of GPU; in a list of fallbacks, for its last entry."""
    from gpuctl import catalog

    before, comma, last = incomplete.rpartition(",")
    auto = [("auto", "the cheapest that fits")] if not comma and "auto".startswith(last.lower()) else []
    return auto + [
        (f"{before}{comma}{gpu.name}", f"{gpu.vram_gib} GiB, at most {gpu.max_count}")
        for gpu in catalog.gpus().values()
        if gpu.name.startswith(last.upper())
    ]


def target_of(local: bool) -> Target:
    """The target of a command: `--local`, else GPUCTL_TARGET, else Modal."""
    if local:
        return Target.LOCAL
    wanted = os.environ.get("GPUCTL_TARGET", "")
    if not wanted:
        return Target.MODAL
    try:
        return Target(wanted)
    except ValueError:
        raise usage_error(f"GPUCTL_TARGET: unknown target {wanted!r}; use 'modal' or 'local'") from None


@dataclass(frozen=True)
class Invocation:
    """What a command line runs with: the words as they came, and what starts processes (None: the real thing)."""

    argv: tuple[str, ...] = ()
    runner: Runner | None = None


def argv_of(context: typer.Context) -> tuple[str, ...]:
    """The words of this command line, without `gpuctl` itself."""
    invocation = context.find_root().obj
    return invocation.argv if isinstance(invocation, Invocation) else ()


def runner_of(context: typer.Context) -> Runner:
    """What starts processes: the real thing, or what a test put into the context."""
    from gpuctl.modal_cli import ProcessRunner

    invocation = context.find_root().obj
    given = invocation.runner if isinstance(invocation, Invocation) else None
    return ProcessRunner() if given is None else given
