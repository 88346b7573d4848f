"""Commands in running containers: `modal container exec` and `modal shell ta-…`. Imports tasks, processes, wire.

In the cloud this is a service of its own on the machine of the container, to which the client goes with a token that
the control plane gives it. Here it is the same process, and the token names one container and ends with the hour.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import time
from typing import TYPE_CHECKING, Any

from modal_proto import api_pb2
from modal_proto import task_command_router_pb2 as router_pb2

from gpuctl.local.processes import Process
from gpuctl.local.wire import Call, conflict, invalid, not_found, rpc, unauthenticated, unimplemented

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path

    from gpuctl.local.secrets import Secrets
    from gpuctl.local.tasks import Task, Tasks

_TOKEN_SECONDS = 3600
_KEEP_SECONDS = 60.0  # how long what a command said can be read after its container has ended, or it itself
_STDERR_PIPE, _STDERR_STDOUT = (
    router_pb2.TASK_EXEC_STDERR_CONFIG_PIPE,
    router_pb2.TASK_EXEC_STDERR_CONFIG_STDOUT,
)


class CommandRouter:
    """The programs that clients have started in containers, by (task, exec id). `folder` is for what they print."""

    def __init__(self, tasks: Tasks, secrets: Secrets, folder: Path, key: bytes) -> None:
        self._tasks = tasks
        self._secrets = secrets
        self._folder = folder
        self._key = key
        self._processes: dict[tuple[str, str], Process] = {}
        self._starting: dict[tuple[str, str], asyncio.Task[Process]] = {}
        self._timers: dict[tuple[str, str], asyncio.TimerHandle] = {}
        self._jobs: set[asyncio.Task[None]] = set()

    # ---- tokens

    def token(self, task_id: str) -> str:
        """A JSON Web Token for one container; the client reads when it ends, and only this plane can make one."""
        payload = {"task_id": task_id, "exp": int(time.time()) + _TOKEN_SECONDS}
        body = f"{_encoded({'alg': 'HS256', 'typ': 'JWT'})}.{_encoded(payload)}"
        return f"{body}.{self._signature(body)}"

    def _signature(self, body: str) -> str:
        return hmac.new(self._key, b"router " + body.encode(), hashlib.sha256).hexdigest()

    def authenticate(self, metadata: Mapping[str, str]) -> Call:
        """The call of somebody with a token; its container is in `task_id`."""
        token = metadata.get("authorization", "").removeprefix("Bearer ")
        body, _, signature = token.rpartition(".")
        if body and hmac.compare_digest(signature.encode(), self._signature(body).encode()):
            payload = json.loads(base64.urlsafe_b64decode(body.partition(".")[2] + "=="))
            if payload["exp"] > time.time():
                return Call(payload["task_id"], "", router=True)
        raise unauthenticated("The token for this container is missing, not this plane's, or has ended.")

    # ---- programs

    def _live(self, request: Any) -> Task:
        task = self._tasks.live.get(request.task_id)
        if task is None or task.container is None:
            raise not_found(f"Container '{request.task_id}' is not running.")
        return task

    def _process(self, request: Any, call: Call) -> Process:
        _allow(request, call)
        process = self._processes.get((request.task_id, request.exec_id))
        if process is None:
            raise not_found(f"No command '{request.exec_id}' in container '{request.task_id}'.")
        return process

    @rpc("TaskExecStart", differs="in the container's own environment; secret_sources are refused")
    async def start(self, request: Any, call: Call) -> Any:
        key = (request.task_id, request.exec_id)
        _allow(request, call)
        if key not in self._processes:
            task = self._live(request)
            # The client repeats a call whose answer it did not get: a command is started once.
            job = self._starting.get(key)
            if job is None:
                job = self._starting[key] = asyncio.create_task(self._start(task, request))
                job.add_done_callback(lambda _: self._starting.pop(key, None))
            await asyncio.shield(job)
        return router_pb2.TaskExecStartResponse()

    async def _start(self, task: Task, request: Any) -> Process:
        if not request.command_args:
            raise invalid("A command needs at least one argument.")
        if request.secret_sources or request.container_id:
            raise unimplemented(
                "TaskExecStart with secret_sources or container_id is not implemented by the local control plane"
            )
        assert task.container is not None
        extra = {**self._secrets.values(request.secret_ids), **request.env}
        terminal = None
        if request.HasField("pty_info") and request.pty_info.enabled:
            pty = request.pty_info
            terminal = (pty.winsz_rows or 24, pty.winsz_cols or 80)
            extra |= {"TERM": pty.env_term or "xterm"}
            extra |= {"COLORTERM": pty.env_colorterm} if pty.env_colorterm else {}
            extra |= {"TERM_PROGRAM": pty.env_term_program} if pty.env_term_program else {}
        process = Process(self._folder)
        try:
            await task.container.execute(
                process,
                argv=request.command_args,
                env=extra,
                workdir=request.workdir,
                terminal=terminal,
                merge_stderr=request.stderr_config == _STDERR_STDOUT,
            )
        except (OSError, ValueError) as error:
            process.close()
            raise conflict(f"The command could not be started in '{task.id}': {error}") from error
        key = (task.id, request.exec_id)
        self._processes[key] = process
        if request.HasField("timeout_secs") and request.timeout_secs:
            loop = asyncio.get_running_loop()
            self._timers[key] = loop.call_later(request.timeout_secs, process.kill)
        job = asyncio.create_task(self._watch(key, process))
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        return process

    async def _watch(self, key: tuple[str, str], process: Process) -> None:
        await process.wait()
        if timer := self._timers.pop(key, None):
            timer.cancel()
        await asyncio.sleep(_KEEP_SECONDS)
        self._processes.pop(key).close()

    @rpc("TaskExecStdioRead")
    async def read(self, request: Any, call: Call) -> AsyncIterator[Any]:
        process = self._process(request, call)
        stderr = request.file_descriptor == router_pb2.TASK_EXEC_STDIO_FILE_DESCRIPTOR_STDERR
        async for data in (process.stderr if stderr else process.stdout).read(request.offset):
            yield router_pb2.TaskExecStdioReadResponse(data=data)

    @rpc("TaskExecStdinWrite")
    async def write(self, request: Any, call: Call) -> Any:
        process = self._process(request, call)
        try:
            await process.write(request.offset, request.data, end=request.eof)
        except ValueError as error:
            raise invalid(str(error)) from error
        except OSError as error:
            raise conflict(f"The command does not read its input: {error.strerror or error}") from error
        return router_pb2.TaskExecStdinWriteResponse()

    @rpc("TaskExecStdinStatus")
    async def stdin_status(self, request: Any, call: Call) -> Any:
        process = self._process(request, call)
        return router_pb2.TaskExecStdinStatusResponse(
            num_bytes_written=process.written, closed=process.input_closed
        )

    @rpc("TaskExecPoll")
    async def poll(self, request: Any, call: Call) -> Any:
        return _status(router_pb2.TaskExecPollResponse, self._process(request, call).exit_code)

    @rpc("TaskExecWait")
    async def wait(self, request: Any, call: Call) -> Any:
        return _status(router_pb2.TaskExecWaitResponse, await self._process(request, call).wait())

    async def close(self) -> None:
        for job in self._jobs:
            job.cancel()
        for process in self._processes.values():
            with contextlib.suppress(OSError):
                process.close()


class RouterAccess:
    """How a client gets at the router. `url` says where it is, as the caller reaches it."""

    def __init__(self, tasks: Tasks, router: CommandRouter, url: Callable[[], str]) -> None:
        self._tasks = tasks
        self._router = router
        self._url = url

    @rpc("TaskGetCommandRouterAccess", differs="from outside containers only")
    async def access(self, request: Any, call: Call) -> Any:
        if call.task_id:
            raise unimplemented(
                "TaskGetCommandRouterAccess from inside a container is not implemented by the local control plane"
            )
        if request.task_id not in self._tasks.live:
            raise not_found(f"Container '{request.task_id}' is not running.")
        return api_pb2.TaskGetCommandRouterAccessResponse(
            url=self._url(), jwt=self._router.token(request.task_id)
        )


def _allow(request: Any, call: Call) -> None:
    if not call.router or request.task_id != call.task_id:
        raise unauthenticated("This takes the token of `TaskGetCommandRouterAccess` for that container.")


def _encoded(document: Mapping[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(document).encode()).decode().rstrip("=")


def _status(kind: Any, code: int | None) -> Any:
    if code is None:
        return kind()
    return kind(code=code) if code >= 0 else kind(signal=-code)
