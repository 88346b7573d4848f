"""`gpuctl batch` with the user's own function: nothing is lost, and nothing is done twice, whatever dies."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gpuctl.local import client
from gpuctl.paths import state_dir

from .planes import APPS, TestPlane, eventually, processes

if TYPE_CHECKING:
    from collections.abc import Iterator

WORK = str(APPS / "batch_work.py")


class Batch:
    """`gpuctl batch` in a folder of its own."""

    def __init__(self, plane: TestPlane, folder: Path) -> None:
        self.plane = plane
        self.folder = folder

    def rows(self, count: int, name: str = "rows.jsonl", **more: Any) -> str:
        lines = (json.dumps({"n": n, **more}) for n in range(count))
        (self.folder / name).write_text("\n".join(lines) + "\n")
        return name

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "gpuctl", "batch", *words],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *words: str, code: int = 0) -> tuple[str, str]:
        """Its stdout and stderr."""
        process = self.start(*words)
        out, err = process.communicate(timeout=240)
        assert process.returncode == code, (process.returncode, out, err)
        return out, err

    def json(self, *words: str) -> Any:
        return json.loads(self.run(*words, "--json")[0])

    def lines(self, name: str) -> list[Any]:
        file = self.folder / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(scope="module")
def batch_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestPlane]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patch.setenv("GPUCTL_TARGET", "local")
        plane = TestPlane(state_dir() / "local")
        plane.up()
        yield plane
        plane.down()


@pytest.fixture
def batch(batch_plane: TestPlane, tmp_path: Path) -> Batch:
    return Batch(batch_plane, tmp_path)


def check_squares(batch: Batch, count: int, answers: str = "out.jsonl", *, tries: int = 2) -> None:
    """Exactly one line for each row, in order, and the right one."""
    right = [n for n in range(count) if n % 100 != 99]
    found = batch.lines(answers)
    assert [line["custom_id"] for line in found] == [f"row-{n}" for n in right]
    assert [line["response"]["body"] for line in found] == [{"square": n**2} for n in right]
    errors = batch.lines(answers.replace(".jsonl", ".errors.jsonl"))
    assert [line["custom_id"] for line in errors] == [f"row-{n}" for n in range(count) if n % 100 == 99]
    for line in errors:
        assert line["error"]["code"] == "exception"
        assert "is not liked" in line["error"]["message"]
        assert ("(tried 2 times)" in line["error"]["message"]) == (tries == 2)


def test_a_job_from_its_rows_to_its_answers(batch: Batch) -> None:
    rows = batch.rows(250)
    work = (f"{WORK}:square", rows, "-o", "out.jsonl", "--retries", "1", "--max-containers", "2")
    told = batch.json(*work)
    assert (told["state"], told["rows"], told["done"], told["failed"]) == ("done", 250, 248, 2)
    assert told["errors"].endswith("out.errors.jsonl")
    check_squares(batch, 250)

    # Again: the output is the job's own, and becomes the same; with a note in it, it is somebody else's.
    before = (batch.folder / "out.jsonl").read_bytes()
    _, err = batch.run(*work)
    assert "nothing is paid twice" in err
    assert (batch.folder / "out.jsonl").read_bytes() == before
    (batch.folder / "out.jsonl").write_bytes(before + b"{}\n")
    _, err = batch.run(*work, code=2)
    assert "exists" in err
    (batch.folder / "out.jsonl").write_bytes(before)
    # With another, the answers that were paid for are fetched.
    began = batch.json("status", told["job"])["run"]
    again = batch.json(*(word.replace("out.jsonl", "again.jsonl") for word in work))
    assert (again["job"], again["state"]) == (told["job"], "done")
    assert batch.json("status", told["job"])["run"] == began
    check_squares(batch, 250, "again.jsonl")
    assert told["job"] in [row["job"] for row in batch.json("ls")]

    told_again = batch.json("resume", told["job"], "--detach")
    assert told_again == {"job": told["job"], "state": "done", "rows": 250}, "and does not run"
    out, _ = batch.run("logs", told["job"], "--tail", "1000")
    assert "square of 7" in out, "what the function printed"
    assert "@gpuctl" not in out
    for output, says in ((rows, "is a file of the input"), ("out.csv", "kept no columns of the input")):
        _, err = batch.run("fetch", told["job"], "-o", output, "--overwrite", code=2)
        assert says in err

    # Other rows are another job.
    rows = batch.rows(10)
    other = batch.json(f"{WORK}:square", rows, "-o", "other.jsonl")
    assert other["job"] != told["job"]

    batch.run("rm", told["job"], "--yes")
    assert told["job"] not in [row["job"] for row in batch.json("ls")]
    _, err = batch.run("status", told["job"], code=2)
    assert other["job"] in err, "the jobs that there are"


def test_lists_of_rows_columns_and_bad_lines(batch: Batch) -> None:
    (batch.folder / "table.csv").write_text("n,who\n0,Ann\n1,Bob\nodd\n3,Eve\n")
    out = batch.json(f"{WORK}:Adder", "table.csv", "-o", "out.csv", "--batch-size", "2")
    assert (out["done"], out["failed"]) == (3, 1)
    with (batch.folder / "out.csv").open() as file:
        answers = list(csv.DictReader(file))
    assert [(row["n"], row["who"]) for row in answers] == [("0", "Ann"), ("1", "Bob"), ("3", "Eve")]
    assert json.loads(answers[0]["answer"])["n"] == "0"
    (error,) = batch.lines("out.errors.jsonl")
    assert "table.csv:4" in error["error"]["message"]

    _, err = batch.run(f"{WORK}:Adder", "table.csv", "-o", "strict.csv", "--strict", code=2)
    assert "table.csv:4" in err


@pytest.mark.slow
def test_what_was_cancelled_goes_on_where_it_stopped(batch: Batch) -> None:
    batch.plane.modal("volume", "create", "gate")
    (batch.folder / "open").write_text("yes")
    words = (f"{WORK}:gated", batch.rows(1000), "-o", "out.jsonl", "--retries", "0", "--volume", "gate:/gate")
    batch.run(*words, "--detach", "--name", "long")
    eventually(lambda: batch.json("status", "long").get("done", 0) >= 100, seconds=120)
    batch.run("cancel", "long")
    stopped = batch.json("status", "long")
    assert stopped["state"] == "stopped"
    assert 100 <= stopped["done"] < 990
    _, err = batch.run("fetch", "long", code=1)
    assert "resume" in err or "wait" in err
    batch.plane.modal("volume", "put", "gate", str(batch.folder / "open"), "/open")
    told = batch.json("resume", "long")
    assert (told["state"], told["done"], told["failed"]) == ("done", 990, 10)
    assert told["ended_in_run"] == 1000 - stopped["done"] - stopped["failed"], "and the speed is of these"
    check_squares(batch, 1000, tries=1)


def test_a_cap_stops_what_is_charged(batch: Batch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on Modal, with the prices that this plane tells: it is an account like any other."""
    monkeypatch.delenv("GPUCTL_TARGET")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where prices are kept
    for name, value in batch.plane.now.client_env().items():
        monkeypatch.setenv(name, value)
    rows = batch.rows(3000, seconds=0.05)
    words = (
        f"{WORK}:slowly",
        rows,
        "-o",
        "out.jsonl",
        "--retries",
        "0",
        "--name",
        "capped",
        "--cpu",
        "64",
        "-y",
    )
    _, err = batch.run(*words, "--max-cost", "0.01", code=1)
    assert "the job stops at $0.01" in err
    assert "capped was stopped: $0.0" in err
    assert "batch resume capped" in err
    stopped = batch.json("status", "capped")
    assert (stopped["state"], stopped["rows"]) == ("stopped", 3000)
    assert 0.01 <= stopped["usd"] < 0.02
    assert 0 < stopped["done"] < 2970
    assert "--max-cost 0.02` goes on, up to a higher cap" in err
    for again in (("resume", "capped"), (*words, "--max-cost", "0.01")):
        _, err = batch.run(*again, "-y", code=2)
        assert "--max-cost: $0.01 are spent already" in err, "and nothing is started only to be stopped"
    if stopped["shards_ended"]:
        batch.run("fetch", "capped", "--partial")  # where the job puts its answers, which replace these
        kept = [line["custom_id"] for line in batch.lines("out.jsonl")]
        assert kept == [f"row-{n}" for n in range(3000) if f"row-{n}" in kept], "of whole shards, in order"
    else:
        _, err = batch.run("fetch", "capped", "--partial", code=1)
        assert "no shard of it has ended" in err
        assert not (batch.folder / "out.jsonl").exists()

    told = batch.json("resume", "capped", "--max-cost", "5", "--concurrency", "50", "-y")
    assert (told["state"], told["done"], told["failed"]) == ("done", 2970, 30)
    assert told["usd"] > stopped["usd"]
    check_squares(batch, 3000, tries=1)


