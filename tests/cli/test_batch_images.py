"""`gpuctl batch` for pictures, up to where something would start: what makes them, on what, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes import FakeRunner
from gpuctl.__main__ import main
from gpuctl.modal_cli import Completed
from hubs import Hub, Repo, answering

ROWS = (
    '{"custom_id": "a", "method": "POST", "url": "/v1/images/generations", "body": {"prompt": "x", "n": 3}}\n'
)


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with one model that makes pictures, and one that writes."""
    for name in (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "HF_HUB_OFFLINE",
        "GPUCTL_TARGET",
        "http_proxy",
        "HTTP_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("MODAL_TOKEN_ID", "ak-test")
    monkeypatch.setenv("MODAL_TOKEN_SECRET", "as-test")
    for variable in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "HF_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a cat\na dog\n")
    Path("rows.jsonl").write_text(ROWS)
    with answering() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        hub.repos["acme/painter"] = Repo(
            files={"model_index.json": b"{}", "unet/diffusion_pytorch_model.safetensors": bytes(5000)},
            record={"library_name": "diffusers"},
        )
        llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        hub.repos["acme/writer"] = Repo(files={"config.json": json.dumps(llama).encode()})
        yield hub


def batch(*words: str) -> int:
    """Until the Volume would be made, which fails."""
    runner = FakeRunner({"volume": Completed(1, "", "no Volumes today"), "billing": Completed(1, "", "no")})
    return main(["batch", *words, "--yes"], runner=runner)


def test_a_model_of_the_hub_is_known_by_its_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert batch("acme/painter", "prompts.txt", "-o", "pictures/") == 1
    err = capsys.readouterr().err
    assert "prompts.txt: text, a row per line, image generations\n" in err
    assert "--gpu auto: T4, " in err
    assert "judged by the size of its weights" in err
    assert "what pictures take beside the weights grows with their size, and is not known before" in err
    assert "--max-model-len" not in err
    assert "an hour for each container" in err
    assert "no Volumes today" in err


def test_how_many_pictures_is_told_and_that_the_time_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        batch("acme/painter", "rows.jsonl", "-o", "out.jsonl", "--gpu", "L4", "--task", "images", "--dry-run")
        == 0
    )
    err = capsys.readouterr().err
    assert "pictures: 3\ntime: how long a picture takes is not known here\n" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("acme/writer", "rows.jsonl", "-o", "o/"), "acme/writer makes no pictures: it has a config.json"),
        (
            ("acme/painter", "prompts.txt", "-o", "o.jsonl", "--task", "chat"),
            "acme/painter makes pictures, and the rows ask for something else",
        ),
        (
            ("acme/painter", "prompts.txt", "-o", "o/", "--gpu", "H100:2"),
            "a pipeline of diffusers runs on one GPU",
        ),
        (
            ("acme/painter", "prompts.txt", "-o", "o/", "--max-tokens", "5"),
            "--max-tokens: is for a model that writes",
        ),
        (("acme/painter", "prompts.txt", "-o", "o/", "--", "--eager"), "--: is for a model that writes"),
        (
            ("acme/writer", "prompts.txt", "-o", "o.jsonl", "--steps", "5"),
            "--steps: is for pictures (--task images)",
        ),
        (
            ("acme/writer", "prompts.txt", "-o", "o.jsonl", "--batch-size", "5"),
            "--batch-size: is for a function",
        ),
        (
            ("acme/painter", "prompts.txt", "-o", "o/", "--size", "big"),
            "--size: 'big' is no size such as 1024x768",
        ),
        (
            ("acme/painter", "prompts.txt", "-o", "o/", "--guidance", "x"),
            "--guidance: 'x' is not a number from 0 to 100, such as 7.5",
        ),
        (("acme/painter", "prompts.txt", "-o", "o.csv"), "--format csv has no place for pictures"),
    ],
)
def test_what_is_refused(words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert batch(*words) == 2
    assert says in capsys.readouterr().err
