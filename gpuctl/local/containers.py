"""Containers: one sandboxed process tree each, started, spoken to and ended. Imports sandbox, egress, images, errors.

A container is `container_init` as process 1 of its own namespaces, with the app's program below it. The plane
holds one end of a socket; when that closes, whatever the reason, the whole tree is gone. So a plane that is
killed leaves nothing running, and stopping needs no list of process ids.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpuctl.errors import GpuctlError
from gpuctl.local import sandbox
from gpuctl.local.egress import EgressProxy
from gpuctl.local.gpus import DRIVER_PLACE
from gpuctl.local.image_trees import CLIENT_PATH, IMAGE_PATH, follow, follow_in, place_in, remove_tree, tops
from gpuctl.local.overlays import Overlays

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gpuctl.local.layers import BuiltImage
    from gpuctl.local.processes import Process

_PLANE_SOCKET = "/run/modal/plane.sock"
_ARGUMENTS = "/run/modal/arguments.bin"
_READ = 64 * 1024
_LONGEST_LINE = 1 << 20  # a line of output longer than this is cut into pieces
_UNENDED_SECONDS = 1.0  # so is one whose end does not come


@dataclass(frozen=True)
class VolumeBind:
    """A Volume's folder on this machine, at the path that the app names."""

    host: Path
    path: str
    read_only: bool


@dataclass(frozen=True)
class FileBind:
    """One file that the client mounts into the container."""

    host: Path
    path: str


@dataclass(frozen=True)
class ContainerSpec:
    """All that a container needs.

    `env` is the image's environment, the secrets and the MODAL_ variables; paths, HOME and the server's address
    are added here. With `isolated_network` the container has a network of its own, so that several may listen on
    one port: it is reached through `Container.port_socket` and reaches out through an HTTP(S) proxy. With
    `block_network` it has one, too, and no way out of it but to the plane.
    """

    task_id: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    image: BuiltImage
    workdir: str
    volumes: tuple[VolumeBind, ...]
    files: tuple[FileBind, ...]
    isolated_network: bool
    arguments: bytes
    server_socket: Path
    block_network: bool = False
    gpus: tuple[int, ...] = ()  # the numbers of its cards
    build_root: Path | None = (
        None  # for the build of an image: its tree is written to, and this is the root folder
    )


class Container:
    """A running container. Made by `ContainerRuntime.start`."""

    def __init__(
        self,
        spec: ContainerSpec,
        process: asyncio.subprocess.Process,
        control: asyncio.StreamWriter,
        sockets: Path,
        environment: Mapping[str, str],
    ) -> None:
        self.task_id = spec.task_id
        self._environment = environment
        self._spec = spec
        self._process = process
        self._control = control
        self._sockets = sockets
        self._listening: set[int] = set()
        self._exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    @property
    def pid(self) -> int:
        """Process 1 of the container, by its id on this machine; of the launcher while that is still at it."""
        try:
            children = (
                Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
            )
        except OSError:
            children = []
        return int(children[0]) if children else self._process.pid

    def port_socket(self, port: int) -> Path:
        """A unix socket on this machine that leads to 127.0.0.1:`port` in the container.

        A connection is closed at once while nothing listens there. Only for containers with an isolated network.
        """
        path = self._sockets / f"{port}.sock"
        if port not in self._listening:
            self._listening.add(port)
            self._tell(f"listen {port} {_in_container(path, self._sockets)}")
        return path

    async def wait(self) -> int:
        """The program's exit code, once it and its output have ended; negative for a signal."""
        return await asyncio.shield(self._exit)

    async def stop(self, grace: float, *, interrupt: bool = False) -> int:
        """SIGTERM or SIGINT to the program, so that its exit hooks run; after `grace` seconds SIGKILL to all of it."""
        if not self._exit.done() and grace <= 0:
            self.kill()
        elif not self._exit.done():
            self._tell("int" if interrupt else "term")
            try:
                return await asyncio.wait_for(self.wait(), grace)
            except TimeoutError:
                self.kill()
        return await self.wait()

    def kill(self) -> None:
        """End every process of the container now."""
        self._control.close()

    async def execute(
        self,
        process: Process,
        *,
        argv: Sequence[str],
        env: Mapping[str, str],
        workdir: str,
        terminal: tuple[int, int] | None,
        merge_stderr: bool,
    ) -> None:
        """Start one more program in it, with its own environment and `env`. Raises OSError when that cannot be."""
        await process.start(
            self._pass_on,
            argv=argv,
            env={**self._environment, **env},
            workdir=workdir or self._spec.workdir,
            terminal=terminal,
            merge_stderr=merge_stderr,
        )

    def _pass_on(self, descriptors: Sequence[int]) -> None:
        with self._line() as line:
            socket.send_fds(line, [f"exec {len(descriptors)}\n".encode()], descriptors)

    def _tell(self, line: str) -> None:
        """Nobody may be there any more to hear it: then the container has ended, which `wait` says."""
        with contextlib.suppress(OSError), self._line() as end:
            end.sendall(f"{line}\n".encode())

    def _line(self) -> socket.socket:
        """Our end of the line to process 1. Raises OSError when the container has ended.

        Not asyncio's: that cannot pass descriptors, and a line that finds nobody would close it, with what process 1
        said last, `exit`, still unread.
        """
        end = self._control.get_extra_info("socket")
        if self._exit.done() or end is None or end.fileno() < 0:
            raise OSError("the container has ended")
        return socket.socket(fileno=os.dup(end.fileno()))


