"""The three sides of batch_engine.py, in the interpreter that has vLLM: `batch_engine_peers.py ROUNDS ROWS`.

`worker` is the rendered processor. The seconds of each side are written as JSON, behind an @.
"""

import asyncio
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
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
INPUT, OUTPUT, THEIRS = Path("input.jsonl"), Path("ours.jsonl"), Path("theirs.jsonl")


def messages(number: int) -> list[dict[str, str]]:
    words = " ".join(WORDS[(number + n) % len(WORDS)] for n in range(8))
    return [{"role": "user", "content": f"Say {number}: {words}"}]


def bare(model: str, rows: int) -> Callable[[], int]:
    llm = LLM(model, load_format="dummy", enforce_eager=True)
    params = SamplingParams(temperature=0, max_tokens=TOKENS)
    asked: Any = [messages(number) for number in range(rows)]
    return lambda: len(llm.chat(asked, params, use_tqdm=False))


def ours(arguments: list[str]) -> Callable[[], int]:
    worker.engine_arguments = lambda: arguments
    processor = worker.VllmProcessor()

    def run() -> int:
        flying = done = 0
        with INPUT.open(encoding="utf-8") as lines, OUTPUT.open("w", encoding="utf-8") as output:
            rows = map(json.loads, lines)
            while True:
                while flying < processor.capacity and (row := next(rows, None)):
                    processor.start(done + flying, {"url": row["url"], "body": row["body"]})
                    flying += 1
                if not flying:
                    return done
                for _, answer in processor.step():
                    output.write(json.dumps(answer) + "\n")
                    flying -= 1
                    done += 1

    return run


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
    sides = {"ours": ours(arguments), "bare": bare(model, rows), "run-batch": batch(arguments)}
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
