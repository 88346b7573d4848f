"""Paths in the cloud: what they mean, what is mounted for them, and the code that reads and writes them there."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from gpuctl.batch import cloud
from gpuctl.batch.remote_files import _zipped
from gpuctl.errors import GpuctlError
from gpuctl.specs.batch import BatchSpec
from gpuctl.specs.remote_paths import Mount, is_remote, mounts, parse
from gpuctl.target import Target

LOCAL = {"target": Target.LOCAL}
SECRET = {"bucket_secret": "aws"}


def paths(*texts: str) -> list[Any]:
    return [parse("INPUT", text) for text in texts]


def test_what_is_mounted() -> None:
    reads, writes = mounts(
        paths("s3://one/a/b/*.jsonl", "s3://one/a/c.csv", "volume://in/x/rows.jsonl"),
        paths("s3://one/out/2026/answers.jsonl"),
    )
    assert reads == [Mount("s3", "one", "a", "/mnt/in-0", True), Mount("volume", "in", "", "/mnt/in-1", True)]
    assert writes == [Mount("s3", "one", "out/2026", "/mnt/out-0", False)]
    # A Volume is mounted once: where it is read, it can be written, too.
    reads, writes = mounts(paths("volume://both/rows.jsonl"), paths("volume://both/out.jsonl"))
    assert [mount.path for mount in (*reads, *writes)] == ["/mnt/in-0", "/mnt/in-0"]
    assert not any(mount.read_only for mount in (*reads, *writes))
    # The folder of a run is not known when it is mounted.
    assert mounts([], paths("s3://one/out/{date}/a.jsonl"))[1][0].folder == "out"
    assert parse("INPUT", "s3://one/a/b/").folder == "a/b"
    assert parse("INPUT", "volume://in").uri == "volume://in/"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"inputs": ["s3://one/a.jsonl"]}, "--bucket-secret: needed for s3://one/a.jsonl"),
        ({"inputs": ["gs://one/a.jsonl"]}, "GOOGLE_ACCESS_KEY_ID and GOOGLE_ACCESS_KEY_SECRET"),
        ({"inputs": ["s3://one/a.jsonl"], **SECRET, **LOCAL}, "no cloud buckets (CloudBucketMount)"),
        ({"output": "s3://one/a.jsonl", **LOCAL}, "--local: s3://one/a.jsonl"),
        ({"inputs": ["s3://One/a.jsonl"], **SECRET}, "'One' is no name of a bucket"),
        ({"inputs": ["volume://in/../x"]}, "without '..'"),
        ({"inputs": ["https://x.org/a.jsonl"]}, "https:// is none of s3://BUCKET/KEY"),
        ({"inputs": ["r2://one/a.jsonl"]}, "--bucket-endpoint https://ACCOUNT.r2.cloudflarestorage.com"),
        ({"inputs": ["volume://in/a.jsonl", "b.jsonl"]}, "a job reads its rows in one place"),
        ({"inputs": ["volume://in/a.jsonl"], "output": "volume://in/a.jsonl"}, "is the input"),
        ({"output": "volume://out"}, "names no file in it"),
        ({"output": "volume://out/*.jsonl"}, "is a pattern"),
        ({"output": "volume://out/a.jsonl", "errors": "here.jsonl"}, "must be where the answers are"),
        ({"output": "volume://out/a.jsonl", "errors": "volume://o2/e.jsonl"}, "in the same place"),
        (SECRET, "--bucket-secret: no input or output is in a bucket"),
        ({"inputs": ["s3://one/a.jsonl"], **SECRET, "bucket_endpoint": "r2"}, "--bucket-endpoint: 'r2'"),
        ({"every": "1h", "output": "volume://out/a.jsonl"}, "modal volume put NAME rows.jsonl /"),
        ({"every": "1h", "inputs": ["volume://in/a.jsonl"]}, "where a schedule cannot write"),
        ({"every": "1h", "inputs": ["volume://in/a.jsonl"], "output": "-"}, "has no stdout"),
    ],
)
def test_what_is_refused(options: dict[str, Any], says: str) -> None:
    given = {"work": "qwen3", "inputs": ["rows.jsonl"], "output": "out.jsonl", "gpu": "L4"} | options
    with pytest.raises(GpuctlError) as error:
        BatchSpec.from_options(**given)
    assert error.value.exit_code == 2
    assert len(error.value.problems) == 1
    assert says in error.value.problems[0]


def test_paths_of_this_machine_are_none_of_those() -> None:
    assert not any(map(is_remote, ("rows.jsonl", "-", "./a:b", "C:\\rows", "s3:/one", "/volume/x")))
    assert is_remote("s3://one")


def test_what_travels_needs_nothing_else_of_ours(tmp_path: Path) -> None:
    """In an interpreter without site-packages but jinja2's, and without this checkout."""
    zipfile.ZipFile(io.BytesIO(_zipped())).extractall(tmp_path)
    assert _zipped() == _zipped()
    import jinja2
    import markupsafe

    libraries = tmp_path / "libraries"
    libraries.mkdir()
    for module in (jinja2, markupsafe):
        folder = Path(module.__file__).parent
        (libraries / folder.name).symlink_to(folder)
    code = (
        f"import sys; sys.path.append({str(libraries)!r}); import gpuctl.batch.cloud; print(gpuctl.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == str(tmp_path / "gpuctl" / "__init__.py"), done.stderr


class Bucket:
    """A folder that stands for a mounted bucket."""

    def __init__(self, folder: Path) -> None:
        self.read, self.write, self.job = folder / "in", folder / "out", folder / "job"
        for one in (self.read, self.write, self.job / "code"):
            one.mkdir(parents=True)
        self.plan: dict[str, Any] = {
            **dict.fromkeys(("kind", "prompt", "system", "messages_column", "encoding", "limit", "models")),
            "reads": True,
            "scheduled": False,
            "overwrite": False,
            "output_in_bucket": True,
            "url": "function",
            "made_for": "function",
            "strict": False,
            "dedupe": False,
            "defaults": {},
            "containers": 1,
            "format": "jsonl",
            "job": {
                "name": "j",
                "work": "work.py:process",
                "inputs": ["s3://one/day/*.jsonl"],
                "output": "s3://two/made/{date}/answers.jsonl",
                "errors": None,
                "gpu": None,
                "argv": [],
                "created_at": "2026-11-28T00:00:00Z",
                "gpuctl_version": "0",
            },
        }

    def do(self, step: str, stamp: str = "") -> dict[str, Any]:
        (self.job / "code" / "plan.json").write_text(json.dumps(self.plan))
        there = {"read": {"s3://one/day": str(self.read)}, "write": {"s3://two/made": str(self.write)}}
        data = self.job / "runs" / stamp if stamp else self.job
        return cloud.run(step, str(self.job), str(data), there, stamp)

    def answer(self, folder: Path) -> None:
        """Have every row answered by itself."""
        for file in sorted((folder / "input").iterdir()):
            import gzip

            lines = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
            made = [
                {**{name: line[name] for name in ("row", "id", "columns") if name in line}}
                | ({"error": line["bad"]} if "bad" in line else {"answer": line["body"]["n"] + 1})
                for line in lines
            ]
            (folder / "answers").mkdir(exist_ok=True)
            content = b"".join(json.dumps(line).encode() + b"\n" for line in made)
            (folder / "answers" / file.name).write_bytes(gzip.compress(content))


def test_rows_of_a_bucket_and_back(tmp_path: Path) -> None:
    bucket = Bucket(tmp_path)
    (bucket.read / "a.jsonl").write_text('{"n": 1}\n{"n": 2}\noops\n')
    assert bucket.do("begin") == {"rows": 3}
    assert json.loads((bucket.job / "job.json").read_bytes())["rows"] == 3
    assert bucket.do("begin") == {}  # it was done
    assert bucket.do("check") == {"same": True, "rows": 3}
    bucket.answer(bucket.job)
    told = bucket.do("publish", stamp="")
    assert told["output"] == "s3://two/made/{date}/answers.jsonl"  # a run of no schedule has no date
    assert (told["done"], told["failed"]) == (2, 1)
    made = bucket.write / "{date}" / "answers.jsonl"
    assert [json.loads(line) for line in made.read_text().splitlines()] == [
        {"n": 1, "answer": 2},
        {"n": 2, "answer": 3},
    ]
    message = json.loads((bucket.write / "{date}" / "answers.errors.jsonl").read_text())["error"]["message"]
    assert message.startswith("s3://one/day/a.jsonl:3: not JSON")
    assert sorted(path.name for path in made.parent.iterdir()) == ["answers.errors.jsonl", "answers.jsonl"]
    (bucket.read / "b.jsonl").write_text('{"n": 3}\n')
    assert bucket.do("check") == {"same": False, "rows": 4}


def test_pictures_of_a_bucket_and_into_one(tmp_path: Path) -> None:
    import gzip

    bucket = Bucket(tmp_path)
    url = "/v1/images/generations"
    bucket.plan |= {"url": url, "made_for": url, "format": "csv"}
    bucket.plan["job"] |= {"output": "s3://two/made/pictures/"}
    (bucket.read / "a.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": 5}\n')
    assert bucket.do("begin") == {"rows": 2}
    name = "pictures/000000/000000000-0.png"
    (bucket.job / name).parent.mkdir(parents=True)
    (bucket.job / name).write_bytes(b"a picture")
    error = {"code": "invalid_request", "message": "no text"}
    made = [
        {"row": 0, "id": "row-0", "answer": {"data": [{"file": name}]}, "columns": {"prompt": "a cat"}},
        {"row": 1, "id": "row-1", "error": error, "columns": {"prompt": 5}},
    ]
    (bucket.job / "answers").mkdir()
    content = b"".join(json.dumps(line).encode() + b"\n" for line in made)
    (bucket.job / "answers" / "000000.jsonl.gz").write_bytes(gzip.compress(content))
    told = bucket.do("publish")
    assert (told["done"], told["failed"]) == (1, 1)
    there = {path.name: path.read_text() for path in (bucket.write / "pictures").iterdir()}
    assert there.keys() == {"answers.csv", "errors.jsonl", "row-0.png"}
    assert there["row-0.png"] == "a picture"
    assert there["answers.csv"].splitlines() == ["prompt,answer", "a cat,row-0.png"]
    # Another job does not write over them.
    (bucket.job / "begun").unlink()
    (bucket.job / "job.json").unlink()
    assert "exists" in bucket.do("begin")["problems"][0]


def test_runs_of_a_schedule(tmp_path: Path) -> None:
    bucket = Bucket(tmp_path)
    bucket.plan |= {"scheduled": True, "overwrite": True}
    assert bucket.do("begin", "20261128T000000Z")["problems"] == ["s3://one/day/*.jsonl: no files there"]
    (bucket.read / "a.jsonl").write_text('{"n": 1}\n')
    assert bucket.do("begin", "20261128T010000Z") == {"rows": 1}
    first = bucket.job / "runs" / "20261128T010000Z"
    bucket.answer(first)
    assert bucket.do("publish", "20261128T010000Z")["output"] == "s3://two/made/2026-11-28/answers.jsonl"
    # One that has not ended says nothing of what is to be done.
    assert bucket.do("begin", "20261128T020000Z") == {"rows": 1}
    (first / "status.json").write_text('{"state": "done"}')
    assert bucket.do("begin", "20261128T030000Z") == {"unchanged": True, "rows": 1}
    (bucket.read / "a.jsonl").write_text('{"n": 2}\n')
    assert bucket.do("begin", "20261128T040000Z") == {"rows": 1}


def test_an_object_is_written_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mounted bucket knows neither renaming nor adding, and may forbid deleting."""
    bucket = Bucket(tmp_path)
    (bucket.read / "a.jsonl").write_text('{"n": 1}\n')
    bucket.do("begin")
    bucket.answer(bucket.job)
    errors = bucket.write / "{date}" / "answers.errors.jsonl"
    errors.write_text("of an earlier run")
    replace, unlink = Path.replace, Path.unlink

    def within(path: Path) -> bool:
        return path.resolve().is_relative_to(bucket.write)

    def no_replace(self: Path, target: Path) -> Path:
        assert not within(self)
        return replace(self, target)

    def no_unlink(self: Path, missing_ok: bool = False) -> None:
        if within(self):
            raise PermissionError("no delete")
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "replace", no_replace)
    monkeypatch.setattr(Path, "unlink", no_unlink)
    assert bucket.do("publish")["done"] == 1
    assert errors.read_bytes() == b""
