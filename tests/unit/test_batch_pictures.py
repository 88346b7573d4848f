"""Rows that ask for pictures: which requests are refused, and what becomes of the pictures on this side."""

from __future__ import annotations

import base64
import csv
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from pyarrow import parquet

import pieces
from gpuctl.batch.filenames import Names
from gpuctl.batch.inputs import Input, open_input
from gpuctl.batch.outputs import Format, Output, destination
from gpuctl.batch.rows import Result, Url
from gpuctl.errors import GpuctlError
from gpuctl.specs.model import ModelRef

URL = Url.IMAGES


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(body: dict[str, Any]) -> Input:
    line = {"custom_id": "a", "method": "POST", "url": str(URL), "body": body}
    Path("rows.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    return open_input(["rows.jsonl"], url=None)


def test_lines_of_openai_say_that_pictures_are_asked_for(folder: Path) -> None:
    rows = asked(
        {"prompt": "a cat", "n": 2, "user": "ann", "quality": "auto", "seed": None, "size": "64x128"}
    )
    assert rows.url is URL
    assert rows.describe() == "rows.jsonl: OpenAI Batch, image generations"
    (row,) = rows
    # What only says who asks, or what is done anyway, does not make two requests of one.
    assert row.body == {"prompt": "a cat", "n": 2, "size": "64x128"}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "prompt must be text, and not empty"),
        ({"prompt": None}, "prompt must be text, and not empty"),
        ({"prompt": " "}, "prompt: ' ' is no text, or empty"),
        ({"prompt": ["a"]}, "prompt: ['a'] is no text, or empty"),
        ({"n": 0}, "n: 0 is no whole number from 1 to 10"),
        ({"n": True}, "n: True is no whole number from 1 to 10"),
        ({"size": "1024"}, "size: '1024' is no size such as 1024x768"),
        ({"size": "8x8"}, "each from 16 to 4096"),
        ({"size": "1024x99999"}, "each from 16 to 4096"),
        ({"size": "-64x64"}, "is no size such as 1024x768"),
        ({"size": 64}, "size: 64 is no text such as '1024x768'"),
        ({"seed": -1}, "seed: -1 is no whole number from 0 to 9223372036854775807"),
        ({"seed": 1.5}, "seed: 1.5 is no whole number"),
        ({"num_inference_steps": 0}, "num_inference_steps: 0 is no whole number from 1 to 1000"),
        ({"guidance_scale": "7"}, "guidance_scale: '7' is no number from 0 to 100"),
        ({"negative_prompt": 5}, "negative_prompt: 5 is no text"),
        ({"response_format": "url"}, "response_format: 'url': only 'b64_json' can be made"),
        ({"output_format": "webp"}, "output_format: 'webp': only 'png' can be made"),
        ({"quality": "hd"}, "quality: 'hd': only 'auto' can be made"),
        (
            {"style": "vivid"},
            "'style': no field of an image; known are prompt, n, size, seed, negative_prompt,",
        ),
        ({"x" * 500: 1}, "xx…: no field of an image"),
    ],
)
def test_a_wrong_field_is_an_error_by_its_name(folder: Path, body: dict[str, Any], says: str) -> None:
    (row,) = asked({"prompt": "a cat", **body} if body else {})
    assert row.bad is not None
    assert row.bad.code == "invalid_request"
    assert says in row.bad.message
    assert row.bad.message.startswith("rows.jsonl:1: ")


def test_prompts_of_any_kind_of_input(folder: Path) -> None:
    Path("a.txt").write_text("a cat\n\na dog\n")
    Path("b.csv").write_text("thing,colour\ncat,red\n")
    Path("c.jsonl").write_text('{"prompt": "a cow"}\n{"prompt": 5}\n')
    assert [row.body for row in open_input(["a.txt"], url=URL)] == [{"prompt": "a cat"}, {"prompt": "a dog"}]
    (made,) = open_input(["b.csv"], url=URL, prompt="a {colour} {thing}")
    assert made.body == {"prompt": "a red cat"}
    cow, bad = open_input(["c.jsonl"], url=URL)
    assert cow.body == {"prompt": "a cow"}
    assert bad.bad is not None
    with pytest.raises(GpuctlError, match="image generations have no system message"):
        open_input(["a.txt"], url=URL, system="x")
    with pytest.raises(GpuctlError, match="no column 'prompt'; the columns are"):
        open_input(["b.csv"], url=URL)


# -- outputs


