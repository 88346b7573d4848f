"""A server whose code uses the modal client, for the tests of the control plane: it answers with what came of that."""

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import modal

app = modal.App(os.environ.get("T_NAME", "sdk"))
volume = modal.Volume.from_name("sdk", create_if_missing=True)


def outcome(action):
    try:
        return action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def upload():
    large, kept = Path("/tmp/large"), Path("/volume/up/large")
    large.write_bytes(os.urandom(9 << 20))
    with volume.batch_upload(force=True) as batch:
        batch.put_file(large, "up/large")
    return large.read_bytes() == kept.read_bytes() == b"".join(volume.read_file("up/large"))


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        outcomes = {
            "commit": outcome(volume.commit),
            "reload": outcome(volume.reload),
            "upload": outcome(upload),
            "dict": outcome(lambda: modal.Dict.from_name("d", create_if_missing=True).put("a", 1)),
        }
        body = json.dumps(outcomes).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@app.server(
    image=modal.Image.debian_slim(),
    port=8000,
    routing_region="us-east",
    unauthenticated=True,
    volumes={"/volume": volume},
)
class Server:
    @modal.enter()
    def start(self):
        server = ThreadingHTTPServer(("", 8000), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
