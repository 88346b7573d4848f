"""What is kept on disk: records and tokens."""

from __future__ import annotations

import dataclasses
import json
import stat
from pathlib import Path

import pytest

from fakes import FakeRunner
from gpuctl import reach
from gpuctl.errors import GpuctlError
from gpuctl.modal_cli import Completed, ModalEnv
from gpuctl.records import (
    DeploymentRecord,
    EngineRecord,
    LimitsRecord,
    ModelRecord,
    Records,
    SourceRecord,
)
from gpuctl.target import Target
from gpuctl.tokens import ProxyToken, Tokens

LOCAL = ModalEnv.local({"MODAL_TOKEN_ID": "ak-plane"}, {})
MADE = Completed(0, json.dumps({"Modal-Key": "wk-one", "Modal-Secret": "ws-SECRET"}), "")


def a_record(name: str = "tiny", target: Target = Target.LOCAL, **changes: object) -> DeploymentRecord:
    record = DeploymentRecord(
        name=name,
        target=target,
        environment="main",
        app_id=f"ap-{name}",
        server="Server",
        url="http://127.0.0.1:9/served",
        base_url="http://127.0.0.1:9/served/v1",
        auth=True,
        model=ModelRecord("tiny", None, None, "tiny"),
        engine=EngineRecord("vllm", "0.32.0"),
        gpu=(),
        limits=LimitsRecord(8, 0, 1, None, 300, 600, None),
        argv=("gpuctl", "serve", "tiny", "--local"),
        source=SourceRecord("/x/endpoint.py", "ab" * 32),
        deployed_at="2026-11-21T08:00:00Z",
        stopped_at=None,
        gpuctl_version="0.1.0",
        modal_version="1.6.4",
    )
    return dataclasses.replace(record, **changes)  # type: ignore[arg-type]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    records = Records(tmp_path)
    path = records.save(a_record())
    assert path == tmp_path / "deployments/local/main/tiny.json"
    assert mode(path) == 0o600
    assert mode(path.parent) == 0o700
    assert records.get(Target.LOCAL, "main", "tiny") == a_record()
    assert records.all() == [a_record()]
    assert [p.name for p in path.parent.iterdir()] == ["tiny.json"]  # no temporary file is left


def test_fields_of_a_later_gpuctl_are_passed_over(tmp_path: Path) -> None:
    path = Records(tmp_path).save(a_record())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"colour": "blue"}))
    assert Records(tmp_path).all() == [a_record()]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": 99}'])
def test_a_broken_record_is_named(tmp_path: Path, text: str) -> None:
    path = Records(tmp_path).save(a_record())
    path.write_text(text)
    with pytest.raises(GpuctlError, match=r"tiny\.json"):
        Records(tmp_path).all()


