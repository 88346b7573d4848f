"""What a container sees of this machine, as a list of mounts; and how to enter it. Imports gpuctl.errors only.

A container's root is the host's, read-only, with its own writable places on top: `/tmp`, `/root`, its Volumes at
the paths that the app names (`overlays` makes all of it writable, where the kernel can). The user's home, the plane's
state and other containers are not there at all. No privilege and no daemon is needed: a user namespace is enough.

`Filesystem` decides the mounts, in order, as plain data. Two back ends make them: bubblewrap, and util-linux's
`unshare` with our own `container_init` doing the mounting. Both then run `container_init` as process 1.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from gpuctl.errors import GpuctlError

if TYPE_CHECKING:
    from collections.abc import Mapping

EGRESS_PORT = 3128  # where programs in a network of their own find the way out, as HTTP(S)_PROXY
_EGRESS_SOCKET = "/run/modal/egress.sock"

# What names the certificates to trust, in the programs that people run in containers and builds.
CERTIFICATES = (
    "AWS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "GIT_SSL_CAINFO",
    "NODE_EXTRA_CA_CERTS",
    "PIP_CERT",
    "REQUESTS_CA_BUNDLE",
    "SSL_CERT_DIR",
    "SSL_CERT_FILE",
)

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # of programs in a sandbox
INIT = Path(__file__).with_name("container_init.py")

# Top-level places of the host that a container never sees; some are replaced by the container's own.
HIDDEN = (
    "/boot",
    "/dev",
    "/home",
    "/lost+found",
    "/media",
    "/mnt",
    "/proc",
    "/root",
    "/run",
    "/srv",
    "/tmp",
)
# Those of them that a container has as folders of its own, and that an image may fill.
OWN_PLACES = ("/home", "/media", "/mnt", "/srv")
_GPU_DEVICES = ("nvidia", "dri")


@dataclass(frozen=True)
class Mount:
    """One step: `kind` is tmpfs, bind, ro_bind, symlink, proc, dev, dir or overlay; `source` is unused for some, and
    the options of an overlay.
    """

    kind: str
    target: str
    source: str = ""


@dataclass
class Filesystem:
    """The mounts of one container.

    `hide` are host folders that must not be visible wherever they lie (the plane's state and cache, the home).
    `gpus` are the numbers of the NVIDIA cards that are visible, as in /dev/nvidia0; None for all.
    `root` keeps what is made at the top, beside the host's folders; without it that is in memory.
    Things are bound in any order; `mounts` puts what lies higher first, so that nothing covers anything.
    """

    hide: tuple[Path, ...] = ()
    gpus: tuple[int, ...] | None = None
    root: Path | None = None
    _base: list[Mount] = field(default_factory=list)
    _placed: list[Mount] = field(default_factory=list)

    def __post_init__(self) -> None:
        real = (Path(os.path.realpath(hidden)) for hidden in self.hide)
        self.hide = tuple(folder for folder in dict.fromkeys(real) if folder != Path("/"))  # HOME=/ happens
        self._make_base()

    def _make_base(self) -> None:
        self._base.append(Mount("bind", "/", str(self.root)) if self.root else Mount("tmpfs", "/"))
        self._base += self._children("/", skip=HIDDEN)
        for place in OWN_PLACES:
            self._base.append(Mount("dir" if self.root else "tmpfs", place))
        self._base.append(Mount("tmpfs", "/run"))
        if os.path.isdir("/var/tmp") and not os.path.islink("/var"):
            self._base.append(Mount("tmpfs", "/var/tmp"))
        self._base.append(Mount("proc", "/proc"))
        self._devices()
        if resolver := self._resolver():
            self._base.append(Mount("ro_bind", resolver, resolver))

    @property
    def mounts(self) -> list[Mount]:
        """All of them, in the order in which they are made."""
        placed = sorted(self._placed, key=lambda mount: mount.target.count("/"))
        scaffolds = {self._scaffold(mount) for mount in placed} - {""}
        made: list[Mount] = []
        for ancestor in sorted(scaffolds, key=lambda path: path.count("/")):
            made.append(Mount("tmpfs", ancestor))
            made += self._children(ancestor)
        return [*self._base, *made, *placed]

    def bind(self, source: Path, target: str, *, read_only: bool) -> None:
        """Show `source` (a file or folder of the host) at `target`, which need not exist on the host."""
        self._placed.append(Mount("ro_bind" if read_only else "bind", self._real(target), str(source)))

    def place(self, source: Path, target: str) -> None:
        """The same, writable, for what a container's own program may have made: a link stays one, and leads where it
        would in the container.
        """
        if source.is_symlink():
            self._placed.append(Mount("symlink", self._real(target), os.readlink(source)))
        else:
            self.bind(source, target, read_only=False)

    def show(self, folder: Path) -> None:
        """Show a host folder, read-only, at its own path, where it would otherwise be hidden."""
        self.bind(folder, str(folder), read_only=True)

    def directory(self, target: str) -> None:
        """Make sure that `target` exists; made writable (in memory) where the host lacks it."""
        target = self._real(target)
        if not (self._visible(target) and Path(target).is_dir()):
            self._placed.append(Mount("dir", target))

    def way_out(self, *, proxies: bool = True) -> dict[str, str]:
        """This machine's variables by which programs find the internet: proxies, and certificates that are visible."""
        found = {
            name: value for name, value in os.environ.items() if proxies and name.lower().endswith("_proxy")
        }
        for name in CERTIFICATES:
            value = os.environ.get(name, "")
            if os.path.exists(value) and self._visible(os.path.realpath(value)) and self._visible(value):
                found[name] = value
        return found

    def _devices(self) -> None:
        self._base.append(Mount("dev", "/dev"))
        for entry in sorted(Path("/dev").iterdir()):
            if entry.name.startswith(_GPU_DEVICES) and self._may_see(entry.name):
                self._base.append(Mount("bind", str(entry), str(entry)))

    def _may_see(self, device: str) -> bool:
        if self.gpus is None:
            return True
        number = device.removeprefix("nvidia")
        return int(number) in self.gpus if number.isdecimal() else bool(self.gpus)

    def _resolver(self) -> str:
        # systemd-resolved keeps the real file under /run, which is hidden; without it no name resolves.
        real = os.path.realpath("/etc/resolv.conf")
        return real if real.startswith("/run/") and os.path.isfile(real) else ""

    def _children(self, directory: str, *, skip: tuple[str, ...] = ()) -> list[Mount]:
        """Each entry of a host folder at its own path; what is hidden below it stays so."""
        mounts: list[Mount] = []
        with os.scandir(directory) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                if entry.path in skip:
                    continue
                if entry.is_symlink():
                    mounts.append(Mount("symlink", entry.path, os.readlink(entry.path)))
                else:
                    mounts.append(Mount("ro_bind", entry.path, entry.path))
        for hidden in self.hide:
            inside = hidden != Path(directory) and hidden.is_relative_to(directory)
            if inside and hidden.is_dir() and not _within(str(hidden), skip):
                mounts.append(Mount("tmpfs", str(hidden)))
        return mounts

    def _visible(self, path: str) -> bool:
        """Whether `path` shows the host's own (read-only) content, rather than something of the container's."""
        return not _within(path, (*HIDDEN, *map(str, self.hide)))

    def _real(self, target: str) -> str:
        """`target` without the host's links in it: a mount upon one would land wherever it leads on the host."""
        target = os.path.normpath("/" + target.lstrip("/"))
        for _ in range(40):  # as many as the kernel follows
            parts = target.split("/")[1:]
            for count in range(1, len(parts) + 1):
                prefix = "/" + "/".join(parts[:count])
                if not self._visible(prefix):
                    return target
                if os.path.islink(prefix):
                    rest = parts[count:]
                    target = os.path.normpath(
                        os.path.join(os.path.dirname(prefix), os.readlink(prefix), *rest)
                    )
                    break
            else:
                break
        return target

    def _scaffold(self, mount: Mount) -> str:
        """The folder that has to be rebuilt so that `mount` finds a place where the host lacks it; "" for none.

        The deepest existing ancestor is replaced by a small file system in memory with each of the ancestor's
        entries bound back, so that a new mount point can be made in it.
        """
        if not self._visible(mount.target) or os.path.lexists(mount.target):
            return ""
        ancestor = os.path.dirname(mount.target)
        while not os.path.isdir(ancestor):
            ancestor = os.path.dirname(ancestor)
        return "" if ancestor == "/" else ancestor


def on_host(path: str) -> bool:
    """Whether containers find there what this machine has."""
    return os.path.lexists(path) and not _within(path, HIDDEN)


def _within(path: str, places: tuple[str, ...]) -> bool:
    return any(path == place or path.startswith(place.rstrip("/") + "/") for place in places)


def _probe(argv: list[str]) -> str | None:
    """None when the command works, else the last line of what it said."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


_UNSHARE = (
    "unshare",
    "--user",
    "--map-root-user",
    "--mount",
    "--pid",
    "--ipc",
    "--uts",
    "--fork",
    "--kill-child",
)
_BWRAP = (
    "bwrap",
    "--unshare-user",
    "--uid",
    "0",
    "--gid",
    "0",
    "--unshare-pid",
    "--unshare-ipc",
    "--unshare-uts",
)


@cache
def find_backend() -> str:
    """`bwrap` or `unshare`: the first that works here.

    Raises GpuctlError, with what to install, where neither does.
    """
    reasons = []
    if shutil.which("bwrap"):
        if (reason := _probe([*_BWRAP, "--ro-bind", "/", "/", "--proc", "/proc", "true"])) is None:
            return "bwrap"
        reasons.append(f"bwrap: {reason}")
    if shutil.which("unshare"):
        if (reason := _probe([*_UNSHARE, "--net", "mount", "-t", "proc", "proc", "/proc"])) is None:
            return "unshare"
        reasons.append(f"unshare: {reason}")
    raise GpuctlError(
        "the local control plane cannot make containers here"
        + (f" ({'; '.join(reasons)})" if reasons else ": neither bwrap nor unshare is installed"),
        hint="install bubblewrap (`apt install bubblewrap`) or util-linux, and allow user namespaces "
        "(`sysctl kernel.unprivileged_userns_clone=1`, or an AppArmor profile for bwrap or unshare)",
    )


@dataclass(frozen=True)
class Program:
    """What runs in a sandbox, and with what. `egress` is the host's socket that leads out of an isolated network."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    workdir: str
    isolated_network: bool = False
    egress: Path | None = None


@dataclass(frozen=True)
class Launched:
    """A sandbox that was started: the launcher's process, and our end of the socket to `container_init`."""

    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


async def launch(
    folder: Path, filesystem: Filesystem, program: Program, *, merge_stderr: bool = False
) -> Launched:
    """Start `program` as the one below process 1 of new namespaces; `folder` is private to it.

    The first line to read says whether it started. Output is piped, stderr into stdout with `merge_stderr`.
    """
    overlaid = any(mount.kind == "overlay" for mount in filesystem.mounts)  # which few a bubblewrap can make
    backend = "unshare" if overlaid else find_backend()
    new_root = folder / "new_root"
    new_root.mkdir(exist_ok=True)
    plan = plan_seen = folder / "plan.json"
    if program.egress is not None:
        filesystem.bind(program.egress, _EGRESS_SOCKET, read_only=False)
    if backend == "bwrap":
        plan_seen = Path("/run/modal/plan.json")
        filesystem.bind(plan, str(plan_seen), read_only=True)
        filesystem.bind(INIT, str(INIT), read_only=True)
        for interpreter in interpreter_folders():
            filesystem.show(interpreter)
    document = {
        "mounts": [dataclasses.asdict(m) for m in filesystem.mounts] if backend == "unshare" else None,
        "new_root": str(new_root),
        "isolated_network": program.isolated_network,
        "egress_port": EGRESS_PORT if program.egress else 0,
        "egress_socket": _EGRESS_SOCKET,
        "argv": program.argv,
        "env": dict(program.env),
        "workdir": program.workdir,
    }
    # It holds the program's secrets: readable by the user alone, and removed with the folder.
    descriptor = os.open(plan, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(document, file)

    ours, theirs = socket.socketpair()
    argv = _enter_argv(backend, program.isolated_network, theirs.fileno(), plan_seen, filesystem)
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT if merge_stderr else asyncio.subprocess.PIPE,
            pass_fds=[theirs.fileno()],
            # The launcher must not see the plane's own secrets; the program gets exactly the plan's environment.
            env={"PATH": os.environ.get("PATH", os.defpath)},
            start_new_session=True,
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    reader, writer = await asyncio.open_connection(sock=ours)
    return Launched(process, reader, writer)


def _enter_argv(
    backend: str, isolated: bool, control_fd: int, plan: Path, filesystem: Filesystem
) -> list[str]:
    """The command that starts `container_init` as process 1 of new namespaces."""
    init = [_interpreter(), "-I", "-S", str(INIT), str(control_fd), str(plan)]
    if backend == "unshare":
        return [*_UNSHARE, *(["--net"] if isolated else []), "--", *init]
    argv = [*_BWRAP, "--die-with-parent", "--as-pid-1", *(["--unshare-net"] if isolated else [])]
    for mount in filesystem.mounts:
        argv += _bwrap_option(mount)
    return [*argv, "--", *init]


def _bwrap_option(mount: Mount) -> list[str]:
    match mount.kind:
        case "tmpfs" | "proc" | "dev" | "dir":
            return [f"--{mount.kind}", mount.target]
        case "symlink":
            return ["--symlink", mount.source, mount.target]
        case "bind":
            return ["--dev-bind", mount.source, mount.target]
        case "ro_bind":
            return ["--ro-bind", mount.source, mount.target]
    raise AssertionError(mount.kind)


def _interpreter() -> str:
    """The real interpreter, not a virtual environment's link to it: it starts faster and needs one folder less."""
    return str(getattr(sys, "_base_executable", None) or sys.executable)


def interpreter_folders(*executables: str) -> list[Path]:
    """The installation folders that must be visible for these interpreters to start."""
    folders = [Path(sys.base_prefix)]
    for executable in executables:
        real = Path(os.path.realpath(executable))
        folders.append(real.parent.parent if real.parent.name == "bin" else real.parent)
    # /usr and the like are there anyway.
    return [f for f in dict.fromkeys(folders) if str(f) not in ("/", "/usr", "/usr/local")]
