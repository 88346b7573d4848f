"""What runs a container engine's commands: it ends all of them with the plane, and tidies up. No engine is needed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gpuctl.local import engine_keeper

from .planes import eventually, processes

# A step that outlives its parent, in a session of its own, as containers are.
_STEP = "setsid sleep {seconds} & echo begun; wait; echo ended"


def keeper(tmp_path: Path, command: str, how: str = "relay", plane: int | None = None) -> list[str]:
    """The command line of one, whose cleanup makes a file."""
    cleanup = ["touch", str(tmp_path / "cleaned")]
    argv = [sys.executable, "-I", "-S", engine_keeper.__file__, str(plane or os.getpid()), how, "2", *cleanup]
    return [*argv, "sh", "-c", command]


@pytest.mark.parametrize("how", ["relay", "direct"])
def test_what_a_command_says_and_how_it_ends(tmp_path: Path, how: str) -> None:
    done = subprocess.run(
        keeper(tmp_path, "echo out; echo err >&2; exit 7", how), capture_output=True, text=True, check=False
    )
    assert done.returncode == 7
    assert (done.stdout, done.stderr) == (("out\nerr\n", "") if how == "relay" else ("out\n", "err\n"))
    assert (tmp_path / "cleaned").exists()


def test_its_steps_end_first_and_it_may_tidy_up(tmp_path: Path) -> None:
    seconds = f"98{os.getpid()}.1"
    process = subprocess.Popen(
        keeper(tmp_path, _STEP.format(seconds=seconds)), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.terminate()
    assert process.stdout.read() == "ended\n", "it was not killed: its step was"
    process.wait()
    assert not processes("sleep", seconds)
    assert (tmp_path / "cleaned").exists()


def test_it_ends_with_a_plane_that_is_killed(tmp_path: Path) -> None:
    seconds = f"98{os.getpid()}.2"
    code = (
        "import os, subprocess, sys, time; "
        "argv = sys.argv[1:]; argv[argv.index('PLANE')] = str(os.getpid()); "
        "subprocess.Popen(argv, stdout=subprocess.DEVNULL); time.sleep(600)"
    )
    argv = keeper(tmp_path, f"touch {tmp_path}/begun; {_STEP.format(seconds=seconds)}")
    argv[argv.index(str(os.getpid()))] = "PLANE"
    plane = subprocess.Popen([sys.executable, "-c", code, *argv])
    eventually(lambda: (tmp_path / "begun").exists())
    plane.send_signal(signal.SIGKILL)
    plane.wait()
    eventually(lambda: (tmp_path / "cleaned").exists())
    eventually(lambda: not processes("sleep", seconds))


def test_none_is_started_for_a_plane_that_is_gone(tmp_path: Path) -> None:
    done = subprocess.run(
        keeper(tmp_path, f"touch {tmp_path}/started", plane=1), capture_output=True, check=False
    )
    assert done.returncode == 1
    assert not (tmp_path / "started").exists()
