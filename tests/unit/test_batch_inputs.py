"""The input of a batch job: what is found, what becomes of each row, and what is said of the bad ones."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from gpuctl.batch.formats import Kind
from gpuctl.batch.inputs import open_input, strict
from gpuctl.batch.rows import Row, Url
from gpuctl.batch.seen import Seen
from gpuctl.errors import GpuctlError

WAV = b"RIFF\x24\0\0\0WAVEfmt " + b"\0" * 32
PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 32


def chat(number: int, **more: Any) -> dict[str, Any]:
    body = {"model": "llama3", "messages": [{"role": "user", "content": f"say {number}"}]}
    return {"custom_id": f"a{number}", "method": "POST", "url": "/v1/chat/completions", "body": body, **more}


def lines(*values: Any) -> bytes:
    return b"".join(
        (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n" for value in values
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(name: str, content: bytes | str) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def prompts(rows: Sequence[Row]) -> list[str]:
    return [row.body["messages"][-1]["content"] for row in rows if row.body]


def bad(rows: Sequence[Row]) -> list[tuple[int, str, str]]:
    return [(row.number, row.bad.code, row.bad.message) for row in rows if row.bad]


@contextlib.contextmanager
def refused(*parts: str) -> Iterator[None]:
    with pytest.raises(GpuctlError) as error:
        yield
    said = " ".join((*error.value.problems, error.value.hint or ""))
    assert error.value.exit_code == 2
    assert all(part in said for part in parts), said


@contextlib.contextmanager
def stdin(content: bytes) -> Iterator[None]:
    """The process's own stdin as a pipe, fed slowly."""
    reading, writing = os.pipe()

    def feed() -> None:
        with os.fdopen(writing, "wb") as file, contextlib.suppress(BrokenPipeError):
            for start in range(0, len(content), 100_000):
                file.write(content[start : start + 100_000])

    thread = threading.Thread(target=feed, daemon=True)
    thread.start()
    before = sys.stdin
    sys.stdin = os.fdopen(reading, "r")
    try:
        yield
    finally:
        sys.stdin.close()
        sys.stdin = before
        thread.join()


# --- what is found -------------------------------------------------------------------------------------------------


def test_openai_batch_lines_are_requests_as_they_are(folder: Path) -> None:
    put("prompts.jsonl", lines(chat(1), b"", chat(2)))
    found = open_input(["prompts.jsonl"], model="llama3")
    assert found.describe() == "prompts.jsonl: OpenAI Batch, chat completions"
    assert list(found) == [
        Row(0, "a1", Url.CHAT, chat(1)["body"]),
        Row(1, "a2", Url.CHAT, chat(2)["body"]),
    ]
    assert found.warnings() == []


@pytest.mark.parametrize(
    ("url", "body"),
    [
        (Url.COMPLETIONS, {"prompt": "Once"}),
        (Url.COMPLETIONS, {"prompt": [1, 2, 3]}),
        (Url.EMBEDDINGS, {"input": ["a", "b"]}),
        (Url.TRANSCRIPTIONS, {"file": "https://example.org/a.wav"}),
    ],
)
def test_each_url_of_openai_batch(folder: Path, url: Url, body: dict[str, Any]) -> None:
    put("in.jsonl", lines({"custom_id": "x", "method": "POST", "url": url, "body": body}))
    found = open_input(["in.jsonl"])
    assert (found.url, [(row.body, row.media) for row in found]) == (url, [(body, ())])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", lines({"text": "one", "n": 1}, {"text": "two", "n": 2}), "JSONL with columns text, n"),
        ("a.csv", "text,n\r\none,1\r\ntwo,2\r\n", "CSV with columns text, n"),
        ("a.csv", "text;n\none;1\n\ntwo;2\n", "CSV with columns text, n"),
        ("a.csv", '"text","n"\n"one","1"\n"two","2"\n', "CSV with columns text, n"),
        ("a.csv", '"text";"a, b"\none;1\ntwo;2\n', "CSV with columns text, a, b"),
        ("a.csv", '"a\nb"\ttext\n1\tone\n2\ttwo\n', "CSV with columns a\nb, text"),
        ("a.tsv", "text\tn\none\t1\ntwo\t2", "TSV with columns text, n"),
        ("a.txt", "\ufeffone\r\n\r\n \ntwo", "text, a row per line"),
        ("data", lines({"text": "one"}, {"text": "two"}), "JSONL with columns text"),  # by content
        ("data", "text\tn\none\t1\ntwo\t2\n", "TSV with columns text, n"),
        ("data", "text,n\none,1\ntwo,2\n", "CSV with columns text, n"),
        ("data", "one\ntwo\n", "text, a row per line"),
        ("data.gz", gzip.compress(b"one\ntwo\n", mtime=0), "text (gzip), a row per line"),
        ("a.txt", lines({"text": "one"}, {"text": "two"}), "JSONL with columns text"),
        ("a.csv.gz", gzip.compress(b"text,n\none,1\ntwo,2\n", mtime=0), "CSV (gzip) with columns text, n"),
        ("a.csv", "text,n\none,1\ntwo,2\n".encode("utf-16"), "CSV in UTF-16 with columns text, n"),
    ],
)
def test_tables_and_lines_by_content_then_name(
    folder: Path, name: str, content: bytes | str, says: str
) -> None:
    found = open_input([put(name, content)], prompt="Say {text}!")
    assert found.describe() == f"{name}: {says}, chat completions"
    rows = list(found)
    assert prompts(rows) == ["Say one!", "Say two!"]
    assert [(row.number, row.id) for row in rows] == [(0, "row-0"), (1, "row-1")]


