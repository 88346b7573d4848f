"""Tasks: containers as the API knows them, from start to exit. Imports containers, functions, images and the stores.

A task is one run of a container for one definition of one function. Whoever starts it (a server's pool) is told of
its readiness and its end by the task's events; the rest of the plane sees only the rows in the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import posixpath
import secrets
import signal
import sqlite3
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpclib import GRPCError
from modal_proto import api_pb2

from gpuctl.errors import GpuctlError
from gpuctl.local.containers import Container, ContainerRuntime, ContainerSpec, FileBind, VolumeBind
from gpuctl.local.ids import new_id
from gpuctl.local.logs import STDERR, STDOUT, Logs
from gpuctl.local.store import Deployment, Function, Store, TaskRow
from gpuctl.local.wire import Call, conflict, empty, invalid, not_found, rpc

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuctl.local.builders import Build
    from gpuctl.local.environments import Environments
    from gpuctl.local.functions import Functions
    from gpuctl.local.gpus import Card, Gpus
    from gpuctl.local.image_rpcs import Images
    from gpuctl.local.mounts import Mounts
    from gpuctl.local.secrets import Secrets
    from gpuctl.local.volumes import Volumes

log = logging.getLogger(__name__)

_BOOT_SECONDS = 60.0  # what a container has, before it loads the user's code, on a busy machine
EXIT_HOOK_SECONDS = 30.0  # what @modal.exit methods get after SIGTERM, as in the cloud


@dataclass
class Task:
    """A container that is starting or running."""

    id: str
    app_id: str
    function_id: str
    definition_id: str
    secret: str
    enqueued_at: float
    container: Container | None = None
    loading_since: float = (
        0.0  # when it began to load the user's code, by time.monotonic(); 0: it has not started
    )
    announced: asyncio.Event = field(default_factory=asyncio.Event)  # its enter methods have run
    server: bool = False  # it runs a server, and ends by SIGTERM; the others by SIGINT
    failure: str = ""  # what its own code reported as the reason of its end
    result: Any = None  # the same as an api_pb2.GenericResult
    stopping: bool = False  # its end was asked for
    build: Build | None = None  # the image that it builds, if that is what it is for
    isolated: bool = False  # it has a network of its own
    restricted: bool = False  # it may make none but its runtime's own calls
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    exit_code: int | None = None
    # Whose words it prints: the call and the input that it has, or had last. "" where it has several at once.
    call_id: str = ""
    input_id: str = ""


class Tasks:
    """Starts and stops containers, knows those that run, and answers them."""

    def __init__(
        self,
        store: Store,
        environments: Environments,
        functions: Functions,
        images: Images,
        mounts: Mounts,
        volumes: Volumes,
        secrets_: Secrets,
        logs: Logs,
        gpus: Gpus,
    ) -> None:
        self._gpus = gpus
        self._store = store
        self._environments = environments
        self._functions = functions
        self._images = images
        self._mounts = mounts
        self._volumes = volumes
        self._secrets = secrets_
        self._logs = logs
        self._runtime: ContainerRuntime | None = None
        self._server_socket = ""
        self._background: set[asyncio.Task[Any]] = set()
        self.live: dict[str, Task] = {}
        # Called with a task when the client asks for its container to stop, or it does so itself.
        self.stop_hooks: list[Callable[[Task], None]] = []

    def attach(self, runtime: ContainerRuntime, server_socket: str) -> None:
        """Give it what runs containers, and the socket at which they find the plane."""
        self._runtime = runtime
        self._server_socket = server_socket
        now = time.time()
        for row in self._store.unfinished_tasks():
            # Their plane was killed, and they with it.
            self._store.task_finished(row.id, now, None)
            self._logs.say(
                row.app_id, row.function_id, row.id, f"container {row.id} ended with the control plane"
            )

    def on_log(self, task_id: str, descriptor: int, text: str) -> None:
        """What a container prints."""
        task = self.live.get(task_id)
        if task is not None and task.build is not None:
            task.build.log(text)
        elif task is not None:
            source = STDERR if descriptor == 2 else STDOUT
            self._logs.write(
                task.app_id, task.function_id, task.id, source, text, task.call_id, task.input_id
            )

    def of_credentials(self, task_id: str, secret: str) -> Task | None:
        """The task whose container these credentials belong to."""
        task = self.live.get(task_id)
        return task if task and hmac.compare_digest(task.secret.encode(), secret.encode()) else None

    # ---- start and stop

    def create(self, function: Function, definition_id: str) -> Task:
        """A task that `start` is to start."""
        task = Task(
            _task_id(), function.app_id, function.id, definition_id, secrets.token_urlsafe(24), time.time()
        )
        self._store.add_task(TaskRow(task.id, task.app_id, task.function_id, task.enqueued_at, 0, 0, None))
        self.live[task.id] = task
        return task

    async def start(
        self,
        task: Task,
        deployment: Deployment,
        *,
        adapt: Callable[[ContainerSpec], ContainerSpec] = lambda spec: spec,
    ) -> None:
        """Start its container. What goes wrong ends the task, with a system line that says why."""
        try:
            assert self._runtime is not None
            cards = await self._cards(task)
            if cards is None:
                self._finish(task, None)
                return
            await self._make_ready(task)
            spec = adapt(self._spec(task, deployment, cards))
            task.server = spec.isolated_network
            task.isolated = spec.isolated_network or spec.block_network
            task.container = await self._runtime.start(spec)
            task.loading_since = time.monotonic() + _BOOT_SECONDS
        except Exception as error:
            message = (
                error.problems[0] if isinstance(error, GpuctlError) else str(getattr(error, "message", error))
            )
            if not isinstance(error, GpuctlError | GRPCError):
                log.warning("container %s could not be started", task.id, exc_info=True)
            task.failure = message
            self._logs.say(
                task.app_id, task.function_id, task.id, f"container {task.id} could not be started: {message}"
            )
            self._finish(task, None)
            return
        self._spawn(self._watch(task, task.container))
        with contextlib.suppress(sqlite3.Error):  # on a full disk nobody can be told when it started
            self._store.task_started(task.id, time.time())

    async def _make_ready(self, task: Task) -> None:
        """Bring its image here, where an engine has it. Raises GpuctlError, also when it is stopped meanwhile."""
        data = self._functions.data_of(task.function_id, task.definition_id)
        image_id = data.ranked_functions[0].function.image_id
        coming = asyncio.create_task(self._images.ready(image_id, lambda text: self._say(task, text)))
        try:
            while not coming.done():
                await asyncio.wait({coming}, timeout=0.1)
                if task.stopping:
                    raise GpuctlError("it was stopped while its image was brought here")
        finally:
            if not coming.done():
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)
        coming.result()

    def _say(self, task: Task, text: str) -> None:
        """What its start waits for."""
        if task.build is not None:
            task.build.log(text)
        else:
            self._logs.say(task.app_id, task.function_id, task.id, text.rstrip("\n"))

    async def _cards(self, task: Task) -> tuple[Card, ...] | None:
        """The GPUs that its function asks for, once they are free; None when it was stopped while it waited."""
        data = self._functions.data_of(task.function_id, task.definition_id)
        count = data.ranked_functions[0].function.resources.gpu_config.count
        if self._gpus.covers(count) and not self._gpus.ready(count):
            self._logs.say(
                task.app_id,
                task.function_id,
                task.id,
                f"container {task.id} waits for {count} GPU{'s' if count > 1 else ''}: "
                f"{len(self._gpus.free)} of {len(self._gpus.all)} are free",
            )
        return await self._gpus.take(task.id, count)

    def _spawn(self, work: Any) -> None:
        job = asyncio.create_task(work)
        self._background.add(job)
        job.add_done_callback(self._background.discard)

    async def _watch(self, task: Task, container: Container) -> None:
        code = await container.wait()
        unexpected = code or task.server or not task.announced.is_set()
        if unexpected and not task.stopping:
            when = "" if task.announced.is_set() else " before it was ready"
            why = f": {task.failure}" if task.failure else ""
            self._logs.say(
                task.app_id,
                task.function_id,
                task.id,
                f"container {task.id} {describe_exit(code)}{when}{why}",
            )
        self._finish(task, code)

    def _finish(self, task: Task, code: int | None) -> None:
        self._gpus.give_back(task.id)
        task.exit_code = code
        self.live.pop(task.id, None)
        try:
            self._logs.flush()
            self._store.task_finished(task.id, time.time(), code)
        except sqlite3.Error as error:
            # A full disk. It has ended all the same; that it has is written at the next start of the plane.
            log.warning("the end of container %s could not be written: %s", task.id, error)
        finally:
            task.ended.set()
            self._logs.wake()

    async def stop(self, task: Task, *, grace: float = EXIT_HOOK_SECONDS) -> None:
        """End it: a signal, its exit hooks for `grace` seconds, then SIGKILL. Returns when nothing of it is left."""
        task.stopping = True
        self._gpus.withdraw(task.id)
        while task.container is None and not task.ended.is_set():
            await asyncio.sleep(0.01)  # it is being set up: stopped as soon as there is something to stop
        if task.container is not None and not task.ended.is_set():
            await task.container.stop(grace, interrupt=not task.server)
        await task.ended.wait()

    async def stop_all(self, app_id: str | None = None, *, grace: float = EXIT_HOOK_SECONDS) -> None:
        """End every container, of one app or of all."""
        tasks = [task for task in self.live.values() if app_id in (None, task.app_id)]
        await asyncio.gather(*(self.stop(task, grace=grace) for task in tasks))

    def _spec(self, task: Task, deployment: Deployment, cards: tuple[Card, ...]) -> ContainerSpec:
        data = self._functions.data_of(task.function_id, task.definition_id)
        function = data.ranked_functions[0].function
        app = self._store.app(task.app_id)
        assert app is not None
        task.restricted = function.untrusted
        image = self._images.built(function.image_id)
        environment = self._environments.name_of(app.environment_id)
        arguments = api_pb2.ContainerArguments(
            task_id=task.id,
            function_id=task.function_id,
            app_id=task.app_id,
            function_def=function,
            serialized_params=self._functions.parameters(task.function_id),
            environment_name=environment,
            app_layout=self._functions.layout(
                deployment.layout, self._volumes.metadata, self._mounts.metadata
            ),
        )
        return ContainerSpec(
            task_id=task.id,
            argv=(*image.entrypoint, str(image.python), "-u", "-m", "modal._container_entrypoint"),
            env={
                **image.env,
                **self._secrets.values(function.secret_ids),
                **({"CUDA_VISIBLE_DEVICES": ",".join(card.uuid for card in cards)} if cards else {}),
                **self._modal_variables(task, environment, image.id),
            },
            image=image,
            workdir=image.workdir or "/root",
            volumes=tuple(self._volume_bind(mount) for mount in function.volume_mounts),
            files=tuple(
                FileBind(file.host, file.path)
                for mount in function.mount_ids
                for file in self._mounts.files(mount)
            ),
            isolated_network=bool(data.is_server),
            block_network=function.block_network,
            arguments=arguments.SerializeToString(),
            server_socket=Path(self._server_socket),
            gpus=tuple(card.minor for card in cards),
        )

    def _modal_variables(self, task: Task, environment: str, image_id: str) -> dict[str, str]:
        return {
            "MODAL_TASK_ID": task.id,
            "MODAL_TASK_SECRET": task.secret,
            # In the cloud a container proves who it is by its socket; here, by headers on every call.
            "MODAL_OVERRIDE_HEADERS": f"x-modal-task-id:{task.id},x-modal-task-secret:{task.secret}",
            "MODAL_IS_REMOTE": "1",
            "MODAL_IMAGE_ID": image_id,
            "MODAL_ENVIRONMENT": environment,
            "MODAL_CLOUD_PROVIDER": "CLOUD_PROVIDER_LOCAL",
            "MODAL_REGION": "local",
        }

    def _volume_bind(self, mount: Any) -> VolumeBind:
        if not mount.mount_path.startswith("/"):
            raise invalid(f"'{mount.mount_path}' is not an absolute path to mount a Volume at.")
        host = self._volumes.root(mount.volume_id)
        if mount.sub_path:
            host = self._volumes.inside(mount.volume_id, mount.sub_path)
            host.mkdir(parents=True, exist_ok=True)
        return VolumeBind(host, posixpath.normpath(mount.mount_path), mount.read_only)

    # ---- what containers say

    def _caller(self, call: Call) -> Task:
        task = self.live.get(call.task_id)
        if task is None:
            raise conflict("Only a container can say this.")
        return task

    @rpc("ContainerHello")
    async def hello(self, _request: Any, call: Call) -> Any:
        if task := self.live.get(call.task_id):
            task.loading_since = time.monotonic()
        return empty()

    @rpc("ContainerLog")
    async def log(self, _request: Any, _call: Call) -> Any:
        return empty()

    @rpc("ContainerServerLifecycleReady")
    async def ready(self, _request: Any, call: Call) -> Any:
        self._caller(call).announced.set()
        return empty()

    @rpc("TaskResult")
    async def result(self, request: Any, call: Call) -> Any:
        task = self._caller(call)
        if request.result.status != api_pb2.GenericResult.GENERIC_STATUS_SUCCESS:
            task.result = request.result
            task.failure = (request.result.exception or "its code failed").partition("\n")[0]
        return empty()

    # ---- what the client asks

    @rpc("TaskList")
    async def list(self, request: Any, _call: Call) -> Any:
        environment = self._environments.named(request.environment_name) if request.environment_name else None
        stats = []
        for task in self.live.values():
            app, row = self._store.app(task.app_id), self._store.task(task.id)
            if app is None or row is None or request.app_id not in ("", app.id):
                continue
            if environment is not None and app.environment_id != environment.id:
                continue
            stats.append(
                api_pb2.TaskStats(
                    task_id=task.id,
                    app_id=app.id,
                    app_description=app.name,
                    started_at=row.started_at,
                    enqueued_at=row.enqueued_at,
                )
            )
        return api_pb2.TaskListResponse(tasks=stats)

    @rpc("TaskGetInfo")
    async def info(self, request: Any, _call: Call) -> Any:
        row = self._store.task(request.task_id)
        if row is None:
            raise not_found(f"Container '{request.task_id}' not found.")
        info = api_pb2.TaskInfo(
            id=row.id, started_at=row.started_at, finished_at=row.finished_at, enqueued_at=row.enqueued_at
        )
        if row.finished_at:
            good = row.exit_code == 0
            info.result.status = (
                api_pb2.GenericResult.GENERIC_STATUS_SUCCESS
                if good
                else api_pb2.GenericResult.GENERIC_STATUS_FAILURE
            )
            info.result.exitcode = row.exit_code or 0
        return api_pb2.TaskGetInfoResponse(app_id=row.app_id, info=info)

    @rpc("ContainerStop")
    async def stop_container(self, request: Any, _call: Call) -> Any:
        if self._store.task(request.task_id) is None:
            raise not_found(f"Container '{request.task_id}' not found.")
        task = self.live.get(request.task_id)
        if task is not None and not task.stopping:
            for hook in self.stop_hooks:
                hook(task)
            if not request.graceful:
                task.stopping = True
                self._spawn(self.stop(task))
        return api_pb2.ContainerStopResponse()


def _task_id() -> str:
    """One that does not end in V: by that the client knows a sandbox of the second version."""
    while (task_id := new_id("ta")).endswith("V"):
        pass
    return task_id


def describe_exit(code: int) -> str:
    """An exit code in words: "exited with code 1", "exited with code -9 (SIGKILL)"."""
    if code >= 0:
        return f"exited with code {code}"
    with contextlib.suppress(ValueError):
        return f"exited with code {code} ({signal.Signals(-code).name})"
    return f"exited with code {code}"
