"""Stand-ins for the processes that gpuctl starts, and for an endpoint. What a test sees is argv, bytes, requests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from gpuctl.modal_cli import MODAL, Completed, ModalEnv

DEPLOYED_LINES = (
    "✓ Created objects.",
    "├── ✓ Uploaded endpoint.py",
    "└── ✓ Created Server Server",
    "    └── http://127.0.0.1:9/served 🔑",
    "✓ App deployed in 0.4s! 🎉",
    "View Deployment: http://127.0.0.1:9/apps/ap-AbCdEf123456",
)


class FakeFollower:
    def __init__(self) -> None:
        self.cancelled = False
        self.code: int | None = None

    def returncode(self) -> int | None:
        return self.code

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class FakeRunner:
    """Answers by the words after `modal`, for example `{"app list": Completed(0, "[]", "")}`."""

    answers: Mapping[str, Completed] = field(default_factory=dict)
    followed: Sequence[str] = ()
    calls: list[list[str]] = field(default_factory=list)
    envs: list[ModalEnv] = field(default_factory=list)
    followers: list[FakeFollower] = field(default_factory=list)

    def _answer(self, argv: Sequence[str], env: ModalEnv) -> Completed:
        assert tuple(argv[: len(MODAL)]) == MODAL
        words = list(argv[len(MODAL) :])
        self.calls.append(words)
        self.envs.append(env)
        for start, answer in self.answers.items():
            if words[: len(start.split())] == start.split():
                return answer
        raise AssertionError(f"nobody expected: modal {' '.join(words)}")

    def run(self, argv: Sequence[str], env: ModalEnv, *, timeout: float | None = None) -> Completed:
        return self._answer(argv, env)

    def stream(
        self,
        argv: Sequence[str],
        env: ModalEnv,
        *,
        on_output: Callable[[str], None] | None,
        on_error: Callable[[str], None],
    ) -> int:
        done = self._answer(argv, env)
        for line in done.stdout.splitlines():
            if on_output is not None:
                on_output(line)
        for line in done.stderr.splitlines():
            on_error(line)
        return done.returncode

    def follow(self, argv: Sequence[str], env: ModalEnv, on_line: Callable[[str], None]) -> FakeFollower:
        self.calls.append(list(argv[len(MODAL) :]))
        for line in self.followed:
            on_line(line)
        self.followers.append(FakeFollower())
        return self.followers[-1]

    def hand_over(self, argv: Sequence[str], env: ModalEnv) -> int:
        return self._answer(argv, env).returncode


def chat_answer(text: str | None, **more: Any) -> tuple[int, str]:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text, **more}}]})


@dataclass
class FakeEndpoint:
    """What it was asked, and where it is."""

    url: str = ""
    requests: list[tuple[dict[str, str], dict[str, Any]]] = field(default_factory=list)


@contextmanager
def endpoint(*answers: tuple[int, str]) -> Iterator[FakeEndpoint]:
    """An HTTP server that gives these answers in order, the last one for ever."""
    fake = FakeEndpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, text = answers[min(len(fake.requests), len(answers) - 1)]
            fake.requests.append(({k.title(): v for k, v in self.headers.items()}, json.loads(body)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