def test_parquet_and_zst(folder: Path) -> None:
    table = pyarrow.table({"text": ["one", "two"], "score": [0.5, float("nan")], "raw": [b"\xff", None]})
    parquet.write_table(table, "a.parquet")
    found = open_input(["a.parquet"], prompt="{text} {score} {raw}", keep_columns=True)
    assert found.describe() == "a.parquet: Parquet with columns text, score, raw, chat completions"
    rows = list(found)
    assert prompts(rows) == ["one 0.5 /w==", "two  "]
    assert rows[1].columns == {"text": "two", "score": None, "raw": None}
    with pyarrow.CompressedOutputStream("a.jsonl.zst", "zstd") as file:
        file.write(lines({"text": "one"}, {"text": "two"}))
    assert prompts(list(open_input(["a.jsonl.zst"], prompt="{text}"))) == ["one", "two"]
    put("b.parquet.gz", gzip.compress(Path("a.parquet").read_bytes()))
    assert [row.body for row in open_input(["b.parquet.gz"], url=Url.FUNCTION)] == [
        row.columns for row in rows
    ]
    put("cut.parquet", Path("a.parquet").read_bytes()[:-20])
    with refused("cut.parquet: not a whole Parquet file"):
        open_input(["cut.parquet"], prompt="{text}")


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_stdin(folder: Path, pack: Any) -> None:
    many = lines(*(chat(number) for number in range(20_000)))
    with stdin(pack(many)):
        found = open_input(["-"], model="llama3")
        assert found.describe().startswith("stdin: OpenAI Batch")
        assert [row.id for row in found] == [f"a{number}" for number in range(20_000)]
        digest = found.digest
        with pytest.raises(RuntimeError):
            next(iter(found))
    put("same.jsonl", many)
    same = open_input(["same.jsonl"], model="llama3")
    assert sum(1 for _ in same) == 20_000
    assert same.digest == digest


def test_parquet_from_a_pipe(folder: Path) -> None:
    parquet.write_table(pyarrow.table({"text": ["one"]}), "a.parquet")
    with stdin(Path("a.parquet").read_bytes()):
        assert prompts(list(open_input(["-"], prompt="{text}"))) == ["one"]


def test_a_named_pipe_is_read_once_as_process_substitution_makes_it(folder: Path) -> None:
    os.mkfifo("pipe")
    writer = threading.Thread(
        target=lambda: Path("pipe").write_bytes(b"text\n" + b"x,y\n" * 100), daemon=True
    )
    writer.start()
    assert len(list(open_input(["pipe"], kind=Kind.LINES))) == 101
    writer.join()


def test_several_files_are_one_input_in_their_order(folder: Path) -> None:
    put("part-2.csv", "text\nthree\n")
    put("part-10.csv", "text\nfour\n")
    put("part-1.csv.gz", gzip.compress(b"text\none\ntwo\n"))
    put("part-3.csv", "")
    found = open_input(["part-*.csv*"], prompt="{text}")
    assert found.describe() == "part-1.csv.gz and 2 more: CSV (gzip) with columns text, chat completions"
    rows = list(found)
    assert prompts(rows) == ["one", "two", "three", "four"]
    assert [row.number for row in rows] == [0, 1, 2, 3]
    named = list(open_input(["part-10.csv", "part-2.csv"], prompt="{text}"))
    assert prompts(named) == ["four", "three"]


