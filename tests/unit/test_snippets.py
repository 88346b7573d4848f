"""The snippets are run, as they are printed, against an endpoint that is not ready at first."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fakes import chat_answer, endpoint
from gpuctl.paths import found_as
from gpuctl.snippets import Use, curl, openai_client
from gpuctl.target import Target

USE = Use("tiny", Target.LOCAL, None, "", 'it\'s "tiny"', True, 60, "gpuctl", sys.executable)


def pasted(snippet: str, folder: Path) -> str:
    """What bash makes of it, with a `gpuctl` that prints a token for the arguments that it should get."""
    fake = folder / "gpuctl"
    fake.write_text('#!/bin/sh\n[ "$*" = "token tiny --local" ] && echo wk-a.ws-b\n')
    fake.chmod(0o755)
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", snippet], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl_retries_503_and_429_and_prints_the_answer_alone(tmp_path: Path) -> None:
    with endpoint((503, "none up"), (429, "busy"), chat_answer("hello")) as served:
        snippet = curl(dataclasses.replace(USE, base_url=f"{served.url}/v1")).replace(
            "--retry-delay 5", "--retry-delay 1"
        )
        out = pasted(snippet, tmp_path)
    assert out == chat_answer("hello")[1]
    headers, body = served.requests[-1]
    assert headers["Authorization"] == "Bearer wk-a.ws-b"
    assert body["model"] == USE.model
    assert len(served.requests) == 3


@pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="no OpenAI client")
def test_the_openai_client_retries_too(tmp_path: Path) -> None:
    with endpoint((503, "{}"), (429, "{}"), chat_answer("hello")) as served:
        out = pasted(openai_client(dataclasses.replace(USE, base_url=f"{served.url}/v1")), tmp_path)
    assert out == "hello\n"
    headers, body = served.requests[-1]
    assert headers["Authorization"] == "Bearer wk-a.ws-b"
    assert body["model"] == USE.model


def test_without_authentication_there_is_no_token() -> None:
    open_use = dataclasses.replace(USE, auth=False)
    assert "token" not in curl(open_use) + openai_client(open_use)


def test_the_environment_goes_along() -> None:
    use = dataclasses.replace(USE, target=Target.MODAL, environment="dev")
    assert use.stop_command == "gpuctl stop tiny --env dev"


def test_commands_are_given_as_the_shell_finds_them(tmp_path: Path) -> None:
    own = tmp_path / "a clone" / ".venv" / "bin"
    own.mkdir(parents=True)
    program = own / "gpuctl"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert found_as(program, folder=tmp_path, path=str(own)) == "gpuctl"
    assert found_as(program, folder=tmp_path / "a clone", path="/bin") == ".venv/bin/gpuctl"
    assert found_as(program, folder=own, path="/bin") == "./gpuctl"
    assert found_as(program, folder=tmp_path / "b", path="/bin") == f"'{program}'"
