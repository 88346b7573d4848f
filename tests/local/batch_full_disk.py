"""The program of test_batch_full_disk: a job whose client's folders, and then whose Volume, are on disks that are full.

Run in a mount namespace of its own, `unshare --user --map-root-user --mount python batch_full_disk.py FOLDER`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MIB = 1 << 20
ROWS = 4000
WORK = """
import hashlib, time

def process(row):
    time.sleep(0.005)
    return {"n": row["n"], "more": hashlib.shake_256(b"%d" % row["n"]).hexdigest(400)}
"""


class Disk:
    """A small one. It has room again when it is `grown`, or what fills it removed."""

    def __init__(self, path: Path, mib: int) -> None:
        self.path = path
        path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", path], check=True)

    def grow(self, mib: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={mib}m", self.path], check=True)

    def fill(self) -> None:
        with contextlib.suppress(OSError), (self.path / "ballast").open("ab", buffering=0) as ballast:
            for size in (MIB, 4096):
                with contextlib.suppress(OSError):
                    while True:
                        ballast.write(b"b" * size)

    def empty(self) -> None:
        (self.path / "ballast").unlink()


def main() -> None:
    from gpuctl.local import client
    from tests.local.planes import image_cache

    root = Path(sys.argv[1])
    state, cache, out = Disk(root / "state", 96), Disk(root / "cache", 1), Disk(root / "out", 1)
    env = {
        **os.environ,
        "XDG_STATE_HOME": str(state.path),
        "XDG_CACHE_HOME": str(cache.path),
        "GPUCTL_TARGET": "local",
        "NO_COLOR": "1",
        "COLUMNS": "500",
    }
    (root / "work.py").write_text(WORK)
    with (root / "rows.jsonl").open("w") as rows:
        for n in range(ROWS):
            rows.write(json.dumps({"n": n, "text": os.urandom(400).hex()}) + "\n")
    answers = out.path / "answers.jsonl"
    report: dict[str, Any] = {}

    def start(*words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "gpuctl", "batch", *words],
            cwd=root,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ended(what: str, process: subprocess.Popen[str]) -> None:
        _, err = process.communicate(timeout=300)
        report[what] = (process.returncode, err)

    def job(name: str) -> tuple[str, ...]:
        return ("work.py:process", "rows.jsonl", "-o", str(answers), "--overwrite", "--name", name)

    def lines() -> list[Any]:
        return [json.loads(line) for line in answers.read_text().splitlines()]

    client.up(state.path / "gpuctl" / "local", image_cache())
    try:
        # The rows have no room here; then the answers have none, where they are to be, nor on their way.
        ended("rows", start(*job("client")))
        cache.grow(64)
        answers.write_text("as it was\n")
        ended("answers", start(*job("client")))
        report["kept"] = [file.read_text() for file in out.path.iterdir()]
        out.grow(64)
        cache.fill()
        ended("fetching", start("fetch", "client", "--overwrite"))
        report["kept too"] = [file.read_text() for file in out.path.iterdir()]
        cache.empty()
        ended("fetched", start("fetch", "client", "--overwrite"))
        report["client"] = lines()

        # The Volume has none in the middle of the job.
        process = start(*job("volume"))
        while True:
            asked = subprocess.run(
                [sys.executable, "-m", "gpuctl", "batch", "status", "volume", "--json"],
                env=env, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if asked.returncode == 0 and json.loads(asked.stdout).get("done"):
                break
            time.sleep(0.5)
        while process.poll() is None:
            state.fill()
            time.sleep(0.2)
        ended("stopped", process)
        state.empty()
        ended("status", start("status", "volume"))
        ended("resumed", start("resume", "volume", "--overwrite"))
        report["volume"] = lines()
    finally:
        client.down(state.path / "gpuctl" / "local")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
