"""Rows per second of a bulk job whose function does nothing, against a loop that only reads and writes the same lines.

    .venv/bin/python benchmarks/batch_ledger.py [--rows 200000] [--rounds 3] [--batch-size N] [--check]

Ours is a whole job on a local control plane: driver, one container, shards, ledger, commits and fsyncs, by the seconds
that the container was up and ready (`working_seconds` of the job's status), to its last word. The loop is one process
that reads the job's lines (`{"row": 0, "id": "row-0", "url": "function", "body": {…}}`, not packed), parses each with
json.loads, makes the line of its result with json.dumps, writes it, and fsyncs every two seconds, as the job does, and
at its end. They take turns; the ratio is that of each round. Target: 0.4 of the loop's rows per second.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpuctl.local import client

TARGET = 0.4
SYNC_SECONDS = 2.0
WORK = """
def nothing(row):
    return None


def nothings(rows):
    return [None] * len(rows)
"""


def write_rows(file: Path, rows: int) -> None:
    with file.open("w", encoding="utf-8") as opened:
        opened.writelines(
            f'{{"n": {n}, "text": "A sentence about number {n}, as long as such ones are."}}\n'
            for n in range(rows)
        )


def loop(source: Path, target: Path) -> float:
    """Rows per second of reading, parsing, encoding, writing and syncing lines, and of nothing else."""
    began = synced = time.perf_counter()
    rows = 0
    with source.open("rb") as lines, target.open("wb") as results:
        for line in lines:
            row = json.loads(line)
            result = {"row": row["row"], "id": row["id"], "answer": None}
            text = json.dumps(result, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            results.write(text.encode() + b"\n")
            rows += 1
            if rows % 1000 == 0 and time.perf_counter() - synced > SYNC_SECONDS:
                results.flush()
                os.fsync(results.fileno())
                synced = time.perf_counter()
        results.flush()
        os.fsync(results.fileno())
    return rows / (time.perf_counter() - began)


def job(folder: Path, env: dict[str, str], rows: int, batch_size: int | None, name: str) -> float:
    """Rows per second of the job, once its container was ready."""
    function = (
        ["work.py:nothing"] if batch_size is None else ["work.py:nothings", "--batch-size", str(batch_size)]
    )
    gpuctl(
        folder, env, *function, "rows.jsonl", "-o", "answers.jsonl", "--overwrite", "--name", name, "--json"
    )
    status = json.loads(gpuctl(folder, env, "status", name, "--json"))
    assert status["done"] == rows, status
    assert status["containers_started"] == 1, "another container was started meanwhile"
    return rows / float(status["working_seconds"])


def gpuctl(folder: Path, env: dict[str, str], *words: str) -> str:
    argv = [sys.executable, "-m", "gpuctl", "batch", *words]
    done = subprocess.run(argv, cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(argv[2:])} failed ({done.returncode}):\n{done.stdout}{done.stderr}")
    return done.stdout


def lines_of(state: Path, name: str, to: Path) -> None:
    """The lines of the job's shards, as the loop reads them."""
    (job,) = (
        file.parent
        for file in state.rglob("job.json")
        if f'"{name}"' in file.read_text() and (file.parent / "input").is_dir()
    )
    with to.open("wb") as target:
        for shard in sorted((job / "input").iterdir()):
            target.write(gzip.decompress(shard.read_bytes()))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--batch-size", type=int, help="rows in a call of the function; default: one, and no list"
    )
    parser.add_argument("--check", action="store_true", help="exit 1 where the target is missed")
    arguments = parser.parse_args()
    ratios = []
    with tempfile.TemporaryDirectory(prefix="gpuctl-benchmark-") as place:
        folder = Path(place)
        state = folder / "state"
        env = {**os.environ, "XDG_STATE_HOME": str(state), "GPUCTL_TARGET": "local"}
        (folder / "work.py").write_text(WORK, encoding="utf-8")
        write_rows(folder / "rows.jsonl", arguments.rows)
        try:
            for number in range(arguments.rounds + 1):  # the first is for the caches
                name = f"ledger-{number}"
                ours = job(folder, env, arguments.rows, arguments.batch_size, name)
                if not number:
                    lines_of(state, name, folder / "lines.jsonl")
                theirs = statistics.median(
                    loop(folder / "lines.jsonl", folder / "results.jsonl") for _ in range(3)
                )
                gpuctl(folder, env, "rm", name, "--yes")
                print(
                    f"  job {ours:9,.0f} rows/s   loop {theirs:9,.0f} rows/s   ratio {ours / theirs:.2f}",
                    flush=True,
                )
                if number:
                    ratios.append(ours / theirs)
        finally:
            client.down(state / "gpuctl" / "local")
    found = statistics.median(ratios)
    met = found >= TARGET
    print(
        f"{arguments.rows:,} rows, {arguments.rounds} rounds: median ratio {found:.2f}, target {TARGET}: "
        f"{'met' if met else 'MISSED'}"
    )
    return 0 if met or not arguments.check else 1


if __name__ == "__main__":
    raise SystemExit(main())