def test_an_unknown_name_is_told_what_is_near(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.save(a_record("llama3"))
    records.save(a_record("chat", Target.MODAL))
    with pytest.raises(GpuctlError, match="did you mean 'llama3'") as near:
        records.find("lama3", Target.LOCAL, "main")
    assert near.value.exit_code == 2
    with pytest.raises(GpuctlError, match="there is one on this machine: use --local"):
        records.find("llama3", Target.MODAL, "main")
    with pytest.raises(GpuctlError, match="there are: chat"):
        records.find("zzz", Target.MODAL, "main")


def test_stopping_is_recorded(tmp_path: Path) -> None:
    records = Records(tmp_path)
    assert not records.mark_stopped(a_record()).running
    assert not records.find("tiny", Target.LOCAL, "main").running


# -- tokens


def test_a_token_is_made_once_and_kept_privately(tmp_path: Path) -> None:
    runner = FakeRunner({"workspace proxy-tokens create": MADE})
    tokens = Tokens(tmp_path)
    first = tokens.token_for(LOCAL, runner=runner, may_create=pytest.fail)
    assert first.bearer == "wk-one.ws-SECRET"
    assert "SECRET" not in repr(first)
    assert tokens.token_for(LOCAL, runner=runner, may_create=pytest.fail) == first
    assert len(runner.calls) == 1
    assert "SECRET" not in " ".join(runner.calls[0])
    assert mode(tmp_path / "tokens.json") == 0o600


def test_another_plane_gets_another_token(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path)
    tokens.token_for(LOCAL, runner=FakeRunner({"workspace": MADE}), may_create=pytest.fail)
    new = ModalEnv.local({"MODAL_TOKEN_ID": "ak-new-plane"}, {})
    again = Completed(0, json.dumps({"Modal-Key": "wk-two", "Modal-Secret": "ws-2"}), "")
    made = tokens.token_for(new, runner=FakeRunner({"workspace": again}), may_create=pytest.fail)
    assert made == ProxyToken("wk-two", "ws-2")
    assert tokens.kept(LOCAL) is None


def test_on_modal_it_asks_first(tmp_path: Path) -> None:
    env = ModalEnv.modal({"MODAL_TOKEN_ID": "ak-me", "MODAL_TOKEN_SECRET": "as-me"})
    runner = FakeRunner({"workspace": MADE})
    with pytest.raises(GpuctlError, match="no token was made"):
        Tokens(tmp_path).token_for(env, runner=runner, may_create=lambda: False)
    assert runner.calls == []
    assert Tokens(tmp_path).token_for(env, runner=runner, may_create=lambda: True).id == "wk-one"


def test_a_failure_never_shows_what_was_printed(tmp_path: Path) -> None:
    odd = Completed(0, '{"Modal-Secret": "ws-SECRET"}', "")
    with pytest.raises(GpuctlError) as failed:
        Tokens(tmp_path).token_for(LOCAL, runner=FakeRunner({"workspace": odd}), may_create=pytest.fail)
    assert "SECRET" not in str(failed.value)


# -- reach


def test_no_credentials_is_found_early(tmp_path: Path) -> None:
    config = tmp_path / "modal.toml"
    with pytest.raises(GpuctlError, match="modal setup") as none:
        reach.check_credentials({"MODAL_CONFIG_PATH": str(config)})
    assert none.value.exit_code == 2
    assert "--local" in str(none.value)
    config.write_text(
        '[work]\ntoken_id = "ak-1"\ntoken_secret = "as-1"\nactive = true\nenvironment = "dev"\n'
    )
    reach.check_credentials({"MODAL_CONFIG_PATH": str(config)})
    reach.check_credentials({"MODAL_TOKEN_ID": "ak-1", "MODAL_CONFIG_PATH": "/nowhere"})


def test_the_environment_is_the_one_that_the_client_would_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "modal.toml"
    config.write_text('[work]\ntoken_id = "ak-1"\nactive = true\nenvironment = "dev"\n')
    monkeypatch.setenv("MODAL_CONFIG_PATH", str(config))
    monkeypatch.delenv("MODAL_ENVIRONMENT", raising=False)
    assert reach.environment_name(Target.MODAL, None) == "dev"
    assert reach.environment_name(Target.MODAL, "prod") == "prod"
    assert reach.environment_name(Target.LOCAL, None) == "main"
    monkeypatch.setenv("MODAL_ENVIRONMENT", "staging")
    assert reach.environment_name(Target.MODAL, None) == "staging"


@pytest.mark.parametrize("name", ["../..", "*", "a/b", "en-1", ""])
def test_an_environment_is_a_name_before_it_is_a_folder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name:
        with pytest.raises(GpuctlError, match="--env: "):
            reach.environment_name(Target.LOCAL, name)
    monkeypatch.setenv("MODAL_ENVIRONMENT", name or "a b")
    with pytest.raises(GpuctlError, match="MODAL_ENVIRONMENT: "):
        reach.environment_name(Target.MODAL, None)


def test_tokens_belong_to_the_account(tmp_path: Path) -> None:
    config = tmp_path / "modal.toml"
    config.write_text('[work]\ntoken_id = "ak-1"\nactive = true\n[home]\ntoken_id = "ak-2"\n')
    work = ModalEnv.modal({"MODAL_CONFIG_PATH": str(config)})
    home = ModalEnv.modal({"MODAL_CONFIG_PATH": str(config), "MODAL_PROFILE": "home"})
    given = ModalEnv.modal({"MODAL_TOKEN_ID": "ak-3"})
    assert len({reach.account(work), reach.account(home), reach.account(given), reach.account(LOCAL)}) == 4
    assert "ak-3" not in reach.account(given)
