"""A job's App and Volume, through Modal's command line. May import: errors, modal_cli, reach, target.

Everything of a job has one name there, `gpuctl-batch-JOB`: the App, the Volume with its data, the Dict through which
its containers talk. What is asked of it here works from any machine that has the account.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpuctl.errors import GpuctlError
from gpuctl.modal_cli import MODAL, TIMED_OUT, app_stop_argv, deploy_argv, shown
from gpuctl.reach import disk_is_full, environment_name, lost, no_environment, own
from gpuctl.specs.batch import PREFIX
from gpuctl.target import Target

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gpuctl.cli.console import Console
    from gpuctl.modal_cli import Completed, Follower, ModalEnv, Runner

EVENT = "@gpuctl "  # how a line of the driver begins that is for us

_MISSING = re.compile(r"not found|no such file|does not exist|No Volume named", re.IGNORECASE)
_NO_ROOM = re.compile(r"Errno 28\b|No space left on device")
_ALREADY = re.compile(r"already exists", re.IGNORECASE)


@dataclass(frozen=True)
class Remote:
    """The job named `job`, in one Environment of one target."""

    job: str
    env: ModalEnv
    environment: str | None
    runner: Runner
    console: Console

    @property
    def name(self) -> str:
        return PREFIX + self.job

    @property
    def place(self) -> tuple[Target, str]:
        """Where it is: the target, and its Environment by name."""
        return self.env.target, environment_name(self.env.target, self.environment)

    def command(self, verb: str) -> str:
        """What to type to do something with this job."""
        words = [own("gpuctl"), "batch", verb, self.job]
        if self.env.target is Target.LOCAL:
            words.append("--local")
        return " ".join([*words, *self._of_environment()])

    # -- the Volume

    def create(self) -> bool:
        """Make the Volume; False where there is one of this name."""
        done = self.run("volume", "create", self.name, "--version", "2")
        if done.returncode == 0:
            return True
        if _ALREADY.search(done.stderr + done.stdout):
            return False
        raise self.failed("the Volume was not made", done)

    def put(self, source: Path, there: str) -> None:
        """A file, or all that is in a folder; what is there already is replaced."""
        done = self.run(
            "volume", "put", "--force", self.name, f"{source}{'/' if source.is_dir() else ''}", there
        )
        if done.returncode != 0:
            raise self.failed("the rows were not uploaded", done)

    def read(self, path: str) -> bytes | None:
        """A small file; None where there is none, or no such Volume."""
        with tempfile.TemporaryDirectory(prefix="gpuctl-") as folder:
            for number in range(3):  # it may be replaced while it is read
                to = Path(folder) / f"file-{number}"
                done = self.run("volume", "get", self.name, path, str(to))
                if done.returncode == 0 and to.exists():
                    return to.read_bytes()
                if _MISSING.search(done.stderr + done.stdout):
                    return None
            raise self.failed(f"{path} of job {self.job} cannot be read", done)

    def read_json(self, path: str) -> dict[str, Any] | None:
        content = self.read(path)
        try:
            document = None if content is None else json.loads(content)
        except ValueError:
            return None  # being written
        return document if isinstance(document, dict) else None

    def get(self, path: str, to: Path) -> None:
        """A folder with all that is in it, into the folder `to`."""
        done = self.run("volume", "get", "--force", self.name, path, str(to))
        if done.returncode != 0:
            if _NO_ROOM.search(done.stderr + done.stdout):
                raise GpuctlError(
                    f"the answers were not fetched: no space left on the disk of {to}",
                    hint="make room, or name a folder with room for what is kept: export XDG_CACHE_HOME=/path; the "
                    f"answers stay where they are, and `{self.command('fetch')}` gets them",
                )
            raise self.failed("the answers were not fetched", done)

    def remove(self, path: str) -> None:
        """A file; nothing where there is none."""
        done = self.run("volume", "rm", self.name, path)
        if done.returncode != 0 and not _MISSING.search(done.stderr + done.stdout):
            raise self.failed(f"{path} was not removed", done)

    def delete(self) -> None:
        """The Volume with all that is in it, and the Dict."""
        for noun in ("volume", "dict"):
            done = self.run(noun, "delete", self.name, "--yes")
            if done.returncode != 0 and not _MISSING.search(done.stderr + done.stdout):
                raise self.failed(f"the {noun.capitalize()} was not deleted", done)

    # -- the App

    def deploy(self, file: Path) -> None:
        argv = deploy_argv(file, environment=self.environment)
        self.console.detail(f"$ {shown(argv)}")
        errors: list[str] = []
        trace: list[str] = []  # of the client: Ctrl-C reaches it, too, and then nobody wants to see it

        def heard(line: str) -> None:
            if errors or line.startswith("Error"):
                errors.append(line)
            elif trace or line.startswith("Traceback"):
                trace.append(line)
            else:
                self.console.say(line)

        on_output = None if self.console.live else self.console.say
        code = self.runner.stream(argv, self.env, on_output=on_output, on_error=heard)
        for line in trace:
            self.console.say(line)
        if code != 0:
            from gpuctl.deploy import deploy_error

            if gone := lost(self.env.target):
                raise gone
            raise deploy_error("\n".join(errors), code, self.env.target, self.environment)

    def start(self, file: Path, *, retry_failed: bool = False) -> str:
        """Start the driver; the name of this run, which its status carries."""
        # Options of the client come before the file, those of the file after it.
        argv = [*MODAL, "run", *self._of_environment(), f"{file}::start"]
        if retry_failed:
            argv.append("--retry-failed")
        self.console.detail(f"$ {shown(argv)}")
        done = self.runner.run(argv, self.env)
        for line in done.stdout.splitlines():
            if done.returncode == 0 and line.startswith("{"):
                return str(json.loads(line)["run"])
        raise self.failed("the job was not started", done)

    def ask(self, file: Path, entrypoint: str) -> dict[str, Any]:
        """What an entrypoint of the file prints, which is one line of JSON; it runs in the cloud."""
        argv = [*MODAL, "run", *self._of_environment(), f"{file}::{entrypoint}"]
        self.console.detail(f"$ {shown(argv)}")
        done = self.runner.run(argv, self.env, timeout=None)
        for line in done.stdout.splitlines():
            if done.returncode == 0 and line.startswith("{"):
                document: dict[str, Any] = json.loads(line)
                return document
        raise self.failed("the rows cannot be looked at", done)

    def stop(self) -> None:
        """The App, with its containers; nothing where it does not run."""
        done = self.runner.run(app_stop_argv(self.name, environment=self.environment), self.env)
        if done.returncode != 0 and not re.search(
            r"not found|no .*app|already stopped|No App", done.stderr + done.stdout, re.IGNORECASE
        ):
            raise self.failed("the App was not stopped", done)

    def follow(self, on_event: Callable[[dict[str, Any]], None]) -> Follower:
        """Hand on what the driver tells, as it tells it, in another thread."""

        def line(text: str) -> None:
            _, found, event = text.partition(EVENT)
            if found:
                try:
                    on_event(json.loads(event))
                except ValueError:
                    self.console.detail(text)
            elif text.strip():
                self.console.detail(text)

        argv = [*MODAL, "app", "logs", self.name, "--follow", *self._of_environment()]
        self.console.detail(f"$ {shown(argv)}")
        return self.runner.follow(argv, self.env, line)

    def run(self, *words: str) -> Completed:
        argv = [*MODAL, *words, *self._of_environment()]
        self.console.detail(f"$ {shown(argv)}")
        return self.runner.run(argv, self.env)

    def _of_environment(self) -> Sequence[str]:
        return ("--env", self.environment) if self.environment else ()

    def silent(self) -> GpuctlError:
        """Of a job of which nobody says anything any more: it may be that nobody can."""
        kept = f"what it has done is kept; `{self.command('resume')}` goes on from there"
        full = disk_is_full(self.env.target)
        if full is not None:
            return GpuctlError(
                f"job {self.job} stopped: no space left for its Volume, on the disk of {full}",
                hint=f"make room; {kept}",
            )
        return GpuctlError(
            f"job {self.job} says nothing any more",
            hint=f"{kept}, and `{self.command('logs')}` tells what happened",
        )

    def failed(self, what: str, done: Completed) -> GpuctlError:
        if gone := lost(self.env.target):
            return gone
        said = " ".join((done.stderr.strip() or done.stdout.strip()).split()).removeprefix("Error: ")
        missing = no_environment(said, self.env.target)
        if missing is not None:
            return missing
        if done.returncode == TIMED_OUT:
            return GpuctlError(f"{what}: {said}")
        return GpuctlError(f"{what}: {said[-600:] or f'modal ended with code {done.returncode}'}")
