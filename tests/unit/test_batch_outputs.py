"""The answers of a batch job as files: what stands in them, and that they are there whole or not at all."""

from __future__ import annotations

import csv
import gzip
import io
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from gpuctl.batch.inputs import open_input
from gpuctl.batch.outputs import Format, Output, destination
from gpuctl.batch.rows import Problem, Result, Url
from gpuctl.errors import GpuctlError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def there(folder: str = ".") -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def said(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}


def results(*answers: Any, columns: Sequence[dict[str, Any]] = ()) -> list[Result]:
    return [
        Result(number, f"row-{number}", answer, columns=columns[number] if columns else None)
        for number, answer in enumerate(answers)
    ]


def write(
    output: str,
    rows: Sequence[Result],
    url: Url = Url.CHAT,
    form: Format | None = None,
    columns: Sequence[str] = (),
) -> Output:
    with Output(destination(output, url=url, form=form), job="j1", url=url, columns=columns) as out:
        for row in rows:
            out.write(row)
    return out


def test_lines_of_openai_and_of_its_errors(folder: Path) -> None:
    failed = Result(1, "b", None, Problem("invalid_json", "in.jsonl:2: not JSON"))
    out = write("answers.jsonl", [Result(0, "a", said("hé")), failed])
    assert (out.answered, out.failed) == (1, 1)
    text = Path("answers.jsonl").read_text(encoding="utf-8")
    assert "hé" in text
    assert json.loads(text) == {
        "id": "batch_req_j1_0",
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": "req_j1_0", "body": said("hé")},
        "error": None,
    }
    assert json.loads(Path("answers.errors.jsonl").read_bytes()) == {
        "id": "batch_req_j1_1",
        "custom_id": "b",
        "response": None,
        "error": {"code": "invalid_json", "message": "in.jsonl:2: not JSON"},
    }
    write("answers.jsonl", [Result(0, "a", said("x"))])
    assert there() == ["answers.jsonl"]  # no errors: the file of the earlier run is gone


def test_what_comes_in_goes_out(folder: Path) -> None:
    """An input's own columns, each with its answer, in its order; and the bad row in the errors."""
    Path("in.csv").write_text('text,answer\n"a,\n""b""",1\nshort\n  c ,\n', encoding="utf-8")
    source = open_input(["in.csv"], prompt="{text}", keep_columns=True)
    rows = [
        Result(row.number, row.id, said(row.body["messages"][0]["content"].upper()), columns=row.columns)
        if row.body
        else Result(row.number, row.id, None, row.bad)
        for row in source
    ]
    write("out.csv.gz", rows, columns=source.columns)
    read = list(
        csv.DictReader(io.StringIO(gzip.decompress(Path("out.csv.gz").read_bytes()).decode(), newline=""))
    )
    assert read == [
        {"text": 'a,\n"b"', "answer": "1", "answer_2": 'A,\n"B"'},
        {"text": "  c ", "answer": "", "answer_2": "  C "},
    ]
    assert json.loads(Path("out.errors.jsonl").read_bytes())["error"]["code"] == "invalid_row"
    write("out.jsonl", rows, form=Format.JSONL, columns=source.columns)
    lines = [json.loads(line) for line in Path("out.jsonl").read_bytes().splitlines()]
    assert lines == read
    write("out.tsv", rows, columns=source.columns)
    assert Path("out.tsv").read_bytes().startswith(b"text\tanswer\tanswer_2\r\n")
    write("out.parquet", rows, columns=source.columns)
    assert parquet.read_table("out.parquet").to_pylist() == read
    write("out.jsonl.zst", rows, form=Format.JSONL, columns=source.columns)
    with pyarrow.input_stream("out.jsonl.zst") as file:
        assert file.read() == Path("out.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("url", "body", "answer"),
    [
        (Url.CHAT, said("x"), "x"),
        (Url.CHAT, {"choices": [*said("x")["choices"], *said("y")["choices"]]}, ["x", "y"]),
        (Url.CHAT, {"choices": [{"message": {"content": None, "tool_calls": [{"id": "t"}]}}]}, [{"id": "t"}]),
        (Url.CHAT, {"choices": []}, None),
        (Url.COMPLETIONS, {"choices": [{"text": "x"}]}, "x"),
        (Url.EMBEDDINGS, {"data": [{"embedding": [0.5, 1.0]}]}, [0.5, 1.0]),
        (Url.TRANSCRIPTIONS, {"text": " x", "segments": []}, " x"),
        (Url.FUNCTION, {"a": [1, None]}, {"a": [1, None]}),
        (Url.FUNCTION, 3, 3),
        (Url.FUNCTION, float("nan"), None),
        (Url.FUNCTION, "\ud800", "\ud800"),
    ],
)
def test_the_answer_in_a_column(folder: Path, url: Url, body: Any, answer: Any) -> None:
    write("out.jsonl", results(body), url, Format.JSONL)
    assert json.loads(Path("out.jsonl").read_bytes()) == {"answer": answer}
    write("out.csv", results(body), url)
    ((cell,),) = list(csv.reader(io.StringIO(Path("out.csv").read_text(encoding="utf-8"), newline="")))[
        1:
    ] or [("",)]
    if isinstance(answer, str):
        assert cell == answer.encode(errors="replace").decode()
    else:
        assert (json.loads(cell) if cell else None) == answer


