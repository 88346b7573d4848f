"""A revision resolved to a commit, against a hub that answers as the real one does."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpuctl.errors import GpuctlError
from gpuctl.hub import resolve_revision

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    status, body, code, message, location = 200, b"", "", "", ""
    seen: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers["Authorization"]))
        self.send_response(self.status)
        for name, value in (
            ("X-Error-Code", self.code),
            ("X-Error-Message", self.message),
            ("Location", self.location),
        ):
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def answering() -> Iterator[tuple[type[Hub], str]]:
    """A hub that knows every model, and its address."""
    handler = type("Answers", (Hub,), {"seen": [], "body": json.dumps({"sha": COMMIT}).encode()})
    server = http.server.HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield handler, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def nobody_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in (
        "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE",
        "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY",
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    with answering() as (handler, address):
        monkeypatch.setenv("HF_ENDPOINT", address + "/")
        yield handler


def test_a_branch_becomes_a_commit(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_revision("org/name", None) == COMMIT
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert resolve_revision("org/name", "refs/pr/1") == COMMIT
    assert hub.seen == [
        ("/api/models/org/name/revision/main", None),
        ("/api/models/org/name/revision/refs%2Fpr%2F1", "Bearer hf_x"),
    ]


def test_a_commit_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert resolve_revision("org/name", COMMIT) == COMMIT


def test_the_token_of_a_login_is_found(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("hf_of_a_file\n")
    resolve_revision("org/name", None)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_shell")
    resolve_revision("org/name", None)
    assert [authorization for _, authorization in hub.seen] == [
        "Bearer hf_of_a_file",
        "Bearer hf_of_the_shell",
    ]


def test_a_redirect_is_followed_with_the_token_only_to_the_same_host(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    hub.status = 307
    with answering() as (elsewhere, address):
        hub.location = f"{address}/api/models/org/new/revision/main"
        assert resolve_revision("org/name", None) == COMMIT
        assert elsewhere.seen == [("/api/models/org/new/revision/main", None)]
    hub.location = "/api/models/org/new/revision/main"
    with pytest.raises(GpuctlError, match="307"):  # it points at itself for ever
        resolve_revision("org/name", None)
    assert hub.seen[-1] == ("/api/models/org/new/revision/main", "Bearer hf_x")


def test_a_bad_token_is_not_taken_for_a_missing_repository(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_revoked")
    hub.status, hub.message = 401, "Invalid credentials in Authorization header"
    with pytest.raises(GpuctlError, match="refuses your token") as caught:
        resolve_revision("org/name", None)
    assert caught.value.exit_code == 1
    assert "hf_revoked" not in str(caught.value) + str(caught.value.hint)


@pytest.mark.parametrize(
    ("status", "code", "says", "hint", "exit_code"),
    [
        (404, "RevisionNotFound", "has no revision 'v9'", "", 2),
        (404, "RepoNotFound", "no repository 'org/name'", "HF_TOKEN", 2),
        (401, "", "no repository 'org/name'", "HF_TOKEN", 2),
        (403, "GatedRepo", "gated", "accept its licence", 1),
        (503, "", "answered 503", "try again", 1),
    ],
)
def test_refusals_say_what_to_do(
    hub: type[Hub], status: int, code: str, says: str, hint: str, exit_code: int
) -> None:
    hub.status, hub.code = status, code
    with pytest.raises(GpuctlError) as caught:
        resolve_revision("org/name", "v9")
    (problem,) = caught.value.problems
    assert says in problem
    assert hint in (caught.value.hint or "")
    assert caught.value.exit_code == exit_code


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"sha": 1}', b'{"sha": "main"}'])
def test_nonsense_is_not_believed(hub: type[Hub], body: bytes) -> None:
    hub.body = body
    with pytest.raises(GpuctlError):
        resolve_revision("org/name", None)


def test_offline_says_how_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(GpuctlError) as caught:
        resolve_revision("org/name", None)
    assert "exact commit" in (caught.value.hint or "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(GpuctlError, match="HF_HUB_OFFLINE"):
        resolve_revision("org/name", None)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "file:///etc/passwd")
    with pytest.raises(GpuctlError, match="HF_ENDPOINT"):
        resolve_revision("org/name", None)
