"""A bulk job of five million rows: what memory and time it takes here, and how soon a resumed one finds its place.

    .venv/bin/python benchmarks/batch_scale.py [--rows 10000,200000,1000000,5000000] [--output answers.jsonl] [--check]

For each size, on a local control plane of its own, with commands as a user types them and a function that does nothing:

- read: lines of OpenAI's Batch API, each with a custom_id of its own (`--dry-run`), without and with `--dedupe`;
- start: rows are read, sharded, uploaded through the Volume, and the App is deployed (`--detach`);
- resume: the job is cancelled, its Volume is filled with the answers and the ledger of nine tenths of the shards (by
  the code that the App itself writes them with), and `gpuctl batch resume` is timed until a row beyond those is done;
- wait: the rest is answered, all answers are fetched, and written in the input's order.

Memory is the peak of the resident set, of `gpuctl` itself, of the largest `modal` command that it runs, and of all of
them together at one moment. Sizes and places in the Volume are those of the job; nothing is scaled up.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import pieces  # type: ignore[import-not-found]
from gpuctl.local import client

MOST_MB = 200  # of the client, at any size
MOST_MINUTES = 30  # for each step: minutes, not hours
MOST_PLACE = 10.0  # seconds until a resumed job goes on
DONE = 0.9  # of the shards, before it is resumed
GOES_ON = "resume, until it does"

WORK = """
def same(rows):
    return rows
"""


@dataclass
class Peak:
    """What the processes of a command had at most, in MB, and how long it took."""

    seconds: float = 0.0
    own: float = 0.0
    child: float = 0.0
    together: float = 0.0
    out: str = ""


def processes() -> dict[int, int]:
    """The parent of each process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                found[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    return found


def resident(pid: int) -> tuple[float, float]:
    """(the most so far, now) in MB; nothing of one that is gone."""
    values = {"VmHWM": 0, "VmRSS": 0}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in values:
                values[name] = int(rest.split()[0])
    return values["VmHWM"] / 1024, values["VmRSS"] / 1024


def tree(pid: int) -> list[int]:
    """The processes below it."""
    parents = processes()
    found, todo = [], [pid]
    while todo:
        one = todo.pop()
        below = [child for child, parent in parents.items() if parent == one]
        found += below
        todo += below
    return found


@dataclass
class Bench:
    """A plane of its own, and commands against it."""

    folder: Path
    output: str
    reads: bool
    env: dict[str, str] = field(default_factory=dict)

    def gpuctl(self, *words: str) -> Peak:
        """Run a command to its end."""
        peak = Peak()
        began = time.monotonic()
        with (self.folder / "stderr").open("w+") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "gpuctl", *words],
                cwd=self.folder,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            texts: list[str] = []
            stdout = process.stdout
            assert stdout is not None
            reader = threading.Thread(target=lambda: texts.append(stdout.read()))
            reader.start()
            while process.poll() is None:
                _watch(process.pid, peak)
                time.sleep(0.05)
            reader.join()
            peak.out = texts[0]
            peak.seconds = time.monotonic() - began
            if process.returncode != 0:
                errors.seek(0)
                raise SystemExit(
                    f"gpuctl {' '.join(words)}: {process.returncode}\n{peak.out[-2000:]}{errors.read()[-3000:]}"
                )
        return peak


def _watch(pid: int, peak: Peak) -> None:
    most, now = resident(pid)
    peak.own = max(peak.own, most)
    for child in tree(pid):
        most, more = resident(child)
        peak.child = max(peak.child, most)
        now += more
    peak.together = max(peak.together, now)


# -- what is read


def write_rows(file: Path, rows: int) -> None:
    with file.open("w", encoding="utf-8") as opened:
        opened.writelines(
            f'{{"n": {n}, "text": "A sentence about number {n}, as long as such ones are."}}\n'
            for n in range(rows)
        )


def write_requests(file: Path, rows: int) -> None:
    """Half of them ask for what another asks for."""
    with file.open("w", encoding="utf-8") as opened:
        opened.writelines(
            f'{{"custom_id": "request-{n}", "method": "POST", "url": "/v1/chat/completions", "body": {{"messages": '
            f'[{{"role": "user", "content": "Say something about number {n // 2}."}}], "max_tokens": 16}}}}\n'
            for n in range(rows)
        )


# -- a job of which most is done


