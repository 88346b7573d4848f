"""`gpuctl fit` as its user meets it."""

from __future__ import annotations

import json
import os
import pty
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpuctl import catalog
from gpuctl.__main__ import main
from gpuctl.fit.kv import formats
from gpuctl.specs.fit import KV_DTYPES
from hubs import Hub, Repo, answering

# The shapes of Llama 3.1 8B.
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 128256,
    "max_position_embeddings": 131072, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def nobody_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("MODAL_CONFIG_PATH", str(tmp_path / "no-modal.toml"))
    for name in (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "HF_HUB_OFFLINE",
        "MODAL_TOKEN_ID",
        "MODAL_TOKEN_SECRET",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    return str(path)


def asked(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    """The document of a question."""
    assert main(["fit", *argv, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What is said of a wrong question."""
    assert main(["fit", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


def by_gpu(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {f"{one['gpu']}:{one['count']}": one for one in document["candidates"]}


def test_every_gpu_is_judged_at_the_counts_that_make_sense(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    document = asked(capsys, config)
    found = by_gpu(document)
    assert {one.partition(":")[0] for one in found} == set(catalog.gpus())
    assert [one for one in found if one.startswith("A10:")] == ["A10:1", "A10:2", "A10:4"]
    assert [one for one in found if one.startswith("H100:")] == ["H100:1", "H100:2", "H100:4", "H100:8"]
    h100 = found["H100:1"]
    assert h100["verdict"] == "fits"
    assert h100["weights_gib"] == pytest.approx(14.99, rel=0.008)
    parts = ["weights_gib", "activation_gib", "non_torch_gib", "graph_gib", "kv_cache_gib", "reserve_gib"]
    assert 75 < sum(h100[part] for part in parts) < 80
    assert h100["kv_cache_tokens"] == pytest.approx(h100["kv_cache_gib"] * 8192, rel=0.02)
    assert h100["max_context"] == 131072
    assert h100["max_concurrency"] >= 32
    assert h100["usd_per_hour"] == pytest.approx(3.95, rel=0.01)
    assert found["T4:1"]["verdict"] == "no"
    assert "budget" in found["T4:1"]["reason"]
    assert document["model"]["context"] == 131072
    assert document["pick"] == {"gpu": "L40S", "count": 1}
    assert "cheapest" in document["why"]
    assert document["change"] is None
    assert document["prices"]["source"] == "catalogue"


def test_only_those_that_are_named(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    document = asked(capsys, config, "--gpu", "t4,H100!:2,any,A100,h100")
    assert [(one["gpu"], one["count"], one["verdict"]) for one in document["candidates"]] == [
        ("T4", 1, "no"),
        ("H100!", 2, "fits"),
        ("any", 1, "no"),
        ("A100", 1, "fits"),
        ("H100", 1, "fits"),
    ]
    t4, exact, free, a100, h100 = document["candidates"]
    assert not any("assumed" in text for text in t4["assumptions"])
    assert not any("may run it" in text for text in exact["assumptions"])
    assert "assumed T4, the smallest" in free["assumptions"][0]
    assert "assumed the 40 GB card" in a100["assumptions"][0]
    assert "may run it as an H200" in h100["assumptions"][0]
    assert document["pick"] == {"gpu": "A100", "count": 1}
    kept = asked(capsys, config, "--gpu", "t4,A100,h100", "--drop-unfit")
    assert [one["gpu"] for one in kept["candidates"]] == ["A100", "H100"]


def test_more_gpus_are_taken_only_where_they_save_a_quarter(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    document = asked(capsys, config, "--gpu", "L4:2,L40S")
    assert document["pick"] == {"gpu": "L40S", "count": 1}
    assert "L4:2 is $1.60" in document["why"]
    assert asked(capsys, config, "--gpu", "L4:2,H100")["pick"] == {"gpu": "L4", "count": 2}


def test_context_and_concurrency(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    one = asked(capsys, config, "--gpu", "H100", "--context", "131072")["candidates"][0]
    assert one["verdict"] == "fits"  # one such request, and 32 of 4,096 tokens
    assert one["max_concurrency"] == 3
    many = asked(capsys, config, "--gpu", "H100", "--context", "131072", "--concurrency", "8")["candidates"][
        0
    ]
    assert many["verdict"] == "tight"
    assert "3 of 8" in many["reason"]
    few = asked(capsys, config, "--gpu", "L4", "--context", "100000")["candidates"][0]
    assert few["verdict"] == "no"


def test_what_would_fit_instead_can_be_pasted(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    document = asked(
        capsys, config, "--gpu", "T4,L4", "--context", "100000", "--concurrency", "1", "--kv-dtype", "fp8"
    )
    if document["pick"] is not None:  # fp8 halves what a token takes
        document = asked(capsys, config, "--gpu", "T4", "--context", "100000", "--concurrency", "1")
    assert document["pick"] is None
    changes = [document["change"], *document["other_changes"]]
    prices = [change["usd_per_hour"] for change in changes]
    assert prices == sorted(prices)
    for change in changes:
        program, verb, *argv = shlex.split(change["command"])
        assert [program, verb, *argv] == change["argv"]
        assert (program, verb) == ("gpuctl", "fit")
        again = asked(capsys, *argv)
        assert again["pick"] is not None
        assert again["candidates"][0]["usd_per_hour"] == change["usd_per_hour"]


def test_what_only_starts_is_told_what_would_fit(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    document = asked(capsys, config, "--gpu", "L4", "--concurrency", "64")
    assert document["candidates"][0]["verdict"] == "tight"
    assert document["pick"] == {"gpu": "L4", "count": 1}
    change = document["change"]
    (again,) = asked(capsys, *change["argv"][2:])["candidates"]
    assert again["verdict"] == "fits"
    assert again["max_concurrency"] >= 64
    assert asked(capsys, config, "--gpu", "L4,H100", "--concurrency", "64")["change"] is None


def test_where_nothing_helps_that_is_said(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    huge = tmp_path / "huge.json"
    huge.write_text(
        json.dumps(LLAMA | {"hidden_size": 65536, "intermediate_size": 500000, "num_hidden_layers": 128})
    )
    assert main(["fit", str(huge)]) == 0
    assert "No other GPU of Modal" in capsys.readouterr().out
    assert asked(capsys, str(huge))["change"] is None


def test_nothing_is_left_of_what_does_not_fit(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", config, "--gpu", "T4", "--drop-unfit"]) == 0
    said = capsys.readouterr().out
    assert "Nothing fits: on T4, weights and overheads are " in said
    assert "VERDICT" not in said
    assert asked(capsys, config, "--gpu", "T4", "--drop-unfit")["candidates"] == []


@pytest.mark.parametrize(
    ("told", "left"),
    [
        (["--tensor-parallel", "3"], "--tensor-parallel"),
        (["--gpu-memory-utilization", "0.01", "--lora", "1"], "--gpu-memory-utilization"),
        (["--tensor-parallel", "3", "--pipeline-parallel", "2"], "--tensor-parallel and --pipeline-parallel"),
    ],
)
def test_what_the_engine_was_told_may_be_what_keeps_it_from_fitting(
    config: str, capsys: pytest.CaptureFixture[str], told: list[str], left: str
) -> None:
    found = asked(capsys, config, *told)
    assert found["pick"] is None
    change = found["change"]
    assert change["what"].startswith(f"without {left}, on ")
    assert not set(left.split(" and ")) & set(change["argv"])
    again = asked(capsys, *change["argv"][2:])
    assert again["candidates"][0]["verdict"] in ("fits", "tight")
    assert again["candidates"][0]["usd_per_hour"] == change["usd_per_hour"]


def test_verbose_shows_every_choice(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    everything = {
        one["gpu"] if one["count"] == 1 else f"{one['gpu']}:{one['count']}"
        for one in asked(capsys, config)["candidates"]
    }
    shown = {}
    for flag in ("-v", "--drop-unfit"):
        assert main(["fit", config, flag]) == 0
        shown[flag] = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line} & everything
    assert shown["-v"] == everything
    assert len(shown["--drop-unfit"]) == 10  # as many as there are cards


def test_stages_of_any_number(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = asked(capsys, config, "--pipeline-parallel", "3")
    assert {one["count"] for one in found["candidates"]} == {3, 6}
    assert found["pick"] is not None


def test_prices_are_rounded(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    document = asked(capsys, config, "--gpu", "L40S,L4:2")
    assert [one["usd_per_hour"] for one in document["candidates"]] == [1.9512, 1.5984]


def test_the_table_of_a_pipe_is_plain(config: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gpuctl", "fit", config], capture_output=True, text=True, check=True
    )
    assert "\x1b" not in done.stdout
    assert done.stderr == ""
    header = next(line for line in done.stdout.splitlines() if line.startswith("GPU "))
    assert header.split()[:2] == ["GPU", "VERDICT"]
    rows = [line for line in done.stdout.splitlines() if line.startswith(("L40S ", "H100 "))]
    assert len(rows) == 2
    assert "█" in rows[0]
    assert "Take L40S" in done.stdout


def test_a_narrow_terminal_has_no_long_lines(config: str) -> None:
    for columns in (40, 80):
        out = on_terminal(columns, "fit", config, "--gpu", "T4,H100")
        lines = out.replace(config, "").splitlines()
        assert max(map(len, lines)) <= columns, max(lines, key=len)
        assert "H100  fits" in out
        assert "weights" in out
    wide = on_terminal(200, "fit", config, "--gpu", "T4,H100")
    assert any(line.startswith("GPU ") for line in wide.splitlines())


def on_terminal(columns: int, *argv: str) -> str:
    """What a command prints on a terminal of so many columns."""
    leader, follower = pty.openpty()
    env = {**os.environ, "COLUMNS": str(columns), "LINES": "50", "PYTHONIOENCODING": "utf-8"}
    child = subprocess.Popen([sys.executable, "-m", "gpuctl", *argv], stdout=follower, env=env)
    os.close(follower)
    pieces = []
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:
            break
        if not piece:
            break
        pieces.append(piece)
    os.close(leader)
    assert child.wait() == 0
    return b"".join(pieces).decode().replace("\r\n", "\n")


def test_ascii_where_nothing_else_can_be_printed(config: str) -> None:
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "gpuctl", "fit", config, "--gpu", "H100"],
        capture_output=True,
        env=env,
        check=True,
    )
    assert b"##" in done.stdout


def test_quiet_prints_what_serve_takes(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", config, "--gpu", "L4:2,T4", "-q"]) == 0
    assert capsys.readouterr().out == "L4:2\n"
    assert main(["fit", config, "--gpu", "T4", "-q"]) == 0
    assert capsys.readouterr().out == ""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with answering() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        hub.repos["acme/model"] = Repo(files={"config.json": json.dumps(LLAMA).encode()})
        yield hub


def test_a_repository_of_the_hub(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    document = asked(capsys, "acme/model", "--gpu", "H100")
    assert document["candidates"][0]["verdict"] == "fits"
    assert document["model"]["revision"] == hub.repos["acme/model"].commit
    hub.status = 503
    assert main(["fit", "acme/model", "--gpu", "H100", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "answered 503; going on from what the hub said a moment ago" in err
    assert json.loads(out)["model"]["notes"] != []


def test_a_family_that_nobody_knows_is_unknown_not_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA, "model_type": "brand_new"}))
    document = asked(capsys, str(path), "--gpu", "T4")
    (one,) = document["candidates"]
    assert (one["verdict"], one["weights_gib"], document["pick"]) == ("unknown", None, None)
    assert one["reason"]
    assert document["why"] == "whether it fits is not known"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--gpu", "H1000"], "did you mean H100"),
        (["--gpu", "T4,,L4"], "empty entry"),
        (["--context", "0"], "--context: '0'"),
        (["--context", "lots"], "--context: 'lots'"),
        (["--context", "131073"], "--context: 131,073 tokens are more than the 131,072"),
        (["--concurrency", "-1"], "--concurrency: '-1'"),
        (["--dtype", "int3"], "--dtype: 'int3' is not one of"),
        (["--quantization", "none-such"], "--quantization: 'none-such' is not one of"),
        (["--kv-dtype", "fp3"], "--kv-dtype: 'fp3' is not one of"),
        (["--lora", "-1"], "--lora: '-1'"),
        (["--gpu-memory-utilization", "1.1"], "--gpu-memory-utilization: '1.1'"),
        (["--gpu-memory-utilization", "0"], "--gpu-memory-utilization: '0'"),
        (["--gpu-memory-utilization", "nan"], "--gpu-memory-utilization: 'nan'"),
        (["--tensor-parallel", "0"], "--tensor-parallel: '0'"),
        (["--tensor-parallel", "4", "--pipeline-parallel", "4"], "are 16 GPUs"),
        (["--tensor-parallel", "2", "--gpu", "H100"], "needs 2 GPUs, and H100 has 1; use --gpu H100:2"),
        (["--tensor-parallel", "2", "--gpu", "any"], "'any' is one GPU"),
        (["--pipeline-parallel", "2", "--gpu", "H100:1"], "cannot be split into 2"),
        (["--engine-version", "latest"], "--engine-version: 'latest' is not an exact version"),
    ],
)
def test_bad_input_names_the_flag(
    config: str, argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    err = refused(capsys, config, *argv)
    assert says in err
    assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1


def test_all_problems_are_told_at_once(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    err = refused(capsys, config, "--gpu", "X", "--context", "0", "--lora", "x")
    assert len([line for line in err.splitlines() if line.startswith("error:")]) == 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"num_attention_heads": "many"}, "num_attention_heads"),
        ({"model_type": None}, "model_type"),
    ],
)
def test_a_bad_config_names_its_field(
    tmp_path: Path, change: dict[str, object], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {name: value for name, value in {**LLAMA, **change}.items() if value is not None}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
    assert says in refused(capsys, str(path))


def test_models_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean llama3" in refused(capsys, "lama3")
    assert "there is no" in refused(capsys, "./nowhere")
    assert "MODEL" in refused(capsys, "")


def test_every_option_changes_the_answer(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    def h100(*argv: str) -> dict[str, Any]:
        return asked(capsys, config, "--gpu", "H100:2", *argv)["candidates"][0]

    plain = h100()
    assert h100("--dtype", "float32")["weights_gib"] == pytest.approx(2 * plain["weights_gib"], rel=0.01)
    assert h100("--quantization", "fp8")["weights_gib"] < 0.7 * plain["weights_gib"]
    assert h100("--kv-dtype", "fp8")["kv_cache_tokens"] == pytest.approx(
        2 * plain["kv_cache_tokens"], rel=0.01
    )
    assert h100("--lora", "4")["weights_gib"] > plain["weights_gib"]
    assert h100("--gpu-memory-utilization", "0.5")["kv_cache_gib"] < 0.6 * plain["kv_cache_gib"]
    assert h100("--tensor-parallel", "2") == plain
    assert h100("--pipeline-parallel", "2")["kv_cache_tokens"] != plain["kv_cache_tokens"]
    assert h100("--engine-version", "0.11.0") != plain
    assert h100("--engine-version", "0.26.1rc1.dev608+g1a2b3c")["weights_gib"] > 0
    assert h100("--context", "131072")["max_concurrency"] < plain["max_concurrency"]
    assert h100("--concurrency", "1")["decode_tokens_per_s"] < plain["decode_tokens_per_s"]


def test_every_type_of_cache_that_is_taken_is_known() -> None:
    assert set(KV_DTYPES) <= set(formats())


def test_an_alias_of_which_nothing_is_known_is_unknown_offline(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    document = asked(capsys, "flux", "--gpu", "T4")
    assert document["candidates"][0]["verdict"] == "unknown"
    assert "HF_HUB_OFFLINE" in document["model"]["notes"][0]


def test_an_encoder_is_judged_by_its_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    document = asked(capsys, "bge-m3", "--gpu", "T4")
    assert document["model"]["kind"] == "embedding"
    assert document["candidates"][0]["verdict"] == "fits"
    assert main(["fit", "bge-m3", "--gpu", "T4"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("T4 ")]
    assert ">" not in row
    assert "█" in row


def test_an_alias_asks_nobody(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a network call")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert main(["fit", "llama3"]) == 0
    out, err = capsys.readouterr()
    assert "from the catalogue" in out
    assert err == ""


def test_a_quantised_build_is_judged_without_what_was_said_of_the_weights(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = asked(
        capsys,
        "llama3.1-70b",
        "--gpu",
        "H100",
        "--concurrency",
        "1",
        "--quantization",
        "fp8",
        "--dtype",
        "float16",
    )
    for change in (found["change"], *found["other_changes"]):
        again = asked(capsys, *change["argv"][2:])
        assert again["candidates"][0]["verdict"] in ("fits", "tight"), change["command"]