def test_a_folder_of_recordings(folder: Path) -> None:
    for name in ("talks/ep10.wav", "talks/ep2.mp3", "talks/2024/a.flac"):
        put(name, WAV)
    put("talks/unnamed", WAV)
    put("talks/notes.txt", "no recording")
    put("talks/.hidden.wav", WAV)
    put("talks/empty.wav", b"")
    found = open_input(["talks"], keep_columns=True)
    assert (
        found.describe()
        == "talks: 5 audio files, a row each, audio transcriptions; 1 other file skipped (1 .txt)"
    )
    rows = list(found)
    assert [row.id for row in rows] == ["2024/a.flac", "empty.wav", "ep2.mp3", "ep10.wav", "unnamed"]
    assert rows[2] == Row(
        2,
        "ep2.mp3",
        Url.TRANSCRIPTIONS,
        {"file": {"$media": 0}},
        {"file": "ep2.mp3"},
        None,
        (Path("talks/ep2.mp3"),),
    )
    assert bad(rows) == [(1, "unreadable_file", "empty.wav: talks/empty.wav is empty")]
    before = found.digest
    list(found)
    assert found.digest == before
    os.utime("talks/ep10.wav", (1, 1))
    list(found)
    assert found.digest != before


def test_images_with_a_prompt_and_files_of_text(folder: Path) -> None:
    put("photos/a/1.png", PNG)
    put("photos/b/1.png", PNG)
    rows = list(open_input(["photos/**/*.png"], prompt="What is on {file}?", system="Be brief."))
    assert rows[0].body == {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is on a/1.png?"},
                    {"type": "image_url", "image_url": {"url": {"$media": 0}}},
                ],
            },
        ]
    }
    assert [row.id for row in rows] == ["a/1.png", "b/1.png"]
    with refused("--prompt: images need one"):
        open_input(["photos"])
    put("docs/a.md", "# One\ntwo")
    put("docs/b.txt", b"caf\xe9\nx")
    rows = list(open_input(["docs"], prompt="Summarise {file}: {text}"))
    assert prompts(rows) == ["Summarise a.md: # One\ntwo"]
    assert bad(rows)[0][1:] == (
        "wrong_encoding",
        "b.txt: line 1: byte 4 of the line, 0xe9, is not UTF-8; --encoding says what it is, for example latin-1",
    )
    assert prompts(list(open_input(["docs/b.txt", "docs/a.md"], encoding="latin1")))[0] == "café\nx"
    assert len(list(open_input(["docs/*"], kind=Kind.LINES))) == 4


def test_a_function_gets_the_row(folder: Path) -> None:
    put("a.csv", "text,n\none,1\n")
    put("b.wav", WAV)
    put("c.jsonl", lines(chat(1)))
    assert [row.body for row in open_input(["a.csv"], url=Url.FUNCTION)] == [{"text": "one", "n": "1"}]
    (row,) = open_input(["b.wav"], url=Url.FUNCTION)
    assert (row.body, [path.name for path in row.media]) == (
        {"file": "b.wav", "path": {"$media": 0}},
        ["b.wav"],
    )
    assert [row.body for row in open_input(["c.jsonl"], url=Url.FUNCTION)] == [chat(1)]


def test_requests_by_the_names_of_their_columns(folder: Path) -> None:
    turns = [{"role": "user", "content": "hi"}]
    put("a.jsonl", lines({"messages": turns}, {"messages": json.dumps(turns)}, {"messages": 3}, {"other": 1}))
    found = open_input(["a.jsonl"], system="Be kind to {other}.")
    assert (
        found.describe() == "a.jsonl: JSONL with columns messages, other, chat completions of column messages"
    )
    rows = list(found)
    assert [problem[1] for problem in bad(rows)] == ["missing_column"] * 3 + ["missing_column"]
    rows = list(open_input(["a.jsonl"], system="Be kind."))
    assert [row.body and row.body["messages"][0]["role"] for row in rows] == ["system", "system", None, None]
    assert [problem[1] for problem in bad(rows)] == ["invalid_row", "missing_column"]
    put("b.csv", 'prompt,talk\nhello,"[{""role"": ""user"", ""content"": ""x""}]"\n')
    assert prompts(list(open_input(["b.csv"]))) == ["hello"]
    assert prompts(list(open_input(["b.csv"], messages_column="talk"))) == ["x"]
    assert [row.body for row in open_input(["b.csv"], url=Url.COMPLETIONS)] == [{"prompt": "hello"}]
    assert [row.body for row in open_input(["b.csv"], url=Url.EMBEDDINGS, prompt="{prompt}")] == [
        {"input": "hello"}
    ]
    put("talks/a.wav", WAV)
    put("c.csv", "file\ntalks/a.wav\ntalks/b.wav\n")
    rows = list(open_input(["c.csv"], url=Url.TRANSCRIPTIONS))
    assert (rows[0].body, rows[0].media) == ({"file": {"$media": 0}}, (Path("talks/a.wav"),))
    assert bad(rows) == [(1, "unreadable_file", "c.csv:3: talks/b.wav: No such file or directory")]


