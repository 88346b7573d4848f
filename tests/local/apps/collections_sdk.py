"""Everything that the SDK can do with a Dict and a Queue, for the tests; prints what came of it as JSON.

`python collections_sdk.py NAME` runs it here; deployed (T_NAME), a server runs it in a container.
"""

import json
import os
import queue
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import modal

app = modal.App(os.environ.get("T_NAME", "collections"))


def outcome(action):
    try:
        return action()
    except Exception as error:
        return type(error).__name__


def dicts(name):
    d = modal.Dict.from_name(name, create_if_missing=True)
    d.clear()
    d["a"] = 1
    d.update({"b": [2], 3: {"c": None}})
    d.update(e="five")
    found = {
        "first": [d["a"], d.get("b"), d.get("none", "default"), d[3]],
        "missing": outcome(lambda: d["none"]),
        "in": ["a" in d, "none" in d, d.contains(3)],
        "len": d.len(),
        "skip": [d.put("a", 9, skip_if_exists=True), d.put("f", 6, skip_if_exists=True), d["a"]],
        "keys": sorted(map(str, d.keys())),
        "values": sorted(map(str, d.values())),
        "items": sorted([str(k), v] for k, v in d.items() if k in ("a", "f")),
        "pop": [d.pop("a"), d.pop("a", "gone"), outcome(lambda: d.pop("a"))],
        "large": (d.put("large", b"x" * (50 << 20)), len(d["large"]))[1],
        "info": d.info().name == name,
        "same": modal.Dict.from_id(d.object_id).get("e"),
    }
    del d["b"]
    found["after del"] = "b" in d
    with modal.Dict.ephemeral() as e:
        e["x"] = 1
        found["ephemeral"] = e["x"]
    return found


def queues(name):
    q = modal.Queue.from_name(name, create_if_missing=True)
    q.clear(all=True)
    q.put(1)
    q.put_many([2, 3, 4])
    q.put("other", partition="p")
    found = {
        "iterate": list(q.iterate()),
        "len": [q.len(), q.len(partition="p"), q.len(total=True)],
        "get": [q.get(), q.get_many(2), q.get(partition="p")],
        "rest": [q.get(), q.get(block=False), q.get_many(3, block=False)],
        "empty": outcome(lambda: q.get(timeout=0.2)),
        "info": q.info().name == name,
    }
    threading.Timer(0.3, q.put, ["late"]).start()
    began = time.monotonic()
    found["late"] = [q.get(timeout=10), time.monotonic() - began < 5]
    threading.Timer(0.3, q.put, ["polled"]).start()
    found["polled"] = list(q.iterate(item_poll_timeout=0.6))
    q.put("short", partition="brief", partition_ttl=1)
    time.sleep(1.1)
    found["expired"] = [q.len(partition="brief"), q.get(block=False, partition="brief")]
    q.put_many([0] * 5000, partition="full")
    found["full"] = [
        outcome(lambda: q.put(1, block=False, partition="full")),
        outcome(lambda: q.put(1, timeout=0.5, partition="full")),
        q.len(partition="full"),
    ]
    large = b"x" * (1 << 20)
    found["too large"] = [outcome(lambda: q.put(large, block=False)), outcome(lambda: q.put(large))]
    q.clear(partition="full")
    q.clear()
    found["cleared"] = q.len(total=True)
    threads = [
        threading.Thread(target=lambda n=n: q.put_many(list(range(n, n + 50)))) for n in range(0, 400, 50)
    ]
    taken = []
    takers = [threading.Thread(target=lambda: taken.extend(drain(q))) for _ in range(4)]
    for thread in [*threads, *takers]:
        thread.start()
    for thread in [*threads, *takers]:
        thread.join()
    found["each once"] = sorted(taken) == list(range(400))
    with modal.Queue.ephemeral() as e:
        e.put("x")
        found["ephemeral"] = e.get()
    return found


def drain(q):
    while True:
        try:
            yield from q.get_many(7, timeout=2)
        except queue.Empty:
            return


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"dicts": dicts("in-container"), "queues": queues("in-container")}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@app.server(image=modal.Image.debian_slim(), port=8000, routing_region="us-east", unauthenticated=True)
class Server:
    @modal.enter()
    def start(self):
        server = ThreadingHTTPServer(("", 8000), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()


if __name__ == "__main__":
    print(json.dumps({"dicts": dicts(sys.argv[1]), "queues": queues(sys.argv[1])}))
