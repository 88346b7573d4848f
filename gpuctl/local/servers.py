"""Servers: the containers of each `@app.server`, how many, and which of them takes a request. Imports router, tasks.

A `Pool` is one server. It lives as long as its app; it starts containers, watches them become ready, hands requests
to them, replaces them after a deployment and stops those that idle. It decides in one place, `_decide`, which runs
whenever something happened; timers only say when to look again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import os
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modal_proto import api_pb2

from gpuctl.local.router import Refusal, Router, Upstream, listens
from gpuctl.local.tasks import EXIT_HOOK_SECONDS, Task, Tasks
from gpuctl.local.wire import Call, invalid, not_found, rpc

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from gpuctl.local.environments import Environments
    from gpuctl.local.functions import Functions
    from gpuctl.local.listeners import Listeners
    from gpuctl.local.logs import Logs
    from gpuctl.local.proxy_tokens import ProxyTokens
    from gpuctl.local.store import Deployment, Function, Store

log = logging.getLogger(__name__)

DEFAULT_SCALEDOWN_WINDOW = 60.0
UNSET_MAX_CONTAINERS = max(4, os.cpu_count() or 1)  # one machine: a limit where the app sets none
_REJECTION_SECONDS = 2.0  # how long a 429 counts as demand
_BACK_OFF_FIRST, _BACK_OFF_MOST = 1.0, 60.0
_STEADY_SECONDS = 60.0  # a container that served so long has earned a fresh back-off
_PROBE_SECONDS = 0.05
# What a client is told to wait while a container starts. Clients count their retries and take this at its word (the
# OpenAI client does): one second would use them up long before an engine is ready.
_STARTING_RETRY_SECONDS = 5
_TICK_SECONDS = 0.5


@dataclass(frozen=True)
class Limits:
    """How a server scales: its definition, with what `modal server autoscaler update` changed since."""

    port: int
    startup_timeout: float
    exit_grace_period: float
    unauthenticated: bool
    max_concurrency: int  # requests in one container at once; 0: no limit
    target_concurrency: float  # 0: not scaled by load
    min_containers: int
    max_containers: int
    buffer_containers: int
    scaledown_window: float
    scaleup_window: float

    @classmethod
    def of(cls, data: Any, override: bytes) -> Limits:
        settings = effective_settings(data, override)
        http = data.http_config
        return cls(
            port=http.port,
            startup_timeout=float(http.startup_timeout or 30),
            exit_grace_period=float(http.exit_grace_period),
            unauthenticated=http.unauthenticated,
            max_concurrency=data.ranked_functions[0].function.max_concurrent_inputs,
            target_concurrency=settings.target_concurrency_float or float(settings.target_concurrency),
            min_containers=settings.min_containers,
            max_containers=settings.max_containers or max(UNSET_MAX_CONTAINERS, settings.min_containers),
            buffer_containers=settings.buffer_containers,
            scaledown_window=float(settings.scaledown_window) or DEFAULT_SCALEDOWN_WINDOW,
            scaleup_window=float(settings.scaleup_window),
        )


def effective_settings(data: Any, override: bytes) -> Any:
    """The AutoscalerSettings that count: the definition's, then the override."""
    settings = api_pb2.AutoscalerSettings()
    settings.CopyFrom(data.autoscaler_settings)
    settings.MergeFrom(api_pb2.AutoscalerSettings.FromString(override))
    return settings


class Replica:
    """One container of a server, and the requests that it has."""

    def __init__(self, task: Task, port: int) -> None:
        self.task = task
        self.port = port
        self.upstream: Upstream = _NOWHERE
        self.ready_at = 0.0
        self.idle_since = 0.0
        self.requests = 0
        self.leaving = False
        self.quiet = asyncio.Event()
        self.quiet.set()
        self.on_change: Any = lambda: None

    @property
    def ready(self) -> bool:
        return self.ready_at > 0 and not self.leaving

    def __enter__(self) -> Replica:
        self.requests += 1
        self.quiet.clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.requests -= 1
        if not self.requests:
            self.idle_since = time.monotonic()
            self.quiet.set()