def made(source: Path, *results: tuple[str, int]) -> list[Result]:
    """Answers as the job's Volume has them: of (id, how many), with a file for each picture."""
    found = []
    for number, (name, count) in enumerate(results):
        data = []
        for n in range(count):
            file = f"pictures/000000/{number:09}-{n}.png"
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            (source / file).write_bytes(f"{name} {n}".encode())
            data.append({"file": file, "seed": n})
        answer = {"created": 5, "data": data, "size": "64x64"}
        found.append(Result(number, name, answer, columns={"custom_id": name}))
    return found


def write(
    output: str, rows: list[Result], form: Format | None = None, columns: tuple[str, ...] = ()
) -> Output:
    where = destination(output, url=URL, form=form)
    with Output(where, job="j", url=URL, columns=columns, pictures=Path("there")) as out:
        for row in rows:
            out.write(row)
    return out


def files(folder: str) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in Path(folder).rglob("*")
        if path.suffix == ".png"
    }


def test_a_folder_of_pictures_and_the_lines_that_name_them(folder: Path) -> None:
    write("out/", made(Path("there"), ("cat", 1), ("zoo/dog", 2)))
    assert files("out") == {"cat.png": "cat 0", "zoo/dog-1.png": "zoo/dog 0", "zoo/dog-2.png": "zoo/dog 1"}
    first, second = map(json.loads, Path("out/answers.jsonl").read_text().splitlines())
    assert first["response"]["body"]["data"] == [{"file": "cat.png", "seed": 0}]
    assert [one["file"] for one in second["response"]["body"]["data"]] == ["zoo/dog-1.png", "zoo/dog-2.png"]
    assert not list(Path("out").rglob(".*"))


def test_a_table_in_the_folder_says_which_is_whose(folder: Path) -> None:
    rows = made(Path("there"), ("cat", 1), ("dog", 2))
    write("out", rows, Format.CSV, ("custom_id",))
    write("out", rows, Format.PARQUET, ("custom_id",))
    with Path("out/answers.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["custom_id", "answer"],
            ["cat", "cat.png"],
            ["dog", '["dog-1.png","dog-2.png"]'],
        ]
    assert parquet.read_table("out/answers.parquet").num_rows == 2


def test_lines_of_openai_have_the_pictures_in_them(folder: Path) -> None:
    write("out.jsonl", made(Path("there"), ("cat", 2)))
    (line,) = map(json.loads, Path("out.jsonl").read_text().splitlines())
    data = line["response"]["body"]["data"]
    assert [base64.b64decode(one["b64_json"]) for one in data] == [b"cat 0", b"cat 1"]
    assert [one["seed"] for one in data] == [0, 1]
    assert "file" not in data[0]


@pytest.mark.parametrize(
    ("output", "form", "says"),
    [
        ("out.csv", None, "-o out.csv: --format csv has no place for pictures"),
        ("-", Format.PARQUET, "-o -: --format parquet has no place for pictures"),
        ("out.png", None, "-o out.png: the suffix '.png' has no place for pictures"),
        ("out/", Format.SRT, "--format srt: pictures are PNG files"),
    ],
)
def test_an_output_without_a_place_for_them_is_refused(
    folder: Path, output: str, form: Format | None, says: str
) -> None:
    with pytest.raises(GpuctlError) as error:
        destination(output, url=URL, form=form)
    assert error.value.problems[0].startswith(says)


def test_a_folder_that_has_something_in_it_is_not_written_to(folder: Path) -> None:
    Path("out").mkdir()
    where = destination("out", url=URL)
    where.check(overwrite=False)
    Path("out/mine.png").touch()
    where.check(overwrite=True)
    with pytest.raises(GpuctlError, match="-o out: exists"):
        where.check(overwrite=False)
    with pytest.raises(GpuctlError, match="a file; pictures go into a folder"):
        destination("out/mine.png/", url=URL).check(overwrite=True)


HOSTILE = [
    "a", "A", "a.png", "a.PNG", "a.png/b", "a/b", "../a", "/a", "//a", "..", "", ".", "a\0", "a.txt", "a.jpg", "a-3",
    "x" * 300, "x" * 300 + "y", "answers.jsonl", "errors.jsonl", "a-0-1", "ä", "ä".upper(), "a/../b", "row-3",
]  # fmt: skip


