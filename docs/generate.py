"""Write docs/cli.md from the command line's own definition, or say that it is not what it should be.

    .venv/bin/python docs/generate.py            # write
    .venv/bin/python docs/generate.py --check    # exit 1 and print the difference where the file is out of date
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CLI = HERE / "cli.md"

HEADER = """\
<!-- Made by docs/generate.py from the command line's own definition: do not edit. -->

# The command line

Messages go to stderr, answers to stdout. Exit codes are in [exit-codes.md](exit-codes.md).
"""


def cell(text: str) -> str:
    """Text for a table cell: one line, and nothing that Markdown would take for its own."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def default_of(parameter: Any) -> str:
    default = parameter.default
    if default is None or default == () or default == [] or default is False or callable(default):
        return ""
    return f"`{default}`" if str(default) else ""


def option_rows(parameters: list[Any]) -> Iterator[str]:
    yield "| option | what it does | default |"
    yield "| --- | --- | --- |"
    for option in parameters:
        names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
        if not option.is_flag and not option.count:
            names += f" {cell(option.metavar or option.type.name.upper())}"
        help_text = option.help or ""
        if option.envvar:
            variables = [option.envvar] if isinstance(option.envvar, str) else list(option.envvar)
            help_text += f" [{', '.join(variables)}]"
        if option.multiple and "epeatable" not in help_text:
            help_text += " (repeatable)"
        if option.required:
            help_text += " (required)"
        yield f"| {names} | {cell(help_text)} | {cell(default_of(option))} |"


def usage(command: Any, path: str) -> str:
    words = [path]
    if any(p.param_type_name == "option" for p in command.params):
        words.append("[OPTIONS]")
    for argument in (p for p in command.params if p.param_type_name == "argument"):
        name = (argument.metavar or argument.name.upper()).strip("[]") + ("..." if argument.nargs != 1 else "")
        words.append(name if argument.required else f"[{name}]")
    if hasattr(command, "commands"):
        words.append("COMMAND")
    return " ".join(words)


def section(command: Any, path: str, depth: int) -> Iterator[str]:
    """One command: its usage, its help, its arguments and options; then the commands below it."""
    yield f"{'#' * min(depth, 6)} {path}"
    yield ""
    yield "```"
    yield usage(command, path)
    yield "```"
    yield ""
    if command.help:
        yield inspect.cleandoc(command.help).replace("\b", "").replace("\f", "").strip()
        yield ""
    arguments = [p for p in command.params if p.param_type_name == "argument" and getattr(p, "help", None)]
    for argument in arguments:
        yield f"- `{argument.metavar or argument.name.upper()}`: {cell(argument.help)}"
    if arguments:
        yield ""
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    if options:
        yield from option_rows(options)
        yield ""
    for name, below in getattr(command, "commands", {}).items():
        if not below.hidden:
            yield from section(below, f"{path} {name}", depth + 1)


def cli_page() -> str:
    import typer.main

    from gpuctl.cli import app

    lines = section(typer.main.get_command(app), "gpuctl", 2)
    return HEADER + "\n" + "\n".join(lines).rstrip() + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write docs/cli.md from the command line's own definition.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where it is out of date")
    check = parser.parse_args(argv).check
    page = cli_page()
    if not check:
        CLI.write_text(page, encoding="utf-8")
        return 0
    stands = CLI.read_text(encoding="utf-8") if CLI.exists() else ""
    difference = difflib.unified_diff(
        stands.splitlines(), page.splitlines(), "docs/cli.md", "as generated", lineterm=""
    )
    lines = list(difference)
    if lines:
        print("\n".join(lines))
        print("docs/cli.md is out of date: run .venv/bin/python docs/generate.py", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main())
