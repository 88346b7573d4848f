"""The command line: a table of verbs, each imported only when it is called.

`gpuctl --help` reads the table alone, so it costs what Python and typer cost. A new verb is one module here
and one row in `VERBS`. May import at the top: typer and the light parts of the standard library.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from gpuctl import __version__
from gpuctl.cli.texts import take_as_typed

if TYPE_CHECKING:
    from collections.abc import Callable

    from typer._click import Command, Context, HelpFormatter
    from typer._click.shell_completion import CompletionItem


@dataclass(frozen=True)
class Verb:
    """One row: `attribute` of `module` is a verb's function, or a `typer.Typer` with verbs of its own."""

    name: str
    module: str
    attribute: str
    help: str
    # Verbs that pass unknown arguments on (`gpuctl serve … -- --engine-flag`) say so here.
    context_settings: dict[str, Any] | None = None


VERBS = (
    Verb("serve", "gpuctl.cli.serve", "serve", "Deploy a model on a GPU, and wait until it answers."),
    Verb("batch", "gpuctl.cli.batch", "app", "Answer the rows of a file: a bulk job that loses nothing."),
    Verb("fit", "gpuctl.cli.fit", "fit", "Tell on which GPUs a model fits, and which to take."),
    Verb("models", "gpuctl.cli.models", "models", "List the aliases of models, or what is known of one."),
    Verb("gpus", "gpuctl.cli.gpus", "gpus", "List the GPUs, with what they can do and what they cost."),
    Verb("ps", "gpuctl.cli.ps", "ps", "List what is deployed."),
    Verb("logs", "gpuctl.cli.logs", "logs", "Show or follow the logs of a deployment."),
    Verb("stop", "gpuctl.cli.stop", "stop", "Stop a deployment."),
    Verb("cost", "gpuctl.cli.cost", "cost", "Show what was spent, by App or by tag."),
    Verb("token", "gpuctl.cli.token", "token", "Print the token that an endpoint wants."),
    Verb("local", "gpuctl.cli.local", "app", "The control plane of this machine: up, down, status, logs."),
)

CONTEXT_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"]}


def _load(verb: Verb) -> Command:
    """Import a verb's module and make its command."""
    made: Any = getattr(importlib.import_module(verb.module), verb.attribute)
    if not isinstance(made, typer.Typer):
        function: Callable[..., Any] = made
        made = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        settings = CONTEXT_SETTINGS | (verb.context_settings or {})
        made.command(verb.name, context_settings=settings)(function)
    made._add_completion = False  # `--install-completion` belongs to `gpuctl` itself, once
    command: Command = typer.main.get_command(made)
    command.name = verb.name
    take_as_typed(command)
    return command


class VerbGroup(TyperGroup):
    """The group of all verbs: names and help come from the table, the command itself on demand."""

    def list_commands(self, ctx: Context) -> list[str]:  # noqa: ARG002
        return [verb.name for verb in VERBS]

    def get_command(self, ctx: Context, cmd_name: str) -> Command | None:  # noqa: ARG002
        if cmd_name not in self.commands:
            for verb in VERBS:
                if verb.name == cmd_name:
                    self.commands[cmd_name] = _load(verb)
        return self.commands.get(cmd_name)

    def format_commands(self, ctx: Context, formatter: HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(verb.name, verb.help) for verb in VERBS])

    def shell_complete(self, ctx: Context, incomplete: str) -> list[CompletionItem]:
        from typer._click.shell_completion import CompletionItem

        verbs = [CompletionItem(v.name, help=v.help) for v in VERBS if v.name.startswith(incomplete)]
        # The options, as every command completes them.
        return verbs + super(TyperGroup, self).shell_complete(ctx, incomplete)

    def resolve_command(self, ctx: Context, args: list[str]) -> tuple[str | None, Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not ctx.resilient_parsing and not name.startswith("-"):
            near = get_close_matches(name, self.list_commands(ctx), n=2, cutoff=0.6)
            known = ", ".join(self.list_commands(ctx))
            ctx.fail(
                f"no such command '{name}'; did you mean {' or '.join(near)}?"
                if near
                else f"no such command '{name}'; there are: {known}"
            )
        return super().resolve_command(ctx, args)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gpuctl {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="gpuctl",
    cls=VerbGroup,
    help="A model on a GPU, now: flags in, an OpenAI-compatible endpoint on Modal out.",
    epilog="All but fit, models and local itself take --local (or GPUCTL_TARGET=local): this machine instead of Modal.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=CONTEXT_SETTINGS,
)


@app.callback()
def _gpuctl(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    pass


def command() -> TyperGroup:
    """The whole command line as one command object, for the boundary, for tests and for the docs."""
    made = typer.main.get_command(app)
    assert isinstance(made, TyperGroup)
    take_as_typed(made)
    return made