def test_pictures_that_a_line_names_go_along(folder: Path) -> None:
    put("data/x.png", PNG)
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": "x.png", "detail": "low"}}]
    parts += [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "text", "text": "?"},
    ]
    put("data/in.jsonl", lines(chat(1, body={"messages": [{"role": "user", "content": parts}]})))
    (row,) = open_input(["data/in.jsonl"])
    assert row.media == (Path("data/x.png"),)
    assert row.body
    assert row.body["messages"][0]["content"] == [
        {"type": "image_url", "image_url": {"url": {"$media": 0}, "detail": "low"}},
        *parts[1:],
    ]


# --- what is wrong with a row --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        (b"{", "invalid_json", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        (b'{"a": }', "invalid_json", "not JSON: a value is missing at column 7"),
        (b"oops", "invalid_json", "not JSON: a value is missing at column 1"),
        (b'{"a": 1} {"b": 2}', "invalid_json", "not JSON: Extra data at column 9"),
        (b'{"a": NaN}', "invalid_json", "NaN is no number there"),
        (b'{"a": "\\ud800"}', "invalid_json", "half of a character"),
        (b"[" * 100_000, "invalid_json", "nested too deep"),
        (b'{"a": ' * 200 + b"1" + b"}" * 200, "invalid_json", "nested too deep"),
        (b'{"a": ' + b"1" * 5000 + b"}", "invalid_json", "not JSON"),
        (b'{"text": "caf\xe9"}', "wrong_encoding", "byte 14 of the line, 0xe9, is not UTF-8"),
        (b"[1]", "invalid_row", "a JSON object is needed, not an array"),
        (b'{"n": 1}', "invalid_row", "no custom_id"),
        (lines(chat(1, custom_id=7)), "invalid_row", "custom_id is 7, not text"),
        (
            lines(chat(1, url="/v1/responses")),
            "unknown_url",
            "url is '/v1/responses'; gpuctl answers /v1/chat",
        ),
        (lines(chat(1, url="/v1/embeddings")), "mixed_urls", "/v1/embeddings in a job of chat completions"),
        (lines(chat(1, method="GET")), "unknown_url", "method is 'GET'"),
        (lines(chat(1, body=[])), "invalid_request", "body is [], not an object"),
        (lines(chat(1, body={"messages": []})), "invalid_request", "at least one message"),
        (
            lines(chat(1, body={"messages": [{"content": "x"}]})),
            "invalid_request",
            "messages[0] must be an object with",
        ),
        (
            lines(chat(1, body={"messages": [{"role": "user", "content": 3}]})),
            "invalid_request",
            "messages[0].content",
        ),
        (
            lines(chat(1, body={"messages": [{"role": "user", "content": None}]})),
            "invalid_request",
            "messages[0].content must be text or a list of parts",
        ),
        (lines(chat(0)), "duplicate_custom_id", "custom_id 'a0' was there before"),
    ],
)
def test_a_malformed_line_is_told_and_the_rest_goes_on(
    folder: Path, line: bytes, code: str, says: str
) -> None:
    put("in.jsonl", lines(chat(0), line.rstrip(b"\n"), chat(9)))
    rows = list(open_input(["in.jsonl"], model="llama3"))
    ((number, given, message),) = bad(rows)
    assert (number, given) == (1, code)
    assert message.startswith("in.jsonl:2: ")
    assert says in message
    assert [row.id for row in rows if row.body] == ["a0", "a9"]
    with refused("in.jsonl:2: "):
        list(strict(open_input(["in.jsonl"], model="llama3")))


def test_a_row_that_is_refused_does_not_take_its_custom_id_from_a_good_one(folder: Path) -> None:
    put("in.jsonl", lines(chat(1, body={}), chat(1)))
    assert [(row.id, row.bad is None) for row in open_input(["in.jsonl"])] == [("a1", False), ("a1", True)]


def test_another_model_is_counted(folder: Path) -> None:
    put("in.jsonl", lines(chat(1), chat(2, body={**chat(2)["body"], "model": "gpt-4o"}), chat(3)))
    found = open_input(["in.jsonl"], model="llama3")
    list(found)
    assert found.warnings() == ["1 row for another model (gpt-4o): llama3 answers all of them"]
    found = open_input(["in.jsonl"], model="m", models={"llama3", "gpt-4o"})  # of adapters, say
    assert list(found)
    assert found.warnings() == []


