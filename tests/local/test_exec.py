"""Commands in running containers: `modal container exec` with and without a terminal, and the router behind it."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import select
import sys
import time
from typing import TYPE_CHECKING, Any

import grpclib
import pytest
from grpclib.client import Channel
from modal_proto import api_pb2
from modal_proto import task_command_router_pb2 as router_pb2

from .planes import APPS, TestPlane, eventually
from .rpc import SERVICES, call, call_on

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def task(plane: TestPlane) -> Iterator[str]:
    """A container of a server that stays."""
    url = plane.deploy("entered", open=1, min=1, mode="x")
    yield plane.ready(f"{url}/who").json["task"]
    plane.quick("app", "stop", "entered", "--yes")


def test_a_command(plane: TestPlane, task: str) -> None:
    def run(*argv: str, check: bool = True) -> Any:
        return plane.quick("container", "exec", "--no-pty", task, "--", *argv, check=check)

    assert run("echo", "hello there").stdout == "hello there\n"
    shown = run("sh", "-c", "echo out; echo err >&2; pwd; echo $T_MODE $MODAL_TASK_ID; ls /data").stdout
    assert set(shown.splitlines()) == {"out", "err", "/root", f"x {task}"}
    # It is in the container: its processes, its python, not this machine's home.
    assert "modal._container_entrypoint" in run("sh", "-c", "cat /proc/*/cmdline | tr '\\0' ' '").stdout
    assert run("python", "-c", "import sys; print(sys.prefix)").stdout == "/__image/venv\n"
    assert run("sh", "-c", f"ls {plane.state_dir} 2>&1 | wc -l; ls $HOME").stdout.startswith("1\n")
    many = run("python", "-c", "print('x' * 99 + '\\n', end='') or [print('y' * 99) for _ in range(20000)]")
    assert len(many.stdout) == 100 * 20001
    missing = run("no-such-program", check=False)
    assert "no-such-program" in missing.stdout + missing.stderr


def test_a_container_that_is_not_there(plane: TestPlane) -> None:
    done = plane.quick(
        "container", "exec", "--no-pty", "ta-0000000000000000000000", "--", "true", check=False
    )
    assert done.returncode == 1
    assert "Container 'ta-0000000000000000000000' is not running" in " ".join(
        (done.stdout + done.stderr).split()
    )


def test_a_terminal(plane: TestPlane, task: str) -> None:
    child, terminal = pty.fork()
    if not child:
        os.chdir(APPS)
        command = ["-m", "modal", "container", "exec", "--pty", task, "sh"]
        os.execve(sys.executable, [sys.executable, *command], plane.environment(PS1="> ", TERM="xterm"))
    seen = b""

    def until(words: bytes, seconds: float = 60) -> None:
        nonlocal seen
        deadline = time.monotonic() + seconds
        while not re.search(words, seen):
            assert time.monotonic() < deadline, (words, seen)
            if select.select([terminal], [], [], 0.2)[0]:
                seen += os.read(terminal, 4096)

    until(rb"[#$>] ")
    os.write(terminal, b"tty; test -t 0 && test -t 1 && echo is''terminal $TERM\n")
    until(rb"/dev/pts/\d+\r\n.*isterminal xterm")
    # In a process that has the terminal by then: between two commands the shell itself would get the Ctrl-C.
    os.write(terminal, b"sh -c 'echo be\"\"gins; exec sleep 1000'\n")
    until(rb"begins\r\n")
    os.write(terminal, b"\x03")  # Ctrl-C ends what runs in there, not the shell
    os.write(terminal, b"echo go''ing on\n")
    until(rb"going on")
    os.write(terminal, b"exit\n")
    assert os.waitpid(child, 0)[1] == 0
    os.close(terminal)


async def _on_router(plane: TestPlane, task: str, steps: Any) -> Any:
    request = api_pb2.TaskGetCommandRouterAccessRequest(task_id=task)
    access = await asyncio.to_thread(call, plane.now, "TaskGetCommandRouterAccess", request)
    channel = Channel("127.0.0.1", int(plane.now.url.rpartition(":")[2]))
    metadata = {"authorization": f"Bearer {access.jwt}"}

    async def ask(name: str, **fields: Any) -> Any:
        request = getattr(router_pb2, f"{name}Request")(**{"task_id": task, **fields})
        return await call_on(channel, "TaskCommandRouter", name, request, metadata)

    async def read(**fields: Any) -> bytes:
        method = SERVICES["TaskCommandRouter"][1](channel).TaskExecStdioRead
        async with method.open(metadata=metadata, timeout=60) as stream:
            await stream.send_message(router_pb2.TaskExecStdioReadRequest(task_id=task, **fields), end=True)
            return b"".join([message.data async for message in stream])

    try:
        return await steps(ask, read)
    finally:
        channel.close()


def test_the_router_s_answers_can_be_asked_for_again(plane: TestPlane, task: str) -> None:
    async def steps(ask: Any, read: Any) -> None:
        start = {"exec_id": "cat", "command_args": ["cat"], "stdout_config": 1, "stderr_config": 1}
        await ask("TaskExecStart", **start)
        await ask("TaskExecStart", **start)  # a retry starts nothing
        data = os.urandom(1 << 20)
        reader = asyncio.create_task(read(exec_id="cat"))
        await ask("TaskExecStdinWrite", exec_id="cat", data=data[:700000])
        # A retry whose first half arrived already.
        await ask("TaskExecStdinWrite", exec_id="cat", offset=500000, data=data[500000:])
        gap = await ask("TaskExecStdinWrite", exec_id="cat", offset=2 << 20, data=b"x")
        assert gap.status is grpclib.Status.INVALID_ARGUMENT
        assert not (await ask("TaskExecPoll", exec_id="cat")).HasField("code")
        await ask("TaskExecStdinWrite", exec_id="cat", offset=1 << 20, eof=True)
        status = await ask("TaskExecStdinStatus", exec_id="cat")
        assert (status.num_bytes_written, status.closed) == (1 << 20, True)
        assert (await ask("TaskExecWait", exec_id="cat")).code == 0
        assert await reader == data
        assert await read(exec_id="cat", offset=(1 << 20) - 5) == data[-5:]
        assert await read(exec_id="cat", file_descriptor=1) == b""

        await ask("TaskExecStart", exec_id="slow", command_args=["sleep", "100"], timeout_secs=1)
        assert (await ask("TaskExecWait", exec_id="slow")).signal == 9
        await ask("TaskExecStart", exec_id="code", command_args=["sh", "-c", "exit 7"])
        assert (await ask("TaskExecWait", exec_id="code")).code == 7
        for name in ("TaskExecPoll", "TaskExecWait", "TaskExecStdinWrite"):
            assert (await ask(name, exec_id="never")).status is grpclib.Status.NOT_FOUND
        other = await ask("TaskExecStart", exec_id="x", command_args=["true"], task_id="ta-" + "0" * 22)
        assert other.status is grpclib.Status.UNAUTHENTICATED

    asyncio.run(_on_router(plane, task, steps))


def test_only_with_the_router_s_token(plane: TestPlane, task: str) -> None:
    access = call(
        plane.now, "TaskGetCommandRouterAccess", api_pb2.TaskGetCommandRouterAccessRequest(task_id=task)
    )
    head, body, signature = access.jwt.split(".")

    async def ask(header: dict[str, str]) -> Any:
        channel = Channel("127.0.0.1", int(plane.now.url.rpartition(":")[2]))
        request = router_pb2.TaskExecStartRequest(task_id=task, exec_id="no", command_args=["true"])
        answer = await call_on(channel, "TaskCommandRouter", "TaskExecStart", request, header)
        channel.close()
        return answer

    for token in ("", "Bearer x", f"Bearer {head}.{body}.{'0' * 64}", f"Bearer {head}.e30.{signature}"):
        answer = asyncio.run(ask({"authorization": token} if token else {}))
        assert answer.status is grpclib.Status.UNAUTHENTICATED, token


def test_a_command_ends_with_its_container(new_plane: TestPlane) -> None:
    new_plane.up()
    url = new_plane.deploy("brief", open=1, min=1)
    task = new_plane.ready(f"{url}/who").json["task"]

    async def steps(ask: Any, _read: Any) -> Any:
        await ask("TaskExecStart", exec_id="s", command_args=["sleep", "1000"])
        waiting = asyncio.create_task(ask("TaskExecWait", exec_id="s"))
        await ask("TaskExecPoll", exec_id="s")  # by the same connection: the other call is there
        call_stop = api_pb2.ContainerStopRequest(task_id=task)
        await asyncio.to_thread(call, new_plane.now, "ContainerStop", call_stop)
        return await waiting

    assert asyncio.run(_on_router(new_plane, task, steps)).signal == 9
    new_plane.kill()
    eventually(lambda: new_plane.containers() == [])


def test_containers_are_listed_and_stopped(plane: TestPlane) -> None:
    url = plane.deploy("halted", open=1, min=1)
    task = plane.ready(f"{url}/who").json["task"]
    listed = {row["container_id"]: row["app_name"] for row in plane.json("container", "list")}
    assert listed[task] == "halted"
    assert "listening" in plane.quick("container", "logs", task, "--all").stdout
    plane.quick("container", "stop", task, "--yes")
    eventually(lambda: task not in {row["container_id"] for row in plane.json("container", "list")})
    again = plane.quick("container", "stop", task, "--yes", check=False)
    assert again.returncode == 1
    assert "is already stopped" in again.stdout + again.stderr
    # min_containers holds: another one takes its place.
    eventually(lambda: "halted" in {row["app_name"] for row in plane.json("container", "list")})
    plane.quick("app", "stop", "halted", "--yes")
