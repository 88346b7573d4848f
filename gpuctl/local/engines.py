"""Docker or Podman, where one runs: builds Dockerfiles, tells of images, hands their file systems over.

Imports installers, recipes. It is looked for when an image wants it, once; `GPUCTL_LOCAL_ENGINE` names one, or none.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gpuctl.errors import usage_error
from gpuctl.local.installers import ImageBuildError, Log, copy_output
from gpuctl.local.recipes import said_by_user

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

_KEEPER = Path(__file__).with_name("engine_keeper.py")
VARIABLE = "GPUCTL_LOCAL_ENGINE"
CHOICES = ("docker", "podman", "none")
_PROBE_SECONDS = 20.0
_AGAIN_SECONDS = 30.0  # how long it counts that none was found: one may be started meanwhile
_TAG = "localhost/gpuctl/"

# How engines say that a registry does not answer; anything else about an image is an answer.
_UNREACHABLE = re.compile(
    r"dial tcp|no such host|connection refused|i/o timeout|TLS handshake timeout|network is unreachable"
    r"|no route to host"
    r"|context deadline exceeded|Client\.Timeout|certificate|connection reset|proxyconnect|server misbehaving"
    r"|Temporary failure in name resolution|\bEOF\b|too ?many ?requests|\b50[0-9]\b",
    re.IGNORECASE,
)
# How Podman says that its runtime starts no containers here, whatever the command: a change of root still may do.
_NO_CONTAINERS = re.compile(r"creating container for \[|error creating (?:container|cgroup)", re.IGNORECASE)
# How Podman says that another process removed or made, in its store, what it was about to use: it locks parts of it.
_DISTURBED = re.compile(
    r"^Error: .*(?:layer not known|image not known|identifier is not a (?:container|layer|image))",
    re.MULTILINE,
)
_TIMES = 3  # that a command is tried which is disturbed
# How engines say that they cannot build as they are asked to, at all: Docker without BuildKit, older ones without
# secrets that come from variables. What a step says is no such word.
_NO_BUILDER = re.compile(
    r"(?!building at STEP|failed to solve|executor failed)"
    r".*(?:buildx component is missing|Cannot connect to the Docker daemon|buildkit not supported"
    r"|unknown flag|(?:invalid|incorrect|unexpected).*secret|secret.*(?:invalid|syntax|unexpected key))",
    re.IGNORECASE,
)


def check() -> None:
    """Raises GpuctlError, exit code 2, for a choice that is none."""
    chosen = os.environ.get(VARIABLE, "")
    if chosen and chosen not in CHOICES:
        raise usage_error(f"{VARIABLE}: unknown engine '{chosen}'; use one of {', '.join(CHOICES)}")


class EngineError(Exception):
    """The engine cannot be used for this here; the message has its own words."""


@dataclass(frozen=True)
class ImageFacts:
    """What an engine knows of an image that concerns its containers."""

    id: str
    env: Mapping[str, str]
    workdir: str | None
    entrypoint: tuple[str, ...]
    user: str


@dataclass(frozen=True)
class Order:
    """A Dockerfile to build: where it and its context lie, and what its RUN steps are given, by variables.

    `secrets` say where the engine has them from, a file or a variable of `environment`; `folders` of this machine are
    shown to RUN read-only, at a place of theirs, where the engine can.
    """

    dockerfile: Path
    context: Path
    tag: str
    build_args: Mapping[str, str]
    secrets: Sequence[str]
    environment: Mapping[str, str]
    folders: Sequence[tuple[str, str]] = ()
    anew: bool = False


@dataclass
class Engine:
    """One that answers."""

    name: str
    version: str
    label: str = ""  # tells the images of one cache from those of another, which are removed apart
    _isolation: list[str] = field(default_factory=list)

    @property
    def binds(self) -> bool:
        """Whether its builds can be shown folders of this machine."""
        return self.name == "podman"

    def tag(self, image_id: str) -> str:
        """What it calls our image of this id."""
        return f"{_TAG}{image_id}:{self.label or 'latest'}"

    async def facts(self, reference: str) -> ImageFacts | None:
        """Of an image that it has; None where it has none of that name."""
        code, out, _ = await self._ask("image", "inspect", reference)
        if code != 0:
            return None
        found = json.loads(out)[0]
        config = found.get("Config") or {}
        pairs = (entry.partition("=") for entry in config.get("Env") or ())
        entrypoint = config.get("Entrypoint") or ()
        return ImageFacts(
            id=found["Id"].removeprefix("sha256:"),
            env={name: value for name, _, value in pairs},
            workdir=config.get("WorkingDir") or None,
            entrypoint=tuple(entrypoint.split() if isinstance(entrypoint, str) else entrypoint),
            user=config.get("User") or "",
        )

    async def fetch(
        self, reference: str, log: Log, login: tuple[str, str] | None = None, folder: Path | None = None
    ) -> None:
        """Get a base image, where it is not there; with `login`, a file of that is in `folder` meanwhile.

        Raises ImageBuildError for one that there is not, or not for us; EngineError where its registry does not answer.
        """
        if await self.facts(reference) is not None:
            return
        if reference.startswith("localhost/"):
            raise ImageBuildError(f"FROM {reference}: {self.name} has no image of that name")
        log(f"{self.name} pull {reference}\n")
        argv, environment, cleanup = ["pull", reference], {}, []
        if login is not None and folder is not None:
            file = folder / "config.json"
            _write_login(file, reference.partition("/")[0], login)
            cleanup = ["rm", "-f", str(file)]
            if self.name == "podman":
                argv.insert(1, f"--authfile={file}")
            else:
                environment["DOCKER_CONFIG"] = str(folder)
        code, tail = await self._say(argv, log, environment, cleanup)
        if code == 0:
            return
        words = _last_words(tail)
        if _UNREACHABLE.search(words):
            raise EngineError(f"{self.name} could not fetch {reference}: {words}")
        raise ImageBuildError(f"FROM {reference}: {self.name} cannot fetch it: {words}")

    async def build(self, order: Order, log: Log) -> None:
        """Build a Dockerfile. Raises ImageBuildError, with the engine's last words, when a step of it fails."""
        argv = ["build", "--network=host", "-f", str(order.dockerfile), "-t", order.tag]
        environment = dict(order.environment)
        if self.name == "podman":
            argv += [
                "--format=docker",
                "--layers",
                "--force-rm",
                f"--ignorefile={order.dockerfile}.dockerignore",
            ]
            argv += [f"--volume={here}:{inside}:ro" for here, inside in order.folders]
        else:
            argv.append("--progress=plain")
            environment["DOCKER_BUILDKIT"] = "1"
        argv += [f"--secret={secret}" for secret in order.secrets]
        argv += [f"--build-arg={name}={value}" for name, value in order.build_args.items()]
        argv += ["--no-cache"] if order.anew else []
        for left in reversed(range(_TIMES)):
            code, tail = await self._say([*argv, *self._isolation, str(order.context)], log, environment)
            if code == 0:
                return
            if self.name == "podman" and not self._isolation and _NO_CONTAINERS.search(tail):
                log("podman starts no containers here: again with --isolation=chroot\n")
                self._isolation.append("--isolation=chroot")
            elif left and self.name == "podman" and _DISTURBED.search(tail):
                log("podman was disturbed by another of its commands: again\n")
            else:
                break
        words = _last_words(tail)
        kind = EngineError if _NO_BUILDER.match(words.partition("\n")[0]) else ImageBuildError
        raise kind(f"{self.name} build: {words}")

    @contextlib.asynccontextmanager
    async def exported(self, image: str, out: int) -> AsyncIterator[asyncio.subprocess.Process]:
        """A process that writes an image's file system, as a tar, to the descriptor `out`, which is closed here."""
        try:
            # A container needs a command, which is never run.
            code, said, error = await self._ask("create", image, "/none")
            if code != 0:
                raise EngineError(f"{self.name} create {image}: {_last_words(error)}")
            container = said.strip().splitlines()[-1]
            cleanup = [self.name, "rm", "--force", container]
            process = await _start([self.name, "export", container], stdout=out, cleanup=cleanup)
        finally:
            os.close(out)
        try:
            yield process
            if process.returncode != 0:
                assert process.stderr is not None
                words = (await process.stderr.read()).decode(errors="replace")
                raise EngineError(f"{self.name} export: {_last_words(words)}")
        finally:
            await _end(process)

    async def _ask(self, *argv: str) -> tuple[int, str, str]:
        process = await _start([self.name, *argv])
        try:
            out, error = await process.communicate()
        finally:
            await _end(process)
        return process.returncode or 0, out.decode(errors="replace"), error.decode(errors="replace")

    async def _say(
        self,
        argv: list[str],
        log: Log,
        environment: Mapping[str, str] | None = None,
        cleanup: Sequence[str] = (),
    ) -> tuple[int, str]:
        """Run a command whose words go to the log; its exit code and the end of what it said."""
        env = {**os.environ, **(environment or {})}
        process = await _start([self.name, *argv], env=env, stderr=asyncio.subprocess.STDOUT, cleanup=cleanup)
        try:
            tail = await copy_output(process, lambda text: log(said_by_user(text)))
            return await process.wait(), said_by_user(tail)
        finally:
            await _end(process)


