"""`gpuctl serve org/name`, deployed with stand-ins for the hub and for `modal`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes import DEPLOYED_LINES, FakeRunner
from gpuctl.__main__ import main
from gpuctl.modal_cli import Completed
from hubs import COMMIT, Hub, Repo, answering

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 128256,
    "max_position_embeddings": 131072, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
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
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with answering() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        hub.repos["acme/model"] = Repo(
            files={"config.json": json.dumps(LLAMA).encode()},
            record={"safetensors": {"parameters": {"BF16": 8030261248}}},
        )
        yield hub


def modal() -> FakeRunner:
    answers = {"billing": Completed(1, "", "no"), "deploy": Completed(0, "\n".join(DEPLOYED_LINES), "")}
    return FakeRunner(answers | dict.fromkeys(("workspace", "app", "environment"), Completed(0, "[]", "")))


def serve(runner: FakeRunner, *argv: str) -> int:
    return main(["serve", *argv, "--no-wait", "--yes", "--json"], runner=runner)


def test_what_the_hub_says_decides(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    runner = modal()
    assert serve(runner, "acme/model") == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["gpu"] == "L40S"
    assert document["max_model_len"] == 131072
    assert [one["verdict"] for one in document["fit"]] == ["fits"]
    assert "--gpu auto: L40S" in err
    deployed = next(call for call in runner.calls if call[0] == "deploy")
    source = Path(deployed[1]).read_text()
    assert f'REVISION = "{COMMIT}"' in source
    assert "MAX_MODEL_LEN = 131072" in source
    assert f"/acme/model/resolve/{COMMIT}/config.json" in hub.paths


def test_what_cannot_fit_is_not_deployed(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    runner = modal()
    assert serve(runner, "acme/model", "--gpu", "T4") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: --gpu: acme/model does not fit on T4" in err
    assert "hint: gpuctl serve acme/model --gpu " in err
    assert "deploy" not in [call[0] for call in runner.calls]
    assert serve(runner, "acme/model", "--gpu", "T4", "--force") == 0
    assert "warning: --force: acme/model does not fit on T4" in capsys.readouterr().err


def test_an_alias_is_refused_before_anybody_is_asked(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    runner = modal()
    assert serve(runner, "qwen3", "--gpu", "T4") == 2
    assert hub.seen == []
    assert runner.calls == []


def test_a_gated_model_is_deployed_unknown(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repos["acme/model"].gated = True
    assert serve(modal(), "acme/model", "--gpu", "H100") == 0
    out, err = capsys.readouterr()
    assert "whether acme/model fits on H100 is not known" in err
    assert "acme/model is gated" in err
    assert json.loads(out)["max_model_len"] is None
    assert serve(modal(), "acme/model") == 2
    assert "--gpu auto: cannot choose" in capsys.readouterr().err


def test_what_is_no_model_is_not_deployed(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repos["acme/lora"] = Repo(files={"adapter_config.json": b"{}"})
    assert serve(modal(), "acme/lora", "--gpu", "H100") == 2
    assert "an adapter (LoRA)" in capsys.readouterr().err
    assert serve(modal(), "acme/lora", "--gpu", "H100", "--force") == 0


def test_a_strange_config_is_refused_and_can_be_forced(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repos["acme/model"].files["config.json"] = json.dumps(LLAMA | {"hidden_size": -1}).encode()
    assert serve(modal(), "acme/model", "--gpu", "H100") == 2
    assert "hidden_size" in capsys.readouterr().err
    assert serve(modal(), "acme/model", "--gpu", "H100", "--force") == 0
    assert "is not known" in capsys.readouterr().err
