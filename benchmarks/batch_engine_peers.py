"""The three sides of batch_engine.py, in the interpreter that has vLLM: `batch_engine_peers.py ROUNDS ROWS`.

`worker` is the rendered processor. The seconds of each side are written as JSON, behind an @.
"""

import asyncio
import gc
import gzip
import json
import shutil
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
SHARD, SHARDS_AT_ONCE = 250, 3


def messages(number: int) -> list[dict[str, str]]:
    words = " ".join(WORDS[(number + n) % len(WORDS)] for n in range(8))
    return [{"role": "user", "content": f"Say {number}: {words}"}]


def bare(model: str, rows: int) -> Callable[[], int]:
    llm = LLM(model, load_format="dummy", enforce_eager=True)
    params = SamplingParams(temperature=0, max_tokens=TOKENS)
    asked: Any = [messages(number) for number in range(rows)]
    return lambda: len(llm.chat(asked, params, use_tqdm=False))


def ours(arguments: list[str], rows: int) -> Callable[[], int]:
    """What a container does with its shards, from the packed rows to the published answers."""
    worker.engine_arguments = lambda: arguments
    worker.volume = SimpleNamespace(commit=lambda: None, reload=lambda: None)
    worker.live = SimpleNamespace(put=lambda *_: None, get=lambda _: None)
    worker.DATA = Path("job")
    shards = list(range(-(-rows // SHARD)))
    lines = INPUT.read_bytes().splitlines()
    for shard in shards:
        file = worker.input_file(shard)
        file.parent.mkdir(parents=True, exist_ok=True)
        some = lines[shard * SHARD : (shard + 1) * SHARD]
        made = [shard_line(number, line) for number, line in enumerate(some, shard * SHARD)]
        file.write_bytes(gzip.compress(b"".join(made), compresslevel=1))
    line = worker.Line(worker.VllmProcessor())

    def run() -> int:
        for folder in ("answers", "parts"):
            shutil.rmtree(worker.DATA / folder, ignore_errors=True)
        with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
            told = [
                one for ends, _ in pool.map(lambda shard: line.work([shard], "run"), shards) for one in ends
            ]
        assert all(one["ended"] and not one["failed"] for one in told)
        return sum(one["rows"] for one in told)

    return run


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


def processor_time() -> tuple[float, float]:
    """Seconds of this process, and of the engines' below it."""
    below = psutil.Process().children(recursive=True)
    return time.process_time(), sum(sum(child.cpu_times()[:2]) for child in below)


def spent_since(before: tuple[float, float], rows: int) -> str:
    own, below = (1000 * (now - then) / rows for now, then in zip(processor_time(), before, strict=True))
    return f"{own:.2f} + {below:.2f} in the engine"


def main(rounds: int, rows: int) -> None:
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
    sides = {"ours": ours(arguments, rows), "bare": bare(model, rows), "run-batch": batch(arguments)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            gc.collect()
            began, spent = time.perf_counter(), processor_time()
            assert run() == rows, name
            took = time.perf_counter() - began
            if number:  # the first is for the caches
                times[name].append(took)
            print(
                f"{name}: {took:.2f} s, of processors {spent_since(spent, rows)} ms a row",
                file=sys.stderr,
                flush=True,
            )
    print("@" + json.dumps(times), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
