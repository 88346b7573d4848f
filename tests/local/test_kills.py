"""`kill -9` of containers, of the plane and of its supervisor while a `.map` runs.

The plane comes back by itself; every input is answered once, and nothing is left.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gpuctl.local import client

from .planes import APPS, eventually, processes

if TYPE_CHECKING:
    from .planes import TestPlane

CLIENT = """
    import json, modal, sys
    survivor = modal.Function.from_name("calls", "survivor")
    with open(sys.argv[2], "w", buffering=1) as file:
        for x, task in survivor.map(range(int(sys.argv[1])), order_outputs=False):
            file.write(json.dumps([x, task]) + "\\n")
"""


def processes_of(plane: TestPlane) -> list[int]:
    """The processes of its containers, launchers included."""
    return processes(f"{plane.state_dir}/run/")


def below(pids: list[int]) -> list[int]:
    """Them and all their descendants: among them the programs in the containers."""
    found = list(pids)
    for pid in found:
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            found += [int(child) for child in children if int(child) not in found]
    return found


def storm(plane: TestPlane, inputs: int, kills: int, seed: int, folder: Path) -> None:
    chance = random.Random(seed)
    plane.up()
    plane.modal("deploy", "calls.py")
    results = folder / "results"
    mapping = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CLIENT), str(inputs), str(results)],
        env=plane.environment(),
        cwd=APPS,
        stderr=subprocess.PIPE,
        text=True,
    )
    done = {"plane": 0, "container": 0}

    def answered() -> int:
        return results.read_text().count("\n") if results.exists() else 0

    deadline = time.monotonic() + 600 + kills * 6
    for number in range(kills):
        # Spread over the whole map, whatever the machine's speed.
        while mapping.poll() is None and answered() < inputs * number / kills:
            assert time.monotonic() < deadline, (answered(), done)
            time.sleep(0.01)
        assert mapping.poll() is None, f"the map ended after {done}: {mapping.communicate()[1]}"
        if number % 4 == 1:
            eventually(lambda: client.running(plane.state_dir))
            if number % 16 == 5:  # of both one replaces the other
                [supervisor] = eventually(plane.supervisors)
                os.kill(supervisor, signal.SIGKILL)
                eventually(lambda: [pid for pid in plane.supervisors() if pid != supervisor])  # noqa: B023
            plane.crash()
            done["plane"] += 1
            continue
        victims: list[int] = []
        while not victims:
            assert time.monotonic() < deadline, (answered(), done)
            victims = below(processes_of(plane))
            time.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(victims), signal.SIGKILL)
            done["container"] += 1
    _, errors = mapping.communicate(timeout=max(deadline - time.monotonic(), 1))
    assert mapping.returncode == 0, errors
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert sorted(x for x, _ in rows) == list(range(inputs)), "every input is answered exactly once"
    assert len({task for _, task in rows}) > 1
    assert done["plane"] > 0
    assert done["container"] > 0
    assert sum(done.values()) >= kills * 2 / 3, done
    nothing_is_left(plane)


def nothing_is_left(plane: TestPlane) -> None:
    plane.down()
    assert below(processes_of(plane)) == []
    assert plane.supervisors() == []
    assert str(plane.state_dir) not in Path("/proc/self/mountinfo").read_text()
    assert list((plane.state_dir / "run").glob("ta-*")) == []
    with (plane.state_dir / "lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    db = sqlite3.connect(plane.state_dir / "plane.db")
    assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    assert db.execute("SELECT count(*) FROM call_inputs WHERE seq IS NULL").fetchone()[0] == 0
    assert db.execute("SELECT count(*) FROM tasks WHERE finished_at = 0").fetchone()[0] == 0
    db.close()


def test_a_few_kills(new_plane: TestPlane, tmp_path: Path) -> None:
    storm(new_plane, inputs=400, kills=6, seed=1, folder=tmp_path)


@pytest.mark.slow
def test_two_hundred_kills_over_ten_thousand_inputs(new_plane: TestPlane, tmp_path: Path) -> None:
    storm(new_plane, inputs=10_000, kills=200, seed=2, folder=tmp_path)