@pytest.mark.parametrize(
    ("rest", "problems", "good"),
    [
        ("x,1\ny\nz,3\n", [(3, "1 field, where the first line names 2 columns")], ["x", "z"]),
        ("x,1,2\nz,3\n", [(2, "3 fields")], ["z"]),
        ('"a\nb",1\nz\n', [(4, "1 field")], ["a\nb"]),
        (
            '"a\nb"\nz,3\n',
            [(2, "1 field, where the first line names 2 columns (a quote joins lines 2 to 3)")],
            ["z"],
        ),
        ('"stray,1\nx,2\n"quoted",3\n', [(2, "not CSV")], ["x", "quoted"]),
        (
            'x,1\n"never closed,2\ny,3\nz,4\n',
            [(3, "a quote is opened here and never closed")],
            ["x", "y", "z"],
        ),
        ('"a"b,1\nz,3\n', [(2, "not CSV")], ["z"]),
        ("x,1\n\n\ny,2\n", [], ["x", "y"]),
        ("x\ry,1\nz,2\n", [(2, "a carriage return (\\r) without a line feed")], ["z"]),
    ],
)
def test_bad_rows_of_csv(folder: Path, rest: str, problems: list[tuple[int, str]], good: list[str]) -> None:
    put("in.csv", "text,n\n" + rest)
    rows = list(open_input(["in.csv"], prompt="{text}"))
    assert prompts(rows) == good
    assert len(bad(rows)) == len(problems)
    for (_, code, message), (line, says) in zip(bad(rows), problems, strict=True):
        assert code == "invalid_row"
        assert message.startswith(f"in.csv:{line}: ")
        assert says in message


def test_bytes_of_another_encoding_in_csv(folder: Path) -> None:
    put("in.csv", b'text,n\nok,1\n"x\ncaf\xe9",2\nfine,3\n')
    rows = list(open_input(["in.csv"], prompt="{text}"))
    assert prompts(rows) == ["ok", "fine"]
    assert bad(rows)[0][2].startswith("in.csv:3: byte 4 of the line, 0xe9, is not UTF-8")
    assert prompts(list(open_input(["in.csv"], prompt="{text}", encoding="cp1252"))) == [
        "ok",
        "x\ncafé",
        "fine",
    ]
    put("jp.txt", "日本\n".encode("shift_jis") + b"\x81\xff\n" + "語\n".encode("shift_jis"))
    rows = list(open_input(["jp.txt"], encoding="shift_jis"))
    assert prompts(rows) == ["日本", "語"]
    assert "jp.txt:2: byte 0x81 is not in the encoding" in bad(rows)[0][2]


