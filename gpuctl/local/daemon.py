"""The plane's process, `python -m gpuctl.local.daemon`: takes the state directory, wires the nouns, serves.

Imports everything in this package, but only once the state directory is its own: what may fail early, fails fast.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import functools
import json
import logging
import os
import secrets
import signal
import socket
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from gpuctl.errors import EXIT_FAILURE, EXIT_USAGE, GpuctlError, usage_error
from gpuctl.local import engines, sockets
from gpuctl.local.client import LOCK_FILE, LOG_FILE, STATE_FILE, process_start
from gpuctl.local.listeners import Listeners

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Mapping

    from gpuctl.local.wire import Call, Endpoint

log = logging.getLogger("gpuctl.local")

_SWEEP_SECONDS = 300.0
_LOG_BYTES = 10 << 20  # a larger log is put aside at start


def main(arguments: list[str] | None = None) -> int:
    """Run the plane; with --detach as a daemon, with --ready-fd telling a parent how the start went."""
    parser = argparse.ArgumentParser(prog="python -m gpuctl.local.daemon")
    parser.add_argument("--state-dir", type=Path, required=True)
    parser.add_argument("--cache-dir", type=Path, required=True)
    parser.add_argument("--port", type=int, default=None)
    parser.add_argument("--ready-fd", type=int, default=None)
    parser.add_argument("--detach", action="store_true")
    parser.add_argument(
        "--inherit", help="what a supervisor hands on: the channel to it, the lock, the ports"
    )
    options = parser.parse_args(arguments)
    listeners, lock = Listeners(), None
    if options.inherit:
        listeners, lock = _inherited([int(number) for number in options.inherit.split(",")])
    elif options.detach:
        _detach()
    ready = os.fdopen(options.ready_fd, "w") if options.ready_fd is not None else None
    try:
        with _own(options.state_dir, lock, log_to_file=options.detach) as held:
            supervise = None
            if options.detach:
                command = [sys.executable, "-P", "-m", "gpuctl.local.daemon", "--detach"]
                command += ["--state-dir", str(options.state_dir), "--cache-dir", str(options.cache_dir)]
                supervise = functools.partial(listeners.supervise, command, held, options.state_dir)
            return asyncio.run(
                _serve(options.state_dir, options.cache_dir, options.port, ready, listeners, supervise)
            )
    except GpuctlError as error:
        answer = {
            "problems": error.problems,
            "hint": error.hint,
            "exit_code": error.exit_code,
            "already_up": isinstance(error, _TakenError),
        }
        if ready is not None and not ready.closed:
            ready.write(json.dumps(answer))
            ready.close()
        else:
            print(*error.problems, sep="\n", file=sys.stderr)
        return error.exit_code
    except Exception:
        log.exception("the plane failed")
        return EXIT_FAILURE


class _TakenError(GpuctlError):
    """Another plane has the state directory."""


def _inherited(descriptors: list[int]) -> tuple[Listeners, IO[str]]:
    """What the plane before this one had."""
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    channel, lock, *ports = descriptors
    listeners = Listeners(socket.socket(fileno=channel), [socket.socket(fileno=port) for port in ports])
    return listeners, os.fdopen(lock, "a+")


def _detach() -> None:
    """Become a daemon: no terminal, no session of the caller's, a child of init."""
    if os.fork():
        os._exit(0)
    os.setsid()
    if os.fork():
        os._exit(0)
    os.chdir("/")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@contextlib.contextmanager
def _own(state_dir: Path, lock: IO[str] | None, *, log_to_file: bool) -> Iterator[int]:
    """Hold the state directory; the kernel gives it back once this process and its supervisor have ended.

    `lock`: the lock file, where a supervisor has held it all the time. Yields its descriptor.
    """
    os.umask(0o077)
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        state_dir.chmod(0o700)
        inherited, lock = lock, lock or (state_dir / LOCK_FILE).open("a+")
    except OSError as error:
        raise GpuctlError(f"the state directory {state_dir} cannot be used: {error.strerror}") from error
    with lock:
        if inherited is None and not _take(lock):
            lock.seek(0)
            pid = lock.read().strip()
            how = f"is already up (pid {pid})"
            if pid.isdecimal() and process_start(int(pid)) is None:
                how = "was killed, and is coming back by itself"
            raise _TakenError(f"the local control plane {how}", exit_code=EXIT_USAGE)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        os.set_inheritable(lock.fileno(), False)
        if log_to_file:
            _redirect_output(state_dir / LOG_FILE)
        logging.basicConfig(
            level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
        )
        # These speak of every connection and every cancelled stream.
        for noisy in ("asyncio", "hpack", "grpclib", "aiohttp"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        yield lock.fileno()


def _take(lock: IO[str]) -> bool:
    """Lock the file; whoever only looks whether it is locked holds it for a moment, so it is tried a few times."""
    for _ in range(5):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
        else:
            return True
    return False


def _redirect_output(path: Path) -> None:
    if path.exists() and path.stat().st_size > _LOG_BYTES:
        path.replace(path.with_suffix(".log.1"))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)


