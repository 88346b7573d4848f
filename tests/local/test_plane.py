"""The daemon: one per state directory, private, and nothing lost when it is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from gpuctl.errors import GpuctlError
from gpuctl.local import client

from .planes import TestPlane, eventually, http, image_cache

if TYPE_CHECKING:
    from pathlib import Path


def test_up_is_quick_private_and_detached(new_plane: TestPlane) -> None:
    began = time.monotonic()
    plane = new_plane.up()
    seconds = time.monotonic() - began
    assert seconds < 30.0, f"{seconds:.2f} s"  # about 0.6 s on an idle machine
    assert client.running(new_plane.state_dir) == plane
    assert stat.S_IMODE(new_plane.state_dir.stat().st_mode) == 0o700
    for name in ("plane.json", "plane.db", "plane.log"):
        assert stat.S_IMODE((new_plane.state_dir / name).stat().st_mode) == 0o600, name
    assert os.getsid(plane.pid) not in (os.getsid(0), plane.pid)
    status = (client.Path("/proc") / str(plane.pid) / "stat").read_text().rpartition(")")[2].split()
    assert status[1] != str(os.getpid())
    # Only loopback.
    port = int(plane.url.rpartition(":")[2])
    listening = subprocess.run(["cat", "/proc/net/tcp"], capture_output=True, text=True, check=True).stdout
    assert f"0100007F:{port:04X}" in listening
    assert f"00000000:{port:04X}" not in listening


def test_a_second_up_names_the_pid(new_plane: TestPlane) -> None:
    pid = new_plane.up().pid
    with pytest.raises(GpuctlError) as caught:
        new_plane.up()
    assert caught.value.exit_code == 2
    assert f"(pid {pid})" in caught.value.problems[0]
    assert client.ensure_up(new_plane.state_dir, image_cache()).pid == pid


def test_of_several_ups_at_once_one_wins(new_plane: TestPlane) -> None:
    code = (
        "import sys; from pathlib import Path; from gpuctl.local import client; import gpuctl.errors as g\n"
    )
    code += "try: print(client.up(Path(sys.argv[1]), Path(sys.argv[2])).pid)\n"
    code += "except g.GpuctlError as e: print(e.problems[0]); sys.exit(e.exit_code)"
    command = [sys.executable, "-c", code, str(new_plane.state_dir), str(image_cache())]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate()[0].strip() for process in running]
    assert sorted(process.returncode for process in running) == [0, 2, 2, 2]
    pid = new_plane.now.pid
    assert sorted(said) == sorted([str(pid), *[f"the local control plane is already up (pid {pid})"] * 3])


def test_several_ensure_up_at_once_get_the_same_plane(new_plane: TestPlane) -> None:
    with ThreadPoolExecutor() as pool:
        planes = list(pool.map(lambda _: client.ensure_up(new_plane.state_dir, image_cache()), range(4)))
    assert len({plane.pid for plane in planes}) == 1


def test_the_port_is_kept_and_a_taken_one_is_refused(new_plane: TestPlane) -> None:
    first = new_plane.up().url
    new_plane.down()
    assert client.running(new_plane.state_dir) is None
    assert new_plane.up().url == first
    new_plane.down()
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(GpuctlError) as caught:
            new_plane.up(port)
        assert caught.value.exit_code == 2
        assert caught.value.problems == (f"--port: {port} is taken or not allowed",)
    assert new_plane.up(port).url == f"http://127.0.0.1:{port}"


def test_the_command_line(tmp_path: Path) -> None:
    env = os.environ | {"XDG_STATE_HOME": str(tmp_path / "s"), "XDG_CACHE_HOME": str(tmp_path / "c")}

    def gpuctl(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "gpuctl", "local", *argv],
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )

    assert gpuctl("status").returncode == 1
    assert gpuctl("env").returncode == 1
    started = gpuctl("up", "--json")
    try:
        pid = json.loads(started.stdout)["pid"]
        again = gpuctl("up")
        assert again.returncode == 2
        assert f"already up (pid {pid})" in again.stderr
        assert json.loads(gpuctl("status", "--json").stdout)["pid"] == pid
        assert "export MODAL_SERVER_URL=http://127.0.0.1:" in gpuctl("env").stdout
        assert "up in" in gpuctl("logs").stdout
        listed = gpuctl("exec", "--", "modal", "app", "list", "--json")  # none need be on PATH
        assert json.loads(listed.stdout) == []
    finally:
        assert gpuctl("down").returncode == 0
    assert gpuctl("status", "--json").returncode == 1


def test_ctrl_c_in_the_parent_leaves_it_alone(new_plane: TestPlane) -> None:
    code = "import sys,time; from pathlib import Path; from gpuctl.local import client\n"
    code += "print(client.up(Path(sys.argv[1]), Path(sys.argv[2])).pid, flush=True); time.sleep(60)"
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(new_plane.state_dir), str(image_cache())],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    os.killpg(parent.pid, signal.SIGINT)
    os.killpg(parent.pid, signal.SIGHUP)
    parent.wait()
    time.sleep(0.2)
    assert new_plane.now.pid == pid


def test_a_pid_that_belongs_to_somebody_else_is_not_the_plane(new_plane: TestPlane) -> None:
    new_plane.up()
    new_plane.kill()
    state = json.loads((new_plane.state_dir / "plane.json").read_text())
    (new_plane.state_dir / "plane.json").write_text(json.dumps(state | {"pid": os.getpid()}))
    assert client.running(new_plane.state_dir) is None
    new_plane.down()  # and nobody is killed


def test_a_killed_plane_comes_back_with_everything(new_plane: TestPlane) -> None:
    new_plane.up()
    url = new_plane.deploy("keeps", open=1, min=1)
    new_plane.ready(f"{url}/who")
    new_plane.modal("secret", "create", "kept", "KEY=value")
    new_plane.modal("volume", "create", "kept")
    new_plane.modal("volume", "put", "kept", "plain.py", "/plain.py")
    before = new_plane.logs("keeps")
    assert "enter: version 1" in before
    new_plane.kill()
    eventually(lambda: not new_plane.containers())

    new_plane.up()
    assert [app["description"] for app in new_plane.json("app", "list")] == ["keeps"]
    # min_containers come back by themselves, at the same address.
    eventually(lambda: len(new_plane.json("container", "list")) == 1, every=0.5)
    assert new_plane.ready(f"{url}/who").json["version"] == "1"
    after = new_plane.logs("keeps")
    assert after.startswith(before.rstrip("\n"))
    assert "ended with the control plane" in after
    assert [s["name"] for s in new_plane.json("secret", "list")] == ["kept"]
    assert [f["filename"] for f in new_plane.json("volume", "ls", "kept")] == ["plain.py"]
    assert (
        "Deployment skipped"
        in new_plane.modal("deploy", "plain.py", T_NAME="keeps", T_OPEN="1", T_MIN="1").stdout
    )


def test_a_killed_plane_comes_back_by_itself(new_plane: TestPlane) -> None:
    first = new_plane.up()
    url = new_plane.deploy("returns", open=1, min=1)
    environment = new_plane.environment()
    [supervisor] = eventually(new_plane.supervisors)
    new_plane.crash()
    # Who comes now waits: a client, a request to a server, another `up`.
    assert http(f"{url}/who").status in (200, 503)
    command = [sys.executable, "-m", "modal", "app", "list", "--json"]
    listed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert [app["description"] for app in json.loads(listed)] == ["returns"]
    with pytest.raises(
        GpuctlError, match=r"the local control plane (is already up|was killed, and is coming)"
    ):
        new_plane.up()
    second = new_plane.now
    assert (second.url, second.pid == first.pid) == (first.url, False)
    assert new_plane.supervisors() == [supervisor]

    # The two replace each other.
    os.kill(supervisor, signal.SIGKILL)
    [another] = eventually(lambda: [pid for pid in new_plane.supervisors() if pid != supervisor])
    new_plane.crash()
    assert client.ensure_up(new_plane.state_dir, image_cache()).url == first.url
    assert new_plane.ready(f"{url}/who").status == 200
    assert new_plane.supervisors() == [another]
    assert resident_mb(new_plane.now.pid) + resident_mb(another) < 150
    os.kill(new_plane.now.pid, signal.SIGKILL)
    new_plane.down()  # also one that is on its way back, or still on its way out
    assert new_plane.supervisors() == []
    assert http(url).status == 0


def resident_mb(pid: int) -> float:
    status = client.Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def test_a_plane_that_cannot_start_again_stays_down_and_says_so(new_plane: TestPlane) -> None:
    port = int(new_plane.up().url.rpartition(":")[2])
    eventually(new_plane.supervisors)
    database = new_plane.state_dir / "plane.db"
    kept = {file: file.read_bytes() for file in new_plane.state_dir.glob("plane.db*")}
    new_plane.crash()
    for file in kept:
        file.unlink(missing_ok=True)
    database.write_bytes(b"no database at all" * 1000)
    eventually(lambda: not new_plane.supervisors(), seconds=120)
    assert client.running(new_plane.state_dir) is None
    assert not client.coming_back(new_plane.state_dir)
    log = (new_plane.state_dir / "plane.log").read_text()
    assert "file is not a database" in log
    assert "for the 5th time in a row: it stays down" in log
    assert http(f"http://127.0.0.1:{port}").status == 0
    for file, content in kept.items():
        file.write_bytes(content)
    assert new_plane.up().url.endswith(f":{port}")


def test_nothing_comes_back_without_its_state_directory(new_plane: TestPlane) -> None:
    new_plane.up()
    eventually(new_plane.supervisors)
    pid = new_plane.now.pid
    away = new_plane.state_dir.rename(new_plane.state_dir.with_name("away"))
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not new_plane.supervisors())
    assert not new_plane.state_dir.exists()
    away.rename(new_plane.state_dir)
    assert client.was_killed(new_plane.state_dir)


def test_down_stops_containers_orderly_and_keeps_the_state(new_plane: TestPlane) -> None:
    new_plane.up()
    url = new_plane.deploy("orderly", open=1, min=1)
    new_plane.ready(f"{url}/who")
    assert new_plane.containers()
    new_plane.down()
    assert new_plane.containers() == []
    assert http(url).status == 0
    new_plane.up()
    assert "exit: hook ran" in new_plane.logs("orderly")
    new_plane.ready(f"{url}/who")


def test_the_user_s_profile_does_not_leak_in(tmp_path: Path) -> None:
    plane = TestPlane(tmp_path / "gpuctl" / "local")
    plane.up()
    try:
        own = {
            "MODAL_PROFILE": "mine",
            "MODAL_TOKEN_ID": "ak-1",
            "MODAL_ENVIRONMENT": "prod",
            "MODAL_FORCE_BUILD": "1",
        }
        done = subprocess.run(
            [sys.executable, "-m", "gpuctl", "local", "exec", "--", "env"],
            env=plane.environment() | own | {"XDG_STATE_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        seen = dict(line.split("=", 1) for line in done.stdout.splitlines() if line.startswith("MODAL_"))
        assert seen == plane.now.client_env() | {"MODAL_FORCE_BUILD": "1"}
        assert not client.Path(seen["MODAL_CONFIG_PATH"]).exists()
    finally:
        plane.down()


def test_a_killed_plane_leaves_nothing_after_the_next_up_or_down(new_plane: TestPlane) -> None:
    def socket_folder() -> Path:
        return (new_plane.state_dir / "sockets").readlink()

    new_plane.up()
    new_plane.deploy("killed", open=1, min=1)
    first = socket_folder()
    eventually(lambda: (first / "egress.sock").exists())
    new_plane.kill()
    new_plane.up()
    assert not first.exists()
    second = socket_folder()
    new_plane.kill()
    new_plane.down()
    assert not second.exists()
    assert not (new_plane.state_dir / "sockets").is_symlink()


def test_down_ends_a_plane_that_is_still_starting(new_plane: TestPlane) -> None:
    command = [
        sys.executable,
        "-m",
        "gpuctl.local.daemon",
        "--detach",
        "--state-dir",
        str(new_plane.state_dir),
    ]
    subprocess.run([*command, "--cache-dir", str(new_plane.state_dir.parent / "cache")], check=True)
    lock = new_plane.state_dir / "lock"
    # Its pid is in the file once it holds that: before that there is nothing to end.
    eventually(lambda: lock.exists() and lock.read_text() != "", every=0.001)
    new_plane.down()
    assert client.running(new_plane.state_dir) is None
    new_plane.up()
    new_plane.down()


def test_the_user_s_http_proxy_is_not_between_the_client_and_the_plane(new_plane: TestPlane) -> None:
    new_plane.up()
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:1")
    new_plane.modal("volume", "create", "by-proxy", **nowhere)
    new_plane.modal("volume", "put", "by-proxy", "plain.py", "/plain.py", **nowhere)