def test_a_file_that_is_cut_short_gives_what_stands_before(folder: Path) -> None:
    noise = [{"text": os.urandom(50).hex()} for _ in range(20_000)]
    whole = gzip.compress(lines(*noise))
    put("in.jsonl.gz", whole[: len(whole) // 2])
    put("next.jsonl", lines({"text": "last"}))
    rows = list(open_input(["in.jsonl.gz", "next.jsonl"], prompt="{text}"))
    assert prompts(rows)[:-1] == [row["text"] for row in noise[: len(rows) - 2]]
    assert len(rows) > 5000
    assert prompts(rows)[-1] == "last"
    ((number, code, message),) = bad(rows)
    assert (number, code) == (len(rows) - 2, "unreadable_file")
    assert message.startswith(f"in.jsonl.gz:{number + 1}: the compressed file ends too early")
    with pyarrow.CompressedOutputStream("in.jsonl.zst", "zstd") as file:
        file.write(lines(*noise))
    put("in.jsonl.zst", Path("in.jsonl.zst").read_bytes()[:-100])
    assert [problem[1] for problem in bad(list(open_input(["in.jsonl.zst"], prompt="{text}")))] == [
        "unreadable_file"
    ]


def test_a_small_file_that_is_cut_short_does_so_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gzip.compress(lines(*({"text": f"row {number}"} for number in range(50))))
    put("in.jsonl.gz", whole[:-20])
    rows = list(open_input(["in.jsonl.gz"], prompt="{text}"))
    assert len(rows) > 2
    assert prompts(rows) == [f"row {number}" for number in range(len(rows) - 1)]
    ((number, code, _),) = bad(rows)
    assert (number, code) == (len(rows) - 1, "unreadable_file")
    with stdin(whole[:-20]):
        assert len(prompts(list(open_input(["-"], prompt="{text}")))) == number


def test_an_empty_conversation_is_none_with_a_system_message_either(folder: Path) -> None:
    put("in.jsonl", lines({"turns": []}, {"turns": "[]"}, {"turns": [{"role": "user", "content": "x"}]}))
    rows = list(open_input(["in.jsonl"], messages_column="turns", system="be brief"))
    assert prompts(rows) == ["x"]
    assert [says for _, _, says in bad(rows)] == [
        "in.jsonl:1: column 'turns' is an empty list",
        "in.jsonl:2: column 'turns' is an empty list",
    ]


def test_a_line_without_an_end_does_not_fill_the_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpuctl.batch.sources.LONGEST", 10_000)
    put("in.txt", "one\n" + "x" * 300_000 + "\n" + "y" * 9_999 + "\ntwo")
    rows = list(open_input(["in.txt"]))
    assert [len(text) for text in prompts(rows)] == [3, 9_999, 3]
    assert [problem[:2] for problem in bad(rows)] == [(1, "row_too_large")]


def test_a_row_without_a_column_of_the_prompt(folder: Path) -> None:
    put("in.jsonl", lines({"text": "a", "lang": "en"}, {"text": "b"}, {"text": None, "lang": ["x"]}))
    rows = list(open_input(["in.jsonl"], prompt="{text} in {lang}"))
    assert prompts(rows) == ["a in en", ' in ["x"]']
    assert bad(rows) == [(1, "missing_column", "in.jsonl:2: no column 'lang'; this row has text")]


# --- what is refused before anything starts ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "options", "says"),
    [
        ({}, {}, ["in.jsonl: no such file"]),
        ({"in.json": "x"}, {}, ["in.jsonl: no such file; did you mean in.json?"]),
        ({"in.jsonl": ""}, {}, ["in.jsonl: empty, no row to answer"]),
        ({"in.jsonl": "\n \n"}, {}, ["in.jsonl: empty"]),
        ({"in.jsonl": gzip.compress(b"")}, {}, ["in.jsonl: empty"]),
        ({"in.jsonl": b"\x1f\x8b\x08"}, {}, ["in.jsonl: the compressed file ends too early"]),
        ({"in.jsonl": gzip.compress(gzip.compress(lines({"a": 1})))}, {}, ["in.jsonl: packed twice"]),
        ({"in.jsonl": b"PK\x03\x04.."}, {}, ["in.jsonl: a ZIP file", "save it as CSV"]),
        ({"in.jsonl": os.urandom(64) + b"\0\0"}, {}, ["in.jsonl: binary data, not text"]),
        ({"in.jsonl": "text\n".encode("utf-16-le")}, {}, ["binary data", "--encoding utf-16-le"]),
        ({"in.jsonl": '[{"a": 1}]'}, {}, ["one JSON array", "jq -c '.[]' in.jsonl"]),
        ({"in.jsonl": '{\n "a": 1\n}\n'}, {}, ["line 1 is no whole JSON object", "jq -c ."]),
        (
            {"in.jsonl": "hello\nworld\n"},
            {},
            ["none of the first 2 lines is a JSON object; line 1 is 'hello'"],
        ),
        ({"in.jsonl": lines({"a": 1})}, {}, ["no column 'messages' or 'prompt'; the columns are a", "{a}"]),
        ({"in.jsonl": lines({"input": "x"})}, {}, ["the columns are input", "--task embeddings"]),
        (
            {"in.jsonl": lines({"text": 1})},
            {"prompt": "{txt}"},
            ["no column 'txt' in its first", "mean 'text'?"],
        ),
        ({"in.jsonl": lines({"text": 1})}, {"prompt": "{text"}, []),
        ({"in.jsonl": lines({"text": 1})}, {"prompt": "{{ text"}, ["--prompt: not a template", "{column}"]),
        (
            {"in.jsonl": lines({"text": 1})},
            {"messages_column": "Text"},
            ["in.jsonl has no column 'Text'"],
        ),
        (
            {"in.jsonl": lines({"text": 1})},
            {"prompt": "x", "messages_column": "text"},
            ["leave one of them out"],
        ),
        (
            {"in.jsonl": lines({"text": 1})},
            {"encoding": "latin-7"},
            ["'latin-7' is no encoding", "latin-1"],
        ),
        (
            {"in.jsonl": lines({"text": 1})},
            {"encoding": "base64"},
            ["--encoding: 'base64' is no encoding of text"],
        ),
        (
            {"in.jsonl": lines({"text": 1})},
            {"prompt": "x", "url": Url.FUNCTION},
            ["a function gets the row as it is"],
        ),
        ({"in.jsonl": lines(chat(1))}, {"prompt": "x"}, ["OpenAI Batch: its lines are whole requests"]),
        (
            {"in.jsonl": lines(chat(1))},
            {"url": Url.EMBEDDINGS},
            ["ask for chat completions", "is for embeddings"],
        ),
        (
            {"in.jsonl": lines(chat(1, url="/v1/x"))},
            {},
            ["url is '/v1/x'; gpuctl answers /v1/chat/completions"],
        ),
        (
            {"in.jsonl": lines(chat(1)), "b.jsonl": lines({"a": 1})},
            {},
            ["mixed formats: in.jsonl is Open", "is JSONL"],
        ),
        (
            {"in.jsonl": lines({"text": 1}), "b.csv": '"a"b,c\n1,2\n'},
            {"kind": Kind.CSV},
            ["b.csv: the line with the names of the columns: not CSV: a quote that stands"],
        ),
        ({"in.jsonl": lines(chat(1)), "b.csv": "a,b\n"}, {}, ["mixed formats", "b.csv is CSV"]),
        (
            {
                "in.jsonl": lines(chat(1)),
                "b.jsonl": lines(chat(1, url="/v1/embeddings", body={"input": "x"})),
            },
            {},
            ["mixed urls: in.jsonl asks for chat completions, b.jsonl for embeddings"],
        ),
    ],
)
def test_refused(
    folder: Path, files: dict[str, bytes | str], options: dict[str, Any], says: list[str]
) -> None:
    for name, content in files.items():
        put(name, content)
    if not says:  # a brace alone is a brace
        assert prompts(list(open_input(["in.jsonl"], **options))) == ["{text"]
        return
    with refused(*says):
        open_input(["in.jsonl", *(name for name in files if name.startswith("b."))], **options)


def test_refused_folders(folder: Path) -> None:
    put("mixed/a.wav", WAV)
    put("mixed/b.png", PNG)
    put("mixed/c.csv", "a,b\n")
    put("mixed/d.txt", "one")
    put("mixed/e.txt", "two")
    with refused("several kinds of files: 1 audio file, 1 image, 1 table, 2 text files"):
        open_input(["mixed"])
    assert [row.id for row in open_input(["mixed"], url=Url.TRANSCRIPTIONS)] == ["a.wav"]
    assert [row.id for row in open_input(["mixed"], kind=Kind.IMAGE, prompt="?")] == ["b.png"]
    Path("none").mkdir()
    with refused("none: no files there"):
        open_input(["none"])
    with refused("*.mp3: no files there"):
        open_input(["*.mp3"])
    with refused("stdin is an input of its own"):
        open_input(["-", "mixed"])
    with refused("audio files, but the job is for embeddings"):
        open_input(["mixed/a.wav"], url=Url.EMBEDDINGS)


def test_nothing_of_a_folder_is_left_out_without_a_word(folder: Path) -> None:
    put("there/a.txt", "one")
    put("elsewhere/b.txt", "two")
    Path("there/more").symlink_to("../elsewhere")
    Path("there/gone.txt").symlink_to("nothing")
    for path in ("there", "there/*"):
        found = list(open_input([path]))
        assert prompts(found) == ["one"]
        ((_, code, says),) = bad(found)
        assert code == "unreadable_file"
        assert says.endswith("there/gone.txt: No such file or directory")
    assert "; 1 other file skipped (1 more)" in open_input(["there"]).describe()


def test_a_table_of_names_only_has_no_row(folder: Path) -> None:
    put("in.csv", "text,n\n\n")
    with refused("in.csv: no row to answer, only the names of its columns"):
        list(open_input(["in.csv"], prompt="{text}"))


def test_without_pyarrow_parquet_is_one_clear_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put("in.parquet", b"PAR1\0\0\0\0PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with refused("in.parquet: Parquet: pyarrow is not installed", "pip install 'gpuctl[batch]'"):
        open_input(["in.parquet"], prompt="x")


# --- digest, columns, memory ---------------------------------------------------------------------------------------


def test_the_digest_is_of_the_rows_their_order_and_what_is_asked(folder: Path) -> None:
    def digest(content: bytes, name: str = "in.jsonl", **options: Any) -> str:
        found = open_input([put(name, content)], **{"prompt": "{a}", **options})
        list(found)
        return found.digest

    one, two = {"a": 1}, {"a": 2}
    same = digest(lines(one, two))
    assert same == digest(lines(one, two)) == digest(gzip.compress(lines(one, two)), "in.jsonl.gz")
    others = [digest(lines(two, one)), digest(lines(one)), digest(lines(one, two), prompt="{a}!")]
    others += [digest(lines(one, two), system="x"), digest(lines(one, two), url=Url.COMPLETIONS)]
    assert len({same, *others}) == 6


def test_columns_are_those_of_all_rows(folder: Path) -> None:
    put("in.jsonl", lines({"a": 1}, {"b": 2, "a": 1}))
    found = open_input(["in.jsonl"], prompt="{a}", keep_columns=True)
    assert [row.columns for row in found] == [{"a": 1}, {"b": 2, "a": 1}]
    assert found.columns == ("a", "b")
    put("oa.jsonl", lines(chat(1)))
    assert [row.columns for row in open_input(["oa.jsonl"], keep_columns=True)] == [{"custom_id": "a1"}]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.lists(
            st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8), min_size=2, max_size=2
        ),
        min_size=1,
        max_size=6,
    ),
    pack=st.sampled_from([bytes, gzip.compress]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_whatever_csv_writes_is_read_back(
    folder: Path, rows: list[list[str]], pack: Any, encoding: str
) -> None:
    file = io.StringIO(newline="")
    csv.writer(file).writerows([["left", "right"], *rows])
    put("in.csv", pack(file.getvalue().encode(encoding)))
    read = list(open_input(["in.csv"], url=Url.FUNCTION))
    assert [row.body for row in read] == [{"left": left, "right": right} for left, right in rows]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode),
    name=st.sampled_from(["csv", "txt", "x"]),
)
def test_whatever_a_file_holds_it_is_rows_or_one_error(folder: Path, content: bytes, name: str) -> None:
    put(f"in.{name}", content)
    try:
        rows = list(open_input([f"in.{name}"], url=Url.FUNCTION))
    except GpuctlError:
        return
    assert [row.number for row in rows] == list(range(len(rows)))
    assert all((row.body is None) is (row.bad is not None) for row in rows)
    json.dumps([row.body for row in rows], ensure_ascii=False).encode()