def test_types_of_parquet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A type is what all rows need, also where it shows late, and many row groups are one file."""
    monkeypatch.setattr("gpuctl.batch.parquet._ROWS", 2)
    rows: list[dict[str, Any]] = [
        {
            "int": 1,
            "float": 1,
            "text": 1,
            "bool": True,
            "mixed": True,
            "none": None,
            "big": 2**60,
            "list": [1],
        },
        {
            "int": None,
            "float": 2,
            "text": 2.5,
            "bool": None,
            "mixed": 1,
            "none": None,
            "big": 1,
            "list": {"a": "é"},
        },
        {
            "int": 3,
            "float": 3.5,
            "text": "x",
            "bool": False,
            "mixed": None,
            "none": None,
            "big": 2**70,
            "list": [],
        },
        {"int": 3},
        {
            "int": 4,
            "float": 4,
            "text": True,
            "bool": True,
            "mixed": "y",
            "none": None,
            "big": 0.5,
            "list": None,
        },
    ]
    write("out.parquet", results(*["z"] * 5, columns=rows), Url.FUNCTION, columns=list(rows[0]))
    table = parquet.read_table("out.parquet")
    assert [str(kind) for kind in table.schema.types] == [
        "int64", "double", "string", "bool", "string", "string", "string", "string", "string",
    ]  # fmt: skip
    read = table.to_pydict()
    assert read["int"] == [1, None, 3, 3, 4]
    assert read["float"] == [1.0, 2.0, 3.5, None, 4.0]
    assert read["text"] == ["1", "2.5", "x", None, "true"]
    assert read["mixed"] == ["true", "1", None, None, "y"]
    assert read["big"] == [str(2**60), "1", str(2**70), None, "0.5"]
    assert read["list"] == ["[1]", '{"a":"é"}', "[]", None, None]


def test_embeddings_in_parquet_are_lists_of_numbers(folder: Path) -> None:
    body = {"data": [{"embedding": [0.25, -1.5]}]}
    write("out.parquet", results(None, body, {"data": [{"embedding": []}]}, None, body), Url.EMBEDDINGS)
    table = parquet.read_table("out.parquet")
    assert str(table.schema.field("answer").type).startswith("list<")
    assert table.to_pydict() == {"answer": [None, [0.25, -1.5], [], None, [0.25, -1.5]]}
    with pytest.raises(GpuctlError, match="several embeddings"):
        write("out.parquet", results({"data": body["data"] * 2}), Url.EMBEDDINGS)
    assert parquet.read_table("out.parquet").equals(table)


# --- recordings ----------------------------------------------------------------------------------------------------

HEARD = {
    "text": " Hello. <b> & more",
    "segments": [
        {"start": 0.0, "end": 2.5, "text": " Hello.\n\n"},
        {"start": 3661.9996, "end": 3600.0, "text": "<b> & --> more"},
        {"start": 5.0, "end": 6.0, "text": "  "},
    ],
}


@pytest.mark.parametrize(
    ("form", "content"),
    [
        (Format.TXT, "Hello. <b> & more\n"),
        (
            Format.SRT,
            "1\n00:00:00,000 --> 00:00:02,500\nHello.\n\n2\n01:01:02,000 --> 01:01:02,000\n<b> & -> more\n\n",
        ),
        (
            Format.VTT,
            "WEBVTT\n\n00:00:00.000 --> 00:00:02.500\nHello.\n\n"
            "01:01:02.000 --> 01:01:02.000\n&lt;b&gt; &amp; --&gt; more\n\n",
        ),
    ],
)
def test_a_file_for_each_recording(folder: Path, form: Format, content: str) -> None:
    names = ["a/1.mp3", "a/1.wav", "../../b", "/etc/passwd", "v1.2", "a/1.wav" + "x" * 300]
    rows = [Result(number, name, HEARD) for number, name in enumerate(names)]
    rows.append(Result(6, "broken.mp3", None, Problem("unreadable_file", "broken.mp3: no sound")))
    write("out", rows, Url.TRANSCRIPTIONS, form)
    written = sorted(str(path.relative_to("out")) for path in Path("out").rglob("*") if path.is_file())
    long = ("1.wav" + "x" * 300)[:200]
    assert written == sorted(
        [
            *(f"{name}.{form}" for name in ("a/1", "a/1.wav", "b", "etc/passwd", "v1.2", f"a/{long}")),
            "errors.jsonl",
        ]
    )
    assert Path("out", f"a/1.{form}").read_text(encoding="utf-8") == content
    assert json.loads(Path("out/errors.jsonl").read_bytes())["custom_id"] == "broken.mp3"


def test_a_folder_of_json_and_subtitles_without_times(folder: Path) -> None:
    write("out", [Result(0, "a.mp3", HEARD)], Url.TRANSCRIPTIONS, Format.JSON)
    assert json.loads(Path("out/a.json").read_bytes()) == HEARD
    with pytest.raises(GpuctlError, match=r"a\.mp3: the answer has no segments"):
        write("out", [Result(0, "a.mp3", {"text": "x"})], Url.TRANSCRIPTIONS, Format.SRT)


# --- where it goes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "form", "errors"),
    [
        ("a.jsonl", Format.OPENAI, "a.errors.jsonl"),
        ("x/a.b.jsonl.gz", Format.OPENAI, "x/a.b.errors.jsonl"),
        ("a.csv.zst", Format.CSV, "a.errors.jsonl"),
        ("a.parquet", Format.PARQUET, "a.errors.jsonl"),
        ("-", Format.OPENAI, "errors.jsonl"),
        ("talks", Format.TXT, "talks/errors.jsonl"),
        ("v1.2/", Format.TXT, "v1.2/errors.jsonl"),
        ("/dev/null", Format.OPENAI, "/dev/null.errors.jsonl"),
    ],
)
def test_the_name_says_the_format(folder: Path, output: str, form: Format, errors: str) -> None:
    where = destination(output, url=Url.CHAT)
    assert (where.format, str(where.errors)) == (form, errors)
    assert destination(output, url=Url.CHAT, errors="e").errors == Path("e")


@pytest.mark.parametrize(
    ("output", "options", "says"),
    [
        ("a.xlsx", {}, "-o a.xlsx: no format has the suffix '.xlsx'"),
        ("a.srt", {}, "-o a.srt: --format srt writes a file for each row"),
        ("there.csv", {}, "-o there.csv: exists"),
        ("none/a.csv", {}, "-o none/a.csv: no folder none"),
        ("full", {}, "-o full: exists"),
        ("full", {"form": Format.CSV}, "-o full: a folder; --format csv writes one file"),
        ("there.csv", {"form": Format.TXT}, "-o there.csv: a file; --format txt writes a folder"),
        ("-", {"form": Format.TXT}, "--format txt: a file for each row needs a folder"),
        ("a", {"form": Format.SRT}, "--format srt: subtitles are made of recordings"),
        ("a.csv", {"errors": "there.csv"}, "--errors there.csv: exists"),
        ("a.csv", {"errors": "./a.csv"}, "--errors a.csv: is the output"),
        ("a.csv", {"errors": "full"}, "--errors full: a folder"),
        ("a.csv", {"errors": "none/e.jsonl"}, "--errors none/e.jsonl: no folder none"),
        ("-", {"errors": "there.csv"}, "--errors there.csv: exists"),
    ],
)
def test_what_would_fail_is_refused_first(
    folder: Path, output: str, options: dict[str, Any], says: str
) -> None:
    Path("there.csv").touch()
    Path("full").mkdir()
    Path("full/x").touch()
    with pytest.raises(GpuctlError) as error:
        destination(output, url=Url.CHAT, **options).check(overwrite=False)
    assert error.value.exit_code == 2
    assert error.value.problems[0].startswith(says)


@pytest.mark.parametrize(
    ("output", "errors", "says"),
    [
        ("b.jsonl", "in/2.jsonl", "--errors in/2.jsonl: is a file of the input"),
        ("in/2.jsonl", None, "-o in/2.jsonl: is a file of the input"),
        ("link.jsonl", None, "-o link.jsonl: is a file of the input"),
        ("in/1.jsonl", None, "--errors in/1.errors.jsonl: is a file of the input"),
    ],
)
def test_nothing_that_is_read_is_written_to(folder: Path, output: str, errors: str | None, says: str) -> None:
    Path("in").mkdir()
    for name in ("2.jsonl", "1.errors.jsonl"):
        Path("in", name).write_text('{"prompt": "x"}\n')
    Path("link.jsonl").symlink_to("in/2.jsonl")
    with pytest.raises(GpuctlError) as error:
        destination(output, url=Url.CHAT, errors=errors).check_apart(open_input(["in"]).files())
    assert error.value.exit_code == 2
    assert error.value.problems[0].startswith(says)
    destination("b.jsonl", url=Url.CHAT).check_apart(open_input(["in"]).files())


def test_a_folder_may_have_subtitles_beside_recordings_but_no_texts_upon_texts(folder: Path) -> None:
    Path("1.txt").write_text("x")
    files = open_input(["."]).files
    destination("./", url=Url.CHAT, form=Format.JSON).check_apart(files())
    with pytest.raises(GpuctlError, match=r"1\.txt is a file of the input"):
        destination("./", url=Url.CHAT, form=Format.TXT).check_apart(files())


OF_OURS = '{"id":"batch_req_j_0","custom_id":"a","response":null,"error":{"code":"x","message":"y"}}\n'


@pytest.mark.parametrize("name", ["", ".", "/"])
def test_an_output_without_a_name_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(GpuctlError) as error:
        destination(name, url=Url.CHAT, form=Format.OPENAI)
    assert error.value.exit_code == 2


def test_what_holds_no_errors_is_none_of_an_earlier_run(folder: Path) -> None:
    where = destination("a.jsonl", url=Url.CHAT)
    for mine in ("mine\n", "[1]\n", "7", '{"id": "batch_req_1", "response": {}, "error": null}\n'):
        Path("a.errors.jsonl").write_text(mine)
        with pytest.raises(GpuctlError, match=r"a\.errors\.jsonl .*: exists, and holds no errors"):
            where.check(overwrite=False)
        where.check(overwrite=True)
    for of_ours in ("", OF_OURS):
        Path("a.errors.jsonl").write_text(of_ours)
        where.check(overwrite=False)
    write("a.jsonl", [Result(0, "row-0", None, Problem("y", "z"))])
    Path("a.jsonl").unlink()
    where.check(overwrite=False)


def test_what_was_there_may_be_replaced_and_keeps_its_mode_and_its_link(folder: Path) -> None:
    Path("real.jsonl").touch(mode=0o640)
    Path("link.jsonl").symlink_to("real.jsonl")
    destination("link.jsonl", url=Url.CHAT).check(overwrite=True)
    write("link.jsonl", results(said("x")))
    assert Path("link.jsonl").is_symlink()
    assert Path("real.jsonl").stat().st_size
    assert Path("real.jsonl").stat().st_mode & 0o777 == 0o640
    destination("/dev/null", url=Url.CHAT).check(overwrite=False)


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.jsonl.zst", "out.csv", "out.parquet"])
def test_an_interrupt_leaves_what_was_there(folder: Path, name: str) -> None:
    Path(name).write_bytes(b"before")
    Path("out.errors.jsonl").write_bytes(b"before")

    def interrupted() -> None:
        with Output(destination(name, url=Url.CHAT), job="j", url=Url.CHAT) as out:
            for result in results(*[said("x" * 1000)] * 3000):
                out.write(result)
            out.write(Result(9, "b", None, Problem("x", "y")))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert there() == sorted([name, "out.errors.jsonl"])
    assert {Path(one).read_bytes() for one in there()} == {b"before"}


@pytest.mark.parametrize(
    "name", ["out.jsonl", "out.jsonl.gz", "out.jsonl.zst", "out.csv", "out.parquet", "folder"]
)
def test_a_full_disk_is_one_error_and_nothing_is_lost(folder: Path, name: str) -> None:
    """The kernel's limit on the size of a file stands for the disk's."""
    if name != "folder":
        Path(name).write_bytes(b"before")
    program = f"""
