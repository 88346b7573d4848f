"""This machine's Pythons and package installers, as the builds of images use them.

Imports the standard library only.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

Log = Callable[[str], None]


class ImageBuildError(Exception):
    """An image cannot be built; the message is for the client, its build log was already sent."""


def find_python(wanted: str) -> tuple[str, str]:
    """(path, version) of an interpreter of version `wanted` ("3.12"), else of the one that runs the plane."""
    own = str(getattr(sys, "_base_executable", None) or sys.executable)
    own_version = ".".join(map(str, sys.version_info[:3]))
    if not wanted or own_version.startswith(wanted + "."):
        return own, own_version
    home = Path.home()
    candidates = [
        shutil.which(f"python{wanted}"),
        *sorted(map(str, home.glob(f".pyenv/versions/{wanted}.*/bin/python{wanted}")), reverse=True),
        *sorted(
            map(str, home.glob(f".local/share/uv/python/cpython-{wanted}.*/bin/python{wanted}")), reverse=True
        ),
    ]
    for candidate in filter(None, candidates):
        # A pyenv shim is on the PATH for versions that are not switched on: only one that answers counts, and what
        # counts is the interpreter behind it.
        if found := interpreter_behind(candidate):
            return found
    return own, own_version


def interpreter_behind(python: str) -> tuple[str, str] | None:
    """(path, version) of the installed interpreter that the command `python` starts, if it starts one."""
    code = (
        "import ctypes, ssl, sys; print(getattr(sys, '_base_executable', sys.executable)); "
        "print('.'.join(map(str, sys.version_info[:3])))"
    )
    try:
        done = subprocess.run(
            [python, "-I", "-c", code], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    executable, version = done.stdout.splitlines()
    return executable, version


def pip_for(python: str, base_python: str) -> list[str]:
    """A pip that installs into the environment of `python`: its own, ours, the base interpreter's, or uv."""
    site = Path(python).parent.parent
    if any(site.glob("lib/python*/site-packages/pip")):
        return [python, "-m", "pip"]
    for other in (sys.executable, base_python):
        if (
            subprocess.run([other, "-m", "pip", "--version"], capture_output=True, check=False).returncode
            == 0
        ):
            return [other, "-m", "pip", "--python", python]
    if uv := shutil.which("uv"):
        return [uv, "pip", "--python", python]
    raise ImageBuildError(
        "no pip on this machine to install packages with: install python3-pip, python3-venv or uv"
    )


# A program of this machine's ends with the plane, as containers do: the kernel kills it, however the plane ended.
# Otherwise an installer would go on writing to the folder that the next plane's build begins anew.
_ENDS_WITH_PLANE = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
if os.getppid() == int(sys.argv[1]):
    try:
        os.execvp(sys.argv[2], sys.argv[2:])
    except OSError as error:
        sys.exit(f"{sys.argv[2]}: {error.strerror}")
"""


async def run(
    argv: list[str],
    *,
    log: Log,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    name: str = "",
) -> None:
    """Run a command of this machine's, its output to `log`. Raises ImageBuildError, with `name`, when it fails."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", "-c", _ENDS_WITH_PLANE, str(os.getpid())),
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=env,
        cwd=cwd,
        start_new_session=True,
    )
    try:
        tail = await copy_output(process, log)
        code = await process.wait()
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        raise
    if code != 0:
        raise ImageBuildError(f"{name or shlex.join(argv)} ended with exit code {code}:\n{_reason(tail)}")


# How installers, compilers and Python begin the line that says what went wrong.
_SAYS_WHY = re.compile(r"\s*(?:E:|(?:\w+\.)*\w*(?:[Ee]rror|ERROR|[Ff]atal|Exception)\b)")
_MOST_LINES = 12


def _reason(tail: str) -> str:
    """The last lines of what a program said, from the first of an error among them on."""
    lines = [line.rstrip() for line in tail.splitlines() if line.strip()][-_MOST_LINES:]
    first = next((n for n, line in enumerate(lines) if _SAYS_WHY.match(line)), 0)
    return "\n".join(lines[first:])


async def copy_output(process: asyncio.subprocess.Process, log: Log) -> str:
    """Everything that the process says to `log`, as it comes; returns the last 2,000 characters."""
    assert process.stdout is not None
    tail = ""
    pending = b""
    while data := await process.stdout.read(64 * 1024):
        pending += data
        whole, newline, pending = pending.rpartition(b"\n")
        if newline:
            text = whole.decode(errors="replace") + "\n"
            log(text)
            tail = (tail + text)[-2000:]
    if pending:
        log(pending.decode(errors="replace") + "\n")
        tail += pending.decode(errors="replace")
    return tail


def without_unreachable_indexes(arguments: list[str], log: Log) -> list[str]:
    """Leave out extra package indexes that cannot be reached: pip would retry each for every single package."""
    out: list[str] = []
    pairs = iter(arguments)
    for word in pairs:
        option, equals, value = word.partition("=")
        if option not in ("--extra-index-url", "--find-links", "-f"):
            out.append(word)
            continue
        url = value if equals else next(pairs, "")
        if not (url.startswith(("http://", "https://")) and goes_without(option, url, log)):
            out += [option, url]
    return out


def goes_without(option: str, url: str, log: Log) -> bool:
    """Whether an installer is to do without this index, because it cannot be reached; then that is said."""
    if (reason := _unreachable(url)) is None:
        return False
    log(f"going on without {option} {url}, which cannot be reached from here: {reason}\n")
    return True


def _unreachable(url: str) -> str | None:
    """None when something listens there (or a proxy stands before it: then pip is left to find out)."""
    parts = urllib.parse.urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    if urllib.request.getproxies().get(parts.scheme) and not urllib.request.proxy_bypass(host):
        return None
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        return str(error)
    return None
