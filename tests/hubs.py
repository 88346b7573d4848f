"""A stand-in for the Hugging Face hub, to be asked by the real huggingface_hub: HF_ENDPOINT is its address."""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import struct
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def safetensors_of(tensors: Mapping[str, tuple[str, list[int]]], data: int = 0) -> bytes:
    """A safetensors file with these tensors, NAME: (dtype, shape), and `data` bytes of weights."""
    header = {"__metadata__": {"format": "pt"}} | {
        name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}
        for name, (dtype, shape) in tensors.items()
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


@dataclass
class Repo:
    """One repository: its files, and what the hub's API says besides."""

    files: dict[str, bytes] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    commit: str = COMMIT
    branches: tuple[str, ...] = ("main",)
    gated: bool = False
    kind: str = "model"


@dataclass
class Hub:
    """The server's answers and what it was asked: (path with query, Authorization, Range)."""

    address: str
    repos: dict[str, Repo] = field(default_factory=dict)
    seen: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    sent: int = 0
    status: int = 0
    ranges: bool = True
    api: bool = True

    @property
    def paths(self) -> list[str]:
        return [path.partition("?")[0] for path, _, _ in self.seen]


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        hub = self.hub
        hub.seen.append((self.path, self.headers["Authorization"], self.headers["Range"]))
        path = unquote(urlsplit(self.path).path)
        if hub.status:
            self.answer(hub.status, b"{}")
        elif (
            match := re.fullmatch(r"/api/(model|dataset|space)s/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        ) and hub.api:
            self.record(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file(match[1], match[2], match[3])
        else:
            self.answer(404, b"nothing here")

    def record(self, kind: str, name: str, revision: str | None) -> None:
        repo = self.hub.repos.get(name)
        if repo is None or repo.kind != kind:
            self.answer(401 if not self.headers["Authorization"] else 404, b"{}", code="RepoNotFound")
        elif revision not in (None, repo.commit, *repo.branches):
            self.answer(404, b"{}", code="RevisionNotFound")
        else:
            blobs = "blobs" in self.path
            siblings = [
                {"rfilename": file} | ({"size": len(content)} if blobs else {})
                for file, content in repo.files.items()
            ]
            found = {"id": name, "_id": "0", "sha": repo.commit, "siblings": siblings, "gated": repo.gated}
            self.answer(200, json.dumps(found | repo.record).encode())

    def file(self, name: str, revision: str, file: str) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            self.answer(404, b"{}", code="RepoNotFound")
        elif repo.gated and not self.headers["Authorization"]:
            self.answer(401, b"{}", code="GatedRepo")
        elif file not in repo.files:
            self.answer(404, b"{}", code="EntryNotFound")
        else:
            self.content(repo.files[file])

    def content(self, content: bytes) -> None:
        asked = re.fullmatch(r"bytes=([0-9]+)-([0-9]+)", self.headers["Range"] or "")
        if asked and self.hub.ranges:
            self.answer(206, content[int(asked[1]) : int(asked[2]) + 1])
        else:
            self.answer(200, content)

    def answer(self, status: int, body: bytes, code: str = "") -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            for start in range(0, len(body), 65536):
                self.wfile.write(body[start : start + 65536])
                self.hub.sent += len(body[start : start + 65536])

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def answering() -> Iterator[Hub]:
    """A hub that has nothing yet."""
    hub = Hub("")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
