"""A large file into a Volume of the local control plane and out of it, against `cp` of the same file, in turns.

    .venv/bin/python benchmarks/volumes.py [--gigabytes 5] [--rounds 3] [--check]

Target: at least half the speed of `cp`, both ways. `cp`, put and get each end with the data in the same cache of the
kernel, and each writes to a name that is new. The plane and the Volume are made for this run and removed after it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpuctl.local import client

TARGET = 0.5


def fill(path: Path, size: int) -> None:
    with path.open("wb") as file:
        for _ in range(size >> 24):
            file.write(os.urandom(1 << 24))


def timed(argv: list[str], env: dict[str, str] | None = None) -> float:
    began = time.monotonic()
    subprocess.run(argv, check=True, capture_output=True, env=env)
    return time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to work; a temporary folder otherwise"
    )
    parser.add_argument("--check", action="store_true", help="exit 1 where the target is missed")
    options = parser.parse_args()
    size = int(options.gigabytes * 1e9) >> 24 << 24
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        free = shutil.disk_usage(folder).free
        if free < 3.5 * size:
            print(
                f"{folder} has {free / 1e9:.1f} GB left; this needs {3.5 * size / 1e9:.1f}", file=sys.stderr
            )
            return 1
        fill(folder / "file", size)
        plane = client.up(folder / "state", folder / "cache")
        environment = {**os.environ, **plane.client_env()}
        modal = [sys.executable, "-m", "modal", "volume"]
        times: dict[str, list[float]] = {"cp": [], "put": [], "get": []}
        try:
            timed([*modal, "create", "bench"], environment)
            for _ in range(options.rounds):
                times["cp"].append(timed(["cp", str(folder / "file"), str(folder / "copy")]))
                (folder / "copy").unlink()
                times["put"].append(
                    timed([*modal, "put", "bench", str(folder / "file"), "file"], environment)
                )
                times["get"].append(
                    timed([*modal, "get", "bench", "file", str(folder / "back")], environment)
                )
                same = subprocess.run(["cmp", folder / "file", folder / "back"], check=False).returncode == 0
                assert same, "what came back is not what went in"
                (folder / "back").unlink()
                timed([*modal, "rm", "bench", "file"], environment)
        finally:
            client.down(folder / "state")
    medians = {what: statistics.median(taken) for what, taken in times.items()}
    missed = False
    print(f"{size / 1e9:.1f} GB, {options.rounds} rounds, medians; load average {os.getloadavg()[0]:.1f}")
    for what, seconds in medians.items():
        ratio = medians["cp"] / seconds
        missed = missed or ratio < TARGET
        print(f"{what:4} {seconds:7.2f} s {size / seconds / 1e6:8.0f} MB/s {ratio:6.2f} x cp")
    print(f"target: at least {TARGET} x cp: {'missed' if missed else 'met'}")
    return 1 if missed and options.check else 0


if __name__ == "__main__":
    raise SystemExit(main())
