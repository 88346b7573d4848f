"""Rows through a worker's processor, in the interpreter of an image: `python answer.py JOB.json`.

JOB.json: `module` (a file of tests/pieces.py), `processor` (the class in it), `rows` (a JSONL file), `answers` (the
file to write), `kill` (whether to kill the engine afterwards, in the middle of the same rows once more).
"""

import dataclasses
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def through(module: Any, processor: Any, rows: list[dict[str, Any]]) -> dict[int, Any]:
    """How each row ended, as the container's loop finds it out."""
    waiting = list(enumerate(rows))[::-1]
    ended: dict[int, Any] = {}
    flying: set[int] = set()
    while waiting or flying:
        while waiting and len(flying) < processor.capacity:
            key, row = waiting.pop()
            try:
                processor.start(key, row)
            except module.Refused as refused:
                ended[key] = {"code": refused.code, "message": refused.message, "retry": False}
            else:
                flying.add(key)
        for key, outcome in processor.step():
            flying.remove(key)
            ended[key] = dataclasses.asdict(outcome) if isinstance(outcome, module.Failed) else outcome
    return ended


def children(of: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = status.read_text()
        except OSError:
            continue
        if int(text.rpartition(")")[2].split()[1]) == of:
            found.append(int(status.parent.name))
    return [*found, *(below for child in found for below in children(child))]


def main(job: dict[str, Any]) -> None:
    spec = importlib.util.spec_from_file_location("worker", job["module"])
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules["worker"] = module
    spec.loader.exec_module(module)
    processor = getattr(module, job["processor"])()
    rows = [json.loads(line) for line in Path(job["rows"]).read_text(encoding="utf-8").splitlines()]
    began = time.perf_counter()
    ended = through(module, processor, rows)
    report: dict[str, Any] = {"ended": [ended[key] for key in range(len(rows))]}
    report["seconds"] = time.perf_counter() - began
    report["capacity"] = processor.capacity
    if job.get("kill"):
        answered = [row for key, row in enumerate(rows) if "code" not in ended[key]]
        for key, row in enumerate(answered[: processor.capacity]):
            processor.start(key, row)
        processor.step()
        for child in children(os.getpid()):
            os.kill(child, signal.SIGKILL)
        try:
            while True:
                processor.step()
        except Exception as error:
            report["died"] = type(error).__name__
    Path(job["answers"]).write_text(json.dumps(report, allow_nan=False), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
