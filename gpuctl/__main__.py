"""The error boundary: one place that turns what went wrong into lines on stderr and an exit code.

Expected failures are `GpuctlError` (and the command line parser's own usage errors): one `error:` line per
problem and at most one `hint:`. Anything else is a bug and keeps its traceback. Exit codes:
docs/exit-codes.md.
May import: `gpuctl.cli`, `gpuctl.errors`.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import sys
import threading
import traceback
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

from gpuctl.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, GpuctlError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from typer.core import TyperGroup

    from gpuctl.modal_cli import Runner


# What the machine may refuse at any time, wherever a file is touched: no bug of gpuctl's.
MACHINE = frozenset({
    errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EISDIR, errno.ELOOP, errno.EMFILE, errno.ENAMETOOLONG,
    errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS,
})  # fmt: skip


def main(argv: Sequence[str] | None = None, *, runner: Runner | None = None) -> int:
    """Run one command line and return its exit code; without one, the process's own, and end the process with it.

    Tests inject a `runner`.
    """
    # What start-up makes stays: looking through it for garbage again and again is 6 % of a dry run.
    gc.set_threshold(100_000)
    _fill_closed_streams()
    try:
        with _signals_unwind():
            code = _run(sys.argv[1:] if argv is None else list(argv), runner)
    except GpuctlError as error:
        _report(error)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        code = EXIT_FAILURE
    except SystemExit as stop:
        # The parser's own way out of shell completion and of a closed pipe; and ours of a signal.
        code = stop.code if isinstance(stop.code, int) else EXIT_OK if stop.code is None else EXIT_FAILURE
    except OSError as error:
        code = _report_os_error(error)
    except Exception:
        code = _report_bug()
    code = code if _close_pipes() else EXIT_FAILURE
    if argv is None:
        # All is written, and no process of ours is left: taking the interpreter apart would take 20 ms more.
        os._exit(code)
    return code


def _fill_closed_streams() -> None:
    """Started with a closed stream (`gpuctl ps >&-`), Python has None in its place, and the next file its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            nothing = os.open(os.devnull, os.O_RDWR)  # mostly that very number, for children to inherit
            os.set_inheritable(nothing, nothing == number)
            setattr(sys, name, os.fdopen(nothing, "w" if number else "r", encoding="utf-8"))


@contextlib.contextmanager
def _signals_unwind() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind as Ctrl-C does, so that no process that was started outlives the command."""

    def unwind(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, unwind) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(argv: list[str], runner: Runner | None) -> int:
    from typer.exceptions import Abort, TyperException

    from gpuctl.cli import command
    from gpuctl.cli.options import Invocation

    group: TyperGroup = command()
    try:
        # The verbs see the command line as it came: it heads the files that they render.
        invocation = Invocation(tuple(argv), runner)
        result = group.main(args=argv, prog_name="gpuctl", standalone_mode=False, obj=invocation)
    except TyperException as error:
        return _report_usage(error, argv)
    except Abort:
        print("aborted", file=sys.stderr)
        return EXIT_FAILURE
    # Outside standalone mode the parser returns the exit code of `typer.Exit`, or what the verb returned.
    if result == EXIT_INTERRUPTED:
        print("interrupted", file=sys.stderr)
    return result if isinstance(result, int) else EXIT_OK


def _report(error: GpuctlError) -> None:
    for problem in error.problems:
        print(f"error: {problem}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)


def _report_os_error(error: OSError) -> int:
    """A full disk, a folder that may not be written: said in one line. What can only be our mistake is a bug."""
    if error.errno not in MACHINE:
        return _report_bug()
    where = f": {error.filename}" if error.filename is not None else ""
    print(f"error: {error.strerror}{where}", file=sys.stderr)
    return EXIT_FAILURE


def _report_bug() -> int:
    traceback.print_exc()
    print("error: this is a bug in gpuctl; please report it with the lines above", file=sys.stderr)
    return EXIT_FAILURE


def _report_usage(error: Exception, argv: Sequence[str]) -> int:
    """A bad command line, in one line that names the command and the option."""
    context = getattr(error, "ctx", None)
    message = str(error.format_message()) if hasattr(error, "format_message") else str(error)
    if type(error).__name__ == "NoArgsIsHelpError":
        print(message, file=sys.stderr)
        return EXIT_USAGE
    option = getattr(error, "option_name", None)
    near = _near(option, getattr(error, "possibilities", None) or ())
    if type(error).__name__ == "NoSuchOption" and option:
        message = f"no such option: {option}"
        if near:
            message += f"; did you mean {' or '.join(near[:2])}?"
    where = _command_path(context, argv)
    print(f"error: {where}: {' '.join(message.split())}", file=sys.stderr)
    if not near:
        print(f"hint: {where} --help", file=sys.stderr)
    return int(getattr(error, "exit_code", EXIT_USAGE))


def _near(option: str | None, possibilities: Sequence[str]) -> list[str]:
    """The parser's proposals without those that have little more than their dashes in common with what was typed."""
    typed = (option or "").strip("-")
    return [one for one in possibilities if SequenceMatcher(None, typed, one.strip("-")).ratio() >= 0.6]


def _command_path(context: object, argv: Sequence[str]) -> str:
    """`gpuctl serve`: as the parser knows it, or, where it lost it (an option without its value), as it was typed."""
    path: str = getattr(context, "command_path", "gpuctl")
    if path != "gpuctl":
        return path
    from gpuctl.cli import VERBS

    verb = argv[0] if argv else ""
    return f"gpuctl {verb}" if verb in [known.name for known in VERBS] else path


def _close_pipes() -> bool:
    """Flush now: a reader that went away (`gpuctl ps | head -1`) must cause no noise at interpreter exit.

    False: what was still to be written could not be, for another reason.
    """
    written = True
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError) as error:
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
                written = False
                with contextlib.suppress(OSError, ValueError):
                    print(f"error: stdout: {error.strerror}", file=sys.stderr)
    return written


if __name__ == "__main__":
    sys.exit(main())