def fill(volume: Path, share: float) -> int:
    """Answers and ledger of the first shards, as if they had ended; how many."""
    os.environ.pop("MODAL_TASK_ID", None)
    ledger: Any = pieces.module(
        "batch/ledger.py.jinja", folder=volume.parent, constants={"DATA": None, "DEATHS_ALONE": 3}
    )
    ledger.DATA = volume
    job = json.loads((volume / "job.json").read_bytes())
    count = int(job["shards"] * share)
    for entry in ("answers", "parts", "ledger.jsonl", "status.json"):
        path = volume / entry
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for shard in range(count):
        lines = [
            ledger.result_line(row, row["body"], None)
            for row in map(json.loads, ledger.read_gzip(ledger.input_file(shard)))
        ]
        file = ledger.answers_file(shard)
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(gzip.compress(b"".join(lines), compresslevel=1))
        counts = {"rows": len(lines), "failed": 0, "tokens_in": 0, "tokens_out": 0, "run": "earlier"}
        with (volume / "ledger.jsonl").open("ab") as opened:
            opened.write(b"\n" + json.dumps({"shard": shard, **counts}).encode() + b"\n")
    return count


def volume_of(state: Path, job: str) -> Path:
    """Where the local plane keeps the files of the job's Volume."""
    found = [
        file.parent
        for file in (state / "gpuctl" / "local").rglob("job.json")
        if f'"{job}"' in file.read_text()
    ]
    assert len(found) == 1, found
    return found[0]


# -- a size


def read(bench: Bench, rows: int) -> Iterator[tuple[str, Peak]]:
    file = bench.folder / "prompts.jsonl"
    write_requests(file, rows)
    asks = ("batch", "tiny", file.name, "-o", "none.jsonl", "--dry-run", "--local", "-q")
    yield "read", bench.gpuctl(*asks)
    yield "read, --dedupe", bench.gpuctl(*asks, "--dedupe")
    file.unlink()


def measure(bench: Bench, rows: int) -> Iterator[tuple[str, Peak]]:
    folder = bench.folder
    if bench.reads:
        yield from read(bench, rows)
    write_rows(folder / "rows.jsonl", rows)
    job = f"scale-{rows}"
    work = ("batch", "work.py:same", "rows.jsonl", "-o", bench.output, "--batch-size", "1000", "--name", job)
    yield "start", bench.gpuctl(*work, "--detach", "--json")
    yield "cancel --now", bench.gpuctl("batch", "cancel", job, "--now")
    ended = fill(volume_of(Path(bench.env["XDG_STATE_HOME"]), job), DONE)
    place = Peak()
    began = time.time()
    resumed = bench.gpuctl("batch", "resume", job, "--detach", "--json")
    yield "resume --detach", resumed
    status = volume_of(Path(bench.env["XDG_STATE_HOME"]), job) / "status.json"
    while True:
        with contextlib.suppress(OSError, ValueError):
            told = json.loads(status.read_bytes())
            if told["shards_ended"] > ended:
                break
        assert time.time() < began + 600, "it does not go on"
        time.sleep(0.05)
    place.seconds = told["time"] - began
    yield GOES_ON, place
    yield "wait", bench.gpuctl("batch", "wait", job, "--json")
    with (folder / bench.output).open("rb") as answers:
        lines = sum(1 for _ in answers)
    assert lines == rows, f"{lines:,} answers of {rows:,} rows"
    bench.gpuctl("batch", "rm", job, "--yes")
    (folder / bench.output).unlink()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="10000,200000,1000000,5000000")
    parser.add_argument("--output", default="answers.jsonl", help="its suffix is the format")
    parser.add_argument("--no-read", action="store_true", help="leave out what only reads")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    arguments = parser.parse_args()
    missed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="gpuctl-benchmark-") as name:
        folder = Path(name)
        env = {**os.environ, "XDG_STATE_HOME": str(folder / "state"), "GPUCTL_TARGET": "local"}
        bench = Bench(folder, arguments.output, not arguments.no_read, env)
        (folder / "work.py").write_text(WORK, encoding="utf-8")
        try:
            bench.gpuctl("local", "up")  # a plane is none of the client's memory
            print(f"{'':40}{'seconds':>9}{'gpuctl':>10}{'modal':>10}{'together':>10}", flush=True)
            for rows in map(int, arguments.rows.split(",")):
                for what, peak in measure(bench, rows):
                    name = f"{rows:>9,} rows: {what}"
                    memory = "".join(f"{mb:>7.0f} MB" for mb in (peak.own, peak.child, peak.together))
                    print(f"{name:<40}{peak.seconds:>9.1f}{memory if peak.own else ''}", flush=True)
                    if peak.together > MOST_MB:
                        missed.append(f"{name}: {peak.together:.0f} MB, and {MOST_MB} are the most")
                    most = MOST_PLACE if what == GOES_ON else 60 * MOST_MINUTES
                    if peak.seconds > most:
                        missed.append(f"{name}: {peak.seconds:.0f} s, and {most:.0f} are the most")
        finally:
            client.down(folder / "state" / "gpuctl" / "local")
    print("\n".join(missed) or "every target is met")
    return 1 if missed and arguments.check else 0


if __name__ == "__main__":
    raise SystemExit(main())