_NOWHERE: Any = None


class Pool:
    """One server: its port, its containers, and the decisions about them."""

    def __init__(
        self,
        function: Function,
        store: Store,
        functions: Functions,
        tasks: Tasks,
        logs: Logs,
        tokens: ProxyTokens,
        listeners: Listeners,
    ) -> None:
        self.function_id = function.id
        self.app_id = function.app_id
        self._store = store
        self._functions = functions
        self._tasks = tasks
        self._logs = logs
        self._tokens = tokens
        self.router = Router(self._authorize, self._route, listeners)
        self.limits: Limits | None = None  # None until the app is published
        self._deployment: Deployment | None = None
        self._definition_id = ""
        self.replicas: list[Replica] = []
        self._last_request = -math.inf
        self._rejections: deque[float] = deque()
        self._over_since: float | None = None
        self._failures = 0
        self._not_before = 0.0
        self._wake = asyncio.Event()
        self._closing = False
        self._jobs: set[asyncio.Task[None]] = set()
        self._loop = self._spawn(self._run())

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        job: asyncio.Task[None] = asyncio.create_task(work)
        self._jobs.add(job)
        job.add_done_callback(self._job_done)
        return job

    def _job_done(self, job: asyncio.Task[None]) -> None:
        self._jobs.discard(job)
        if not job.cancelled() and job.exception() is not None:
            log.error("server %s: a job failed", self.function_id, exc_info=job.exception())

    # ---- deployments

    def publish(self, deployment: Deployment) -> None:
        """Serve this deployment: at once where nothing runs yet, else when a container of it is ready."""
        self._deployment = deployment
        self._definition_id = deployment.layout.definition_ids[self.function_id]
        self._failures, self._not_before = 0, 0.0
        self.configure()

    def forgive(self) -> None:
        """Forget the failures so far: try again now."""
        self._failures, self._not_before = 0, 0.0
        self._wake.set()

    def configure(self) -> None:
        """Read the limits again."""
        row = self._functions.row(self.function_id)
        self.limits = Limits.of(self._functions.data(self._definition_id), row.settings)
        self._wake.set()

    def roll(self) -> None:
        """Replace every container by a fresh one of the same definition."""
        for replica in self.replicas:
            replica.task.definition_id = ""
        self.forgive()

    async def close(self, *, drain: bool = True) -> None:
        """Stop serving: no new requests, then (drain) those under way for the exit grace period, then no container."""
        self._closing = True
        self._loop.cancel()
        await self.router.stop_listening()
        grace = self.limits.exit_grace_period if self.limits and drain else 0.0
        await asyncio.gather(*(self._retire(replica, grace) for replica in list(self.replicas)))
        await self.router.close()
        if self._jobs:
            await asyncio.wait(self._jobs, timeout=1)
        for job in list(self._jobs):
            job.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)

    # ---- requests

    def _authorize(self, headers: Any) -> Refusal | None:
        if self.limits is None:
            return Refusal(404, "the app is not deployed yet")
        if self.limits.unauthenticated:
            return None
        problem = self._tokens.problem(headers)
        return Refusal(401, problem) if problem else None

    def _route(self, session: str) -> Replica | Refusal:
        limits = self.limits
        assert limits is not None
        now = time.monotonic()
        idle_before = now - self._last_request > limits.scaledown_window
        self._last_request = now
        ready = self._serving()
        if not ready:
            self._wake.set()
            wait = max(_STARTING_RETRY_SECONDS, math.ceil(self._not_before - now))
            return Refusal(
                503, "no container of this server is ready; try again in a moment", retry_after=wait
            )
        room = [r for r in ready if not limits.max_concurrency or r.requests < limits.max_concurrency]
        if not room:
            self._rejections.append(now)
            self._wake.set()
            return Refusal(
                429,
                f"every container has its {limits.max_concurrency} requests; try again in a moment",
                retry_after=1,
            )
        if idle_before or limits.target_concurrency:
            self._wake.set()
        if session:
            # Rendezvous hashing: a session stays where it is when other containers come and go.
            return max(room, key=lambda r: hashlib.sha256(f"{session} {r.task.id}".encode()).digest())
        return min(room, key=lambda r: r.requests)

    def _serving(self) -> list[Replica]:
        """The containers that take new requests: the current ones; until one of those is ready, the outdated."""
        ready = [r for r in self.replicas if r.ready]
        return [r for r in ready if r.task.definition_id == self._definition_id] or ready

    # ---- decisions

    async def _run(self) -> None:
        while True:
            try:
                wait = self._decide(time.monotonic()) if self.limits else None
            except Exception:
                # A full disk, say. The server must outlive it.
                log.exception("server %s: could not decide", self.function_id)
                wait = 1.0
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), wait)
            self._wake.clear()

    def _decide(self, now: float) -> float | None:
        """Start and stop containers as things stand; returns in how many seconds to look again, None for not at all."""
        limits = self.limits
        assert limits is not None
        staying = [r for r in self.replicas if not r.leaving]
        current = [r for r in staying if r.task.definition_id == self._definition_id]
        outdated = [r for r in staying if r.task.definition_id != self._definition_id]
        replaced = any(r.ready for r in current)
        for replica in outdated:
            if replaced or not replica.ready:
                self._spawn(self._retire(replica, limits.exit_grace_period))
        wanted = self._wanted(now, limits)
        if outdated:
            wanted = max(wanted, 1)
        missing = wanted - len(current)
        if missing > 0 and self._may_start(now, limits, len(current)):
            for _ in range(missing):
                self._start()
        elif missing < 0:
            idle = sorted(
                (
                    r
                    for r in current
                    if r.ready and not r.requests and now - r.idle_since >= limits.scaledown_window
                ),
                key=lambda r: r.idle_since,
            )
            for replica in idle[:-missing]:
                self._spawn(self._retire(replica, limits.exit_grace_period))
        busy = bool(self.replicas) or missing > 0
        return _TICK_SECONDS if busy else None

    def _wanted(self, now: float, limits: Limits) -> int:
        while self._rejections and now - self._rejections[0] > _REJECTION_SECONDS:
            self._rejections.popleft()
        load = sum(r.requests for r in self.replicas) + len(self._rejections)
        active = load > 0 or now - self._last_request < limits.scaledown_window
        wanted = limits.min_containers
        if active:
            by_load = math.ceil(load / limits.target_concurrency) if limits.target_concurrency else 1
            wanted = max(wanted, by_load, 1) + limits.buffer_containers
        return min(wanted, limits.max_containers)

    def _may_start(self, now: float, limits: Limits, running: int) -> bool:
        """Not while a failure is fresh; and beyond the first, only when the demand has lasted."""
        if now < self._not_before:
            return False
        if running >= max(limits.min_containers, 1) and limits.scaleup_window:
            self._over_since = self._over_since or now
            if now - self._over_since < limits.scaleup_window:
                return False
        self._over_since = None
        return True

    # ---- the life of one container

    def _start(self) -> None:
        assert self.limits is not None
        assert self._deployment is not None
        task = self._tasks.create(self._functions.row(self.function_id), self._definition_id)
        replica = Replica(task, self.limits.port)
        self.replicas.append(replica)
        self._spawn(self._live(replica, self._deployment, self.limits))

    async def _live(self, replica: Replica, deployment: Deployment, limits: Limits) -> None:
        task = replica.task
        await self._tasks.start(task, deployment)
        watcher = asyncio.create_task(self._until_ready(replica))
        try:
            await asyncio.wait_for(asyncio.shield(watcher), limits.startup_timeout)
        except TimeoutError:
            if not task.ended.is_set() and not task.stopping:
                self._logs.say(
                    self.app_id,
                    self.function_id,
                    task.id,
                    f"container {task.id} was not ready within its startup_timeout of {limits.startup_timeout:g} s: "
                    "it is stopped",
                )
                replica.leaving = True
                task.failure = "startup_timeout"
                await self._tasks.stop(task, grace=5.0)
        finally:
            watcher.cancel()
        self._wake.set()
        await task.ended.wait()
        if replica in self.replicas:
            self.replicas.remove(replica)
        if replica.upstream is not None:
            await replica.upstream.close()
        if not task.stopping or task.failure == "startup_timeout":
            self._failed(replica)
        self._wake.set()

    async def _until_ready(self, replica: Replica) -> None:
        """Until its code says that it is ready and its port accepts, or it has ended."""
        task = replica.task
        ended = asyncio.create_task(task.ended.wait())
        announced = asyncio.create_task(task.announced.wait())
        try:
            await asyncio.wait({ended, announced}, return_when=asyncio.FIRST_COMPLETED)
            if task.container is None:
                return
            replica.upstream = Upstream(task.container.port_socket(replica.port))
            while not task.ended.is_set() and not replica.leaving:
                if listens(task.container.pid, replica.port):
                    replica.ready_at = replica.idle_since = time.monotonic()
                    return
                await asyncio.sleep(_PROBE_SECONDS)
        finally:
            ended.cancel()
            announced.cancel()

    def _failed(self, replica: Replica) -> None:
        """It ended without being asked to: wait longer each time before the next."""
        now = time.monotonic()
        steady = replica.ready_at and now - replica.ready_at >= _STEADY_SECONDS
        self._failures = 1 if steady else self._failures + 1
        delay = min(_BACK_OFF_FIRST * 2 ** (self._failures - 1), _BACK_OFF_MOST)
        self._not_before = now + delay
        asyncio.get_running_loop().call_later(delay, self._wake.set)

    async def _retire(self, replica: Replica, drain: float) -> None:
        """No new requests; those under way for `drain` seconds; then stop it."""
        if replica.leaving:
            await replica.task.ended.wait()
            return
        replica.leaving = True
        replica.task.stopping = True
        if drain and replica.requests:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(replica.quiet.wait(), drain)
        await self._tasks.stop(replica.task, grace=EXIT_HOOK_SECONDS)

    def dropped(self, task: Task) -> None:
        """The client stops one of the containers."""
        for replica in self.replicas:
            if replica.task is task:
                replica.leaving = True
        self._wake.set()


