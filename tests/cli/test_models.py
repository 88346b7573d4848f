"""`gpuctl models`, and the user's own aliases wherever a MODEL is taken."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from fakes import FakeRunner
from gpuctl.__main__ import main
from gpuctl.cli.options import complete_model


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the user's own aliases, which is not there yet."""
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("MODAL_CONFIG_PATH", str(tmp_path / "none.toml"))
    for name in ("GPUCTL_TARGET", "MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET", "MODAL_ENVIRONMENT"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "gpuctl").mkdir()
    return tmp_path / "gpuctl" / "models.toml"


def gpuctl(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(words, runner=FakeRunner())
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def aliases(out: str) -> list[str]:
    return [line.split()[0] for line in out.splitlines()[1:]]


# -- the catalogue


def test_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = gpuctl(capsys, "models")
    assert code == 0
    header, first, *rest = out.splitlines()
    assert header.split() == [
        "ALIAS", "KIND", "REPO", "REVISION", "PARAMS", "CONTEXT", "DTYPE", "LICENCE", "GATED", "ENGINE", "TOOLS",
        "REASONING",
    ]  # fmt: skip
    assert first.startswith("tiny ")
    assert len(rest) >= 150


@pytest.mark.parametrize(
    ("words", "among", "not_among"),
    [
        (["qwen3"], {"qwen3", "qwen3-32b"}, {"llama3"}),
        (["QWEN3 fp8"], {"qwen3-32b-fp8"}, {"qwen3-32b"}),
        (["meta-llama"], {"llama3", "llama4-scout"}, {"qwen3"}),
        (["kimi_k2"], {"kimi-k2"}, {"kimi-k3"}),
        (["--kind", "reranker"], {"bge-reranker-v2-m3"}, {"bge-m3", "llama3"}),
        (["--gated"], {"llama3", "gemma3-27b", "flux"}, {"qwen3", "whisper"}),
        (["--open"], {"qwen3", "tiny"}, {"llama3", "whisper"}),
        (["llama", "--open"], set(), {"llama3"}),
    ],
)
def test_searched(
    capsys: pytest.CaptureFixture[str], words: list[str], among: set[str], not_among: set[str]
) -> None:
    code, out, _ = gpuctl(capsys, "models", *words)
    found = {model["alias"] for model in json.loads(gpuctl(capsys, "models", *words, "--json")[1])["models"]}
    assert code == 0
    assert among <= found
    assert not not_among & found
    if len(found) > 1:
        assert set(aliases(out)) == found


def test_one_that_is_called_exactly_so_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert aliases(gpuctl(capsys, "models", "qwen3-vl")[1])[0] == "qwen3-vl-8b"
    assert aliases(gpuctl(capsys, "models", "Qwen/Qwen3-8B")[1])[0] == "qwen3"


def test_where_only_one_is_like_it_each_fact_has_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = gpuctl(capsys, "models", "llama3.2-1b")
    assert code == 0
    lines = {line[:16].strip(): line[18:] for line in out.splitlines()}
    assert lines["gated"].split()[0] == "yes"
    assert "https://" in lines["gated"]
    assert "meta-llama/Llama-3.2-1B-Instruct" in lines["repo"]
    assert lines["tool parser"].startswith("llama3_json")


def test_verbose_tells_the_sources_of_many(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = gpuctl(capsys, "models", "kimi", "--verbose")
    assert out.count("\n\n") >= 4
    assert "alias             kimi-k2" in out


def test_what_is_not_known_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    whisper = next(
        line
        for line in gpuctl(capsys, "models", "--kind", "speech")[1].splitlines()
        if line.startswith("whisper ")
    )
    assert "unknown" in whisper
    [model] = [
        m
        for m in json.loads(gpuctl(capsys, "models", "whisper", "--json")[1])["models"]
        if m["alias"] == "whisper"
    ]
    assert model["gated"] is None
    assert model["revision"] is None
    assert model["licence"] == "mit"
    assert model["sources"]["licence"]["where"].startswith("https://")


def test_nothing_like_it(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = gpuctl(capsys, "models", "qwem3.6")
    assert (code, out) == (0, "")
    assert "did you mean qwen3.6" in err
    assert json.loads(gpuctl(capsys, "models", "qwem3.6", "--json")[1]) == {"models": []}


def test_bad_filters_are_named_all_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = gpuctl(capsys, "models", "--kind", "visio", "--gated", "--open")
    assert (code, out) == (2, "")
    assert "--kind: unknown 'visio'; did you mean vision?" in err
    assert "--gated and --open" in err


# -- what serve takes


@pytest.mark.parametrize(
    ("model", "what"),
    [
        ("whisper", "a speech model"),
        ("bge-m3", "an embedding model"),
        ("BAAI/bge-reranker-v2-m3", "a reranker"),
        ("flux", "a model that makes images"),
    ],
)
def test_serve_refuses_what_cannot_chat(capsys: pytest.CaptureFixture[str], model: str, what: str) -> None:
    code, out, err = gpuctl(capsys, "serve", model, "--gpu", "h100", "--dry-run")
    assert (code, out) == (2, "")
    assert f"MODEL: {model} is {what}, and answers no chat requests" in err


def test_another_name_is_the_same_model(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = gpuctl(capsys, "serve", "llama3.1-8b", "--gpu", "h100", "--dry-run")
    assert code == 0
    assert "meta-llama/Llama-3.1-8B-Instruct" in out
    assert '"llama3.1-8b"' in out, "what was typed is a name that requests may give"


# -- the user's own


def test_own_aliases_are_taken_everywhere(capsys: pytest.CaptureFixture[str], own: Path) -> None:
    own.write_text(
        '# mine\nmy-llama = "acme/llama-tuned@v2"\n\n[other]\nrepo = "acme/Other-9B"\ngated = true\n'
        'licence = "ours"\ncontext = 8192\nkind = "vision"\n'
    )
    [model] = json.loads(gpuctl(capsys, "models", "my-llama", "--json")[1])["models"]
    assert (model["repo"], model["revision"], model["mine"]) == ("acme/llama-tuned", "v2", True)
    [other] = json.loads(gpuctl(capsys, "models", "acme/Other-9B", "--json")[1])["models"]
    assert (other["gated"], other["licence"], other["context"]) == (True, "ours", 8192)
    assert other["sources"]["alias"]["where"] == str(own)
    code, out, err = gpuctl(capsys, "serve", "my-llama", "--gpu", "h100", "--dry-run")
    assert code == 0, err
    assert '"acme/llama-tuned"' in out
    assert "v2" in out
    assert ("my-llama", "acme/llama-tuned") in complete_model("my")
    assert "acme/Other-9B is gated" in gpuctl(capsys, "serve", "other", "--gpu", "h100", "--dry-run")[2]


def test_an_own_alias_wins_over_the_catalogue_s(capsys: pytest.CaptureFixture[str], own: Path) -> None:
    own.write_text('llama3 = "acme/llama"\n')
    assert '"acme/llama"' in gpuctl(capsys, "serve", "llama3", "--gpu", "h100", "--dry-run")[1]
    models = json.loads(gpuctl(capsys, "models", "--json")[1])["models"]
    assert [model["repo"] for model in models if model["alias"] == "llama3"] == ["acme/llama"]


def test_what_is_not_given_is_taken_from_the_catalogue(capsys: pytest.CaptureFixture[str], own: Path) -> None:
    own.write_text('ear = "openai/whisper-large-v3"\n[mine]\nrepo = "Qwen/Qwen3-8B"\nlicence = "bought"\n')
    [model] = [m for m in json.loads(gpuctl(capsys, "models", "mine", "--json")[1])["models"] if m["mine"]]
    assert (model["licence"], model["context"], model["also"]) == ("bought", 40960, [])
    assert model["sources"]["licence"]["where"] == str(own)
    assert "NOTICE.md" in model["sources"]["context"]["where"]
    assert "MODEL: ear is a speech model" in gpuctl(capsys, "serve", "ear", "--gpu", "h100", "--dry-run")[2]
    assert gpuctl(capsys, "fit", "mine", "--gpu", "h100", "-q")[0] == 0


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a = 'x/y'\nb = \n", 2, "no TOML"),
        ("a = 'x/y", 1, "no TOML"),
        ("a = 'x/y'\na = 'x/z'\n", 2, "no TOML"),
        ("\nmine = 'llama'\n", 2, "mine: 'llama' is no repository"),
        ("\nmine = 7\n", 2, "mine: give a repository"),
        ("[mine]\ngated = true\n", 1, "mine: give a repository"),
        ("[mine]\nrepo = 'x/y'\n\ngate = true\n", 4, "mine: unknown 'gate'; did you mean gated?"),
        ("[mine]\nrepo = 'x/y'\ngated = 'yes'\n", 3, "mine: gated is 'yes'; it wants true or false"),
        ("[mine]\nrepo = 'x/y'\ncontext = true\n", 3, "mine: context is True; it wants a whole number"),
        ("[mine]\nrepo = 'x/y'\ncontext = -1\n", 3, "mine: context is -1; it wants a number above 0"),
        ("[mine]\nrepo = 'x/y'\nkind = 'text'\n", 3, "mine: kind is 'text'"),
        ("[mine]\nrepo = 'x/y@main'\nrevision = 'v1'\n", 3, "mine: give the revision once"),
        ("mine = 'x/y@ a'\n", 1, "mine: ' a' is no branch"),
        ("[mine]\nrepo = 'x/y'\nrevision = '-'\n", 3, "mine: '-' is no branch"),
        ("'my llama' = 'x/y'\n", 1, "'my llama' is no alias"),
        ("tiny = 'x/y'\n", 1, "'tiny' is gpuctl's own"),
    ],
)
def test_what_is_wrong_with_the_file_is_said_with_its_line(
    capsys: pytest.CaptureFixture[str], own: Path, text: str, line: int, says: str
) -> None:
    own.write_text(text)
    for words in (["models"], ["serve", "qwen3", "--gpu", "h100", "--dry-run"]):
        code, out, err = gpuctl(capsys, *words)
        assert (code, out) == (2, "")
        assert err.count("error:") == 1
        assert f"{own}, line {line}: " in err
        assert says in err
    assert ("qwen3", "Qwen/Qwen3-8B") in complete_model("qwen3"), "completion goes on without it"


def test_a_file_that_is_no_text(capsys: pytest.CaptureFixture[str], own: Path) -> None:
    own.write_bytes(b"a = 'x/y'\nb = '\xff'\n")
    code, _, err = gpuctl(capsys, "models")
    assert code == 2
    assert f"{own}, line 2: this is not UTF-8" in err
    own.unlink()
    own.mkdir()
    code, _, err = gpuctl(capsys, "models")
    assert code == 2
    assert f"{own}: cannot be read" in err


def test_a_table_that_is_wider_than_the_terminal_is_told_in_paragraphs() -> None:
    leader, follower = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "gpuctl", "models", "qwen3-vl"],
        stdout=follower,
        env={**os.environ, "COLUMNS": "60"},
    )
    os.close(follower)
    said = b""
    with contextlib.suppress(OSError):  # the child has ended
        while piece := os.read(leader, 4096):
            said += piece
    os.close(leader)
    assert child.wait(30) == 0
    lines = said.decode().splitlines()
    assert max(map(len, lines)) <= 60
    assert "qwen3-vl-8b" in lines
    assert "  KIND vision  REPO Qwen/Qwen3-VL-8B-Instruct  REVISION main" in lines
