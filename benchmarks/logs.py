"""A million lines of output in the local control plane: taken in, tailed and searched, and what else waits meanwhile.

    .venv/bin/python benchmarks/logs.py [--lines 1000000] [--check]

Targets: `modal app logs` answers within 2 s more than the client's own start, tail or search, whether it finds
something or not; and another call is answered within 250 ms while a search goes on. A run's plane is its own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpuctl.local import client

TARGET_SECONDS, TARGET_OTHER_SECONDS = 2.0, 0.25
APP = """
import modal

app = modal.App("talker")


@app.function(timeout=3600)
def talk(lines):
    for number in range(lines):
        print(f"line {number}: as long as lines of a log are, more or less, in most of the programs that write one")


@app.local_entrypoint()
def main(lines: int):
    talk.remote(lines)
"""


def timed(argv: list[str], env: dict[str, str]) -> tuple[float, str]:
    began = time.monotonic()
    done = subprocess.run(argv, check=True, capture_output=True, env=env, text=True)
    return time.monotonic() - began, done.stdout


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Prober:
    """Asks the plane something small again and again, and remembers the longest answer."""

    def __init__(self, env: dict[str, str]) -> None:
        code = (
            "import sys, time, modal\n"
            "d = modal.Dict.from_name('probe', create_if_missing=True); d['k'] = 1; worst = 0\n"
            "print('ready', flush=True)\n"
            "import threading; stop = threading.Event()\n"
            "threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()\n"
            "while not stop.is_set():\n"
            "    began = time.monotonic(); d['k']; worst = max(worst, time.monotonic() - began); time.sleep(0.01)\n"
            "print(worst)\n"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def worst(self) -> float:
        out, _ = self._process.communicate("")
        return float(out)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    options = parser.parse_args()
    modal = [sys.executable, "-m", "modal"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "talker.py").write_text(APP)
        plane = client.up(folder / "state", folder / "cache")
        env = {**os.environ, **plane.client_env()}
        try:
            timed([*modal, "run", "-q", str(folder / "talker.py"), "--lines", "1"], env)  # builds the image
            spent = cpu_seconds(plane.pid)
            taken, _ = timed(
                [*modal, "run", "-q", str(folder / "talker.py"), "--lines", str(options.lines)], env
            )
            spent = cpu_seconds(plane.pid) - spent
            listed = timed([*modal, "app", "list"], env)[1].split()
            apps = [word for word in listed if word.startswith("ap-")]
            app = max(apps, key=lambda one: len(timed([*modal, "app", "logs", one, "--tail", "100"], env)[1]))
            bare = statistics.median(timed([*modal, "app", "list"], env)[0] for _ in range(options.rounds))
            each = spent / options.lines * 1e6
            print(
                f"{options.lines:,} lines: printed in {taken:.1f} s, {each:.1f} us of the plane's CPU for each."
            )
            print(f"Seconds over those of `modal app list` ({bare:.2f}), medians of {options.rounds}:")
            missed = False
            prober = Prober(env)
            for what in (
                ["--tail", "100"],
                ["--tail", "20000"],
                ["--search", f"line {options.lines // 2}:"],
                ["--search", "what is nowhere"],
                ["--source", "stderr"],
            ):
                took = statistics.median(
                    timed([*modal, "app", "logs", app, *what], env)[0] for _ in range(options.rounds)
                )
                missed = missed or took - bare > TARGET_SECONDS
                print(f"  {' '.join(what):28} {max(took - bare, 0):6.2f}")
            worst = prober.worst()
            missed = missed or worst > TARGET_OTHER_SECONDS
            print(f"the longest that another call waited meanwhile: {worst * 1000:.0f} ms")
            print(
                f"targets: {TARGET_SECONDS} s and {TARGET_OTHER_SECONDS * 1000:.0f} ms: {'missed' if missed else 'met'}"
            )
        finally:
            client.down(folder / "state")
    return 1 if missed and options.check else 0


if __name__ == "__main__":
    raise SystemExit(main())
