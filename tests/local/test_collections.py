"""Dicts and Queues: the whole SDK from this machine and from a container, the CLI, and what `kill -9` may not take."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import Any

import grpclib
import pytest
from grpclib.client import Channel
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from modal_proto import api_pb2

from .planes import APPS, TestPlane
from .rpc import call, call_on, credentials

DICTS = {
    "first": [1, [2], "default", {"c": None}],
    "missing": "KeyError",
    "in": [True, False, True],
    "len": 4,
    "skip": [False, True, 1],
    "keys": ["3", "a", "b", "e", "f"],
    "values": ["1", "6", "[2]", "five", "{'c': None}"],
    "items": [["a", 1], ["f", 6]],
    "pop": [1, "gone", "KeyError"],
    "large": 50 << 20,
    "info": True,
    "same": "five",
    "after del": False,
    "ephemeral": 1,
}
QUEUES = {
    "iterate": [1, 2, 3, 4],
    "len": [4, 1, 5],
    "get": [1, [2, 3], "other"],
    "rest": [4, None, []],
    "empty": "Empty",
    "info": True,
    "late": ["late", True],
    "polled": ["polled"],
    "expired": [0, None],
    "full": ["Full", "Full", 5000],
    "too large": ["RequestSizeError", "RequestSizeError"],
    "cleared": 0,
    "each once": True,
    "ephemeral": "x",
}


def sdk(plane: TestPlane, code: str) -> Any:
    """What a program that uses the SDK prints, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", "import json, modal\n" + code],
        env=plane.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_sdk_from_this_machine(plane: TestPlane) -> None:
    done = subprocess.run(
        [sys.executable, "collections_sdk.py", "sdk"],
        env=plane.environment(),
        cwd=APPS,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"dicts": DICTS, "queues": QUEUES}


@pytest.mark.slow
def test_the_sdk_in_a_container(plane: TestPlane) -> None:
    url = plane.deploy("collected", app="collections_sdk.py")
    assert plane.ready(url).json == {"dicts": DICTS, "queues": QUEUES}
    plane.quick("app", "stop", "collected", "--yes")
    # The container's Dict is the one that this machine sees.
    assert plane.quick("dict", "get", "in-container", "e").stdout == "five\n"


def test_the_command_lines(plane: TestPlane) -> None:
    plane.quick("dict", "create", "shelf")
    plane.quick("dict", "create", "shelf")  # again is fine
    plane.quick("queue", "create", "line")
    code = "d = modal.Dict.from_name('shelf'); d['k'] = 'v'; d['n'] = 1\n"
    code += "q = modal.Queue.from_name('line'); q.put_many(['x', 'y']); q.put('z', partition='p'); print(0)"
    sdk(plane, code)
    assert plane.quick("dict", "get", "shelf", "k").stdout == "v\n"
    assert plane.quick("dict", "get", "shelf", "none").stdout == "None\n"
    assert {row["key"]: row["value"] for row in plane.json("dict", "items", "shelf")} == {"k": "v", "n": 1}
    assert "shelf" in [row["name"] for row in plane.json("dict", "list")]
    assert plane.quick("queue", "len", "line").stdout == "2\n"
    assert plane.quick("queue", "len", "line", "--total").stdout == "3\n"
    assert plane.quick("queue", "len", "line", "--partition", "p").stdout == "1\n"
    assert plane.quick("queue", "peek", "line", "5").stdout == "x\ny\n"
    listed = next(row for row in plane.json("queue", "list") if row["name"] == "line")
    assert (listed["partitions"], listed["total_size"], listed["total_size_truncated"]) == (2, 3, False)
    plane.quick("queue", "clear", "line", "--yes")
    assert plane.quick("queue", "len", "line", "--total").stdout == "1\n"
    plane.quick("queue", "clear", "line", "--all", "--yes")
    assert plane.quick("queue", "len", "line", "--total").stdout == "0\n"
    plane.quick("dict", "clear", "shelf", "--yes")
    assert plane.json("dict", "items", "shelf") == []
    for noun, name in (("dict", "shelf"), ("queue", "line")):
        plane.quick(noun, "delete", name, "--yes")
        assert name not in [row["name"] for row in plane.json(noun, "list")]
        gone = plane.quick(noun, "delete", name, "--yes", check=False)
        assert gone.returncode == 1
        assert f"'{name}' not found in environment 'main'" in " ".join((gone.stdout + gone.stderr).split())
        plane.quick(noun, "delete", name, "--yes", "--allow-missing")


def test_environments_have_their_own_and_take_them_along(plane: TestPlane) -> None:
    plane.quick("environment", "create", "shelves")
    plane.quick("dict", "create", "mine", "-e", "shelves")
    assert [row["name"] for row in plane.json("dict", "list", "-e", "shelves")] == ["mine"]
    assert "mine" not in [row["name"] for row in plane.json("dict", "list")]
    found = call(
        plane.now,
        "DictGetOrCreate",
        api_pb2.DictGetOrCreateRequest(deployment_name="mine", environment_name="shelves"),
    )
    plane.quick("environment", "delete", "shelves", "--yes")
    gone = call(plane.now, "DictLen", api_pb2.DictLenRequest(dict_id=found.dict_id))
    assert gone.status is grpclib.Status.NOT_FOUND


