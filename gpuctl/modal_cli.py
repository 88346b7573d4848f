"""Modal's own command line: what to run (pure functions that return argv) and running it.

The core never imports `modal`; it runs the client that is installed beside it, so that what is deployed is
what `modal deploy` deploys. This is the only module that starts processes. May import: `gpuctl.errors`,
`gpuctl.target`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shlex
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, Protocol

from gpuctl.errors import usage_error
from gpuctl.target import Target

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

TESTED_VERSION = "1.6.4"
ANY_VERSION = "GPUCTL_ANY_MODAL"  # set to 1: go on with a client that was not tested

# `-P`: a file named types.py or modal.py in the user's folder must not shadow what the client imports.
MODAL = (sys.executable, "-P", "-m", "modal")

# Written to a pipe, the client folds its lines at 80 columns, in the middle of a URL.
_PIPE_COLUMNS = "1000"


# -- what to run


def deploy_argv(
    file: Path, *, environment: str | None = None, tag: str | None = None, strategy: str | None = None
) -> list[str]:
    argv = [*MODAL, "deploy", str(file)]
    if tag:
        argv += ["--tag", tag]
    if strategy:
        argv += ["--strategy", strategy]
    return argv + _environment(environment)


def app_list_argv(*, environment: str | None = None) -> list[str]:
    return [*MODAL, "app", "list", "--json", *_environment(environment)]


def app_logs_argv(
    app: str,
    *,
    follow: bool = False,
    since: str | None = None,
    until: str | None = None,
    tail: int | None = None,
    search: str | None = None,
    source: str | None = None,
    timestamps: bool = False,
    container_ids: bool = False,
    environment: str | None = None,
) -> list[str]:
    argv = [*MODAL, "app", "logs", app]
    if follow:
        argv.append("--follow")
    for option, value in (("--since", since), ("--until", until), ("--search", search), ("--source", source)):
        if value is not None:
            argv += [option, value]
    if tail is not None:
        argv += ["--tail", str(tail)]
    if timestamps:
        argv.append("--timestamps")
    if container_ids:
        argv.append("--show-container-id")
    return argv + _environment(environment)


def app_stop_argv(app: str, *, environment: str | None = None) -> list[str]:
    return [*MODAL, "app", "stop", app, "--yes", *_environment(environment)]


def server_info_argv(app: str, server: str, *, environment: str | None = None) -> list[str]:
    return [*MODAL, "server", "info", f"{app}/{server}", "--json", *_environment(environment)]


def proxy_token_create_argv(name: str) -> list[str]:
    return [*MODAL, "workspace", "proxy-tokens", "create", "--name", name, "--json"]


def billing_rates_argv() -> list[str]:
    return [*MODAL, "billing", "rates", "--json"]


def billing_report_argv(start: str, *, end: str | None = None, resolution: str) -> list[str]:
    """`start` and `end` in ISO 8601, UTC; `resolution`: `d` or `h`. Only full days or hours are told."""
    argv = [*MODAL, "billing", "report", "--start", start]
    if end is not None:
        argv += ["--end", end]
    # "*": all tags of each object (the API's own word for it, modal/_workspace.py).
    return [*argv, "--resolution", resolution, "--tag-names", "*", "--json"]


def billing_summary_argv() -> list[str]:
    return [*MODAL, "billing", "summary", "--json"]


def container_list_argv(*, environment: str | None = None) -> list[str]:
    return [*MODAL, "container", "list", "--json", *_environment(environment)]


def _environment(environment: str | None) -> list[str]:
    return ["--env", environment] if environment else []


def shown(argv: Sequence[str]) -> str:
    """An argv as a user would type it."""
    words = ["modal", *argv[len(MODAL) :]] if tuple(argv[: len(MODAL)]) == MODAL else list(argv)
    return shlex.join(words)


# -- where it runs


@dataclass(frozen=True)
class ModalEnv:
    """The environment variables of the child: the user's own, or those that point it at the local plane."""

    target: Target
    variables: Mapping[str, str] = field(repr=False)  # holds credentials

    @classmethod
    def modal(cls, environ: Mapping[str, str] | None = None) -> ModalEnv:
        return cls(Target.MODAL, dict(os.environ if environ is None else environ))

    @classmethod
    def local(cls, plane: Mapping[str, str], environ: Mapping[str, str] | None = None) -> ModalEnv:
        """The plane's settings; none of the user's own MODAL_* may reach past it to their account."""
        base = os.environ if environ is None else environ
        kept = {name: value for name, value in base.items() if not name.startswith("MODAL_")}
        return cls(Target.LOCAL, kept | dict(plane))


# -- running it


TIMED_OUT = 124  # as timeout(1) says it


@dataclass(frozen=True)
class Completed:
    returncode: int
    stdout: str
    stderr: str


class Follower(Protocol):
    """A child that goes on by itself, for example `modal app logs -f`."""

    def returncode(self) -> int | None:
        """None while it runs."""

    def cancel(self) -> None:
        """End it and wait for its end; harmless when it ended already."""


class Runner(Protocol):
    """How processes are started. Tests inject their own."""

    def run(self, argv: Sequence[str], env: ModalEnv, *, timeout: float | None = None) -> Completed:
        """To its end, output kept; `timeout` seconds at most, then its code is `TIMED_OUT` and stderr says so."""

    def stream(
        self,
        argv: Sequence[str],
        env: ModalEnv,
        *,
        on_output: Callable[[str], None] | None,
        on_error: Callable[[str], None],
    ) -> int:
        """To its end; lines of stdout and of stderr handed on as they come, from two threads.

        `on_output=None`: stdout is our own stderr, which is a terminal, so that spinners work.
        """

    def follow(self, argv: Sequence[str], env: ModalEnv, on_line: Callable[[str], None]) -> Follower:
        """In the background; `on_line` is called in another thread."""

    def hand_over(self, argv: Sequence[str], env: ModalEnv) -> int:
        """To its end, with our own terminal, keyboard included."""


