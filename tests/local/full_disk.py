"""The program of test_full_disk: a plane whose state lies on a small disk of its own, which fills up.

Run in a mount namespace of its own, `unshare --user --map-root-user --mount python full_disk.py FOLDER`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOM = 48 << 20
SDK = """
import json, modal, sys
def outcome(action):
    try:
        return action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
d = modal.Dict.from_name("d", create_if_missing=True)
q = modal.Queue.from_name("q", create_if_missing=True)
found = {}
for step in json.loads(sys.argv[1]):
    if step == "put":
        found["dict"] = outcome(lambda: d.put("large", b"x" * (20 << 20)))
        found["queue"] = outcome(lambda: q.put_many([b"y" * 1_000_000] * 20, block=False))
    else:
        found["dict"] = {k: len(v) if isinstance(v, bytes) else v for k, v in d.items()}
        found["queue"] = q.len()
        d["more"] = "works"
        q.put("works")
print(json.dumps(found))
"""


def main() -> None:
    from gpuctl.local import client

    disk = Path(sys.argv[1])
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", disk], check=True)
    state = disk / "state"
    plane = client.up(state, disk / "cache")
    env = {**os.environ, **plane.client_env(), "NO_COLOR": "1", "COLUMNS": "500"}

    def sdk(*steps: str) -> dict[str, object]:
        argv = [sys.executable, "-c", SDK, json.dumps(steps)]
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
        found: dict[str, object] = json.loads(done.stdout)
        return found

    def modal(*argv: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "modal", *argv], env=env, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr

    report: dict[str, object] = {"before": sdk("look")}
    modal("volume", "create", "v")
    (disk.parent / "small").write_bytes(b"s" * 1000)
    modal("volume", "put", "v", str(disk.parent / "small"), "small")
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "ballast").write_bytes(b"b" * (free - (8 << 20)))
    (disk.parent / "large").write_bytes(os.urandom(12 << 20))
    report["volume"] = modal("volume", "put", "v", str(disk.parent / "large"), "large")
    report["full"] = sdk("put")
    with contextlib.suppress(OSError), (disk / "ballast").open("ab", buffering=0) as ballast:
        while True:
            ballast.write(b"b" * 4096)
    report["secret"] = modal("secret", "create", "s", "A=" + "x" * 100_000)
    report["up"] = client.running(state) is not None
    (disk / "ballast").unlink()
    report["room"] = modal("volume", "put", "v", str(disk.parent / "large"), "large")
    report["listed"] = json.loads(modal("volume", "ls", "v", "--json")[1])
    report["secrets"] = json.loads(modal("secret", "list", "--json")[1])
    report["after"] = sdk("look")
    os.kill(plane.pid, 9)
    client.down(state)
    plane = client.up(state, disk / "cache")
    env |= plane.client_env()
    report["again"] = sdk("look")
    report["left"] = sorted(p.name for p in (state / "volumes" / ".uploads").iterdir())
    client.down(state)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
