"""The log store: what filters find, whichever way a client asks; and the words of a run that is followed."""

from __future__ import annotations

import asyncio
import itertools
import json
import sqlite3
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import grpclib
import pytest
from modal_proto import api_pb2

from gpuctl.local.logs import Logs
from gpuctl.local.store import App, LogFilter, LogReader, LogRow, Store
from gpuctl.local.variants import Variants
from gpuctl.local.wire import Call, timestamp

from .planes import TestPlane, eventually
from .rpc import call

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[Logs]:
    """3,000 lines of one app, one a second since the second 1000; every seventh says "seven", every 500th on stderr."""
    store = Store(tmp_path / "db")
    store.add_app(App("ap-1", "en-1", "x", api_pb2.APP_STATE_STOPPED, 0, 0, 0, 0, "{}"))
    store.add_app(App("ap-2", "en-1", "y", api_pb2.APP_STATE_STOPPED, 0, 0, 0, 0, "{}"))
    made = Logs(store, Variants(store))
    rows = []
    for number in range(3000):
        words = f"line {number}{' seven' if number % 7 == 0 else ''}\n"
        rows.append(LogRow("ap-1", "fu-1", "ta-1", 2 if number % 500 == 0 else 1, 1000.0 + number, words))
        rows.append(LogRow("ap-2", "fu-2", "ta-2", 1, 1000.0 + number, "other seven\n"))
    store.add_logs(rows)
    yield made
    made.close()
    store.close()


def ask(logs: Logs, **fields: Any) -> list[str]:
    times = {name: timestamp(fields.pop(name)) for name in ("since", "until") if name in fields}
    request = api_pb2.AppFetchLogsRequest(app_id="ap-1", **fields, **times)
    answer = asyncio.run(logs.fetch(request, Call("", "")))
    return [item.data.rstrip("\n") for batch in answer.batches for item in batch.items]


@pytest.mark.parametrize("fields", [{}, {"search_text": "seven"}, {"source": 2}, {"search_text": "never"}])
def test_a_client_that_looks_further_and_further_back_finds_what_one_look_does(
    logs: Logs, fields: dict[str, Any]
) -> None:
    for limit, until in itertools.product((1, 5, 300, 20000), (3500, 3999.5, 9000)):
        for since in (3990, 3800, 3800, 2000, 500):  # as `modal app logs` does
            found = ask(logs, since=since, until=until, limit=limit, **fields)
        assert (
            found
            == [
                f"line {n}{' seven' if n % 7 == 0 else ''}"
                for n in range(3000)
                if n + 1000 <= until
                and (n % 7 == 0 if fields.get("search_text") == "seven" else "search_text" not in fields)
                and (n % 500 == 0 or "source" not in fields)
            ][-limit:]
        )


def test_new_lines_are_found_though_the_same_was_asked_before(logs: Logs) -> None:
    assert ask(logs, since=1000, limit=2) == ["line 2998", "line 2999"]
    logs._store.add_logs([LogRow("ap-1", "", "", 1, 5000.0, "new\n")])
    assert ask(logs, since=1000, limit=2) == ["line 2999", "new"]
    assert ask(logs, limit=1) == ["new"]


def test_who_follows_sees_each_line_once_and_what_does_not_match_is_not_read_again(logs: Logs) -> None:
    wanted = LogFilter("ap-1", search="line 1000\n")
    rows, last = logs._reader.after(wanted, 0, 10)
    assert [row.data for row in rows] == ["line 1000\n"]
    assert last == 6000
    seen: list[str] = []
    while True:
        rows, last = logs._reader.after(LogFilter("ap-1"), last if seen else 0, 700)
        if not rows:
            break
        seen += [row.data for row in rows]
    assert seen == [f"line {n}{' seven' if n % 7 == 0 else ''}\n" for n in range(3000)]


def test_what_cannot_be_told_apart_is_refused(plane: TestPlane) -> None:
    made = call(plane.now, "AppCreate", api_pb2.AppCreateRequest(description="empty")).app_id
    for name, request in (
        ("AppFetchLogs", api_pb2.AppFetchLogsRequest(app_id=made, sandbox_id="sb-1")),
        ("AppCountLogs", api_pb2.AppCountLogsRequest(app_id=made, sandbox_id="sb-1")),
        ("AppGetLogs", api_pb2.AppGetLogsRequest(app_id=made, sandbox_id="sb-1")),
    ):
        answer = call(plane.now, name, request)
        assert isinstance(answer, grpclib.GRPCError), name
        assert answer.status is grpclib.Status.UNIMPLEMENTED, name


SPEAK = """
import json, modal
say = modal.Function.from_name("talk", "say")
calls = [say.spawn(word) for word in ("one", "two")]
modal.FunctionCall.gather(*calls)
modal.Cls.from_name("talk", "Speaker")(name="Ada").say.remote()
modal.Function.from_name("talk", "pause").spawn()
streamed = sorted(entry.message for entry in calls[1].logs.stream(timeout=60))
print(json.dumps([[call.object_id for call in calls], streamed]))
"""


def test_words_are_told_apart_by_call_and_by_class(plane: TestPlane) -> None:
    plane.modal("deploy", "talk.py")
    done = subprocess.run(
        [sys.executable, "-c", SPEAK], env=plane.environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (one, two), streamed = json.loads(done.stdout)
    assert streamed == ["err two\n", "out two\n"]
    assert sorted(plane.logs("talk", "--function-call", one).splitlines()) == ["err one", "out one"]
    shown = plane.logs("talk", "--function-call", two, "--source", "stderr", "--show-function-call-id")
    assert shown == f"{two} err two\n"
    info = plane.json("app", "info", "talk")
    assert plane.logs("talk", "--function", info["functions"]["Speaker.*"]["id"]) == "I am Ada\n"
    # A line whose end does not come is shown all the same.
    pause = info["functions"]["pause"]["id"]
    assert eventually(lambda: plane.logs("talk", "--function", pause).strip()) == "so far"
    plane.quick("app", "stop", "talk", "--yes")


def test_a_database_of_an_earlier_version_is_brought_up_to_date(tmp_path: Path) -> None:
    Store(tmp_path / "db").close()
    old = sqlite3.connect(tmp_path / "db")
    old.executescript(
        "ALTER TABLE logs DROP COLUMN call_id; ALTER TABLE logs DROP COLUMN input_id; PRAGMA user_version = 1"
    )
    old.close()
    for _ in range(2):
        store = Store(tmp_path / "db")
        store.add_logs([LogRow("ap-1", "fu-1", "ta-1", 1, 1.0, "line", "fc-1")])
        store.close()
    reader = LogReader(tmp_path / "db")
    assert len(reader.last(LogFilter("ap-1", call_id="fc-1"), 10)) == 2
    reader.close()
