"""The plane from outside: find it, start it, stop it. Imports the standard library and gpuctl.errors, to be instant."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpuctl.errors import EXIT_FAILURE, EXIT_USAGE, GpuctlError

if TYPE_CHECKING:
    from collections.abc import Iterator

STATE_FILE = "plane.json"
LOG_FILE = "plane.log"
LOCK_FILE = "lock"
_START_SECONDS = 30.0
_STOP_SECONDS = 60.0
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Plane:
    """A control plane that is up. Its credentials are in `token_id` and `token_secret`; keep them out of logs."""

    pid: int
    url: str
    state_dir: Path
    token_id: str
    token_secret: str
    revived: bool = False  # by its supervisor

    def client_env(self) -> dict[str, str]:
        """What points the `modal` client at this plane, and at nothing else of the user's."""
        return {
            "MODAL_SERVER_URL": self.url,
            "MODAL_TOKEN_ID": self.token_id,
            "MODAL_TOKEN_SECRET": self.token_secret,
            # A file that is not there: the user's own profiles must not leak in.
            "MODAL_CONFIG_PATH": str(self.state_dir / "no-modal-config.toml"),
            # The plane is on this machine: the way to it must not lead over the user's HTTP proxy.
            "MODAL_DISABLE_API_PROXY": "1",
        }


class AlreadyUpError(GpuctlError):
    """Somebody else's plane holds the state directory."""


def running(state_dir: Path) -> Plane | None:
    """The plane of this state directory, if it is up."""
    try:
        state: dict[str, Any] = json.loads((state_dir / STATE_FILE).read_text())
        pid, started = int(state["pid"]), str(state["started"])
        credentials = str(state["token_id"]), str(state["token_secret"])
        plane = Plane(pid, str(state["url"]), state_dir, *credentials, revived=bool(state.get("revived")))
    except (OSError, ValueError, KeyError):
        return None
    return plane if started == process_start(pid) else None


def was_killed(state_dir: Path) -> bool:
    """Whether the last plane of this state directory ended without being stopped: it left its description."""
    return (state_dir / STATE_FILE).exists() and running(state_dir) is None


def coming_back(state_dir: Path) -> bool:
    """Whether the last plane was killed and its supervisor is starting another."""
    if not was_killed(state_dir):
        return False
    with _held(state_dir) as ours:
        return not ours


def process_start(pid: int) -> str | None:
    """When a process started, which tells one user of a pid from the next; None when it is gone."""
    try:
        # The name of the program, in parentheses, may hold spaces and parentheses itself.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def up(state_dir: Path, cache_dir: Path, *, port: int | None = None) -> Plane:
    """Start the plane as a daemon; returns when it answers. Raises GpuctlError: exit code 2 when one is up already."""
    already = running(state_dir)
    if already is not None:
        raise AlreadyUpError(
            f"the local control plane is already up (pid {already.pid})", exit_code=EXIT_USAGE
        )
    reader, writer = os.pipe()
    try:
        command = [sys.executable, "-P", "-m", "gpuctl.local.daemon", "--detach", "--ready-fd", str(writer)]
        command += ["--state-dir", str(state_dir.absolute()), "--cache-dir", str(cache_dir.absolute())]
        command += ["--port", str(port)] if port is not None else []
        launcher = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[writer],
            start_new_session=True,
        )
        os.close(writer)
        writer = -1
        launcher.wait()
        answer = _read_answer(reader)
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)
    if answer is None:
        raise GpuctlError("the local control plane did not start", hint=f"its log: {state_dir / LOG_FILE}")
    if problems := answer.get("problems"):
        kind = AlreadyUpError if answer.get("already_up") else GpuctlError
        raise kind(problems, hint=answer.get("hint"), exit_code=int(answer.get("exit_code", EXIT_FAILURE)))
    plane = running(state_dir)
    if plane is None:
        raise GpuctlError("the local control plane ended at once", hint=f"its log: {state_dir / LOG_FILE}")
    return plane


def ensure_up(state_dir: Path, cache_dir: Path) -> Plane:
    """The plane that is up, or a new one. Several at once get the same one."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        plane = running(state_dir)
        if plane is not None:
            return plane
        try:
            return up(state_dir, cache_dir)
        except AlreadyUpError:
            # Another start, or a stop, is under way: the next look tells.
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_SECONDS)


def down(state_dir: Path) -> None:
    """Stop the plane and its containers; nothing of its state goes. Does nothing when it is not up.

    One that is starting is waited for, and so is one that somebody else is stopping; one that is killed at this moment
    is stopped when it comes back.
    """
    from gpuctl.local import sockets

    deadline = time.monotonic() + _STOP_SECONDS
    told: set[int] = set()
    while True:
        plane = running(state_dir)
        if plane is None:
            with _held(state_dir) as ours:
                if ours:  # what a plane that was killed left
                    sockets.remove(state_dir)
                    (state_dir / STATE_FILE).unlink(missing_ok=True)
                    return
        elif plane.pid not in told:
            if told and not plane.revived:
                return  # it is down, and somebody has started the next
            told.add(plane.pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(plane.pid, signal.SIGTERM)
        if time.monotonic() > deadline:
            what = (
                f"(pid {max(told)}) has not ended after {_STOP_SECONDS:.0f} s"
                if told
                else "neither starts nor ends"
            )
            raise GpuctlError(f"the local control plane {what}", hint=f"its log: {state_dir / LOG_FILE}")
        time.sleep(_POLL_SECONDS)


@contextlib.contextmanager
def _held(state_dir: Path) -> Iterator[bool]:
    """Hold the state directory for a moment, as a plane does for its life; False where one has it."""
    try:
        lock = (state_dir / LOCK_FILE).open("r+")
    except OSError:
        yield True  # there was never a plane
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _read_answer(reader: int) -> dict[str, Any] | None:
    """The daemon's word on how its start went: one JSON document, then the pipe closes."""
    data = b""
    deadline = time.monotonic() + _START_SECONDS
    while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
        piece = os.read(reader, 65536)
        if not piece:
            break
        data += piece
    try:
        answer: dict[str, Any] = json.loads(data)
    except ValueError:
        return None
    return answer
