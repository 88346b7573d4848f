"""Servers: their URL, what passes through it, and how many containers there are, seen with real HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import math
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from .planes import TestPlane, eventually
from .planes import http as ask

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def echo(plane: TestPlane) -> Iterator[str]:
    """The URL of an open server with one container that is up."""
    url = plane.deploy("echo", open=1, min=1, limit=100, target=100)
    plane.ready(url)
    yield url
    plane.modal("app", "stop", "echo", "--yes")


# ---- what passes through


def test_the_request_arrives_as_it_was_sent(echo: str) -> None:
    headers = {
        "X-Mine": "yes",
        "Modal-Key": "wk-x",
        "Modal-Secret": "ws-x",
        "Authorization": "Bearer wk-a.ws-b",
        "Connection": "close, X-Hop",
        "X-Hop": "1",
        "Accept-Encoding": "identity",
    }
    connection = http.client.HTTPConnection(echo.removeprefix("http://"))
    connection.request("GET", "/headers?q=%20a%2Fb&x=1", headers=headers)
    answer = json.loads(connection.getresponse().read())
    assert answer["path"] == "/headers?q=%20a%2Fb&x=1"
    seen = {name.lower(): value for name, value in answer["headers"]}
    assert seen["x-mine"] == "yes"
    assert seen["host"] == echo.removeprefix("http://")
    assert seen["x-forwarded-for"] == "127.0.0.1"
    for gone in ("modal-key", "modal-secret", "authorization", "x-hop"):
        assert gone not in seen
    # Somebody else's credentials are the app's affair.
    other = ask(f"{echo}/headers", headers={"Authorization": "Bearer sk-mine"}).json
    assert ["Authorization", "Bearer sk-mine"] in other["headers"]


def test_head_has_the_length_and_no_body(echo: str) -> None:
    answer = ask(f"{echo}/", method="HEAD")
    assert (answer.status, answer.body, answer.headers["Content-Length"]) == (200, b"", "7")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_streamed(echo: str, chunked: bool) -> None:
    piece = os.urandom(1 << 20)
    digest = hashlib.sha256(piece * 64).hexdigest()
    connection = http.client.HTTPConnection(echo.removeprefix("http://"))
    headers = {} if chunked else {"Content-Length": str(64 << 20)}
    connection.request(
        "POST", "/upload", body=(piece for _ in range(64)), headers=headers, encode_chunked=chunked
    )
    assert json.loads(connection.getresponse().read()) == {"sha256": digest, "length": 64 << 20}


def test_events_arrive_one_by_one(echo: str) -> None:
    connection = http.client.HTTPConnection(echo.removeprefix("http://"))
    connection.request("GET", "/sse")
    response = connection.getresponse()
    began = time.monotonic()
    assert response.readline() == b"data: 0\n"
    assert time.monotonic() - began < 10  # the whole stream takes 20 s
    response.readline()
    assert response.readline() == b"data: 1\n"
    connection.close()


def test_a_client_that_leaves_is_noticed(plane: TestPlane, echo: str) -> None:
    connection = http.client.HTTPConnection(echo.removeprefix("http://"))
    connection.request("GET", "/sse")
    connection.getresponse().readline()
    connection.close()
    eventually(lambda: "the client went away" in plane.logs("echo"), seconds=15, every=0.5)


def test_websockets(echo: str) -> None:
    async def talk() -> list[Any]:
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{echo}/ws") as socket:
            await socket.send_str("text")
            first = (await socket.receive()).data
            await socket.send_bytes(b"bytes")
            second = (await socket.receive()).data
            await socket.close(code=4001)
            return [first, second, socket.close_code]

    assert asyncio.run(talk()) == ["echo text", b"echo bytes", 4001]


# ---- who gets in


def test_only_proxy_tokens_open_a_server(plane: TestPlane) -> None:
    token = plane.json("workspace", "proxy-tokens", "create", "--name", "mine")
    url = plane.deploy("guarded", min=1)
    key, secret = token["Modal-Key"], token["Modal-Secret"]
    assert key.startswith("wk-")
    assert secret.startswith("ws-")
    for headers in (
        {},
        {"Modal-Key": key},
        {"Modal-Key": key, "Modal-Secret": "ws-wrong"},
        {"Authorization": f"Bearer {key}"},
        {"Authorization": f"Bearer {key}.ws-wrong"},
        {"Authorization": f"Basic {key}.{secret}"},
        {"Authorization": "Bearer sk-other"},
    ):
        answer = ask(f"{url}/", headers=headers)
        assert answer.status == 401, headers
        assert b"credentials for proxy authorization" in answer.body
    good = {"Modal-Key": key, "Modal-Secret": secret}
    assert plane.ready(f"{url}/who", headers=good).status == 200
    assert ask(f"{url}/who", headers={"Authorization": token["Authorization"]}).status == 200
    listed = plane.json("workspace", "proxy-tokens", "list")
    assert [t["token_id"] for t in listed] == [key]
    assert secret not in json.dumps(listed)
    assert secret.encode() not in (plane.state_dir / "plane.db").read_bytes()
    plane.modal("workspace", "proxy-tokens", "delete", key, "--yes")
    assert ask(f"{url}/who", headers=good).status == 401
    plane.modal("app", "stop", "guarded", "--yes")


# ---- how many there are


def tasks(plane: TestPlane, name: str) -> list[str]:
    app_id = next(a["app_id"] for a in plane.json("app", "list") if a["description"] == name)
    return [c["container_id"] for c in plane.json("container", "list", "--app-id", app_id)]


def test_from_zero_and_back(plane: TestPlane) -> None:
    url = plane.deploy("zero", open=1, scaledown=2)
    answer = ask(f"{url}/who")
    assert answer.status == 503
    assert answer.headers["Retry-After"] == "5"
    assert ask(f"{url}/who").status == 503  # never queued
    assert plane.ready(f"{url}/who").status == 200
    eventually(lambda: tasks(plane, "zero") == [], every=0.5)
    assert "exit: hook ran" in plane.logs("zero")
    assert "exited with" not in plane.logs("zero")  # as asked: no crash
    assert ask(f"{url}/who").status == 503
    plane.modal("app", "stop", "zero", "--yes")


def test_above_the_limit_429_and_another_container(plane: TestPlane) -> None:
    url = plane.deploy("limits", open=1, min=1, limit=2, target=2, max=2)
    plane.ready(f"{url}/who")

    def slow() -> int:
        return ask(f"{url}/slow?6").status

    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(slow) for _ in range(2)]
        time.sleep(0.5)
        refused = ask(f"{url}/who")
        assert refused.status == 429
        assert "Retry-After" in refused.headers
        # The refusal is demand: a second container comes, and takes the next request.
        eventually(lambda: ask(f"{url}/who").status == 200, seconds=20, every=0.2)
        assert [job.result() for job in jobs] == [200, 200]
    assert len(tasks(plane, "limits")) == 2  # max_containers
    plane.modal("app", "stop", "limits", "--yes")


def test_a_session_stays_with_its_container(plane: TestPlane) -> None:
    url = plane.deploy("sticky", open=1, min=3, max=3, limit=10, target=10)
    eventually(lambda: len({ask(f"{url}/who").body for _ in range(1)} | {b""}) == 2, seconds=60)

    def of(session: str) -> str:
        return str(plane.ready(f"{url}/who", headers={"Modal-Session-ID": session}).json["task"])

    eventually(lambda: len({of(f"warm-{n}") for n in range(24)}) == 3, seconds=60, every=0.5)
    for session in ("a", "b", "c"):
        assert len({of(session) for _ in range(10)}) == 1
    plane.modal("app", "stop", "sticky", "--yes")


def test_live_changes_of_the_autoscaler(plane: TestPlane) -> None:
    plane.deploy("tuned", open=1)
    plane.modal("server", "autoscaler", "update", "tuned/Server", "--min-containers", "1")
    eventually(lambda: len(tasks(plane, "tuned")) == 1, every=0.5)
    assert (
        '"min_containers": 1'
        in plane.modal("server", "autoscaler", "settings", "tuned/Server", "--json").stdout
    )
    plane.deploy("tuned", open=1, version=2)
    settings = plane.modal("server", "autoscaler", "settings", "tuned/Server", "--json").stdout
    assert '"min_containers": 1' not in settings
    plane.modal("app", "stop", "tuned", "--yes")


# ---- when they fail


@pytest.mark.parametrize(
    ("mode", "line"),
    [
        ("die", "exited with code 7 before it was ready"),
        ("crash", "exited with code 0 before it was ready: RuntimeError('this server never comes up')"),
    ],
)
def test_a_crash_at_start_is_said_and_does_not_spin(plane: TestPlane, mode: str, line: str) -> None:
    url = plane.deploy(f"fails-{mode}", open=1, mode=mode)
    began = time.monotonic()

    def log() -> str:
        assert ask(f"{url}/").status == 503
        return plane.logs(f"fails-{mode}", "--source", "system")

    eventually(lambda: log().count("exited with") > 2)
    assert f" {line}" in log()
    # At once, after 1 s, after 2 s more, …
    assert log().count("exited with") <= 2 + math.log2(1 + time.monotonic() - began)
    assert int(ask(f"{url}/").headers["Retry-After"]) >= 1
    # A deploy starts afresh.
    plane.deploy(f"fails-{mode}", open=1)
    assert plane.ready(f"{url}/who").status == 200
    plane.modal("app", "stop", f"fails-{mode}", "--yes")


def test_one_that_never_listens_is_stopped(plane: TestPlane) -> None:
    url = plane.deploy("hangs", open=1, mode="hang", startup=2)
    assert ask(f"{url}/").status == 503
    eventually(lambda: "was not ready within its startup_timeout of 2 s" in plane.logs("hangs"), every=0.5)
    eventually(lambda: ask(f"{url}/").status == 503)
    plane.modal("app", "stop", "hangs", "--yes")
    assert tasks(plane, "hangs") == []


def test_a_killed_container_is_replaced(plane: TestPlane) -> None:
    url = plane.deploy("killed", open=1, min=1)
    first = plane.ready(f"{url}/who").json["task"]
    subprocess.run(["pkill", "-9", "-f", f"/{first}/"], check=False)
    eventually(lambda: f"container {first} exited with code -9 (SIGKILL)" in plane.logs("killed"), every=0.5)
    eventually(lambda: plane.ready(f"{url}/who").json["task"] != first)
    plane.modal("app", "stop", "killed", "--yes")


# ---- deployments


def test_rolling_a_new_version_loses_no_request(plane: TestPlane) -> None:
    url = plane.deploy("rolls", open=1, min=1, limit=10, target=10)
    plane.ready(f"{url}/who")
    seen: list[tuple[int, str]] = []
    stop = threading.Event()

    def knock() -> None:
        while not stop.is_set():
            answer = ask(f"{url}/who")
            seen.append((answer.status, answer.json["version"] if answer.status == 200 else ""))
            time.sleep(0.02)

    knocker = threading.Thread(target=knock)
    knocker.start()
    assert plane.deploy("rolls", open=1, min=1, limit=10, target=10, version=2) == url
    eventually(lambda: seen[-1][1] == "2")
    eventually(lambda: len(tasks(plane, "rolls")) == 1, every=0.5)
    stop.set()
    knocker.join()
    assert {status for status, _ in seen} == {200}
    versions = [version for _, version in seen]
    assert versions == sorted(versions)  # and never back
    assert [row["version"] for row in plane.json("app", "history", "rolls")] == ["v2", "v1"]
    plane.modal("app", "stop", "rolls", "--yes")


def test_recreate_ends_the_old_ones_first(plane: TestPlane) -> None:
    url = plane.deploy("again", open=1, min=1)
    first = plane.ready(f"{url}/who").json["task"]
    plane.deploy("again", "--strategy", "recreate", open=1, min=1, version=2)
    answer = plane.ready(f"{url}/who").json
    assert answer["version"] == "2"
    assert answer["task"] != first
    assert first not in tasks(plane, "again")
    plane.modal("app", "stop", "again", "--yes")


def test_a_deploy_that_changes_nothing_replaces_nothing(plane: TestPlane) -> None:
    url = plane.deploy("same", open=1, min=1)
    first = plane.ready(f"{url}/who").json["task"]
    output = plane.modal("deploy", "plain.py", T_NAME="same", T_OPEN="1", T_MIN="1").stdout
    assert "no changes detected" in output
    time.sleep(1)
    assert ask(f"{url}/who").json["task"] == first
    plane.modal("app", "rollover", "same")
    eventually(lambda: ask(f"{url}/who").json["task"] != first)
    plane.modal("app", "stop", "same", "--yes")


def test_stop_leaves_nothing_and_the_name_can_be_used_again(plane: TestPlane) -> None:
    url = plane.deploy("ends", open=1, min=1)
    plane.ready(f"{url}/who")
    follower = subprocess.Popen(
        [sys.executable, "-m", "modal", "app", "logs", "ends", "-f"],
        env=plane.environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    time.sleep(2)
    task = tasks(plane, "ends")[0]
    plane.modal("app", "stop", "ends", "--yes")
    assert not [line for line in plane.containers() if task in line]
    assert ask(url).status == 0
    output, _ = follower.communicate(timeout=15)  # it ends by itself
    assert "enter: version 1" in output
    assert "exit: hook ran" in output
    row = next(a for a in plane.json("app", "list") if a["description"] == "ends")
    assert row["state"] == "stopped"
    assert row["stopped_at"]
    again = plane.modal("app", "stop", "ends", "--yes", check=False)
    assert "already stopped" in again.stderr + again.stdout
    assert plane.deploy("ends", open=1) == url
    plane.modal("app", "stop", "ends", "--yes")


def test_info_says_where_it_is(plane: TestPlane) -> None:
    url = plane.deploy("shown", open=1)
    info = plane.json("server", "info", "shown/Server")
    assert info["server_url"] == url
    assert info["port"] == 8000
    assert (info["max_containers"], info["target_concurrency"]) == (2, 2)
    servers = plane.json("app", "info", "shown")["servers"]
    assert servers["Server"]["summary"]["authenticated"] is False
    wrong = plane.modal("server", "info", "shown/Sever", check=False)
    assert wrong.returncode == 1
    assert "shown/Server" in wrong.stderr + wrong.stdout  # what is near
    plane.modal("app", "stop", "shown", "--yes")


def test_a_server_s_own_code_may_use_volumes_and_is_refused_the_rest_by_name(plane: TestPlane) -> None:
    answer = plane.ready(plane.deploy("sdk", app="sdk.py")).json
    assert answer == {
        "commit": None,
        "reload": None,
        "upload": True,
        "dict": True,
    }
    plane.modal("app", "stop", "sdk", "--yes")
