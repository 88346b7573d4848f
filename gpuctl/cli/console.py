"""What the user sees: talk on stderr, the answer on stdout, one JSON document where it was asked for.

This module alone knows colours, spinners and prompts. rich is imported only for a spinner, hence only when
stderr is a terminal. May import: the standard library, `gpuctl.errors`.
"""

from __future__ import annotations

import contextlib
import json as json_module
import os
import sys
from typing import IO, TYPE_CHECKING, Any

from gpuctl.errors import usage_error

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rich.status import Status

_BOLD, _DIM, _RED, _YELLOW, _GREEN, _OFF = "\x1b[1m", "\x1b[2m", "\x1b[31m", "\x1b[33m", "\x1b[32m", "\x1b[0m"


def wants_color(stream: IO[str], environ: Mapping[str, str] | None = None) -> bool:
    """NO_COLOR (no-color.org) forbids, CLICOLOR_FORCE demands; else a terminal that is not `dumb`."""
    environ = os.environ if environ is None else environ
    if environ.get("NO_COLOR"):
        return False
    if environ.get("CLICOLOR_FORCE", "0") not in ("", "0"):
        return True
    return stream.isatty() and environ.get("TERM") != "dumb" and environ.get("CLICOLOR", "1") != "0"


class Console:
    """One command's conversation. `json` keeps stdout for `print_document` alone."""

    def __init__(
        self,
        *,
        quiet: bool = False,
        verbose: bool = False,
        json: bool = False,
        color: bool | None = None,
        stdin: IO[str] | None = None,
        stdout: IO[str] | None = None,
        stderr: IO[str] | None = None,
    ) -> None:
        self.quiet = quiet
        self.verbose = verbose
        self.json = json
        self._stdin = stdin or sys.stdin
        self._out = stdout or sys.stdout
        self._err = stderr or sys.stderr
        self._color = wants_color(self._err) if color is None else color
        self._status: Status | None = None

    @property
    def live(self) -> bool:
        """Whether spinners and progress that redraws itself are welcome: a terminal, and not `--quiet`."""
        return self._err.isatty() and not self.quiet and os.environ.get("TERM") != "dumb"

    @property
    def interactive(self) -> bool:
        """Whether somebody can be asked: both what we read from and what we ask on are terminals."""
        return self._stdin.isatty() and self._err.isatty()

    # -- the conversation: stderr

    def say(self, text: str = "") -> None:
        """Progress and advice; nothing with `--quiet`."""
        if not self.quiet:
            self._write(text)

    def note(self, text: str) -> None:
        """Something to know before it happens; nothing with `--quiet`."""
        if not self.quiet:
            self._write(f"{self._paint(_DIM, 'note:')} {text}")

    def detail(self, text: str) -> None:
        """Only with `--verbose`."""
        if self.verbose:
            self._write(self._paint(_DIM, text))

    def warn(self, text: str) -> None:
        self._write(f"{self._paint(_YELLOW, 'warning:')} {text}")

    def error(self, text: str) -> None:
        self._write(f"{self._paint(_RED, 'error:')} {text}")

    def hint(self, text: str) -> None:
        self._write(f"{self._paint(_BOLD, 'hint:')} {text}")

    def error_block(self, title: str, lines: Sequence[str]) -> None:
        """Lines of somebody else's, set off from our own: they explain the error that follows."""
        self._write(title)
        for line in lines:
            self._write(f"  {self._paint(_DIM, '|')} {line}")

    def done(self, text: str) -> None:
        """A step that ended well; nothing with `--quiet`."""
        if not self.quiet:
            self._write(f"{self._paint(_GREEN, '✓')} {text}")

    @contextlib.contextmanager
    def spinner(self, text: str) -> Iterator[None]:
        """A spinner below whatever is said meanwhile. Not a terminal: nothing, the plain lines tell."""
        if not self.live:
            yield
            return
        from rich.console import Console as RichConsole

        rich = RichConsole(file=self._err, no_color=not self._color, highlight=False)
        self._status = rich.status("")
        self._status.start()
        self.progress(text)
        try:
            yield
        finally:
            self._status.stop()
            self._status = None

    def progress(self, text: str) -> None:
        """Change the spinner's text."""
        if self._status is not None:
            from rich.text import Text

            self._status.update(Text(text))

    def confirm(self, question: str, *, refused: str) -> bool:
        """Ask on stderr, read from stdin, default no. Nobody there: `refused` is the usage error."""
        if not self.interactive:
            raise usage_error(refused)
        self._err.write(f"{question} [y/N] ")
        self._err.flush()
        answer = ""
        try:
            answer = self._stdin.readline()
        finally:
            if not answer.endswith("\n"):  # Ctrl-C or Ctrl-D: what is said next gets a line of its own
                self._err.write("\n")
        return answer.strip().lower() in ("y", "yes")

    def _paint(self, style: str, text: str) -> str:
        return f"{style}{text}{_OFF}" if self._color else text

    def _write(self, text: str) -> None:
        if self._status is not None:
            from rich.text import Text

            self._status.console.print(Text.from_ansi(text), soft_wrap=True)
            return
        print(text, file=self._err, flush=True)

    # -- the answer: stdout

    def answer(self, text: str) -> None:
        """What the command was asked for, for a person or a pipe."""
        print(text, file=self._out, flush=True)

    def print_document(self, document: Mapping[str, Any] | Sequence[Any]) -> None:
        """The one JSON document of `--json`."""
        print(json_module.dumps(document, indent=2), file=self._out, flush=True)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Columns wide enough for their content, two spaces apart: for eyes, `awk` and `column` alike.

        On a terminal that is narrower, a paragraph for each row.
        """
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        if self._out.isatty():
            import shutil

            columns = shutil.get_terminal_size().columns
            if sum(widths) + 2 * (len(widths) - 1) > columns:
                for row in rows:
                    for line in _paragraph(header, row, columns):
                        self.answer(line)
                return
        for row in (header, *rows):
            self.answer(
                "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            )


def _paragraph(header: Sequence[str], row: Sequence[str], columns: int) -> Iterator[str]:
    """A row of a table for a narrow terminal: its first cell, below it the others, each behind its column's name."""
    import textwrap

    yield row[0]
    line = ""
    for name, cell in zip(header[1:], row[1:], strict=True):
        pair = f"{name} {cell}"
        if line and len(line) + 2 + len(pair) > columns:
            yield line
            line = ""
        line = f"{line}  {pair}" if line else f"  {pair}"
        if len(line) > columns:
            yield from textwrap.wrap(
                pair, max(columns, 20), initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
            )
            line = ""
    if line:
        yield line
