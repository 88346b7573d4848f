"""Flags to an answer, with the real vLLM on this CPU: what the README's first command does, and what follows it.

The tests go in this order and share one deployment, as a user's session would.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import urllib.error
import urllib.request
from typing import Any

import openai
import pytest

from .conftest import Gpuctl, processes_of, wait_for

ENGINE = "vllm.entrypoints.openai.api_server"
# The very first run builds the engine's environment; later runs find it in the cache.
IMAGE_TIMEOUT = 540


@pytest.fixture(scope="module")
def served(gpuctl: Gpuctl) -> dict[str, Any]:
    """The document of `gpuctl serve tiny --local --json`."""
    document: dict[str, Any] = json.loads(
        gpuctl.ok("serve", "tiny", "--local", "--json", timeout=IMAGE_TIMEOUT)
    )
    return document


@pytest.fixture(scope="module")
def token(gpuctl: Gpuctl, served: dict[str, Any]) -> str:
    return gpuctl.ok("token", served["name"], "--local").strip()


@pytest.fixture(scope="module")
def client(served: dict[str, Any], token: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=served["base_url"], api_key=token, timeout=60)


def status_of(url: str, headers: dict[str, str]) -> int:
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_the_document_says_all_that_a_client_needs_and_no_secret(served: dict[str, Any], token: str) -> None:
    assert set(served) == {
        *("name", "target", "url", "base_url", "model", "gpu", "environment", "app_id", "seconds"),
        *("max_model_len", "fit", "cost"),
    }
    assert served["target"] == "local"
    assert served["base_url"] == served["url"].rstrip("/") + "/v1"
    assert served["app_id"].startswith("ap-")
    assert all(seconds >= 0 for seconds in served["seconds"].values())
    key, secret = token.split(".")
    assert key.startswith("wk-")
    assert secret.startswith("ws-")
    assert secret not in json.dumps(served)


def test_an_openai_client_gets_an_answer(served: dict[str, Any], client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=served["model"], messages=[{"role": "user", "content": "Say something"}], max_tokens=8
    )
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert 1 <= answer.usage.completion_tokens <= 8


def test_it_streams(served: dict[str, Any], client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=served["model"],
        messages=[{"role": "user", "content": "Say something"}],
        max_tokens=8,
        stream=True,
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces)
    assert len(pieces) > 1


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wk-nobody.ws-nothing"},
        {"Modal-Key": "wk-nobody", "Modal-Secret": "ws-nothing"},
    ],
    ids=["none", "a wrong bearer", "a wrong key"],
)
def test_without_credentials_it_refuses(served: dict[str, Any], headers: dict[str, str]) -> None:
    assert status_of(served["base_url"] + "/chat/completions", headers) == http.client.UNAUTHORIZED


def test_with_credentials_it_answers(served: dict[str, Any], token: str) -> None:
    headers = {"Authorization": f"Bearer {token}"}
    assert status_of(served["base_url"] + "/chat/completions", headers) == http.client.OK


def test_ps_and_logs_name_it_as_the_user_did(gpuctl: Gpuctl, served: dict[str, Any]) -> None:
    listed = json.loads(gpuctl.ok("ps", "--local", "--json"))
    assert served["name"] in json.dumps(listed)
    logs = gpuctl.ok("logs", served["name"], "--local")
    assert "[serve] ready" in logs


def test_an_engine_that_is_killed_is_seen(
    gpuctl: Gpuctl, served: dict[str, Any], client: openai.OpenAI
) -> None:
    engines = [process for process in processes_of(gpuctl.state) if f"-m {ENGINE}" in process.command]
    assert engines
    # The oldest of them is the one that was started; what it started dies with it or is swept.
    os.kill(engines[0].pid, signal.SIGKILL)

    def reported() -> bool:
        return "[serve] engine exited with code -9 while serving" in gpuctl.ok(
            "logs", served["name"], "--local"
        )

    assert wait_for(reported, 30), gpuctl.ok("logs", served["name"], "--local")
    # It is replaced: 503 until then, and the client asks again every second or less often.
    answer = client.with_options(max_retries=150, timeout=120).chat.completions.create(
        model=served["model"], messages=[{"role": "user", "content": "Are you there?"}], max_tokens=4
    )
    assert answer.choices[0].message.content
    assert engines[0].pid not in {process.pid for process in processes_of(gpuctl.state)}


def test_an_engine_that_cannot_start_ends_the_wait_with_its_last_lines(gpuctl: Gpuctl) -> None:
    done = gpuctl.run(
        "serve", "tiny", "--local", "--name", "broken", "--yes", "--", "--no-such-flag", timeout=180
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "--no-such-flag" in done.stderr
    assert "unrecognized arguments" in done.stderr
    assert "hint:" in done.stderr
    assert "Traceback" not in done.stderr.splitlines()[-1]
    gpuctl.ok("stop", "broken", "--local", "--yes")


def test_stopped_it_leaves_no_process(gpuctl: Gpuctl, served: dict[str, Any]) -> None:
    gpuctl.ok("stop", served["name"], "--local", "--yes")

    def engines() -> list[str]:
        return [
            process.command for process in processes_of(gpuctl.state) if "vllm" in process.command.lower()
        ]

    assert wait_for(lambda: not engines(), 30), engines()
    assert served["name"] not in gpuctl.ok("ps", "--local")
    gpuctl.ok("local", "down")
    assert wait_for(lambda: not processes_of(gpuctl.state), 15), processes_of(gpuctl.state)