def _in_container(path: Path, sockets: Path) -> str:
    return f"/run/modal/sockets/{path.relative_to(sockets)}"


class ContainerRuntime:
    """Starts containers under `run_dir` (one folder each, removed at its end), their sockets under `sockets`.

    `hide` are folders of this machine that no container may see, beside the home and the folder of `run_dir`.
    `http_port` is the plane's own port for blobs on this machine's loopback, which containers reach by the egress
    proxy. `overlays` make containers' roots; without them it keeps some of its own.

    `on_log(task id, file descriptor, text)` gets the output, 1 for standard output and 2 for standard error, in whole
    lines, "\\n" included, where their end comes soon. Raises GpuctlError where no sandbox works, saying what to
    install.
    """

    def __init__(
        self,
        run_dir: Path,
        sockets: Path,
        *,
        on_log: Callable[[str, int, str], None],
        hide: tuple[Path, ...] = (),
        http_port: int = 0,
        overlays: Overlays | None = None,
    ) -> None:
        self.backend = sandbox.find_backend()
        self._run_dir = run_dir
        self._sockets = sockets
        self._hide = (Path.home(), run_dir.parent, *hide)
        self._overlays = overlays or Overlays(run_dir.parent / "host", hide=self._hide)
        self._http_port = http_port
        self._on_log = on_log
        self._egress: dict[bool, EgressProxy] = {}  # by whether it leads to the plane alone
        self._watchers: set[asyncio.Task[None]] = set()
        run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)

    async def start(self, spec: ContainerSpec) -> Container:
        """Start a container; returns once its program runs. Raises GpuctlError when its sandbox cannot be made."""
        folder = self._run_dir / spec.task_id
        folder.mkdir(mode=0o700)
        sockets = self._sockets / spec.task_id
        sockets.mkdir(mode=0o700)
        (folder / "arguments.bin").write_bytes(spec.arguments)

        overlaid = await self._overlaid(spec)
        filesystem = await asyncio.to_thread(self._filesystem, spec, folder, sockets, overlaid)
        own_network = spec.isolated_network or spec.block_network
        program = sandbox.Program(
            argv=spec.argv,
            env=self._environment(spec, filesystem.way_out(proxies=not own_network)),
            workdir=spec.workdir,
            isolated_network=own_network,
            egress=await self._egress_socket(spec.block_network) if own_network else None,
        )
        launched = await sandbox.launch(folder, filesystem, program)
        process, reader, writer = launched.process, launched.reader, launched.writer
        (folder / "pid").write_text(str(process.pid))
        container = Container(spec, process, writer, sockets, program.env)
        output = [
            asyncio.create_task(self._pump(spec.task_id, fd, stream))
            for fd, stream in ((1, process.stdout), (2, process.stderr))
            if stream is not None
        ]
        line = (await reader.readline()).decode(errors="replace").strip()
        if not line.startswith("started"):
            writer.close()
            await process.wait()
            await asyncio.gather(*output)
            self._remove(folder, sockets)
            raise GpuctlError(
                f"container {spec.task_id} could not be started: {line.removeprefix('error ') or 'no reason given'}"
            )
        watcher = asyncio.create_task(self._watch(container, reader, output, folder))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)
        return container

    def sweep(self) -> None:
        """End and remove what an earlier plane left behind (one that was killed in the middle of a start, say)."""
        for folder in list(self._run_dir.iterdir()):
            with contextlib.suppress(OSError, ValueError):
                pid = int((folder / "pid").read_text())
                # The id may belong to somebody else by now: only what was started for this folder is ended.
                if str(folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
            remove_tree(folder)

    async def _watch(
        self,
        container: Container,
        reader: asyncio.StreamReader,
        output: list[asyncio.Task[None]],
        folder: Path,
    ) -> None:
        code = -signal.SIGKILL  # when process 1 ends without a word, the tree was killed
        with contextlib.suppress(ConnectionError):  # it ended with a line of ours unread
            async for raw in reader:
                if raw.startswith(b"exit "):
                    code = int(raw.split()[1])
        await container._process.wait()
        await asyncio.gather(*output)
        container._control.close()
        await asyncio.to_thread(self._remove, folder, container._sockets)
        container._exit.set_result(code)

    async def _pump(self, task_id: str, fd: int, stream: asyncio.StreamReader) -> None:
        """Hand output on in whole lines. What has no end of line yet waits for it, but not for long, nor for much."""
        pending = b""
        while True:
            try:
                data = await asyncio.wait_for(stream.read(_READ), _UNENDED_SECONDS if pending else None)
            except TimeoutError:  # a prompt, a bar of progress
                self._on_log(task_id, fd, pending.decode(errors="replace"))
                pending = b""
                continue
            if not data:
                break
            pending += data
            cut = pending.rfind(b"\n") + 1 or (len(pending) if len(pending) > _LONGEST_LINE else 0)
            if cut:
                self._on_log(task_id, fd, pending[:cut].decode(errors="replace"))
                pending = pending[cut:]
        if pending:
            self._on_log(task_id, fd, pending.decode(errors="replace") + "\n")

    async def _overlaid(self, spec: ContainerSpec) -> bool:
        if spec.build_root is not None:  # the build has decided
            return (spec.build_root / "upper").is_dir()
        if spec.image.engine:
            return await self._overlays.prepare()
        return await self._overlays.carry(spec.image.tree)

    def _filesystem(
        self, spec: ContainerSpec, folder: Path, sockets: Path, overlaid: bool
    ) -> sandbox.Filesystem:
        filesystem: sandbox.Filesystem
        if overlaid:
            at = spec.build_root or folder
            whole = bool(spec.image.engine)
            filesystem = self._overlays.root(at, spec.image.tree, self._hide, spec.gpus, whole=whole)
            places: list[tuple[Path, str]] = []
            if whole:  # as the file of the same name in an environment of ours
                (folder / "client.pth").write_text(f"{CLIENT_PATH}/deps\n")
                filesystem.place(folder / "client.pth", f"{spec.image.packages}/zz_modal_client.pth")
        else:
            filesystem = sandbox.Filesystem(hide=self._hide, gpus=spec.gpus, root=spec.build_root)
            places = self._lay_out(spec, folder, filesystem)
        for interpreter in [] if spec.image.engine else sandbox.interpreter_folders(spec.image.base_python):
            filesystem.show(interpreter)
        filesystem.bind(spec.image.client, CLIENT_PATH, read_only=True)
        for volume in spec.volumes:
            for source, target in places:
                if volume.path.startswith(target + "/"):
                    (source / os.path.relpath(volume.path, target)).mkdir(parents=True, exist_ok=True)
            filesystem.bind(volume.host, volume.path, read_only=volume.read_only)
        for file in spec.files if overlaid else ():
            filesystem.place(file.host, file.path)
        filesystem.bind(spec.server_socket, _PLANE_SOCKET, read_only=False)
        filesystem.bind(folder / "arguments.bin", _ARGUMENTS, read_only=True)
        filesystem.bind(sockets, "/run/modal/sockets", read_only=False)
        filesystem.directory(spec.workdir)
        return filesystem

    def _lay_out(
        self, spec: ContainerSpec, folder: Path, filesystem: sandbox.Filesystem
    ) -> list[tuple[Path, str]]:
        """Where no overlays are made: the image's and the client's files, those that can be written to as copies.

        Returns (path on this machine, path in the container) of what was bound.
        """
        for name in ("tmp", "root"):
            (folder / name).mkdir(mode=0o700)
        building = spec.build_root is not None
        home = spec.image.tree / "home" if building else folder / "root"
        filesystem.bind(folder / "tmp", "/tmp", read_only=False)
        filesystem.bind(home, "/root", read_only=False)
        filesystem.bind(spec.image.tree, IMAGE_PATH, read_only=not building)
        places = self._place_build_files(spec, folder) if building else self._place_files(spec, folder)
        for path, source in [] if building else spec.image.large.items():
            filesystem.bind(source, path, read_only=True)
        for source, target in places:
            filesystem.place(source, target)  # the container's own copies
        return places

    def _place_files(self, spec: ContainerSpec, folder: Path) -> list[tuple[Path, str]]:
        """Lay out the image's and the client's files: those under /root and /tmp in place, the others to be bound.

        Returns (path on this machine, path in the container) of what has to be bound: a folder where the host has
        nothing there, else file by file.
        """
        large = set(spec.image.large.values())
        if (home := spec.image.tree / "home").is_dir():
            shutil.copytree(
                home,
                folder / "root",
                symlinks=True,
                dirs_exist_ok=True,
                ignore=lambda at, names: [name for name in names if Path(at, name) in large],
            )
        outside: dict[str, Path] = {}
        files = [
            *((f.host, f.path) for f in spec.files),
            *((host, path) for path, host in spec.image.files.items() if host not in large),
        ]

        def place_of(path: str) -> Path:
            inside = path.lstrip("/")
            return folder / inside if inside.startswith(("root/", "tmp/")) else folder / "files" / inside

        for host, path in sorted(files, key=lambda file: not file[0].is_symlink()):
            path = follow(path, place_of)
            if host.is_dir() and not host.is_symlink() and sandbox.on_host(path):
                continue
            inside, place = path.lstrip("/"), place_of(path)
            place.parent.mkdir(parents=True, exist_ok=True)
            if host.is_symlink():
                place.symlink_to(os.readlink(host))
            elif host.is_dir():
                place.mkdir(exist_ok=True)
            else:
                if place.is_symlink():
                    place.unlink()
                shutil.copyfile(host, place)
                shutil.copymode(host, place)
            if place.is_relative_to(folder / "files"):
                top = "/" + inside
                while not os.path.lexists(os.path.dirname(top)):
                    top = os.path.dirname(top)
                outside[top] = folder / "files" / top.lstrip("/")
        return [(source, target) for target, source in outside.items()]

    def _place_build_files(self, spec: ContainerSpec, folder: Path) -> list[tuple[Path, str]]:
        """The same for the build of an image: in its own tree, whose places are bound as they are."""
        tree = spec.image.tree
        files = tree / "files"
        for file in spec.files:
            path = follow_in(tree, file.path)
            place = place_in(tree, path) or folder / path.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file.host, place)
            shutil.copymode(file.host, place)
        return tops(files)

    def _environment(self, spec: ContainerSpec, way_out: dict[str, str]) -> dict[str, str]:
        venv = f"{IMAGE_PATH}/venv"
        own = {"PATH": f"{venv}/bin:{sandbox.SYSTEM_PATH}", "VIRTUAL_ENV": venv}
        environment = {
            "PATH": sandbox.SYSTEM_PATH,
            "LANG": "C.UTF-8",
            "HOME": "/root",
            **({} if spec.image.engine else own),
            **way_out,
            **spec.env,
            "MODAL_SERVER_URL": f"unix://{_PLANE_SOCKET}",
            "MODAL_CONTAINER_ARGUMENTS_PATH": _ARGUMENTS,
            # The client's own calls need no way out: a unix socket, and URLs that the egress proxy serves itself.
            "MODAL_DISABLE_API_PROXY": "1",
        }
        if spec.image.engine and spec.gpus:
            for name, folder in (("PATH", "bin"), ("LD_LIBRARY_PATH", "lib64")):
                before = environment.get(name)
                environment[name] = ":".join(filter(None, (before, f"{DRIVER_PLACE}/{folder}")))
        # As in the cloud: the client's own code first, then what the app mounted.
        environment["PYTHONPATH"] = ":".join(
            filter(None, (f"{CLIENT_PATH}/pkg", "/root", environment.get("PYTHONPATH")))
        )
        if spec.isolated_network and not spec.block_network:
            for name in ("HTTP_PROXY", "HTTPS_PROXY"):
                environment[name] = environment[name.lower()] = f"http://127.0.0.1:{sandbox.EGRESS_PORT}"
            environment["NO_PROXY"] = environment["no_proxy"] = "localhost,127.0.0.1,::1"
        return environment

    async def _egress_socket(self, blocked: bool) -> Path:
        if (proxy := self._egress.get(blocked)) is None:
            socket_ = self._sockets / ("plane-only.sock" if blocked else "egress.sock")
            proxy = self._egress[blocked] = EgressProxy(socket_, self._http_port, only_plane=blocked)
            await proxy.start()
        return proxy.path

    async def close(self) -> None:
        """Stop what the runtime itself runs; containers are stopped by whoever started them."""
        for proxy in self._egress.values():
            await proxy.close()
        self._egress.clear()

    def _remove(self, folder: Path, sockets: Path) -> None:
        shutil.rmtree(sockets, ignore_errors=True)
        remove_tree(folder)