def test_a_kill_takes_nothing_and_a_retry_repeats_nothing(new_plane: TestPlane) -> None:
    new_plane.up()
    made = api_pb2.QueueGetOrCreateRequest(deployment_name="q", object_creation_type=1)
    queue_id = call(new_plane.now, "QueueGetOrCreate", made).queue_id
    made_dict = api_pb2.DictGetOrCreateRequest(deployment_name="d", object_creation_type=1)
    dict_id = call(new_plane.now, "DictGetOrCreate", made_dict).dict_id

    def again(name: str, request: Any, key: str) -> Any:
        return call(new_plane.now, name, request, credentials(new_plane.now) | {"x-idempotency-key": key})

    put = api_pb2.QueuePutRequest(queue_id=queue_id, values=[b"1", b"22", b"", b"4"])
    get = api_pb2.QueueGetRequest(queue_id=queue_id, n_values=3)
    update = api_pb2.DictUpdateRequest(
        dict_id=dict_id, updates=[api_pb2.DictEntry(key=b"k", value=b"v")], if_not_exists=True
    )
    again("QueuePut", put, "put")
    assert again("DictUpdate", update, "update").created
    new_plane.kill()
    new_plane.up()
    again("QueuePut", put, "put")  # the client never saw the answer
    assert again("DictUpdate", update, "update").created
    assert call(new_plane.now, "QueueLen", api_pb2.QueueLenRequest(queue_id=queue_id)).len == 4
    assert list(again("QueueGet", get, "get").values) == [b"1", b"22", b""]
    new_plane.kill()
    new_plane.up()
    assert list(again("QueueGet", get, "get").values) == [b"1", b"22", b""]
    assert list(again("QueueGet", get, "next").values) == [b"4"]
    pop = api_pb2.DictPopRequest(dict_id=dict_id, key=b"k")
    assert again("DictPop", pop, "pop").value == again("DictPop", pop, "pop").value == b"v"
    assert not again("DictPop", pop, "other").found


def test_who_waits_is_woken_by_the_end_of_the_queue(plane: TestPlane) -> None:
    made = api_pb2.QueueGetOrCreateRequest(deployment_name="ends", object_creation_type=1)
    queue_id = call(plane.now, "QueueGetOrCreate", made).queue_id

    async def run() -> Any:
        channel = Channel("127.0.0.1", int(plane.now.url.rpartition(":")[2]))
        mine = credentials(plane.now)
        get = api_pb2.QueueGetRequest(queue_id=queue_id, n_values=1, timeout=15)
        waiting = asyncio.create_task(call_on(channel, "ModalClient", "QueueGet", get, mine))
        await asyncio.sleep(0.3)
        await call_on(
            channel, "ModalClient", "QueueDelete", api_pb2.QueueDeleteRequest(queue_id=queue_id), mine
        )
        answer = await asyncio.wait_for(waiting, 60)
        channel.close()
        return answer

    assert asyncio.run(run()).status is grpclib.Status.NOT_FOUND


@example(text="", key=b"", last=str(-(2**63) - 1), number=0)
@given(
    text=st.text(max_size=30),
    key=st.binary(max_size=70),
    last=st.one_of(st.text(max_size=5), st.integers().map(str)),
    number=st.integers(-(2**31), 2**31 - 1),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_request_is_our_failure(plane: TestPlane, text: str, key: bytes, last: str, number: int) -> None:
    """Whatever is in a request: an answer, or an error that says what is wrong with it, and never INTERNAL."""
    made = api_pb2.QueueGetOrCreateRequest(deployment_name="fuzz", object_creation_type=1)
    queue = {"queue_id": call(plane.now, "QueueGetOrCreate", made).queue_id}
    for name, fields in (
        ("QueueGetOrCreate", {"deployment_name": text, "environment_name": text}),
        ("DictGetOrCreate", {"deployment_name": text, "object_creation_type": 1}),
        ("QueuePut", {**queue, "partition_key": key, "values": [key], "partition_ttl_seconds": number}),
        ("QueueGet", {**queue, "partition_key": key, "n_values": number}),
        ("QueueNextItems", {**queue, "partition_key": key, "last_entry_id": last}),
        ("QueueLen", {"queue_id": text, "partition_key": key}),
        ("DictGet", {"dict_id": queue["queue_id"], "key": key}),
        ("DictList", {"pagination": {"max_objects": number, "created_before": number}}),
    ):
        answer = call(plane.now, name, getattr(api_pb2, f"{name}Request")(**fields))
        if isinstance(answer, grpclib.GRPCError):
            assert answer.status in (grpclib.Status.INVALID_ARGUMENT, grpclib.Status.NOT_FOUND), (
                name,
                answer,
            )


@pytest.mark.parametrize("noun", ["dict", "queue"])
def test_a_name_that_is_none(plane: TestPlane, noun: str) -> None:
    done = plane.quick(noun, "create", "a/b", check=False)
    assert done.returncode != 0
    assert "a/b" in done.stdout + done.stderr