@given(st.lists(st.text(max_size=3)))
def test_seen_is_a_set(texts: list[str]) -> None:
    seen, plain = Seen(), set[str]()
    for text in texts:
        assert seen.add(text) is (text not in plain)
        plain.add(text)


def test_seen_keeps_little_of_each() -> None:
    seen = Seen()
    for number in range(100_000):
        assert seen.add(f"request-{number}")
    assert sum(len(table) * table.itemsize for table in seen._tables) < 100_000 * 17


def test_text_that_begins_as_other_files_do_is_text(folder: Path) -> None:
    for line in ("ID3 learns trees", "The big WAVE", "PAR1 is a hole", "GIF8 words", "BZh9", "OggS"):
        assert prompts(list(open_input([put("in.txt", line)]))) == [line]


def test_names_of_files_may_be_any_bytes(folder: Path) -> None:
    Path("docs").mkdir()
    Path(os.fsdecode(b"docs/caf\xe9\n.txt")).write_text("x")
    (row,) = open_input(["docs"], prompt="{file}", keep_columns=True)
    assert (row.id, row.columns, prompts([row])) == ("caf\ufffd\n.txt", {"file": row.id}, [row.id])
    (named,) = open_input([os.fsdecode(b"docs/caf\xe9\n.txt")])
    assert prompts([named]) == ["x"]


