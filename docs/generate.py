"""Write docs/cli.md from the command line's own definition; `--check` says whether it is up to date."""

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


def rows(parameters: list[Any], context: Any) -> Iterator[str]:
    """The table of a command's arguments or options, as its `--help` says them."""
    for parameter in parameters:
        names, text = parameter.get_help_record(context)
        yield f"| `{names.replace('|', '/')}` | {cell(text)} |"


def below_of(command: Any, context: Any) -> Iterator[tuple[str, Any]]:
    """The commands of a group, in its own order, those that are not hidden."""
    if not hasattr(command, "list_commands"):
        return
    for name in command.list_commands(context):
        below = command.get_command(context, name)
        if not below.hidden:
            yield name, below


def section(command: Any, path: str, depth: int) -> Iterator[str]:
    """One command: its usage, its help, its arguments and options; then the commands below it."""
    context = command.context_class(command, info_name=path, **command.context_settings)
    yield f"{'#' * min(depth, 6)} {path}"
    yield ""
    yield f"    {' '.join([path, *command.collect_usage_pieces(context)])}"
    yield ""
    for text in (command.help, command.epilog):
        if text:
            yield inspect.cleandoc(text).replace("\b\n", "").split("\f")[0].strip()
            yield ""
    parameters = [p for p in command.get_params(context) if p.get_help_record(context)]
    if parameters:
        yield "| | |"
        yield "| --- | --- |"
        yield from rows(parameters, context)
        yield ""
    for name, below in below_of(command, context):
        yield from section(below, f"{path} {name}", depth + 1)


def cli_page() -> str:
    from gpuctl.cli import command

    lines = section(command(), "gpuctl", 2)
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
