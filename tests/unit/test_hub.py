"""A revision resolved to a commit, against a hub that answers as the real one does."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator

import pytest

from gpuctl.errors import GpuctlError
from gpuctl.hub import resolve_revision

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    status, body, code = 200, b"", ""
    seen: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers["Authorization"]))
        self.send_response(self.status)
        if self.code:
            self.send_header("X-Error-Code", self.code)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("Answers", (Hub,), {"seen": [], "body": json.dumps({"sha": COMMIT}).encode()})
    server = http.server.HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield handler
    server.shutdown()
    server.server_close()


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


@pytest.mark.parametrize(
    ("status", "code", "says", "hint"),
    [
        (404, "RevisionNotFound", "has no revision 'v9'", ""),
        (404, "RepoNotFound", "no repository 'org/name'", "HF_TOKEN"),
        (401, "", "no repository 'org/name'", "HF_TOKEN"),
        (403, "GatedRepo", "gated", "accept its licence"),
        (503, "", "answered 503", "try again"),
    ],
)
def test_refusals_say_what_to_do(hub: type[Hub], status: int, code: str, says: str, hint: str) -> None:
    hub.status, hub.code = status, code
    with pytest.raises(GpuctlError) as caught:
        resolve_revision("org/name", "v9")
    (problem,) = caught.value.problems
    assert says in problem
    assert hint in (caught.value.hint or "")


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
