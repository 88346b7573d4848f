"""Runs one command of a container engine, and ends all of it when the plane ends, or asks for it. Imports nothing.

Run as `python -I -S engine_keeper.py PLANE_PID relay|direct CLEANUP_WORDS CLEANUP… COMMAND…`. An engine that is killed
leaves behind what it made for a step, and that step's programs; one whose step ends tidies up. So the programs are
ended first, from the last, and the engine itself only when it does not end by that. CLEANUP is run at the end,
whatever happened.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 16384, 1 << 18
_PATIENCE = 16.0  # seconds for an engine whose step was ended


class _Ended(Exception):  # noqa: N818 it is none of ours
    """The plane has ended, or wants this to."""


def _children() -> dict[int, list[int]]:
    """The processes of this machine by their parents'."""
    found: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                with open(f"/proc/{name}/stat") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
                found.setdefault(parent, []).append(int(name))
    return found


def _below(pid: int, children: dict[int, list[int]]) -> list[int]:
    """Those that this process has started, and those that they have, the last ones first."""
    found: list[int] = []
    for child in children.get(pid, ()):
        found += [*_below(child, children), child]
    return found


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes]) -> None:
    began = time.monotonic()
    told = at_a_step = False
    while process.poll() is None and (passed := time.monotonic() - began) < _PATIENCE:
        children = _children()
        leaves = [pid for pid in _below(process.pid, children) if not children.get(pid)]
        _kill(leaves)
        at_a_step = at_a_step or bool(leaves)
        if not told and (passed > _PATIENCE / 2 or not at_a_step):  # it is at none, or does not end with it
            told = True
            process.terminate()
        time.sleep(0.05)
    # What outlived its parents has come to us.
    _kill(_below(os.getpid(), _children()))
    process.wait()


def _start(command: list[str], *, relay: bool) -> tuple[subprocess.Popen[bytes], threading.Thread | None]:
    """Start it; with `relay` what it says goes through here: with the plane, who reads it ends, and it would die of
    that before it has tidied up.
    """
    if not relay:
        return subprocess.Popen(command, start_new_session=True), None
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    source = process.stdout.fileno()

    def carry() -> None:
        while data := os.read(source, 65536):
            with contextlib.suppress(OSError):
                while data:
                    data = data[os.write(1, data) :]

    thread = threading.Thread(target=carry, daemon=True)
    thread.start()
    return process, thread


def main(argv: list[str]) -> int:
    plane, relay, words = int(argv[0]), argv[1] == "relay", int(argv[2])
    cleanup, command = argv[3 : 3 + words], argv[3 + words :]

    asked = armed = False

    def ended(*_: object) -> None:
        nonlocal asked
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        asked = True
        if armed:
            raise _Ended

    signal.signal(signal.SIGTERM, ended)
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # What a superuser's engine mounts below /var is its own: the kernel lays no overlay upon a folder that has others'
    # mounts in it, which is what containers need.
    if os.geteuid() == 0 and libc.unshare(_CLONE_NEWNS) == 0:
        libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None)
    process: subprocess.Popen[bytes] | None = None
    code = 1
    try:
        if os.getppid() == plane:
            process, words_of = _start(command, relay=relay)
            armed = True  # not before: what has been started has to be known
            if asked:
                raise _Ended
            code = process.wait()
            if words_of is not None:
                words_of.join()
    except _Ended:
        if process is not None:
            _end(process)
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
    finally:
        armed = False
        if cleanup:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                null = subprocess.DEVNULL
                subprocess.run(cleanup, stdout=null, stderr=null, timeout=30, check=False)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
