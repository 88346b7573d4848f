"""Calls through the real client in processes of its own: `modal run`, and scripts that use deployed functions."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import textwrap
import uuid
from typing import TYPE_CHECKING

import pytest

from .planes import APPS, eventually

if TYPE_CHECKING:
    from pathlib import Path

    from .planes import TestPlane


def script(plane: TestPlane, code: str, **values: object) -> str:
    """What a Python program prints that uses the modal SDK against this plane; it has `values` as variables."""
    setup = "import modal, time\n" + "".join(f"{name} = {value!r}\n" for name, value in values.items())
    setup += "def function(name, app='calls'):\n    return modal.Function.from_name(app, name)\n"
    done = subprocess.run(
        [sys.executable, "-c", setup + textwrap.dedent(code)],
        env=plane.environment(),
        cwd=APPS,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def deployed(plane: TestPlane) -> TestPlane:
    """A plane on which `calls.py` is deployed as `calls`."""
    plane.modal("deploy", "calls.py")
    return plane


def marks(plane: TestPlane, name: str) -> int:
    """How often a function of `calls.py` left this mark on its Volume."""
    found = list(plane.state_dir.glob(f"volumes/*/{name}"))
    return len(found[0].read_text()) if found else 0


def listed(plane: TestPlane, app: str) -> dict[str, str]:
    """As `modal app list` shows it."""
    return next(row for row in plane.json("app", "list") if row["description"] == app)


def state(plane: TestPlane, app: str) -> str:
    return listed(plane, app)["state"]


def run_waits(plane: TestPlane, name: str, *options: str, app: str) -> subprocess.Popen[bytes]:
    """`modal run` of a function that leaves marks, and waits between them for `go`."""
    # A shell starts what it puts into the background with SIGINT ignored, and that is inherited.
    argv = ["env", "--default-signal=INT", sys.executable, "-m", "modal", "run", *options]
    argv += ["calls.py::waits", "--name", name]
    return subprocess.Popen(argv, cwd=APPS, env=plane.environment(T_NAME=app), stdout=subprocess.DEVNULL)


# ---- modal run


def test_run_passes_arguments_and_the_result_goes_to_a_file(plane: TestPlane, tmp_path: Path) -> None:
    result = tmp_path / "result"
    done = plane.modal(
        "run", "--write-result", str(result), "calls.py::main", "--n", "4", "--word", "yo", "--shout"
    )
    assert "remote 16 local 16 YO" in done.stdout
    assert "map [0, 1, 4, 9]" in done.stdout
    assert "App completed" in done.stdout
    assert result.read_text() == "result 4"
    states = {app["description"]: app["state"] for app in plane.json("app", "list")}
    assert states["calls"] in ("stopped", "deployed")


def test_quiet_says_only_what_the_program_says(plane: TestPlane) -> None:
    done = plane.modal("run", "-q", "calls.py::errors")
    assert done.stdout.splitlines()[0].startswith("caught odd: 3")
    assert "remote frames True" in done.stdout
    assert "outcomes ['0', \"OwnError('odd: 1')\", '2', \"OwnError('odd: 3')\"]" in done.stdout
    assert "Initialized" not in done.stdout + done.stderr


def test_a_script_on_standard_input_and_a_failure_that_ends_it(plane: TestPlane) -> None:
    code = """
        import modal
        app = modal.App("from-stdin")
        @app.function()
        def divide(a, b):
            print("in the container")
            return a / b
        @app.local_entrypoint()
        def main():
            print("half", divide.remote(1, 2))
            divide.remote(1, 0)
    """
    done = plane.modal("run", "-", check=False, stdin=textwrap.dedent(code))
    assert done.returncode == 1
    assert "half 0.5" in done.stdout
    assert "in the container" in done.stdout
    assert "ZeroDivisionError" in done.stdout + done.stderr


def test_an_app_ends_with_its_client_unless_it_is_detached(plane: TestPlane) -> None:
    name = uuid.uuid4().hex
    attached, detached = ["run", "calls.py::leaves_work"], ["run", "--detach", "calls.py::leaves_work"]
    output = plane.modal(*attached, T_MARK=f"{name}-a", T_SECONDS="600", T_NAME="ends").stdout
    assert "call fc-" in output
    plane.modal(*detached, T_MARK=f"{name}-b", T_SECONDS="3", T_NAME="stays")

    # A detached app goes on after its client, until nothing is left to do.
    eventually(lambda: marks(plane, f"{name}-b-ended") == 1, seconds=60)
    eventually(lambda: state(plane, "stays") == "stopped", seconds=60)
    eventually(lambda: state(plane, "ends") == "stopped", seconds=60)
    assert marks(plane, f"{name}-a-ended") == 0


def test_a_detached_run_survives_the_death_of_its_client(plane: TestPlane) -> None:
    name = uuid.uuid4().hex
    with run_waits(plane, name, "--detach", app="orphan") as process:
        eventually(lambda: marks(plane, f"{name}-began"), seconds=60)
        process.kill()
    assert "detached" in state(plane, "orphan")
    assert marks(plane, f"{name}-ended") == 0
    (began,) = plane.state_dir.glob(f"volumes/*/{name}-began")
    began.with_name(f"{name}-go").touch()
    eventually(lambda: marks(plane, f"{name}-ended"), seconds=60)
    plane.modal("app", "stop", listed(plane, "orphan")["app_id"], "--yes")  # a run has no name to be found by


def test_an_interrupted_run_ends_its_containers(plane: TestPlane) -> None:
    name = uuid.uuid4().hex
    with run_waits(plane, name, app="interrupted") as process:
        eventually(lambda: marks(plane, f"{name}-began"), seconds=60)
        process.send_signal(signal.SIGINT)

    def containers() -> list[object]:
        return [row for row in plane.json("container", "list") if row["app_name"] == "interrupted"]

    eventually(lambda: not containers(), seconds=60)
    assert marks(plane, f"{name}-ended") == 0


# ---- functions of a deployed app, from outside


def test_ways_to_call(deployed: TestPlane) -> None:
    code = """
        import asyncio
        square, double, add = function("square"), function("double"), function("add")
        assert square.remote(7) == 49 and square.remote(2, power=5) == 32
        assert asyncio.run(double.remote.aio(21)) == 42
        assert list(square.map(range(120), kwargs={"power": 3})) == [n**3 for n in range(120)]
        assert sorted(square.map(range(9), order_outputs=False)) == [n * n for n in range(9)]
        assert list(add.map([1, 2], [10, 20])) == [11, 22]
        assert list(add.starmap([(1, 2), (3, 4)])) == [3, 7]
        assert square.for_each(range(4)) is None
        assert list(function("numbers").remote_gen(300)) == list(range(300))
        assert "".join(function("letters").remote_gen("hello")) == "hello"
        assert function("sum_of_squares").remote(5) == 30
        assert function("factorial").remote(3) == 6
    """
    script(deployed, code)


def test_large_arguments_and_results(deployed: TestPlane) -> None:
    code = """
        size_of, many_bytes = function("size_of"), function("many_bytes")
        for megabytes in (1, 5):
            data = b"a" + bytes(megabytes << 20) + b"z"
            assert size_of.remote(data) == (len(data), b"az")
            assert many_bytes.remote(megabytes << 20) == b"m" * (megabytes << 20)
        assert [len(r) for r in many_bytes.map([3 << 20] * 3)] == [3 << 20] * 3
        assert size_of.spawn(bytes(100_000)).get() == (100_000, bytes(2))
    """
    script(deployed, code)


def test_handles_of_calls(deployed: TestPlane) -> None:
    code = """
        square, sleeps = function("square"), function("sleeps_alone")
        calls = [square.spawn(n) for n in range(4)]
        assert modal.FunctionCall.gather(*calls) == [0, 1, 4, 9]
        assert modal.FunctionCall.from_id(calls[3].object_id).get() == 9
        try:
            calls[3].get(index=1)
        except modal.exception.NotFoundError as error:
            assert "has one input" in str(error)
        else:
            raise AssertionError("it would have asked for ever")
        many = square.experimental_spawn_map(range(60))
        assert many.num_inputs() == 60 and many.get(index=7) == 49
        assert list(many.iter(start=50)) == [n * n for n in range(50, 60)]
        square.spawn_map(range(3))
        long = sleeps.spawn(name, 600)
        try:
            long.get(timeout=0)
        except TimeoutError:
            pass
        else:
            raise AssertionError("it cannot have ended")
        while not function("read_mark").remote(name + "-began"):
            time.sleep(0.05)
        modal.FunctionCall.from_id(long.object_id).cancel()
        try:
            long.get()
        except modal.exception.RemoteError as error:
            assert "cancelled" in str(error)
        else:
            raise AssertionError("it cannot have ended")
        sleeps.remote(name, 0)
        outer = function("consumes").spawn(name + "-gen")
        while not function("read_mark").remote(name + "-gen-began"):
            time.sleep(0.05)
        outer.cancel()
        graph = function("sum_of_squares").spawn(3)
        assert graph.get() == 5
        (top,) = graph.get_call_graph()
        assert [child.function_name for child in top.children] == ["square"] * 3
    """
    name = uuid.uuid4().hex
    script(deployed, code, name=name)
    assert marks(deployed, f"{name}-began") == 2
    assert marks(deployed, f"{name}-ended") == 1
    # What was cancelled waited for a generator, which ends with it.
    eventually(lambda: marks(deployed, f"{name}-gen-left"), seconds=60)
    assert marks(deployed, f"{name}-gen-ended") == 0
    # The container of the cancelled one was free again, and did the next.
    (mark,) = deployed.state_dir.glob(f"volumes/*/{name}-in-*")
    assert len(mark.read_text()) == 2


def test_failures_are_retried_and_timeouts_end_the_input(deployed: TestPlane) -> None:
    code = """
        assert function("flaky").remote(name + "-a", 2) == 2
        assert function("dies").remote(name + "-b", 2) == 2, "its containers died twice"
        try:
            function("flaky").remote(name + "-c", 3)
        except Exception as error:
            assert (type(error).__name__, str(error)) == ("OwnError", "attempt 2")
        else:
            raise AssertionError("there was no third retry")
        try:
            function("slow").remote(name + "-d", 600)
        except modal.exception.FunctionTimeoutError as error:
            assert "timeout of 1s" in str(error)
        else:
            raise AssertionError("it cannot have ended")
    """
    name = uuid.uuid4().hex
    script(deployed, code, name=name)
    eventually(lambda: marks(deployed, f"{name}-d"), seconds=60)
    assert marks(deployed, f"{name}-c") == 3


def test_a_blocked_network_and_no_access_to_modal(deployed: TestPlane) -> None:
    code = """
        data = b"d" * (3 << 20)
        back, alone, by_proxy, proxy = function("offline").remote(data, port)
        assert back == data, "arguments and results have their way, also as blobs"
        assert "refused" in alone and "network of this container is blocked" in by_proxy and proxy is None
        refused = [error.split(":")[0] for error in function("restricted").remote(2)]
        assert refused == ["FunctionMap", "VolumeGetOrCreate"], refused
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        script(deployed, code, port=listener.getsockname()[1])


def test_what_cannot_be_called_says_so(deployed: TestPlane) -> None:
    code = """
        for app, name in (("calls", "nothing"), ("nowhere", "square")):
            try:
                function(name, app).remote(1)
            except modal.exception.NotFoundError as error:
                print(error)
        try:
            modal.FunctionCall.from_id("fc-" + "0" * 22).get()
        except modal.exception.NotFoundError as error:
            print(error)
    """
    said = script(deployed, code)
    assert "has no Function or Server 'nothing'" in said
    assert "App 'nowhere' in environment 'main' is not deployed" in said
    assert "Function call 'fc-" in said