# Becomes the program that it is told to start, after asking the kernel (Linux has PR_SET_PDEATHSIG, 1) to end that
# with gpuctl, however gpuctl ends; where gpuctl has ended meanwhile, nothing is started.
_BOUND = """
import ctypes, os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def _bound(argv: Sequence[str]) -> list[str]:
    """For what goes on until it is told to end: `kill -9` of gpuctl must not leave it behind.

    To be started by the main thread: the kernel's word is about the thread that started it.
    """
    return [sys.executable, "-I", "-S", "-c", _BOUND, str(os.getpid()), *argv]


class ProcessRunner:
    """The real one."""

    def run(self, argv: Sequence[str], env: ModalEnv, *, timeout: float | None = None) -> Completed:
        try:
            done = subprocess.run(
                list(argv),
                env=_piped(env),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as late:
            return Completed(TIMED_OUT, "", f"no answer within {late.timeout:g} s")
        return Completed(done.returncode, done.stdout, done.stderr)

    def stream(
        self,
        argv: Sequence[str],
        env: ModalEnv,
        *,
        on_output: Callable[[str], None] | None,
        on_error: Callable[[str], None],
    ) -> int:
        sys.stderr.flush()
        child = subprocess.Popen(
            list(argv),
            env=dict(env.variables) if on_output is None else _piped(env),
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno() if on_output is None else subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            bufsize=1,
        )
        errors = threading.Thread(target=_pump, args=(child.stderr, on_error), daemon=True)
        errors.start()
        try:
            if on_output is not None:
                _pump(child.stdout, lambda line: _unboxed(line, on_output))
            errors.join()
            return child.wait()
        except BaseException:
            # Ctrl-C reached the child too: let it say goodbye to the server before it is made to end.
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=5)
            _end(child)
            raise

    def follow(self, argv: Sequence[str], env: ModalEnv, on_line: Callable[[str], None]) -> Follower:
        return _Following(argv, env, on_line)

    def hand_over(self, argv: Sequence[str], env: ModalEnv) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        child = subprocess.Popen(_bound(argv), env=dict(env.variables))
        # Ctrl-C reaches the whole foreground group; the child decides what it means, we only wait for it.
        interrupted = False
        while True:
            try:
                code = child.wait()
                break
            except KeyboardInterrupt:
                interrupted = True
            except BaseException:
                _end(child)
                raise
        if interrupted or code == -signal.SIGINT:
            raise KeyboardInterrupt
        return code


class _Following:
    def __init__(self, argv: Sequence[str], env: ModalEnv, on_line: Callable[[str], None]) -> None:
        # A session of its own: Ctrl-C goes to gpuctl alone, which then cancels.
        self._child = subprocess.Popen(
            _bound(argv),
            env=_piped(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            bufsize=1,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, args=(on_line,), daemon=True)
        self._reader.start()

    def _read(self, on_line: Callable[[str], None]) -> None:
        _pump(self._child.stdout, on_line)
        self._child.wait()

    def returncode(self) -> int | None:
        return None if self._reader.is_alive() else self._child.returncode

    def cancel(self) -> None:
        _end(self._child)
        self._reader.join(timeout=5)


def _piped(env: ModalEnv) -> dict[str, str]:
    return {**env.variables, "COLUMNS": _PIPE_COLUMNS, "PYTHONUNBUFFERED": "1"}


def _pump(stream: IO[str] | None, on_line: Callable[[str], None]) -> None:
    assert stream is not None
    for line in stream:
        on_line(line.rstrip("\n"))


def _unboxed(line: str, on_line: Callable[[str], None]) -> None:
    """Hand on a line of one of the client's boxes, which are as wide as `_PIPE_COLUMNS`, without the frame."""
    if line.startswith(("╭", "│", "╰")) and line.endswith(("╮", "│", "╯")):
        line = line.strip("╭╮╰╯│─ ")
        if not line:
            return
    on_line(line)


def _end(child: subprocess.Popen[Any]) -> None:
    """SIGTERM, and SIGKILL two seconds later."""
    with contextlib.suppress(ProcessLookupError):
        child.terminate()
    try:
        child.wait(timeout=2)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


# -- before it runs


def check_version(environ: Mapping[str, str] | None = None) -> str:
    """The installed client's version. One that was not tested is refused: its output is what gpuctl reads."""
    environ = os.environ if environ is None else environ
    install = f"'{sys.executable}' -m pip install 'modal=={TESTED_VERSION}'"
    try:
        # The client's own module for this, which imports nothing; importlib.metadata takes 13 ms to tell the same.
        installed: str = importlib.import_module("modal_version").__version__
    except ImportError:
        raise usage_error("the Modal client is not installed beside gpuctl", hint=install) from None
    if installed != TESTED_VERSION and environ.get(ANY_VERSION, "0") in ("", "0"):
        raise usage_error(
            f"modal {installed} was not tested with this gpuctl, modal {TESTED_VERSION} was: {install}"
            f" (or set {ANY_VERSION}=1 to try it anyway)"
        )
    return installed
