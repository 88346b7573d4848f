"""Nothing is lost and nothing is twice with a real vLLM either, whatever dies in the middle of its work."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from .conftest import Gpuctl, Process, processes_of

pytestmark = pytest.mark.slow

ROWS = 3000
KILLS = ["worker", "worker", "driver", "client", "client", "plane"]


def words(out: Path, name: str, *more: str) -> list[str]:
    # Few at once: there is to be a middle in which things can die.
    return [
        *("batch", "tiny", str(out.parent / "prompts.jsonl"), "--local", "--prompt", "Continue: {text}"),
        *("--max-tokens", "16", "--temperature", "0", "--concurrency", "4"),
        *("-o", str(out), "--name", name, *more),
    ]


class Killed:
    """A job, and the kill -9 of what has a part in it; the same command again where it was the client."""

    def __init__(self, gpuctl: Gpuctl, command: list[str], engine: Path) -> None:
        self.gpuctl = gpuctl
        self.command = command
        # `…/images/ID/tree/venv/bin/python`: what its containers have mounted.
        self.image = engine.parents[3].name
        self.said = ""
        self.client = self.start()

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "gpuctl", *self.command],
            env=self.gpuctl.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def victims(self, kind: str) -> list[Process]:
        everyone = processes_of(self.gpuctl.state)
        if kind == "client":
            return [one for one in everyone if one.pid == self.client.pid]
        if kind == "plane":
            return [one for one in everyone if "gpuctl.local.daemon --detach" in one.command][:1]
        found = []
        for one in everyone:
            plan = next((Path(word) for word in one.command.split() if word.endswith("/plan.json")), None)
            if plan is None or "--kill-child" in one.command:  # of the container, its first process
                continue
            with contextlib.suppress(OSError):
                if (self.image in plan.read_text()) == (kind == "worker"):
                    found.append(one)
        return found

    def kill(self, kind: str) -> bool:
        for victim in self.victims(kind):
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim.pid, signal.SIGKILL)
                return True
        return False

    def again(self) -> None:
        """Start the command again where it ended, be it that it was killed or that it lost the plane."""
        if self.client.poll() is not None:
            assert self.client.returncode in (1, -signal.SIGKILL), self.client.communicate()
            self.client = self.start()

    def ended(self) -> int:
        """Rows that are said to have ended, read where the plane has the job's Volume: to ask takes seconds."""
        name = self.command[self.command.index("--name") + 1]
        for file in self.gpuctl.state.glob("gpuctl/local/volumes/*/job.json"):
            with contextlib.suppress(OSError, ValueError):  # not there yet, or being written
                if json.loads(file.read_text())["name"] == name:
                    status = json.loads(file.with_name("status.json").read_text())
                    return int(status["done"] + status["failed"])
        return 0


def answers(file: Path) -> list[tuple[str, Any]]:
    """Without ids and times. The fingerprint is one, too: of the engine's settings, in which the folder of `tiny` has a
    name of its own in each container."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        document = json.loads(line)
        body = document["response"]["body"]
        del body["id"], body["created"], body["system_fingerprint"]
        found.append((document["custom_id"], body))
    return found


def test_six_kills_of_a_real_engine_lose_nothing(gpuctl: Gpuctl, tmp_path: Path, engine_python: Path) -> None:
    rows = [{"text": f"row {n}: " + " ".join(str(n * k % 97) for k in range(n % 40))} for n in range(ROWS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    calm, stormy = tmp_path / "calm.jsonl", tmp_path / "stormy.jsonl"
    gpuctl.ok(*words(calm, "calm"), timeout=1200)

    chance = random.Random(6)
    kills = chance.sample(KILLS, len(KILLS))
    job = Killed(gpuctl, words(stormy, "stormy"), engine_python)
    deadline = time.monotonic() + 3000
    before = 0
    while kills and time.monotonic() < deadline:
        assert job.client.poll() != 0, f"it was done before {kills} came: more rows are needed"
        job.again()
        now = job.ended()
        if now not in (0, before):  # something was done since the last of them
            time.sleep(chance.uniform(0, 2))
            if job.kill(kills[-1]):
                kills.pop()
                before = now
        time.sleep(0.2)
    while job.client.poll() != 0 and time.monotonic() < deadline:
        job.again()
        time.sleep(0.5)
    assert not kills
    assert job.client.poll() == 0
    found = answers(stormy)
    assert [custom_id for custom_id, _ in found] == [f"row-{n}" for n in range(ROWS)]
    assert found == answers(calm)
    assert not (tmp_path / "stormy.errors.jsonl").exists()