class Servers:
    """Every server of every app that is not stopped: their pools, URLs, and the RPCs about scaling."""

    def __init__(
        self,
        store: Store,
        environments: Environments,
        logs: Logs,
        tokens: ProxyTokens,
        listeners: Listeners,
    ) -> None:
        self._store = store
        self._environments = environments
        self._logs = logs
        self._tokens = tokens
        self._listeners = listeners
        self._pools: dict[str, Pool] = {}
        # Called with a function's id when its settings were changed: functions have pools of another kind.
        self.settings_hooks: list[Callable[[str], None]] = []
        self._functions: Functions
        self._tasks: Tasks

    def attach(self, functions: Functions, tasks: Tasks) -> None:
        """The rest of what it needs; these need it too."""
        self._functions = functions
        self._tasks = tasks
        tasks.stop_hooks.append(self._task_stopped)

    def url_of(self, function_id: str) -> str:
        pool = self._pools.get(function_id)
        return f"http://127.0.0.1:{pool.router.port}" if pool else ""

    async def open(self, function_id: str) -> Pool:
        """The server's pool, listening; a server that had a port gets the same again if it is free."""
        if function_id in self._pools:
            return self._pools[function_id]
        function = self._functions.row(function_id)
        app = self._store.app(function.app_id)
        assert app is not None
        pool = Pool(
            function, self._store, self._functions, self._tasks, self._logs, self._tokens, self._listeners
        )
        self._pools[function_id] = pool
        named = app.state in (api_pb2.APP_STATE_DEPLOYED, api_pb2.APP_STATE_INITIALIZING)
        had = function.port or (
            self._store.port_of(app.environment_id, app.name, function.name) if named else 0
        )
        port = await pool.router.listen(had or self._free_port())
        if had and port != had:
            self._logs.say(
                app.id,
                function.id,
                "",
                f"port {had} is taken: {function.name} is at {self.url_of(function.id)}",
            )
        self._store.set_function(function_id, port=port)
        if named:
            self._store.set_port(app.environment_id, app.name, function.name, port)
        return pool

    def _free_port(self) -> int:
        """0: the kernel chooses. Ports that stopped servers had are theirs only as long as nobody else wants them."""
        return 0

    async def publish(self, deployment: Deployment) -> None:
        """Serve what was deployed, and close the servers that are no longer part of the app."""
        servers = [
            function_id
            for function_id, definition_id in deployment.layout.definition_ids.items()
            if self._functions.data(definition_id).is_server
        ]
        for pool in [p for p in self._pools.values() if p.app_id == deployment.app_id]:
            if pool.function_id not in servers:
                await self._close(pool)
        for function_id in servers:
            (await self.open(function_id)).publish(deployment)

    def of_app(self, app_id: str) -> list[Pool]:
        return [pool for pool in self._pools.values() if pool.app_id == app_id]

    async def close_app(self, app_id: str) -> None:
        await asyncio.gather(*(self._close(pool) for pool in self.of_app(app_id)))

    async def close(self) -> None:
        """For the end of the plane: no draining."""
        await asyncio.gather(*(self._close(pool, drain=False) for pool in list(self._pools.values())))

    async def _close(self, pool: Pool, *, drain: bool = True) -> None:
        await pool.close(drain=drain)
        self._pools.pop(pool.function_id, None)

    def _task_stopped(self, task: Task) -> None:
        pool = self._pools.get(task.function_id)
        if pool is not None:
            pool.dropped(task)

    # ---- RPCs

    @rpc("FunctionGetSchedulingParams")
    async def settings(self, request: Any, _call: Call) -> Any:
        row = self._functions.row(request.function_id)
        data = self._functions.data_of(row.id, self._functions.definition_of(row.id))
        return api_pb2.FunctionGetSchedulingParamsResponse(
            autoscaler_configuration=api_pb2.AutoscalerConfiguration(
                settings=effective_settings(data, row.settings)
            )
        )

    @rpc("FunctionUpdateSchedulingParams")
    async def update_settings(self, request: Any, _call: Call) -> Any:
        row = self._functions.row(request.function_id)
        merged = api_pb2.AutoscalerSettings.FromString(row.settings)
        merged.MergeFrom(request.settings)
        data = self._functions.data_of(row.id, self._functions.definition_of(row.id))
        settings = effective_settings(data, merged.SerializeToString())
        if settings.max_containers and settings.min_containers > settings.max_containers:
            raise invalid(
                f"min_containers ({settings.min_containers}) cannot be greater than max_containers "
                f"({settings.max_containers})"
            )
        self._store.set_function(row.id, settings=merged.SerializeToString())
        if pool := self._pools.get(row.id):
            pool.configure()
        for hook in self.settings_hooks:
            hook(row.id)
        return api_pb2.FunctionUpdateSchedulingParamsResponse(current_settings=settings)

    @rpc("FlashContainerList", differs="host and port are the server's own URL")
    async def containers(self, request: Any, _call: Call) -> Any:
        pool = self._pools.get(request.function_id)
        if pool is None:
            raise not_found(f"Server '{request.function_id}' is not running.")
        containers = [
            api_pb2.FlashContainerListResponse.Container(
                task_id=replica.task.id, host="127.0.0.1", port=pool.router.port
            )
            for replica in pool.replicas
            if replica.ready
        ]
        return api_pb2.FlashContainerListResponse(containers=containers)
