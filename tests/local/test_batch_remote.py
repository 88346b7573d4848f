"""Jobs whose rows or answers are in Volumes: read and written there, by the same code as on this machine."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gpuctl.paths import state_dir

from .planes import TestPlane, eventually
from .test_batch import WORK, Batch, check_squares

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestPlane]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patch.setenv("GPUCTL_TARGET", "local")
        plane = TestPlane(state_dir() / "local")
        plane.up()
        yield plane
        plane.down()


@pytest.fixture
def batch(plane: TestPlane, tmp_path: Path) -> Batch:
    return Batch(plane, tmp_path)


def put(batch: Batch, name: str, volume: str, path: str) -> None:
    batch.plane.quick("volume", "create", volume, check=False)
    batch.plane.quick("volume", "put", "--force", volume, str(batch.folder / name), path)


def got(batch: Batch, volume: str, path: str) -> Path:
    to = batch.folder / path.rpartition("/")[2]
    batch.plane.quick("volume", "get", "--force", volume, path, str(to))
    return to


@pytest.mark.slow
def test_rows_of_a_volume_become_answers_in_another(batch: Batch) -> None:
    with (batch.folder / batch.rows(120)).open("a") as file:
        file.write("oops\n")
    put(batch, "rows.jsonl", "squares", "/data/rows.jsonl")
    work = (f"{WORK}:square", "volume://squares/data/rows.jsonl", "-o", "volume://made/deep/out.jsonl")
    told = batch.json(*work, "--name", "away", "--retries", "0")
    assert (told["rows"], told["done"], told["failed"]) == (121, 119, 2)
    assert told["output"] == "volume://made/deep/out.jsonl"
    assert told["errors"] == "volume://made/deep/out.errors.jsonl"
    lines = [json.loads(line) for line in got(batch, "made", "deep/out.jsonl").read_text().splitlines()]
    assert [line["response"]["body"] for line in lines] == [{"square": n**2} for n in range(120) if n != 99]
    errors = got(batch, "made", "deep/out.errors.jsonl").read_text().splitlines()
    # Files are called as they are where they are.
    assert json.loads(errors[1])["error"]["message"].startswith(
        "volume://squares/data/rows.jsonl:121: not JSON"
    )
    row = next(row for row in batch.json("ls") if row["job"] == "away")
    assert (row["state"], row["rows"]) == ("done", 121)

    # The same command finds that nothing changed, and what it made is here, too.
    began = batch.json("status", "away")["run"]
    assert batch.json(*work, "--name", "away")["done"] == 119
    assert batch.json("status", "away")["run"] == began
    batch.json("fetch", "away", "-o", "here.jsonl")
    assert len(batch.lines("here.jsonl")) == 119

    # Other rows in the same place are noticed.
    batch.rows(7)
    put(batch, "rows.jsonl", "squares", "/data/rows.jsonl")
    _, err = batch.run(*work, "--name", "away", code=2)
    assert "has changed since job 'away'" in err
    assert "(121 rows then, 7 now)" in err

    # Answers that are there are no other job's to replace.
    _, err = batch.run(*work, "--name", "other", code=2)
    assert "volume://made/deep/out.jsonl: exists" in err
    told = batch.json(*work, "--name", "other", "--overwrite")
    assert (told["done"], told["errors"]) == (7, None)
    assert len(got(batch, "made", "deep/out.jsonl").read_text().splitlines()) == 7
    left = batch.plane.json("volume", "ls", "made", "deep")
    assert [entry["filename"] for entry in left] == ["deep/out.jsonl"]


def test_rows_of_this_machine_and_answers_in_a_volume(batch: Batch) -> None:
    rows = batch.rows(30)
    told = batch.json(f"{WORK}:square", rows, "-o", "volume://made/packed.csv.gz", "--format", "csv")
    assert (told["done"], told["output"]) == (30, "volume://made/packed.csv.gz")
    table = gzip.decompress(got(batch, "made", "packed.csv.gz").read_bytes()).decode().splitlines()
    assert table[:2] == ["n,answer", '0,"{""square"":0}"']


def test_a_glob_in_a_volume_and_answers_on_this_machine(batch: Batch) -> None:
    lines = [json.dumps({"n": n}) + "\n" for n in range(120)]
    for number in range(3):
        (batch.folder / "part").write_text("".join(lines[number * 40 : number * 40 + 40]))
        put(batch, "part", "parts", f"/day/part-{number * 9}.jsonl")
    told = batch.json(f"{WORK}:square", "volume://parts/day/*.jsonl", "-o", "out.jsonl", "--retries", "1")
    assert (told["rows"], told["output"]) == (120, "out.jsonl")
    check_squares(batch, 120)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("volume://nowhere/rows.jsonl", "no Volume 'nowhere'"),
        ("volume://parts/nothing.jsonl", "volume://parts/nothing.jsonl: there is no such file"),
        ("volume://parts/*.nothing", "volume://parts/*.nothing: no files there"),
    ],
)
def test_rows_that_are_not_there(batch: Batch, path: str, says: str) -> None:
    (batch.folder / "one.jsonl").write_text('{"n": 1}\n')
    put(batch, "one.jsonl", "parts", "/one.jsonl")
    _, err = batch.run(f"{WORK}:square", path, "-o", "none.jsonl", code=2)
    assert says in err
    assert not batch.lines("none.jsonl")


def test_what_is_wrong_with_the_rows_is_said_as_it_is_on_this_machine(batch: Batch) -> None:
    (batch.folder / "bad.jsonl").write_text('{"n": 1}\n{"n": 2,}\n')
    put(batch, "bad.jsonl", "bad", "/bad.jsonl")
    work = (f"{WORK}:square", "volume://bad/bad.jsonl", "-o", "bad-out.jsonl", "--name", "bad", "--strict")
    _, err = batch.run(*work, code=2)
    assert "volume://bad/bad.jsonl:2: not JSON" in err
    assert "without --strict" in err

    def start_again() -> Any:
        (batch.folder / "bad.jsonl").write_text('{"n": 1}\n{"n": 2}\n')
        put(batch, "bad.jsonl", "bad", "/bad.jsonl")
        return batch.json(*work)

    assert start_again()["done"] == 2


@pytest.mark.slow
def test_a_schedule_runs_over_the_rows_as_they_are_then(batch: Batch) -> None:
    batch.rows(20)
    put(batch, "rows.jsonl", "inbox", "/rows.jsonl")
    work = (
        f"{WORK}:square",
        "volume://inbox/rows.jsonl",
        "-o",
        "volume://outbox/{time}.jsonl",
        "--name",
        "often",
    )
    # A local file cannot be read later.
    _, err = batch.run(
        f"{WORK}:square", "rows.jsonl", "-o", "volume://outbox/x.jsonl", "--every", "1m", code=2
    )
    assert "modal volume put NAME rows.jsonl" in err
    told = batch.json(*work, "--every", "1h")
    assert (told["state"], told["schedule"]) == ("scheduled", {"every": {"hours": 1}})
    # Another schedule takes its place.
    _, err = batch.run(*work, "--every", "1m")
    assert "was scheduled every hour, and will be every minute" in err

    def runs() -> list[Any]:
        return [run for run in batch.json("status", "often")["runs"] if run["state"] != "skipped"]

    first = eventually(runs, seconds=150, every=2)[0]
    assert (first["state"], first["rows"], first["done"]) == ("done", 20, 20)
    made = got(batch, "outbox", f"{first['run']}.jsonl").read_text().splitlines()
    assert [json.loads(line)["response"]["body"] for line in made] == [{"square": n**2} for n in range(20)]
    row = next(row for row in batch.json("ls") if row["job"] == "often")
    assert row["next"] > row["last"]["time"]
    assert "NEXT" in batch.run("ls")[0]

    second = eventually(lambda: found if len(found := runs()) > 1 else None, seconds=150, every=2)[1]
    assert second["state"] == "unchanged"
    batch.rows(30)
    put(batch, "rows.jsonl", "inbox", "/rows.jsonl")
    third = eventually(lambda: [run for run in runs()[1:] if run["state"] == "done"], seconds=150, every=2)[0]
    assert third["done"] == 30

    assert batch.json("fetch", "often", "-o", "third.jsonl")["done"] == 30
    batch.json("fetch", "often", "-o", "first.jsonl", "--run", first["run"])
    assert len(batch.lines("first.jsonl")) == 20
    batch.run("cancel", "often")
    ended = batch.json("status", "often")
    assert (ended["state"], ended["next"]) == ("stopped", None)
    batch.run("resume", "often")
    assert batch.json("status", "often")["state"] == "scheduled"
    batch.run("rm", "often", "--yes")
    assert "often" not in [row["job"] for row in batch.json("ls")]


def test_a_bucket_is_refused_by_the_plane_itself(batch: Batch) -> None:
    """Whoever deploys the file of such a job to the plane is told what it does not have."""
    source = Path(__file__).parents[1] / "golden" / "batch-s3" / "app.py"
    batch.plane.quick("secret", "create", "aws-reviews", "AWS_ACCESS_KEY_ID=a", "AWS_SECRET_ACCESS_KEY=b")
    done = batch.plane.modal("deploy", str(source), check=False)
    assert done.returncode != 0
    assert "Cloud bucket mounts" in " ".join((done.stdout + done.stderr).split())
    _, err = batch.run(
        f"{WORK}:square", "s3://one/rows.jsonl", "-o", "x.jsonl", "--bucket-secret", "a", code=2
    )
    assert "CloudBucketMount" in err
