"""What runs in a job's containers: rows through a processor, what is saved when, and what attempts leave behind."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections import deque
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import pieces

PIECES = ("batch/ledger.py.jinja", "batch/worker.py.jinja")


class Echo:
    """A processor that answers in the order in which rows came, and does what a row says."""

    def __init__(self, runtime: ModuleType, capacity: int = 4) -> None:
        self.runtime = runtime
        self.capacity = capacity
        self.waiting: deque[tuple[int, dict[str, Any]]] = deque()
        self.together: list[list[int]] = []  # rows that were in flight at once
        self.tries: dict[int, int] = {}

    def start(self, key: int, row: dict[str, Any]) -> None:
        if row["body"].get("refuse"):
            raise self.runtime.Refused("too_long", "it is too long")
        self.waiting.append((key, row))

    def step(self) -> list[tuple[int, object]]:
        self.together.append([row["row"] for _, row in self.waiting])
        key, row = self.waiting.popleft()
        body, number = row["body"], row["row"]
        self.tries[number] = self.tries.get(number, 0) + 1
        if self.tries[number] <= body.get("fails", 0):
            return [(key, self.runtime.Failed("exception", "no luck", retry=body.get("again", True)))]
        answer = body.get("answer", {"n": number})
        for _ in range(body.get("deep", 0)):
            answer = [answer]
        return [(key, answer)]

    def give_back(self) -> list[int]:
        keys = [key for key, _ in self.waiting]
        self.waiting.clear()
        return keys


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    made = pieces.module(
        *PIECES,
        folder=tmp_path,
        constants={
            "TASK": "ta-1",
            "BEGAN": 0.0,
            "UNLOADED": "unloaded",
            "SAVE_SECONDS": 0.02,
            "RETRIES": 1,
            "PATIENCE": 0.2,
            "DEATHS": 2,
            "DEATHS_ALONE": 3,
            "WAVE": 32,
            "DIED": "died",
        },
    )
    made.DATA = tmp_path / "job"  # type: ignore[attr-defined]
    made.volume = SimpleNamespace(commit=lambda: None, reload=lambda: None)  # type: ignore[attr-defined]
    made.live = SimpleNamespace(put=lambda *_: None, get=lambda _: None)  # type: ignore[attr-defined]
    monkeypatch.setattr(made.random, "uniform", lambda *_: 0.0)
    return made


def shard(runtime: ModuleType, rows: list[dict[str, Any]], number: int = 0) -> None:
    file = runtime.input_file(number)
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"row": n, "id": f"id-{n}", "url": "function", "body": row})
        for n, row in enumerate(rows, 1000 * number)
    ]
    file.write_bytes(gzip.compress("\n".join(lines).encode()))


def answers(runtime: ModuleType, number: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in runtime.read_gzip(runtime.answers_file(number))]


def work(line: Any, number: int, *more: Any) -> dict[str, Any]:
    """What a call for one shard tells of it."""
    told, seconds = line.work([number], *more)
    assert seconds >= 0
    (one,) = told
    return dict(one)


def test_every_row_ends_once_in_order(runtime: ModuleType) -> None:
    rows: list[dict[str, Any]] = [{} for _ in range(50)]
    rows[3] = {"refuse": True}
    rows[4] = {"fails": 1}  # and then it works
    rows[5] = {"fails": 9}
    rows[6] = {"fails": 9, "again": False}
    rows[7] = {"answer": float("nan")}
    rows[8] = {"deep": 100_000}
    shard(runtime, rows)
    processor = Echo(runtime)
    counts = work(runtime.Line(processor), 0, "run")
    assert (counts["rows"], counts["failed"], counts["ended"]) == (50, 5, 1)
    found = answers(runtime)
    assert [line["row"] for line in found] == list(range(50))
    assert {line["row"]: line["error"]["code"] for line in found if "error" in line} == {
        3: "too_long",
        5: "exception",
        6: "exception",
        7: "not_json",
        8: "not_json",
    }
    assert found[5]["error"]["message"] == "no luck (tried 2 times)"
    assert found[6]["error"]["message"] == "no luck"
    assert found[4]["answer"] == {"n": 4}
    assert max(map(len, processor.together)) == 4, "as many at once as it wants, and no more"
    assert not runtime.parts_folder(0).exists()


def test_shards_share_the_processor_without_a_pause(runtime: ModuleType) -> None:
    for number in range(3):
        shard(runtime, [{} for _ in range(9)], number)
    processor = Echo(runtime)
    line = runtime.Line(processor)
    threads = [threading.Thread(target=work, args=(line, number, "run")) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(3):
        assert len(answers(runtime, number)) == 9


def test_shards_of_a_call_share_its_commits(runtime: ModuleType) -> None:
    runtime.SAVE_SECONDS = 60  # type: ignore[attr-defined]
    commits: list[int] = []
    runtime.volume.commit = lambda: commits.append(1)
    for number in range(20):
        shard(runtime, [{} for _ in range(5)], number)
    runtime.Line(Echo(runtime)).work([7], "run")
    alone = len(commits)
    line = runtime.Line(Echo(runtime))
    told, _ = line.work(list(range(20)), "run")
    assert len(commits) == 2 * alone
    assert [one["rows"] for one in told] == [5] * 20, "also of the one that was done before"
    assert all(one["ended"] for one in told)
    assert all(len(answers(runtime, number)) == 5 for number in range(20))
    assert not line.open


def test_a_shard_that_ended_is_published_though_its_call_goes_on(runtime: ModuleType) -> None:
    shard(runtime, [{} for _ in range(5)])
    shard(runtime, [{} for _ in range(5)], 1)
    goes_on = threading.Event()

    class Waits(Echo):
        def step(self) -> list[tuple[int, object]]:
            if self.waiting[0][1]["row"] >= 1000:
                goes_on.wait(0.01)
                if not goes_on.is_set():
                    return []
            return super().step()

    line = runtime.Line(Waits(runtime))
    call = threading.Thread(target=line.work, args=([0, 1], "run"))
    call.start()
    deadline = time.monotonic() + 60
    while not runtime.answers_file(0).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not runtime.answers_file(1).exists()
    goes_on.set()
    call.join()
    assert len(answers(runtime, 1)) == 5


def test_who_stops_does_not_wait_for_rows_that_are_only_at_hand(runtime: ModuleType) -> None:
    shard(runtime, [{} for _ in range(500)])

    class Stops(Echo):
        def step(self) -> list[tuple[int, object]]:
            if len(self.tries) == 10:
                line.stopping.set()
            return super().step()

    processor = Stops(runtime, capacity=1000)
    line = runtime.Line(processor)
    told = work(line, 0, "run")
    assert (told["rows"], told["ended"]) == (11, 0)
    assert work(runtime.Line(Echo(runtime)), 0, "next")["rows"] == 500
    assert [one["row"] for one in answers(runtime)] == list(range(500))


def part(
    runtime: ModuleType, name: str, *lines: Any, torn: str = "", number: int = 0, driver: str = ""
) -> None:
    """A file that an attempt left behind, handed out by `driver`."""
    folder = runtime.parts_folder(number)
    lines = tuple({**line, "driver": driver} if "begin" in line else line for line in lines)
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    (folder / name).write_text(text + torn)


def test_an_attempt_goes_on_where_others_stopped(runtime: ModuleType) -> None:
    shard(runtime, [{} for _ in range(6)])
    part(
        runtime,
        "1",
        {"begin": "a"},
        {"row": 0, "id": "id-0", "answer": "first"},
        torn='{"row":1,"id":"id-1","ans',
    )
    part(runtime, "2", {"begin": "b"}, {"row": 0, "id": "id-0", "answer": "second"}, {"end": "stopped"})
    processor = Echo(runtime)
    work(runtime.Line(processor), 0, "run")
    assert [line["answer"] for line in answers(runtime)] == ["first", *({"n": n} for n in range(1, 6))]
    assert 0 not in processor.tries, "what ended is not done again"


def test_what_another_attempt_published_stays(runtime: ModuleType) -> None:
    shard(runtime, [{} for _ in range(3)])
    work(runtime.Line(Echo(runtime)), 0, "run")
    before = runtime.answers_file(0).read_bytes()
    processor = Echo(runtime)
    counts = work(runtime.Line(processor), 0, "run")
    assert (counts["rows"], counts["ended"]) == (3, 1)
    assert not processor.tries
    assert runtime.answers_file(0).read_bytes() == before


def test_after_deaths_rows_are_tried_few_at_a_time(runtime: ModuleType) -> None:
    shard(runtime, [{} for _ in range(100)])
    part(runtime, "1", {"begin": "a"})
    part(runtime, "2", {"begin": "b"})
    processor = Echo(runtime, capacity=1000)
    work(runtime.Line(processor), 0, "run")
    assert max(map(len, processor.together)) == 32
    assert len(answers(runtime)) == 100


def test_the_suspects_come_first_and_in_the_end_alone(runtime: ModuleType) -> None:
    shard(runtime, [{} for _ in range(100)])
    shard(runtime, [{} for _ in range(100)], number=1)
    part(runtime, "1", {"begin": "a"})
    part(runtime, "2", {"begin": "b"}, {"trying": [40, 41, 42], "alone": False})
    processor = Echo(runtime, capacity=1000)
    line = runtime.Line(processor)
    beside = threading.Thread(target=work, args=(line, 1, "run"))
    beside.start()
    work(line, 0, "run")
    beside.join()
    assert [rows for rows in processor.together if {40, 41, 42} & set(rows)] == [[40], [41], [42]]
    assert len(answers(runtime)) == len(answers(runtime, 1)) == 100


def test_a_row_of_which_the_container_died_alone_is_given_up(runtime: ModuleType) -> None:
    shard(runtime, [{} for _ in range(40)])
    part(runtime, "1", {"begin": "a"})
    part(runtime, "2", {"begin": "b"}, {"trying": [7, 8], "alone": False})
    part(runtime, "3", {"begin": "c"}, {"trying": [7], "alone": True})
    part(runtime, "4", {"begin": "d"}, {"trying": [7], "alone": True})
    part(runtime, "5", {"begin": "e"}, {"trying": [7], "alone": True})
    processor = Echo(runtime)
    counts = work(runtime.Line(processor), 0, "run")
    assert (counts["rows"], counts["failed"]) == (40, 1)
    assert answers(runtime)[7]["error"]["code"] == "container_died"
    assert 7 not in processor.tries


def test_twice_may_have_been_chance(runtime: ModuleType) -> None:
    shard(runtime, [{} for _ in range(40)])
    part(runtime, "1", {"begin": "a"})
    part(runtime, "2", {"begin": "b"}, {"trying": [7], "alone": True})
    part(runtime, "3", {"begin": "c"}, {"trying": [7], "alone": True})
    processor = Echo(runtime)
    work(runtime.Line(processor), 0, "run")
    assert all("error" not in line for line in answers(runtime))
    assert processor.together[0] == [7], "alone again"


def test_nothing_is_known_of_an_attempt_that_another_driver_handed_out(runtime: ModuleType) -> None:
    """Its container may still be at it, or have died of what the driver died of."""
    shard(runtime, [{} for _ in range(40)])
    for name in "123456":
        part(runtime, name, {"begin": "a"}, {"trying": [7], "alone": True}, driver="earlier")
    processor = Echo(runtime)
    work(runtime.Line(processor), 0, "run", False, "now")
    assert all("error" not in line for line in answers(runtime))
    assert len(processor.together[0]) == 4, "nor is it careful"


def test_a_container_that_had_no_row_of_a_shard_did_not_die_of_one(runtime: ModuleType) -> None:
    shard(runtime, [{} for _ in range(40)])
    for name in "123456":
        part(runtime, name, {"begin": "a"}, {"trying": [7], "alone": True}, {"trying": [], "alone": False})
    processor = Echo(runtime)
    work(runtime.Line(processor), 0, "run")
    assert all("error" not in line for line in answers(runtime))
    assert len(processor.together[0]) == 4


def test_a_row_that_failed_alone_rests_outside_and_comes_alone_again(runtime: ModuleType) -> None:
    shard(runtime, [{"fails": 1} for _ in range(3)])
    shard(runtime, [{} for _ in range(30)], number=1)
    part(runtime, "1", {"begin": "a"})
    part(runtime, "2", {"begin": "b"}, {"trying": [0, 1, 2], "alone": False})
    processor = Echo(runtime)
    line = runtime.Line(processor)
    threads = [threading.Thread(target=work, args=(line, number, "run")) for number in (1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert {row: processor.tries[row] for row in range(3)} == {0: 2, 1: 2, 2: 2}
    assert all(len(rows) == 1 for rows in processor.together if {0, 1, 2} & set(rows))
    assert len(answers(runtime)) == 3
    assert len(answers(runtime, 1)) == 30


class Disk:
    """A Volume that cannot commit until it is repaired."""

    def __init__(self) -> None:
        self.broken = False

    def commit(self) -> None:
        if self.broken:
            raise RuntimeError("commit failed")

    def reload(self) -> None:
        pass


def test_a_volume_that_cannot_commit_ends_the_attempt_and_nothing_of_it_is_said_to_be_done(
    runtime: ModuleType,
) -> None:
    disk = Disk()
    runtime.volume = disk  # type: ignore[attr-defined]
    shard(runtime, [{} for _ in range(500)])

    class Breaks(Echo):
        def step(self) -> list[tuple[int, object]]:
            if len(self.tries) >= 100:
                disk.broken = True
                time.sleep(0.005)
            return super().step()

    told = work(runtime.Line(Breaks(runtime)), 0, "run")
    assert "commit failed" in told["unwritable"]
    assert told["ended"] == 0
    assert not runtime.answers_file(0).exists()
    disk.broken = False
    assert work(runtime.Line(Echo(runtime)), 0, "run", False, "next")["rows"] == 500
    assert [line["row"] for line in answers(runtime)] == list(range(500))


def test_a_volume_that_can_be_written_again_in_time_is_no_matter(runtime: ModuleType) -> None:
    disk = Disk()
    runtime.volume = disk  # type: ignore[attr-defined]
    runtime.PATIENCE = 60  # type: ignore[attr-defined]
    shard(runtime, [{} for _ in range(500)])
    disk.broken = True
    repair = threading.Timer(0.3, lambda: setattr(disk, "broken", False))
    repair.start()
    told = work(runtime.Line(Echo(runtime)), 0, "run")
    assert (told["rows"], told["ended"]) == (500, 1)
    assert "unwritable" not in told


def test_half_a_line_is_taken_back_where_the_disk_is_full(
    runtime: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = runtime.DATA / "file"
    file.parent.mkdir(exist_ok=True)
    runtime.append(file, b"whole\n")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runtime.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        runtime.append(file, b"lost\n")
    assert file.read_bytes() == b"whole\n"


def test_a_row_that_was_last_and_not_alone_is_not_blamed(runtime: ModuleType) -> None:
    shard(runtime, [{} for _ in range(5)])
    part(runtime, "1", {"begin": "a"})
    part(runtime, "2", {"begin": "b"}, {"trying": [4], "alone": False})
    work(runtime.Line(Echo(runtime)), 0, "run")
    assert all("error" not in line for line in answers(runtime))


def test_files_are_named_as_the_work_wants_them(runtime: ModuleType) -> None:
    chat = {
        "url": "/v1/chat/completions",
        "media": ["media/a b.png"],
        "body": {
            "messages": [{"content": [{"image_url": {"url": {"$media": 0}}}, {"text": {"$media": "x"}}]}]
        },
    }
    runtime.place(chat)
    (image, text) = chat["body"]["messages"][0]["content"]  # type: ignore[index]
    assert image["image_url"]["url"] == f"file://{runtime.DATA}/media/a%20b.png"
    assert text == {"text": {"$media": "x"}}, "a user's data, and no file"
    audio = {"url": "/v1/audio/transcriptions", "media": ["m.wav"], "body": {"file": {"$media": 0}}}
    runtime.place(audio)
    assert audio["body"] == {"file_url": f"file://{runtime.DATA}/m.wav"}
    own = {"url": "function", "media": ["m.wav"], "body": {"path": {"$media": 0}}}
    runtime.place(own)
    assert own["body"] == {"path": f"{runtime.DATA}/m.wav"}


def test_what_failed_is_tried_again_once_in_a_run(runtime: ModuleType) -> None:
    rows: list[dict[str, Any]] = [{} for _ in range(10)]
    rows[3] = {"fails": 2}
    shard(runtime, rows)
    file = runtime.input_file(0)
    lines = [
        *runtime.read_gzip(file)[:9],
        b'{"row":9,"id":"id-9","bad":{"code":"invalid_json","message":"x"}}\n',
    ]
    file.write_bytes(gzip.compress(b"".join(lines)))
    processor = Echo(runtime)
    line = runtime.Line(processor)
    assert work(line, 0, "first")["failed"] == 2
    assert work(line, 0, "second", True)["failed"] == 1
    assert processor.tries == {n: 3 if n == 3 else 1 for n in range(9)}
    assert work(line, 0, "second", True)["failed"] == 1, "its container died, and it comes again"
    assert [found["row"] for found in answers(runtime) if "error" in found] == [9]
    assert answers(runtime)[3]["answer"] == {"n": 3}


# -- what the driver hands out


@pytest.fixture
def driver(tmp_path: Path) -> Any:
    made: Any = pieces.module(
        "batch/ledger.py.jinja",
        "batch/driver.py.jinja",
        folder=tmp_path,
        constants={
            "AT_ONCE": 2,
            "MOST_BYTES": 10_000,
            "USD_PER_SECOND": None,
            "UNLOADED": "unloaded",
            "MOST_UNLOADED": 3,
            "SAVE_SECONDS": 2.0,
        },
        schedule=None,
        files=False,
        writes=(),
    )
    made.DATA = tmp_path / "job"
    (made.DATA / "input").mkdir(parents=True)
    (made.DATA / "job.json").write_text(json.dumps({"shards": 100, "rows": 100_000, "copies": 0}))
    for number in range(100):
        made.input_file(number).write_bytes(bytes(1000))
    return made.Driver("run", retry_failed=True)


def test_one_shard_at_a_time_until_it_is_known_that_they_are_quick(driver: Any) -> None:
    todo = deque(range(100))
    assert driver.next_shards(todo) == [0]
    driver.together = 4
    assert driver.next_shards(todo) == [1, 2, 3, 4]


def test_no_call_has_more_than_its_share_or_than_fits(driver: Any) -> None:
    driver.together = 64
    assert driver.next_shards(deque(range(100))) == list(range(10)), "MOST_BYTES"
    assert driver.next_shards(deque(range(20))) == list(range(5)), "as many for each that may wait, twice"
    assert driver.next_shards(deque([9])) == [9]


def test_what_failed_or_is_tried_again_is_not_mixed_with_others(driver: Any) -> None:
    driver.together = 4
    driver.failures[1] = 1
    todo = deque(range(100))
    assert [driver.next_shards(todo) for _ in range(3)] == [[0], [1], [2, 3, 4, 5]]
    driver.ledger.ended = {8: {"failed": 1}, 9: {"failed": 1}}
    assert [driver.next_shards(todo) for _ in range(3)] == [[6, 7], [8, 9], [10, 11, 12, 13]]


def test_shards_that_ended_together_are_lines_of_the_ledger(driver: Any) -> None:
    counts = {"rows": 3, "failed": 1, "tokens_in": 0, "tokens_out": 0}
    driver.ledger.now[4] = counts
    driver.ledger.end("run", {4: counts, 5: counts})
    again = type(driver.ledger)()
    assert again.ended == driver.ledger.ended == {shard: {**counts, "run": "run"} for shard in (4, 5)}
    assert not driver.ledger.now


def test_what_ends_the_process_while_it_is_loaded_has_failed(runtime: ModuleType) -> None:
    """Modal starts another container for one that ended in order: without end, and without a word."""
    told: dict[str, Any] = {}
    runtime.live.put = told.__setitem__
    with pytest.raises(RuntimeError, match="SystemExit: 2"), runtime.loading():
        raise SystemExit(2)
    assert told["unloaded ta-1"][1] == "SystemExit: 2"


def test_a_job_ends_where_three_containers_could_load_nothing(driver: Any) -> None:
    def told(count: int, when: float = 1.0) -> list[tuple[str, Any]]:
        return [(f"unloaded ta-{n}", [driver.began + when + n, f"no {n}"]) for n in range(count)]

    driver.end_where_nothing_loads([*told(2), ("ta-0", {"up": [], "shards": {}})])
    driver.end_where_nothing_loads(told(9, when=-10.0))  # of an earlier run
    driver.ledger.now[0] = {"rows": 1}
    driver.end_where_nothing_loads(told(3))
    assert driver.state == "running"
    driver.ledger.now[0] = {"rows": 0}
    driver.end_where_nothing_loads(told(3))
    assert (driver.state, driver.problem) == ("failed", "it cannot be loaded: no 2")


def test_a_job_goes_on_where_others_of_its_containers_load_or_have(driver: Any) -> None:
    """Three of twenty may have had bad luck."""
    told = [(f"unloaded ta-{n}", [driver.began + n, f"no {n}"]) for n in range(4)]

    def up(task: int, ready: float | None, seen: float = 0.0) -> None:
        driver.ledger.containers[f"ta-{task}"] = [driver.began, driver.began + seen, ready, 0.0, 0]

    for task in range(4):
        up(task, None)  # those that failed
    for task in range(4, 8):
        up(task, None)
    driver.end_where_nothing_loads(told)
    assert driver.state == "running", "as many load"
    for task in range(5, 8):
        up(task, None, seen=-100.0)
    up(4, driver.began)
    driver.end_where_nothing_loads(told)
    assert driver.state == "running", "one can answer"
    up(4, None)
    driver.end_where_nothing_loads(told)
    assert (driver.state, driver.problem) == ("failed", "it cannot be loaded: no 3")


def test_a_container_that_loads_says_so_until_it_can_answer(runtime: ModuleType) -> None:
    told: list[Any] = []
    twice = threading.Event()

    def put(task: str, report: dict[str, Any]) -> None:
        told.append((task, report["up"][2], report["shards"]))
        if len(told) == 1:
            raise ConnectionError("not now")  # which is no reason not to load
        twice.set()

    runtime.live.put = put

    def load() -> None:
        assert twice.wait(30)
        raise MemoryError

    with pytest.raises(RuntimeError, match="MemoryError"), runtime.loading():
        load()
    count = len(told)
    assert set(map(repr, told)) == {"('ta-1', None, {})"}
    shard(runtime, [{}])
    runtime.Line(Echo(runtime)).work([0], "run")
    assert all(ready is not None for _, ready, _ in told[count:]), "and no more once it does"
    assert len(told) > count
