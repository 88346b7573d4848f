"""An HTTP server of the standard library, with a little of everything that a proxy can get wrong."""

import base64
import hashlib
import json
import os
import struct
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, body: bytes, kind: str = "application/json") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path == "/headers":
            self.answer(json.dumps({"path": self.path, "headers": list(self.headers.items())}).encode())
        elif path == "/who":
            self.answer(
                json.dumps({"task": os.environ["MODAL_TASK_ID"], "version": os.environ["T_VERSION"]}).encode()
            )
        elif path == "/slow":
            time.sleep(float(self.path.partition("?")[2] or 1))
            self.answer(b'"slow"')
        elif path == "/sse":
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            try:
                for number in range(200):
                    self.wfile.write(f"data: {number}\n\n".encode())
                    self.wfile.flush()
                    time.sleep(0.1)
            except OSError:
                print("sse: the client went away", flush=True)
            self.close_connection = True
        elif path == "/die":
            sys.stdout.flush()
            os._exit(3)
        elif path == "/ws":
            self.websocket()
        else:
            self.answer(b'"hello"')

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        digest = hashlib.sha256()
        length = 0
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().strip(), 16):
                digest.update(self.rfile.read(size))
                length += size
                self.rfile.readline()
            self.rfile.readline()
        else:
            left = int(self.headers.get("Content-Length", 0))
            while left:
                data = self.rfile.read(min(left, 1 << 20))
                if not data:
                    return
                digest.update(data)
                length += len(data)
                left -= len(data)
        self.answer(json.dumps({"sha256": digest.hexdigest(), "length": length}).encode())

    def websocket(self):
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header(
            "Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        )
        self.end_headers()
        while True:
            first, second = self.rfile.read(2)
            length = second & 127
            if length == 126:
                (length,) = struct.unpack(">H", self.rfile.read(2))
            mask = self.rfile.read(4)
            data = bytes(b ^ mask[i % 4] for i, b in enumerate(self.rfile.read(length)))
            if first & 15 == 8:
                self.wfile.write(bytes([0x88, len(data)]) + data)
                break
            reply = b"echo " + data
            self.wfile.write(bytes([0x80 | (first & 15), len(reply)]) + reply)
            self.wfile.flush()
        self.close_connection = True

    def log_message(self, *args):
        pass


print("listening", flush=True)
ThreadingHTTPServer(("127.0.0.1", 8000), Handler).serve_forever()
