"""The sides of batch_engine.py, in the interpreter that has vLLM: `batch_engine_peers.py ROUNDS ROWS SHARD [RAY]`.

`worker` is the rendered processor, SHARD the rows in a shard, RAY the folder that has Ray, if it takes part. What was
measured is written as JSON, behind an @.
"""

import asyncio
import gc
import gzip
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import worker
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers import run_batch
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM

WORDS = ["bado", "kifu", "lomi", "tare", "zuvo"]
TOKENS = 16
INPUT, THEIRS = Path("input.jsonl"), Path("theirs.jsonl")
SHARDS_AT_ONCE = 3
PAIRS = 25  # of a quick processor's jobs, in shards and in one


def messages(number: int) -> list[dict[str, str]]:
    words = " ".join(WORDS[(number + n) % len(WORDS)] for n in range(8))
    return [{"role": "user", "content": f"Say {number}: {words}"}]


def bare(model: str, rows: int) -> Callable[[], int]:
    llm = LLM(model, load_format="dummy", enforce_eager=True)
    params = SamplingParams(temperature=0, max_tokens=TOKENS)
    asked: Any = [messages(number) for number in range(rows)]
    return lambda: len(llm.chat(asked, params, use_tqdm=False))


def ours(line: Any, rows: int, size: int) -> Callable[[], int]:
    """What a container does with its shards of so many rows, from the packed rows to the published answers."""
    data = Path(f"job-{size}")
    worker.DATA = data
    shards = list(range(-(-rows // size)))
    lines = INPUT.read_bytes().splitlines()
    for shard in shards:
        file = worker.input_file(shard)
        file.parent.mkdir(parents=True, exist_ok=True)
        some = lines[shard * size : (shard + 1) * size]
        made = [shard_line(number, line) for number, line in enumerate(some, shard * size)]
        file.write_bytes(gzip.compress(b"".join(made), compresslevel=1))

    def run() -> int:
        worker.DATA = data
        for folder in ("answers", "parts"):
            shutil.rmtree(data / folder, ignore_errors=True)
        with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
            told = [
                one for ends, _ in pool.map(lambda shard: line.work([shard], "run"), shards) for one in ends
            ]
        assert all(one["ended"] and not one["failed"] for one in told)
        return sum(one["rows"] for one in told)

    return run


class AtOnce:
    """A processor that has its answer, so that what is left is the way of the rows to it and from it."""

    capacity = 512

    def __init__(self, answer: object) -> None:
        self.answer = answer
        self.ended: list[tuple[int, object]] = []

    def start(self, key: int, _: dict[str, Any]) -> None:
        self.ended.append((key, self.answer))

    def step(self) -> list[tuple[int, object]]:
        ended, self.ended = self.ended, []
        return ended

    def give_back(self) -> list[int]:
        return []


def of_a_shard(rows: int, size: int) -> float:
    """Seconds of the processors that a shard takes for itself: jobs of the same rows in shards and in one, in turn."""
    worker.DATA = Path(f"job-{size}")
    answer = json.loads(worker.read_gzip(worker.answers_file(0))[0])["answer"]
    line = worker.Line(AtOnce(answer))
    sides = [ours(line, rows, size), ours(line, rows, rows)]
    spent: list[list[float]] = [[], []]
    for _ in range(PAIRS):
        for run, seconds in zip(sides, spent, strict=True):
            gc.collect()
            before = time.process_time()
            assert run() == rows
            seconds.append(time.process_time() - before)
    more: float = statistics.median(many - one for many, one in zip(*spent, strict=True))
    others = -(-rows // size) - 1
    return more / others


def shard_line(number: int, text: bytes) -> bytes:
    """A line of OpenAI's Batch API as it stands in a shard."""
    asked = json.loads(text)
    row = {"row": number, "id": asked["custom_id"], "url": asked["url"], "body": asked["body"]}
    return json.dumps(row).encode() + b"\n"


def batch(arguments: list[str]) -> Callable[[], int]:
    """`vllm run-batch`, without its start: its engine and its handlers are made once."""
    parser = run_batch.make_arg_parser(FlexibleArgumentParser())
    args = parser.parse_args(["-i", str(INPUT), "-o", str(THEIRS), *arguments])
    loop = asyncio.new_event_loop()

    async def load() -> Any:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(args))
        return engine, await run_batch.build_endpoint_registry(engine, args)

    engine, registry = loop.run_until_complete(load())

    async def known(**_: Any) -> Any:
        return registry

    run_batch.build_endpoint_registry = known

    def run() -> int:
        loop.run_until_complete(run_batch.run_batch(engine, args))
        return len(THEIRS.read_text(encoding="utf-8").splitlines())

    return run


class RayData:
    """Ray's processor, in a process that loads an engine of its own each time: it says how long the rest took."""

    def __init__(self, model: str, rows: int, packages: str) -> None:
        self.argv = [sys.executable, str(Path(__file__).with_name("batch_engine_ray.py"))]
        self.argv += [model, str(rows), str(TOKENS)]
        self.rows = rows
        self.env = {**os.environ, "PYTHONPATH": packages, "RAY_USAGE_STATS_ENABLED": "0"}
        self.seconds = 0.0

    def __call__(self) -> int:
        done = subprocess.run(self.argv, env=self.env, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(done.stdout + done.stderr)
        (said,) = (line for line in done.stdout.splitlines() if line.startswith("@"))
        self.seconds = json.loads(said[1:])
        return self.rows


def processor_time() -> tuple[float, float]:
    """Seconds of this process, and of the engines' below it."""
    below = psutil.Process().children(recursive=True)
    return time.process_time(), sum(sum(child.cpu_times()[:2]) for child in below)


def spent_since(before: tuple[float, float], rows: int) -> str:
    own, below = (1000 * (now - then) / rows for now, then in zip(processor_time(), before, strict=True))
    return f"{own:.2f} + {below:.2f} in the engine"


def main(rounds: int, rows: int, size: int, packages: str = "") -> None:
    model = worker.make_tiny_model()
    url = "/v1/chat/completions"
    fields = {"model": model, "temperature": 0, "max_tokens": TOKENS}
    with INPUT.open("w", encoding="utf-8") as output:
        for number in range(rows):
            body = {**fields, "messages": messages(number)}
            output.write(
                json.dumps({"custom_id": str(number), "method": "POST", "url": url, "body": body}) + "\n"
            )
    arguments = ["--model", model, "--load-format", "dummy", "--enforce-eager"]
    worker.engine_arguments = lambda: arguments
    worker.volume = SimpleNamespace(commit=lambda: None, reload=lambda: None)
    worker.live = SimpleNamespace(put=lambda *_: None, get=lambda _: None)
    line = worker.Line(worker.VllmProcessor())
    sides: dict[str, Any] = {
        "ours": ours(line, rows, size),
        "bare": bare(model, rows),
        "run-batch": batch(arguments),
    }
    if packages:
        sides["ray"] = RayData(model, rows, packages)
    times: dict[str, list[float]] = {name: [] for name in sides}
    taken: list[float] = []  # by ours, of the processors
    for number in range(rounds + 1):
        for name, run in sides.items():
            if name == "ray" and not number:
                continue  # it begins anew each time
            gc.collect()
            began, spent = time.perf_counter(), processor_time()
            assert run() == rows, name
            took = run.seconds if name == "ray" else time.perf_counter() - began
            if number:  # the first is for the caches
                times[name].append(took)
            if number and name == "ours":
                taken.append(sum(processor_time()) - sum(spent))
            print(
                f"{name}: {took:.2f} s, of processors {spent_since(spent, rows)} ms a row",
                file=sys.stderr,
                flush=True,
            )
    shard = {"itself": of_a_shard(rows, size), "all": statistics.median(taken) * size / rows}
    print("@" + json.dumps({"times": times, "shard": shard}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