import os, sys
from gpuctl.batch.outputs import Output, destination
from gpuctl.batch.rows import Result, Url
from gpuctl.errors import GpuctlError
try:
    with Output(destination({name!r}, url=Url.FUNCTION), job="j", url=Url.FUNCTION) as out:
        for number in range(200):
            out.write(Result(number, f"r{{number}}", os.urandom(20_000).hex()))
except GpuctlError as error:
    print(error.exit_code, error.problems[0], error.hint)
"""
    limit = 10_000 if name == "folder" else 1_000_000
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.stdout.startswith(f"1 {name}: File too large; it was not written"), (done.stdout, done.stderr)
    assert "can be fetched again" in done.stdout
    assert there() == [name]
    if name == "folder":
        assert there(name) == []
    else:
        assert Path(name).read_bytes() == b"before"


def test_stdout(folder: Path) -> None:
    program = """
from gpuctl.batch.outputs import Format, Output, destination
from gpuctl.batch.rows import Result, Url
import sys
with Output(destination("-", url=Url.FUNCTION, form=Format(sys.argv[1])), job="j", url=Url.FUNCTION) as out:
    out.write(Result(0, "r", "x"))
"""
    for form, text in (
        (Format.CSV, b"answer\r\nx\r\n"),
        (Format.JSONL, b'{"answer":"x"}\n'),
        (Format.PARQUET, b"PAR1"),
    ):
        done = subprocess.run([sys.executable, "-c", program, form], capture_output=True, check=True)
        assert done.stdout.startswith(text)
    with Path("/dev/full").open("wb") as full:
        failed = subprocess.run([sys.executable, "-c", program, "jsonl"], stdout=full, stderr=subprocess.PIPE)
    assert b"GpuctlError: stdout: No space left on device" in failed.stderr


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.tuples(st.fixed_dictionaries({"a": json_values, "b": json_values}), json_values), max_size=6
    )
)
def test_whatever_json_holds_is_written(folder: Path, rows: list[tuple[dict[str, Any], Any]]) -> None:
    given_ = results(*(answer for _, answer in rows), columns=[columns for columns, _ in rows])
    for name, form in (("o.jsonl", Format.JSONL), ("o.csv", Format.CSV), ("o.parquet", Format.PARQUET)):
        write(name, given_, Url.FUNCTION, form, ["a", "b"])
    read = [json.loads(line) for line in Path("o.jsonl").read_bytes().splitlines()]
    assert read == [{**columns, "answer": answer} for columns, answer in rows]
    assert parquet.read_table("o.parquet").num_rows == len(rows)
    assert (
        len(list(csv.reader(io.StringIO(Path("o.csv").read_bytes().decode(), newline="")))) == len(rows) + 1
    )
