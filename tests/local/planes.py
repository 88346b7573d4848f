"""Real control planes on state directories of their own, driven by the real `modal` CLI.

The image cache is shared by all of them and kept between runs, so that the base environment is installed once;
`GPUCTL_TEST_CACHE` moves it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpuctl.local import client
from gpuctl.local.listeners import SUPERVISOR

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

APPS = Path(__file__).parent / "apps"


def image_cache() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpuctl-tests"
    path = Path(os.environ.get("GPUCTL_TEST_CACHE") or default) / "local"
    path.mkdir(parents=True, exist_ok=True)
    return path


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    headers: Mapping[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def http(
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    data: bytes | None = None,
    method: str | None = None,
) -> Answer:
    """One request; status 0 when nothing listens."""
    request = urllib.request.Request(url, data=data, headers=dict(headers or {}), method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as response:
            return Answer(response.status, response.read(), dict(response.headers))
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.read(), dict(error.headers))
    except (urllib.error.URLError, ConnectionError):
        return Answer(0, b"", {})


def eventually(question: Callable[[], Any], *, seconds: float = 60.0, every: float = 0.05) -> Any:
    """The first true answer."""
    deadline = time.monotonic() + seconds
    while True:
        answer = question()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(every)


def processes(*words: str) -> list[int]:
    """The processes of this machine that have all of these in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes()
                if all(word.encode() in line for word in words):
                    found.append(int(entry.name))
    return found


@cache
def _helper() -> subprocess.Popen[str]:
    """The one process that forks for `TestPlane.quick`; it ends when its standard input does."""
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("many.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@dataclass
class TestPlane:
    """A control plane and the ways to use it."""

    __test__ = False
    state_dir: Path

    @property
    def now(self) -> client.Plane:
        plane = client.running(self.state_dir)
        assert plane is not None, "the plane is not up"
        return plane

    def up(self, port: int | None = None) -> client.Plane:
        return client.up(self.state_dir, image_cache(), port=port)

    def down(self) -> None:
        client.down(self.state_dir)

    def supervisors(self) -> list[int]:
        """What would bring it back: one process, once it has served for a moment."""
        return processes(str(SUPERVISOR), str(self.state_dir))

    def crash(self) -> None:
        """As `kill -9` of it does: it comes back by itself."""
        pid = self.now.pid
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: client.process_start(pid) is None)

    def kill(self) -> None:
        """As the end of the machine does, supervisor and all: only the next command brings it back."""
        pid = self.now.pid
        eventually(self.supervisors)
        quiet = 0
        while quiet < 3:  # what one of them has just started counts, too
            found = [*processes("gpuctl.local.daemon", str(self.state_dir)), *self.supervisors()]
            for victim in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
            quiet = 0 if found else quiet + 1
            time.sleep(0.1)
        eventually(lambda: client.process_start(pid) is None)

    def environment(self, **extra: str) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith(("MODAL_", "T_"))}
        return own | self.now.client_env() | {"COLUMNS": "200", "NO_COLOR": "1"} | extra

    def modal(
        self, *argv: str, check: bool = True, stdin: str | None = None, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the unmodified `modal` CLI against this plane."""
        done = subprocess.run(
            [sys.executable, "-m", "modal", *argv],
            env=self.environment(**extra),
            cwd=APPS,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        if check:
            assert done.returncode == 0, f"modal {' '.join(argv)}\n{done.stdout}\n{done.stderr}"
        return done

    def quick(self, *argv: str, check: bool = True, **extra: str) -> subprocess.CompletedProcess[str]:
        """The same, without a start of Python for each: see `many`. For commands that load no code of a user's."""
        helper = _helper()
        assert helper.stdin is not None
        assert helper.stdout is not None
        command = {"argv": argv, "env": self.environment(**extra), "cwd": str(APPS)}
        helper.stdin.write(json.dumps(command) + "\n")
        helper.stdin.flush()
        code, out, err = json.loads(helper.stdout.readline())
        if check:
            assert code == 0, f"modal {' '.join(argv)}\n{out}\n{err}"
        return subprocess.CompletedProcess(["modal", *argv], code, out, err)

    def json(self, *argv: str) -> Any:
        return json.loads(self.quick(*argv, "--json").stdout)

    def deploy(self, name: str, *options: str, app: str = "plain.py", **settings: object) -> str:
        """Deploy an app under `name`; returns its server's URL. Settings become T_… variables."""
        extra = {f"T_{key.upper()}": str(value) for key, value in settings.items()}
        output = self.modal("deploy", app, *options, T_NAME=name, **extra).stdout
        return next(word for word in output.split() if word.startswith("http://127.0.0.1:"))

    def ready(self, url: str, **keywords: Any) -> Answer:
        """Ask until something but 503 comes."""

        def ask() -> Answer | None:
            answer = http(url, **keywords)
            return answer if answer.status != 503 else None

        answer: Answer = eventually(ask, seconds=60)
        return answer

    def logs(self, name: str, *options: str) -> str:
        return self.quick("app", "logs", name, *options).stdout

    def containers(self) -> list[str]:
        """The command lines of processes that belong to this plane's containers."""
        mark = str(self.state_dir).encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) not in (os.getpid(), os.getppid()):
                with contextlib.suppress(OSError):
                    line = (entry / "cmdline").read_bytes()
                    if mark + b"/run/" in line:
                        found.append(line.replace(b"\0", b" ").decode(errors="replace"))
        return found