def test_a_million_rows_stay_flat(folder: Path) -> None:
    """In a process of its own, whose peak is its own: 100 MB of rows take no more memory than 1 MB of them."""
    program = """
import itertools, resource, sys
from gpuctl.batch.inputs import open_input
peak = []
for name in ("small.jsonl", "large.jsonl"):
    found = open_input([name])
    for row in found: pass
    peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
print(peak[1] - peak[0])
"""
    long = "x" * 1000
    for name, count in (("small.jsonl", 1000), ("large.jsonl", 100_000)):
        with Path(name).open("wb") as file:
            file.writelines(lines(chat(number, note=long)) for number in range(count))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20


def test_a_prompt_that_leaves_the_row_out_is_pointed_out(folder: Path) -> None:
    put("in.jsonl", '{"text": "a"}\n')

    def warned(prompt: str, **options: Any) -> bool:
        rows = open_input(["in.jsonl"], prompt=prompt, **options)
        list(rows)
        return any("every row asks the same" in warning for warning in rows.warnings())

    assert warned("Summarise: {text")  # a slip of the finger
    assert not warned("Summarise: {text}")
    assert not warned("Summarise it.", system="It is: {text}")


def test_lines_that_are_no_json_for_their_encoding_name_that(folder: Path) -> None:
    put("in.jsonl", '{"text": "café"}\n{"text": "thé"}\n'.encode("latin-1"))
    with pytest.raises(GpuctlError) as refused:
        open_input(["in.jsonl"], prompt="{text}")
    assert "line 1: byte 14 of the line, 0xe9, is not UTF-8" in refused.value.problems[0]
    assert "--encoding" in (refused.value.hint or "")
    assert prompts(list(open_input(["in.jsonl"], prompt="{text}", encoding="latin-1"))) == ["café", "thé"]
