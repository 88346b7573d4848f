"""`gpuctl batch` with a real vLLM on the CPU, from prompts to answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .conftest import Gpuctl

pytestmark = pytest.mark.slow


def lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_every_prompt_is_answered_by_the_engine(gpuctl: Gpuctl, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"text": f"number {n}"} for n in range(40)]
    rows[7] = {"text": "long " * 5000}
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{half\n", encoding="utf-8")
    out = tmp_path / "answers.jsonl"
    work = (
        "batch",
        "tiny",
        str(prompts),
        "--local",
        "--prompt",
        "Say {text}",
        "--max-tokens",
        "8",
        "--temperature",
        "0",
    )
    told = json.loads(gpuctl.ok(*work, "-o", str(out), "--json", timeout=600))
    assert (told["state"], told["rows"], told["done"], told["failed"]) == ("done", 41, 39, 2)
    assert told["tokens_out"] == 39 * 8

    answers = {line["custom_id"]: line["response"]["body"] for line in lines(out)}
    assert list(answers) == [f"row-{n}" for n in range(40) if n != 7]
    for body in answers.values():
        assert body["object"] == "chat.completion"
        assert body["choices"][0]["message"]["content"]
        assert body["usage"]["completion_tokens"] == 8
    errors = {line["custom_id"]: line["error"] for line in lines(tmp_path / "answers.errors.jsonl")}
    assert errors["row-7"]["code"] == "context_length_exceeded"
    assert "2048" in errors["row-7"]["message"], "the model's context"
    assert errors["row-40"]["code"] == "invalid_json"
    assert "prompts.jsonl:41" in errors["row-40"]["message"]

    # The same engine and rows by OpenAI's own format: greedy answers are the same.
    batch = tmp_path / "batch.jsonl"
    with batch.open("w", encoding="utf-8") as file:
        for n in range(5):
            body = {
                "model": "tiny",
                "messages": [{"role": "user", "content": f"Say number {n}"}],
                "max_tokens": 8,
                "temperature": 0,
            }
            line = {"custom_id": f"own-{n}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    table = tmp_path / "answers.csv"
    gpuctl.ok("batch", "tiny", str(batch), "--local", "-o", str(table), timeout=600)
    again = table.read_text(encoding="utf-8")
    for n in range(5):
        assert answers[f"row-{n}"]["choices"][0]["message"]["content"] in again
