"""What `gpuctl batch` tells before anything starts."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fakes import FakeRunner
from gpuctl.__main__ import main
from gpuctl.modal_cli import Completed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuctl.modal_cli import ModalEnv


@pytest.fixture(autouse=True)
def _nobody_to_ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a network call")

    monkeypatch.delenv("GPUCTL_TARGET", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for variable in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "HF_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.chdir(tmp_path)


def rows(*texts: str, name: str = "rows.jsonl") -> str:
    Path(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return name


def told(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["batch", *words, "-o", "out.jsonl", "--dry-run"]) == code
    return capsys.readouterr().err


ASK = ("--prompt", "{text}", "--gpu", "T4")


def test_tokens_time_and_cost_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    err = told(capsys, "tiny", rows(*["badu gomi"] * 30), *ASK, "--max-tokens", "20")
    assert "in (all of the 30 rows tokenised), 30 to 600 out\n" in err
    assert "\ntime: 40 s to 3 min on one T4; cost: $0.0066 to $0.0" in err
    assert "--max-tokens N" not in err


def test_answers_without_an_end_are_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    err = told(capsys, "tiny", rows("badu"), *ASK)
    assert "out, as the context has room for no more" in err
    assert "note: --max-tokens N says how long an answer may be" in err


def test_a_model_whose_tokenizer_is_not_here_is_counted_by_letters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    err = told(
        capsys, "qwen3", rows("Hello there"), "--prompt", "{text}", "--gpu", "L40S", "--max-tokens", "9"
    )
    assert (
        "from the number of letters, because Qwen/Qwen3-8B has no tokenizer in the cache, and nobody was asked"
        in err
    )


def test_a_cap_that_does_not_do_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("tiny", rows(*["badu"] * 30), *ASK, "--max-tokens", "20", "--max-cost")
    assert "--max-cost: $0.01 may be spent before all rows are answered" in told(capsys, *words, "0.01")
    assert "warning: --max-cost" not in told(capsys, *words, "5")


def test_where_nothing_is_charged_a_cap_stops_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("batch", "tiny", rows("badu"), "--prompt", "{text}", "--local", "--max-cost", "5", "--dry-run")
    assert main([*words, "-o", "out.jsonl"]) == 0
    out, err = capsys.readouterr()
    assert "--max-cost: nothing is charged on this machine, and the job does not stop for it\n" in err
    assert "\nMAX_USD: float | None = None\n" in out


def test_rows_without_room_are_warned_of_and_nothing_starts_where_all_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    long = "badu " * 3000
    err = told(capsys, "tiny", rows("badu", long), *ASK, "--max-tokens", "20")
    assert (
        "warning: 1 of the 2 rows has no room in the context of 2,048 tokens (the longest question has 3,0"
        in err
    )
    err = told(capsys, "tiny", rows(long, long), *ASK, "--max-tokens", "20", code=2)
    assert "error: INPUT: 2 of the 2 rows have no room in the context of 2,048 tokens" in err


def test_an_input_of_bad_rows_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {}}
    Path("bad.jsonl").write_text(2 * (json.dumps(line) + "\n"))
    err = told(capsys, "tiny", "bad.jsonl", code=2)
    assert "error: INPUT: bad.jsonl: none of its 2 rows can be answered" in err
    assert "invalid_request: " in err


def test_a_function_is_not_guessed_at(capsys: pytest.CaptureFixture[str]) -> None:
    Path("work.py").write_text("def process(row):\n    return row\n")
    err = told(capsys, "work.py:process", rows(*["a"] * 101))
    assert "time: nobody knows how long a function takes; --limit 100 does 100 rows for a taste" in err
    err = told(capsys, "work.py:process", "rows.jsonl", "--limit", "100")
    assert "time: nobody knows how long a function takes\n" in err


def test_it_is_told_before_anybody_is_asked_and_what_was_made_is_taken_away(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODAL_TOKEN_ID", "ak-1")
    monkeypatch.setenv("MODAL_TOKEN_SECRET", "as-1")
    done: Any = Completed(0, "{}", "")
    runner = FakeRunner(
        {
            "volume create": done,
            "volume delete": done,
            "dict delete": done,
            "billing rates": Completed(1, "", "no"),
            "app list": Completed(0, "[]", ""),
        }
    )
    argv = ["batch", "tiny", rows("badu"), *ASK, "--max-tokens", "20", "-o", "out.jsonl"]
    assert main(argv, runner=runner) == 2
    err = capsys.readouterr().err
    assert err.index("cost: $0.00") < err.index("--yes: needed to start a job on Modal")
    assert ["volume", "delete"] in [call[:2] for call in runner.calls]
    assert "deploy" not in [call[0] for call in runner.calls]


@pytest.mark.parametrize("words", [["lss"], ["statsu", "rows-1"], ["cancle", "rows-1", "--now", "--local"]])
def test_a_verb_with_a_slip_is_no_model(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["batch", *words]) == 2
    meant = {"lss": "ls", "statsu": "status", "cancle": "cancel"}[words[0]]
    assert f"there is no command {words[0]!r}; did you mean {meant}?" in capsys.readouterr().err


def test_a_schema_in_the_place_of_its_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    err = told(capsys, "tiny", rows("badu"), *ASK, "--json-schema", '{"type": "object"}', code=2)
    assert "--json-schema: takes the name of a file" in err


class InterruptedRunner(FakeRunner):
    """Somebody presses Ctrl-C while the App is deployed."""

    def stream(self, argv: Sequence[str], env: ModalEnv, **told: Any) -> int:
        self._answer(argv, env)
        raise KeyboardInterrupt


def test_ctrl_c_while_it_is_deployed_tells_what_is_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODAL_TOKEN_ID", "ak-1")
    monkeypatch.setenv("MODAL_TOKEN_SECRET", "as-1")
    done = Completed(0, "", "")
    runner = InterruptedRunner(
        {"volume": done, "dict": done, "deploy": done, "billing rates": Completed(1, "", "no")}
        | {"app list": Completed(0, "[]", "")}
    )
    argv = ["batch", "tiny", rows("badu"), *ASK, "--max-tokens", "20", "-o", "out.jsonl", "--yes"]
    assert main(argv, runner=runner) == 130
    err = capsys.readouterr().err
    assert "was not started, and nothing works on it" in err
    assert "gpuctl batch rm rows-" in err
    assert not Path("out.jsonl").exists()


@pytest.mark.parametrize(
    ("task", "flags", "refused"),
    [
        (
            "embeddings",
            ("--max-tokens", "4", "--temperature", "0"),
            [
                "--max-tokens: is for a model that writes, and these rows ask for embeddings",
                "--temperature: is for a model that writes, and these rows ask for embeddings",
            ],
        ),
        ("embeddings", ("--seed", "1"), ["--seed: is for a model that writes"]),
        ("transcriptions", ("--json-schema", "schema.json"), ["--json-schema: is for a model that writes"]),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(
    capsys: pytest.CaptureFixture[str], task: str, flags: Sequence[str], refused: list[str]
) -> None:
    Path("schema.json").write_text("{}")
    Path("1.wav").write_bytes(b"RIFF....WAVEfmt ")
    Path("in.jsonl").write_text(json.dumps({"input": "x", "file": "1.wav"}) + "\n")
    err = told(capsys, "tiny", "in.jsonl", "--task", task, *flags, "--gpu", "T4", code=2)
    assert all(says in err for says in refused)


def test_how_long_a_transcription_may_be_is_said_as_the_engine_calls_it() -> None:
    from gpuctl.specs.batch import BatchSpec

    spec = BatchSpec.from_options(
        work="tiny", inputs=["a.wav"], output="o.jsonl", max_tokens="7", temperature="0"
    )
    asked = spec.defaults("/v1/audio/transcriptions")
    assert asked == {"max_completion_tokens": 7, "temperature": 0}
    assert spec.defaults("/v1/chat/completions") == {"max_tokens": 7, "temperature": 0}


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ('{"type": "objekt"}', "type is 'objekt', none of object, array"),
        ('{"properties": {"a": {"items": {"type": ["null", 3]}}}}', "properties.a.items.type is 3"),
        ('{"anyOf": [true, 1]}', "anyOf[1] is 1, not a schema"),
        ('{"required": "a"}', "required is 'a', not a list of names"),
        ('{"items": [{"type": "string"}, {"type": "int"}]}', "items[1].type is 'int'"),
        ("[]", "holds no JSON Schema"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_a_mistake_in_a_schema_is_refused(capsys: pytest.CaptureFixture[str], schema: str, says: str) -> None:
    Path("schema.json").write_text(schema)
    err = told(capsys, "tiny", rows("badu"), *ASK, "--json-schema", "schema.json", code=2)
    assert "error: --json-schema: 'schema.json' " in err
    assert says in err


def test_a_schema_may_be_whatever_json_schema_has(capsys: pytest.CaptureFixture[str]) -> None:
    schema = {
        "type": ["object", "null"],
        "$defs": {"n": {"enum": [1, "x"], "const": 3}},
        "properties": {
            "type": {"$ref": "#/$defs/n"},
            "required": {"items": {"type": "string"}, "minItems": 1},
        },
        "required": ["type"],
        "additionalProperties": False,
    }
    Path("schema.json").write_text("\ufeff" + json.dumps(schema), encoding="utf-8")
    assert "error" not in told(capsys, "tiny", rows("badu"), *ASK, "--json-schema", "schema.json")