async def _start(
    argv: list[str],
    *,
    env: Mapping[str, str] | None = None,
    stdout: int = asyncio.subprocess.PIPE,
    stderr: int = asyncio.subprocess.PIPE,
    cleanup: Sequence[str] = (),
) -> asyncio.subprocess.Process:
    """Start an engine's command under a keeper, which ends it when the plane ends."""
    how = "relay" if stderr == asyncio.subprocess.STDOUT else "direct"
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", str(_KEEPER), str(os.getpid()), how, str(len(cleanup)), *cleanup),
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        env=env,
        start_new_session=True,
    )


async def _end(process: asyncio.subprocess.Process) -> None:
    """End it, where it has not ended: the keeper takes its time, and returns when nothing is left."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await asyncio.shield(asyncio.ensure_future(process.wait()))


def _write_login(file: Path, registry: str, login: tuple[str, str]) -> None:
    """For this user alone, and for as long as it is asked with: no engine takes a password in another way."""
    auth = {"auth": base64.b64encode(":".join(login).encode()).decode()}
    names = [registry, *(["https://index.docker.io/v1/"] if registry == "docker.io" else [])]
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        json.dump({"auths": dict.fromkeys(names, auth)}, out)


def _last_words(tail: str) -> str:
    """Of what an engine said: its error, else the last line."""
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(?:Error|ERROR|error)\b", line)]
    if not errors:
        return lines[-1] if lines else "it said nothing"
    said = re.sub(r"^(?:error|ERROR|Error)(?: response from daemon)?:\s*", "", errors[-1])
    # What the step itself said last is the reason, more often than not.
    before = lines[: lines.index(errors[-1])]
    own = [
        line for line in before if not re.match(r"(?:STEP \d|-->|time=|#\d+ |Error|subprocess exited)", line)
    ]
    return f"{said}\n{chr(10).join(own[-5:])}" if own else said


class Engines:
    """Finds the engine of this machine, once."""

    def __init__(self, label: str = "") -> None:
        self._label = label
        self._wanted = os.environ.get(VARIABLE, "")
        self._found: Engine | None = None
        self._looked_at = -_AGAIN_SECONDS
        self._looking = asyncio.Lock()
        self.problem = ""  # why there is none

    @property
    def refused(self) -> bool:
        return self._wanted == "none"

    async def find(self) -> Engine | None:
        """Docker, where its daemon answers, else Podman."""
        if self.refused:
            self.problem = f"{VARIABLE}=none"
            return None
        async with self._looking:
            if self._found is None and time.monotonic() - self._looked_at >= _AGAIN_SECONDS:
                problems: list[str] = []
                for name in [self._wanted] if self._wanted else CHOICES[:2]:
                    self._found = await _probe(name, problems, self._label)
                    if self._found is not None:
                        break
                self.problem = "; ".join(problems)
                self._looked_at = time.monotonic()
        return self._found


async def _probe(name: str, problems: list[str], label: str) -> Engine | None:
    if shutil.which(name) is None:
        problems.append(f"{name} is not installed")
        return None
    what = ["version", "--format", "{{.Server.Version}}"]
    if name == "podman":
        what = ["info", "--format", "{{.Version.Version}}"]
    process = await _start([name, *what])
    try:
        out, error = await asyncio.wait_for(process.communicate(), _PROBE_SECONDS)
    except TimeoutError:
        problems.append(f"{name} does not answer")
        return None
    finally:
        await _end(process)
    version = out.decode(errors="replace").strip()
    if process.returncode != 0 or not version:
        problems.append(f"{name}: {_last_words(error.decode(errors='replace'))}")
        return None
    if name == "docker" and "podman" in error.decode(errors="replace").lower():
        name = "podman"  # its stand-in for Docker's command
    return Engine(name, version, label)