def test_a_row_that_kills_its_container_is_told_and_the_others_are_answered(batch: Batch) -> None:
    lines = [{"n": n} for n in range(60)]
    lines[17]["poison"] = True  # type: ignore[assignment]
    (batch.folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    told = batch.json(f"{WORK}:poisoned", "rows.jsonl", "-o", "out.jsonl")
    assert (told["done"], told["failed"]) == (59, 1)
    answers = [line["response"]["body"] for line in batch.lines("out.jsonl")]
    assert answers == [n + 1 for n in range(60) if n != 17]
    (error,) = batch.lines("out.errors.jsonl")
    assert (error["custom_id"], error["error"]["code"]) == ("row-17", "container_died")


def test_work_that_cannot_start_ends_the_job_with_its_reason(batch: Batch) -> None:
    (batch.folder / "bad.py").write_text("import no_such_module\n\ndef process(row):\n    return row\n")
    _, err = batch.run("bad.py:process", batch.rows(5), "-o", "out.jsonl", code=1)
    assert "no_such_module" in err
    assert not (batch.folder / "out.jsonl").exists()


# -- whatever dies


def storm(
    batch: Batch, count: int, kills: int, seed: int, out: str = "out.jsonl", **more: Any
) -> Counter[str]:
    """kill -9 of workers, of the driver, of the client and of the plane, spread over the job."""
    chance = random.Random(seed)
    words = (
        *(f"{WORK}:slowly", batch.rows(count, **more), "-o", out),
        *("--retries", "0", "--max-containers", "2", "--name", f"storm-{seed}"),
    )
    killed: Counter[str] = Counter()
    process = batch.start(*words)
    deadline = time.monotonic() + 240 + 15 * kills
    next_kill = time.monotonic() + 3
    while time.monotonic() < deadline:
        time.sleep(0.05)
        if process.poll() is not None:
            if process.returncode == 0:
                return killed
            assert process.returncode in (1, -signal.SIGKILL), process.communicate()
            process = batch.start(*words)
        if killed.total() < kills and time.monotonic() > next_kill:
            next_kill = time.monotonic() + chance.uniform(0.2, 2)
            containers = processes(f"{batch.plane.state_dir}/run/", "container_init.py")
            if not containers and chance.random() < 0.9:
                continue  # on a busy machine none would ever come up
            kind = chance.choice(("client", "plane", "container", "container", "container"))
            plane = client.running(batch.plane.state_dir)
            pids = {
                "client": [process.pid],
                "plane": [plane.pid] if plane else [],
                "container": containers,
            }[kind]
            if pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(chance.choice(pids), signal.SIGKILL)
                    killed[kind] += 1
    pytest.fail(f"not done in time, after {killed}: {batch.run('status', f'storm-{seed}')}")


@pytest.mark.slow
def test_a_few_kills(batch: Batch) -> None:
    killed = storm(batch, 2000, kills=6, seed=4)
    assert killed.total() > 0
    check_squares(batch, 2000, tries=1)


def without_ids(lines: list[Any]) -> list[Any]:
    """What must be equal in two runs: all but the ids, which are made of the job's name."""
    for line in lines:
        line.pop("id")
        if line["response"] is not None:
            line["response"].pop("request_id")
    return lines


@pytest.mark.slow
def test_a_hundred_kills(batch: Batch) -> None:
    """On 20,000 rows, of which each takes so long that the storm ends before they do."""
    killed = storm(batch, 20_000, kills=100, seed=7, seconds=0.01)
    assert killed.total() == 100, killed
    assert min(killed[kind] for kind in ("client", "plane", "container")) > 5, killed
    storm(batch, 20_000, kills=0, seed=0, out="calm.jsonl", seconds=0.001)
    for name in ("{}.jsonl", "{}.errors.jsonl"):
        assert without_ids(batch.lines(name.format("out"))) == without_ids(batch.lines(name.format("calm")))
    check_squares(batch, 20_000, tries=1)


BAD_LINES = [
    (b'{"n": 1', "invalid_json"),
    (b"[1, 2]", "invalid_row"),
    (b'"text"', "invalid_row"),
    (b'{"n": NaN}', "invalid_json"),
    (b'{"n": "\xff"}', "wrong_encoding"),
    (b'{"n": "\\ud800"}', "invalid_json"),
    (b"[" * 5000 + b"]" * 5000, "invalid_json"),
]


@pytest.mark.slow
def test_ten_thousand_malformed_rows_among_a_hundred_thousand_good_ones(batch: Batch) -> None:
    good: list[int] = []
    bad: dict[int, str] = {}  # by their line
    with (batch.folder / "rows.jsonl").open("wb") as file:
        for line in range(1, 110_001):
            if line % 11 == 5:
                text, code = BAD_LINES[line // 11 % len(BAD_LINES)]
                bad[line] = code
                file.write(text + b"\n")
            else:
                good.append(line)
                file.write(b'{"n": %d}\n' % line)
    assert len(bad) == 10_000
    told = batch.json(f"{WORK}:Adder", "rows.jsonl", "-o", "out.jsonl", "--batch-size", "100")
    assert (told["state"], told["done"], told["failed"]) == ("done", 100_000, 10_000)
    answers = batch.lines("out.jsonl")
    assert [answer["response"]["body"]["n"] for answer in answers] == good
    assert [answer["custom_id"] for answer in answers] == [f"row-{line - 1}" for line in good]
    errors = batch.lines("out.errors.jsonl")
    assert [error["custom_id"] for error in errors] == [f"row-{line - 1}" for line in bad]
    for error, (line, code) in zip(errors, bad.items(), strict=True):
        assert error["error"]["code"] == code, error
        assert error["error"]["message"].startswith(f"rows.jsonl:{line}: "), error


@pytest.mark.slow
def test_what_failed_is_tried_again_with_other_options(batch: Batch) -> None:
    (batch.folder / "fussy.py").write_text(
        "import os\n\ndef process(row):\n    if os.path.exists('/marks/fixed') or row['n'] != 3:\n"
        "        return row['n']\n    raise ValueError('not yet')\n"
    )
    batch.plane.modal("volume", "create", "marks-of-batch")
    (batch.folder / "fixed").write_text("yes")
    words = ("fussy.py:process", batch.rows(8), "-o", "out.jsonl", "--volume", "marks-of-batch:/marks")
    told = batch.json(*words, "--retries", "0")
    assert (told["done"], told["failed"]) == (7, 1)
    batch.plane.modal("volume", "put", "marks-of-batch", str(batch.folder / "fixed"), "/fixed")
    told = batch.json("resume", told["job"], "--retry-failed", "--max-containers", "2")
    assert (told["done"], told["failed"]) == (8, 0)
    assert [line["response"]["body"] for line in batch.lines("out.jsonl")] == list(range(8))
    assert not (batch.folder / "out.errors.jsonl").exists()