async def _serve(
    state_dir: Path,
    cache_dir: Path,
    port: int | None,
    ready: IO[str] | None,
    listeners: Listeners,
    supervise: Callable[[], Coroutine[Any, Any, None]] | None,
) -> int:
    began = time.monotonic()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    engines.check()
    # The port first: nothing else takes long, and nothing may be half done when it is taken.
    plane = ControlPlane(state_dir, cache_dir, listeners)
    supervision = None
    try:
        await plane.start(port)
        _write_private(state_dir / STATE_FILE, json.dumps(plane.description()))
        log.info("up in %.2f s: %s, pid %d", time.monotonic() - began, plane.url, os.getpid())
        if ready is not None:
            ready.write("{}")
            ready.close()
        listeners.serving()
        supervision = asyncio.create_task(supervise()) if supervise else None
        await stop.wait()
        log.info("stopping")
        listeners.stopping()
        # First: who looks for a plane now must wait for the next, not talk to this one.
        (state_dir / STATE_FILE).unlink(missing_ok=True)
    finally:
        if supervision is not None:
            supervision.cancel()
        await plane.stop()
    log.info("down")
    return 0


def _write_private(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    part.replace(path)


class ControlPlane:
    """All nouns of one plane, wired together."""

    def __init__(self, state_dir: Path, cache_dir: Path, listeners: Listeners) -> None:
        from gpuctl.local.apps import Apps
        from gpuctl.local.billing import Billing
        from gpuctl.local.blobs import Blobs
        from gpuctl.local.builders import Builders
        from gpuctl.local.callers import Callers
        from gpuctl.local.calls import Calls
        from gpuctl.local.capacity import Capacity
        from gpuctl.local.command_router import CommandRouter, RouterAccess
        from gpuctl.local.dicts import Dicts
        from gpuctl.local.environments import Environments
        from gpuctl.local.functions import Functions
        from gpuctl.local.gpus import Gpus, cards
        from gpuctl.local.ids import new_id
        from gpuctl.local.image_rpcs import Images
        from gpuctl.local.images import ImageStore
        from gpuctl.local.items import Items
        from gpuctl.local.ledger import Ledger
        from gpuctl.local.logs import Logs
        from gpuctl.local.mounts import Mounts
        from gpuctl.local.overlays import Overlays
        from gpuctl.local.proxy_tokens import ProxyTokens
        from gpuctl.local.queues import Queues
        from gpuctl.local.schedules import Schedules
        from gpuctl.local.secrets import Secrets
        from gpuctl.local.servers import Servers
        from gpuctl.local.store import Store
        from gpuctl.local.tasks import Tasks
        from gpuctl.local.variants import Variants
        from gpuctl.local.volumes import Volumes

        self._state_dir = state_dir
        self._cache_dir = cache_dir
        self._ports = listeners
        self._store = store = Store(state_dir / "plane.db")
        self._token_id = self._remembered("token_id", lambda: new_id("ak"))
        self._token_secret = self._remembered("token_secret", lambda: new_id("as"))
        key = bytes.fromhex(self._remembered("key", lambda: secrets.token_hex(32)))

        self._environments = Environments(store)
        variants = Variants(store)
        self._logs = Logs(store, variants)
        self._blobs = Blobs(state_dir / "blobs", key)
        self._mounts = Mounts(store, self._blobs)
        self._volumes = Volumes(store, self._environments, self._blobs, state_dir / "volumes")
        self._secrets = Secrets(store, self._environments, state_dir / "secrets", key)
        self._billing = Billing()
        self._items = Items(store)
        self._dicts = Dicts(self._items, self._environments)
        self._queues = Queues(self._items, self._environments)
        self._proxy_tokens = ProxyTokens(store, self._environments)
        self._overlays = Overlays(state_dir / "host", hide=(Path.home(), state_dir, cache_dir))
        images = ImageStore(cache_dir, hide=(state_dir,), overlays=self._overlays)
        self._images = Images(images, self._mounts, self._secrets)
        self._servers = Servers(store, self._environments, self._logs, self._proxy_tokens, listeners)
        gpus = Gpus(cards())
        self._functions = Functions(
            store,
            self._environments,
            variants,
            open_url=self._servers.open,
            url_of=self._servers.url_of,
            gpus=gpus,
        )
        self._tasks = Tasks(
            store,
            self._environments,
            self._functions,
            self._images,
            self._mounts,
            self._volumes,
            self._secrets,
            self._logs,
            gpus,
        )
        self._callers = Callers(self._tasks, self._token_id, self._token_secret)
        self._images.attach(Builders(self._functions, self._tasks))
        self._servers.attach(self._functions, self._tasks)
        self._calls = Calls(store, Ledger(store), self._functions, self._tasks, self._logs, Capacity())
        self._servers.settings_hooks.append(self._calls.configure)
        self._schedules = Schedules(store, self._functions, self._calls.fire)
        self._apps = Apps(
            store,
            self._environments,
            self._functions,
            self._images,
            self._mounts,
            self._volumes,
            self._servers,
            self._calls,
            self._tasks,
            self._logs,
            self._schedules,
            [noun.forget_environment for noun in (self._items, self._volumes, self._secrets)],
        )
        run = state_dir / "run"
        run.mkdir(exist_ok=True, mode=0o700)
        self._router = CommandRouter(self._tasks, self._secrets, run, key)
        self._router_access = RouterAccess(self._tasks, self._router, lambda: self.url)
        self._runtime: Any = None
        self._listeners: list[Any] = []
        self._watches: list[asyncio.Task[None]] = []
        self.url = ""

    def _remembered(self, name: str, make: Any) -> str:
        value = self._store.meta(name)
        if value is None:
            value = str(make())
            self._store.set_meta(name, value)
        return value

    def description(self) -> dict[str, Any]:
        """What `client` reads: how to find this process and to be let in."""
        return {
            "pid": os.getpid(),
            "started": process_start(os.getpid()),
            "url": self.url,
            "port": int(self.url.rpartition(":")[2]),
            "token_id": self._token_id,
            "token_secret": self._token_secret,
            "revived": self._ports.inherited,
        }

    def endpoints(self) -> Mapping[str, Endpoint]:
        """Every RPC that is served."""
        from gpuctl.local.wire import collect

        return collect(
            self._environments,
            self._apps,
            self._functions,
            self._servers,
            self._calls,
            self._tasks,
            self._router_access,
            self._images,
            self._mounts,
            self._blobs,
            self._volumes,
            self._secrets,
            self._dicts,
            self._queues,
            self._proxy_tokens,
            self._billing,
            self._logs,
        )

    async def start(self, port: int | None) -> None:
        """Listen, and serve what was deployed before. Raises GpuctlError, exit code 2 when the wanted port is taken."""
        from modal_proto.api_grpc import ModalClientBase
        from modal_proto.task_command_router_grpc import TaskCommandRouterBase

        from gpuctl.local.containers import ContainerRuntime
        from gpuctl.local.http2 import Server
        from gpuctl.local.service import routes
        from gpuctl.local.wire import collect

        listener = self._listener("port", port)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        await self._blobs.start(self._listener("http_port"))
        # Containers use a unix socket.
        folder = sockets.make(self._state_dir)
        self._runtime = ContainerRuntime(
            self._state_dir / "run",
            folder,
            on_log=self._tasks.on_log,
            hide=(self._state_dir, self._cache_dir),
            http_port=self._blobs.port,
            overlays=self._overlays,
        )
        self._runtime.sweep()

        endpoints = self.endpoints()
        served = {
            **routes(ModalClientBase, endpoints, self._callers.authenticate),
            **routes(TaskCommandRouterBase, collect(self._router), self._authenticate_router),
        }
        path = str(folder / "plane.sock")
        for place in ({"sock": listener}, {"path": path}):
            server = Server(served)
            await server.start(**place)
            self._listeners.append(server)
        self._tasks.attach(self._runtime, path)
        await self._apps.resume()
        self._watches = [asyncio.create_task(work) for work in (self._apps.watch_clients(), self._sweep())]
        # The first container need not wait for it.
        self._preparing = asyncio.create_task(self._overlays.prepare())

    async def _sweep(self) -> None:
        """Remove what has expired, now and then. Runs for ever."""
        while True:
            self._items.sweep()
            await asyncio.to_thread(self._blobs.sweep)
            await self._volumes.sweep()
            await asyncio.sleep(_SWEEP_SECONDS)

    def _listener(self, name: str, port: int | None = None) -> socket.socket:
        """The wanted port; without one the port of last time, or a free one if that is taken."""
        last = int(self._store.meta(name) or 0)
        for candidate in [port] if port is not None else [last, 0]:
            try:
                listener = self._ports.open(candidate)
            except (OSError, OverflowError):
                continue
            self._store.set_meta(name, str(listener.getsockname()[1]))
            return listener
        raise usage_error(
            f"--port: {port} is taken or not allowed", hint="without --port, a free one is chosen"
        )

    def _authenticate_router(self, metadata: Mapping[str, str]) -> Call:
        """By a token for one container; who has the plane's own is told what is refused, and not let into one."""
        if "authorization" in metadata:
            return self._router.authenticate(metadata)
        return self._callers.authenticate(metadata)

    async def stop(self) -> None:
        """End what runs, in order: no new calls, then containers (they may still talk), then the rest."""
        self._schedules.stop()
        for watch in self._watches:
            watch.cancel()
        for server in self._listeners[:1]:
            server.close()
        await self._images.stop()
        await asyncio.gather(self._servers.close(), self._calls.close())
        await self._tasks.stop_all()
        for server in self._listeners:
            server.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(server.wait_closed(), 2)
        await self._router.close()
        await self._blobs.stop()
        if self._runtime is not None:
            await self._runtime.close()
        self._logs.close()
        self._store.close()
        sockets.remove(self._state_dir)


if __name__ == "__main__":
    sys.exit(main())
