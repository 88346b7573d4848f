"""Rows into the files of a job, and back."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpuctl.batch.copies import with_copies
from gpuctl.batch.results import read_results
from gpuctl.batch.rows import Problem, Result, Row, Url
from gpuctl.batch.shards import LARGEST, Staged, portions, stage
from gpuctl.specs.batch import BatchSpec
from gpuctl.specs.engine_args import adapters


def rows(count: int, kinds: int | None = None) -> Iterator[Row]:
    for n in range(count):
        yield Row(n, f"id-{n}", Url.CHAT, {"messages": n if kinds is None else n % kinds}, {"n": n})


def lines(staged: Staged) -> list[list[dict[str, Any]]]:
    files = sorted((staged.folder / "input").iterdir())
    return [[json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()] for file in files]


@pytest.mark.parametrize("count", [1, 15, 100, 4096, 4097, 10_000])
def test_every_row_is_in_one_shard_in_order(count: int, tmp_path: Path) -> None:
    staged = stage(rows(count), tmp_path / "job", containers=4, defaults={"temperature": 0})
    shards = lines(staged)
    assert (staged.rows, staged.shards) == (count, len(shards))
    assert [line["row"] for shard in shards for line in shard] == list(range(count))
    assert max(map(len, shards)) <= LARGEST
    assert shards[0][0]["body"] == {"temperature": 0, "messages": 0}
    if count > 500:
        assert len(shards) >= 4, "each container gets some"


def test_the_same_rows_are_the_same_files(tmp_path: Path) -> None:
    one, two = (stage(rows(50), tmp_path / name, containers=1, defaults={}) for name in "ab")
    assert one.digest == two.digest
    for file in (one.folder / "input").iterdir():
        assert (two.folder / "input" / file.name).read_bytes() == file.read_bytes()
    assert stage(rows(51), tmp_path / "c", containers=1, defaults={}).digest != one.digest


def test_a_limit_takes_the_first(tmp_path: Path) -> None:
    staged = stage(rows(10_000), tmp_path / "job", containers=1, defaults={}, limit=7)
    assert [line["row"] for shard in lines(staged) for line in shard] == list(range(7))


def test_what_a_request_says_itself_stays(tmp_path: Path) -> None:
    row = Row(0, "a", Url.CHAT, {"temperature": 1})
    bad = Row(1, "b", Url.CHAT, None, bad=Problem("invalid_json", "x:2: no"))
    own = Row(2, "c", Url.FUNCTION, {"n": 1})
    staged = stage([row, bad, own], tmp_path / "job", containers=1, defaults={"temperature": 0})
    assert lines(staged) == [
        [
            {"row": 0, "id": "a", "url": "/v1/chat/completions", "body": {"temperature": 1}},
            {"row": 1, "id": "b", "bad": {"code": "invalid_json", "message": "x:2: no"}},
            {"row": 2, "id": "c", "url": "function", "body": {"n": 1}},
        ]
    ]
    assert staged.bad == 1


def test_files_travel_with_their_rows(tmp_path: Path) -> None:
    (tmp_path / "A.PNG").write_bytes(b"png")
    row = Row(0, "a", Url.CHAT, {"image": {"$media": 0}}, media=(tmp_path / "A.PNG",))
    staged = stage([row], tmp_path / "job", containers=1, defaults={})
    ((line,),) = lines(staged)
    assert (staged.folder / line["media"][0]).read_bytes() == b"png"


@pytest.mark.parametrize("kinds", [1, 7, 3000])
def test_the_same_request_is_asked_once_and_answered_everywhere(kinds: int, tmp_path: Path) -> None:
    staged = stage(rows(5000, kinds), tmp_path / "job", containers=2, defaults={}, dedupe=True)
    asked = [line for shard in lines(staged) for line in shard]
    assert [line["row"] for line in asked] == list(range(kinds))
    assert (staged.rows, staged.copies) == (5000, 5000 - kinds)

    (staged.folder / "answers").mkdir()
    for number, at in enumerate(range(0, len(asked), LARGEST)):
        text = "".join(
            json.dumps({"row": line["row"], "id": line["id"], "columns": line["columns"]} | answer(line))
            + "\n"
            for line in asked[at : at + LARGEST]
        )
        (staged.folder / "answers" / f"{number:06}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    found = list(with_copies(read_results(staged.folder / "answers"), staged.folder))
    assert found == [
        Result(n, f"id-{n}", None, Problem("exception", "no"), {"n": n})
        if n % kinds == 5
        else Result(n, f"id-{n}", {"was": n % kinds}, None, {"n": n})
        for n in range(5000)
    ]


def answer(line: dict[str, Any]) -> dict[str, Any]:
    if line["row"] == 5:
        return {"error": {"code": "exception", "message": "no"}}
    return {"answer": {"was": line["row"]}}


def test_another_api_s_model_is_the_job_s(tmp_path: Path) -> None:
    bodies: list[dict[str, Any]] = [
        {"model": "gpt-4o"},
        {"model": "tiny"},
        {"model": "sql"},
        {},
        {"model": []},
    ]
    asked = [Row(n, str(n), Url.CHAT, dict(body)) for n, body in enumerate(bodies)]
    staged = stage(asked, tmp_path / "job", containers=1, defaults={}, models={"tiny", "sql"})
    assert [line["body"] for line in lines(staged)[0]] == [{}, {"model": "tiny"}, {"model": "sql"}, {}, {}]
    assert asked[0].body == {"model": "gpt-4o"}


def test_one_adapter_answers_the_rows_that_name_no_model(tmp_path: Path) -> None:
    bodies: list[dict[str, Any]] = [{"model": "gpt-4o"}, {"model": "tiny"}, {"model": "sql"}, {}]
    asked = [Row(n, str(n), Url.CHAT, dict(body)) for n, body in enumerate(bodies)]
    given = ("--enable-lora", "--lora-modules", "sql=/adapters/sql")
    spec = BatchSpec.from_options(work="tiny", inputs=["a"], output="o.jsonl", engine_args=given)
    defaults = spec.defaults("/v1/chat/completions")
    staged = stage(asked, tmp_path / "job", containers=1, defaults=defaults, models={"tiny", "sql"})
    assert [line["body"].get("model") for line in lines(staged)[0]] == [None, "tiny", "sql", "sql"]
    spec = BatchSpec.from_options(work="tiny", inputs=["a"], output="o.jsonl", engine_args=(*given, "b=/b"))
    assert spec.defaults("/v1/chat/completions") == {}


def test_adapters_have_names() -> None:
    assert adapters(["--lora-modules", "sql=/x", '{"name": "b", "path": "/y"}', "--seed", "3"]) == [
        "sql",
        "b",
    ]
    assert adapters(["--lora-modules=sql=/x", "--enable-lora"]) == ["sql"]
    assert adapters(["--seed", "3"]) == []


def test_what_is_uploaded_at_once_has_not_too_many_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "job"
    files = {f"input/{number:06}.jsonl.gz" for number in range(25)} | {
        "media/000000/7-0.png",
        "copies.jsonl.gz",
    }
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    assert list(portions(folder)) == [folder], "few files are uploaded where they are"
    monkeypatch.setattr("gpuctl.batch.shards._TOGETHER", 10)
    found: dict[str, str] = {}
    sizes = []
    for portion in portions(folder):
        some = [file for file in portion.rglob("*") if file.is_file()]
        sizes.append(len(some))
        found |= {file.relative_to(portion).as_posix(): file.read_text() for file in some}
    assert sizes == [10, 10, 7]
    assert found == {name: name for name in files}
    assert not [file for file in tmp_path.rglob("*") if file.is_file()], "what was uploaded makes room"