def test_no_row_leaves_the_folder_or_takes_the_place_of_another(folder: Path) -> None:
    """Also where large and small letters are the same, and where a row is called as another's folder."""
    rows = made(Path("there"), *((name, 1 + number % 2) for number, name in enumerate(HOSTILE)))
    write("out/", rows)
    count = sum(len(row.answer["data"]) for row in rows)
    there = files("out")
    assert len({name.casefold() for name in there}) == len(there) == count
    assert sorted(there.values()) == sorted(
        f"{row.id} {n}" for row in rows for n in range(len(row.answer["data"]))
    )
    assert sorted(path.name for path in folder.iterdir()) == ["out", "there"]


def test_names_do_not_depend_on_what_else_is_fetched(folder: Path) -> None:
    of = lambda names, name, number: names.of(Result(number, name, None))  # noqa: E731
    names, part = Names("png"), Names("png")
    whole = [of(names, name, number) for number, name in enumerate(["one", "two", "b/three"])]
    assert [of(part, "b/three", 2)] == whole[2:]


# -- a model that is a folder


def test_a_folder_with_a_pipeline(folder: Path) -> None:
    model = folder / "mine"
    (model / "unet").mkdir(parents=True)
    (model / "model_index.json").write_text("{}")
    (model / "unet" / "weights.safetensors").write_bytes(b"1")
    found = ModelRef.of_folder("./mine")
    assert found is not None
    assert (found.folder, found.repo, found.tiny, found.title) == (model, None, False, str(model))
    assert ModelRef.of_folder("mine") == found
    (model / "unet" / "weights.safetensors").write_bytes(b"22")
    changed = ModelRef.of_folder("mine")
    assert changed is not None
    assert changed.revision != found.revision, "another model is other work"
    assert ModelRef.of_folder("qwen3") is None
    for text, says in (("./none", "there is no folder"), (str(folder), "has no model_index.json")):
        with pytest.raises(GpuctlError, match=says):
            ModelRef.of_folder(text)


# -- what a container saves


@pytest.fixture
def runtime(tmp_path: Path) -> ModuleType:
    constants = {
        "TASK": "ta-1", "BEGAN": 0.0, "SAVE_SECONDS": 0.02, "RETRIES": 1, "PATIENCE": 0.2, "DEATHS": 2,
        "DEATHS_ALONE": 3, "WAVE": 32, "DIED": "died", "BATCH_SIZE": 1,
    }  # fmt: skip
    made = pieces.module(
        *("batch/ledger.py.jinja", "batch/worker.py.jinja", "batch/diffusers.py.jinja"),
        folder=tmp_path,
        constants=constants,
        kind="diffusers",
    )
    made.DATA = tmp_path / "job"  # type: ignore[attr-defined]
    made.volume = SimpleNamespace(commit=lambda: None, reload=lambda: None)  # type: ignore[attr-defined]
    made.live = SimpleNamespace(put=lambda *_: None, get=lambda _: None)  # type: ignore[attr-defined]
    return made


def shard(runtime: ModuleType, rows: int) -> Any:
    file = runtime.input_file(0)
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"row": n, "id": f"r{n}", "url": str(URL), "body": {"prompt": "x"}} for n in range(rows)]
    file.write_bytes(runtime.gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    return runtime.Shard(0)


def finish(runtime: ModuleType, one: Any, n: int) -> None:
    name = f"pictures/000000/{n:09}-0.png"
    one.end(one.rows.popleft(), runtime.WithFiles({"data": [{"file": name}]}, {name: b"png"}), None)


def test_pictures_are_on_the_disk_before_the_lines_that_name_them(runtime: ModuleType) -> None:
    one = shard(runtime, 3)
    finish(runtime, one, 0)
    one.save()
    assert (runtime.DATA / "pictures/000000/000000000-0.png").read_bytes() == b"png"
    assert not one.files, "and no longer in memory"
    assert b'"file":"pictures/000000/000000000-0.png"' in one.part.read_bytes()

    whole, runtime.write_whole = runtime.write_whole, full  # type: ignore[attr-defined]
    finish(runtime, one, 1)
    with pytest.raises(OSError, match="No space left"):
        one.save()
    assert b"000000001-0.png" not in one.part.read_bytes()
    runtime.write_whole = whole  # type: ignore[attr-defined]
    one.save()
    assert (runtime.DATA / "pictures/000000/000000001-0.png").exists()

    # The last one is written with the end of the shard.
    finish(runtime, one, 2)
    one.close()
    for line in map(json.loads, runtime.read_gzip(runtime.answers_file(0))):
        assert (runtime.DATA / line["answer"]["data"][0]["file"]).exists()


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")
