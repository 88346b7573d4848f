"""Pictures through `gpuctl batch` on this machine, by a real diffusers and a small Stable Diffusion on the CPU."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

import pieces
from gpuctl import catalog, paths

from .conftest import Gpuctl, processes_of

pytestmark = pytest.mark.slow

URL = "/v1/images/generations"


def asked(name: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": URL, "body": {"num_inference_steps": 4, **body}}


GOOD = [
    asked("cat", prompt="a red cat", seed=5, n=3, size="128x64"),
    asked("cat again", prompt="a red cat", seed=6, size="128x64"),
    asked("dogs/small", prompt="a dog", size="64x64"),
    asked("dogs/SMALL", prompt="a dog", size="64x64"),
    asked("../../fish", prompt="a fish", negative_prompt="water", guidance_scale=3),
    asked("plain", prompt="a house", size="auto", model="tiny", user="ann", response_format="b64_json"),
    *(
        asked(f"number {n}", prompt=f"the number {n}", size="64x64", num_inference_steps=30)
        for n in range(30)
    ),
]
BAD = {
    "odd": (
        asked("odd", prompt="a dog", size="60x64"),
        "invalid_request",
        "divisible by 8 but are 64 and 60",
    ),
    "big": (asked("big", prompt="a dog", size="big"), "invalid_request", "size: 'big' is no size such as"),
    "style": (
        asked("style", prompt="a dog", style="vivid"),
        "invalid_request",
        "'style': no field of an image",
    ),
    "none": (asked("none"), "invalid_request", "prompt must be text"),
    "many": (asked("many", prompt="a dog", n=11), "invalid_request", "n: 11 is no whole number from 1 to 10"),
    "url": (
        asked("url", prompt="a dog", response_format="url"),
        "invalid_request",
        "response_format: 'url': only 'b64_json'",
    ),
    "long": (asked("long", prompt="dog " * 80), "context_length_exceeded", "tokens, and the model reads 77"),
}


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def lines(file: Path) -> dict[str, Any]:
    read = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return {line["custom_id"]: line["error"] or line["response"]["body"] for line in read}


def size_of(png: bytes) -> tuple[int, int]:
    """Of a whole PNG, every part of which has the right sum."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, found = 8, []
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        part, (crc,) = (
            png[at + 4 : at + 8 + length],
            struct.unpack(">I", png[at + 8 + length : at + 12 + length]),
        )
        assert zlib.crc32(part) == crc
        found.append(part)
        at += 12 + length
    assert found[-1] == b"IEND"
    width, height = struct.unpack(">II", found[0][4:12])
    return width, height


def engine_python() -> Path:
    """The interpreter of the image that has diffusers, once it was built."""
    for image in (paths.cache_dir() / "local" / "images").glob("*/image.json"):
        venv = image.parent / "tree" / "venv"
        if any(venv.glob(f"lib/python3*/site-packages/diffusers-{catalog.diffusers().version}.dist-info")):
            return venv / "bin" / "python"
    raise AssertionError("no image with diffusers, although pictures were just made")


def kill_a_worker(state: Path) -> None:
    """The process that makes pictures, found by the library that it has in its memory."""
    for process in processes_of(state):
        with contextlib.suppress(OSError):
            if "libtorch" in Path(f"/proc/{process.pid}/maps").read_text():
                os.kill(process.pid, signal.SIGKILL)
                return
    raise AssertionError("there is no container that makes pictures")


def test_pictures_are_the_same_whoever_makes_them_and_whatever_dies(gpuctl: Gpuctl, tmp_path: Path) -> None:
    wrong = [row for row, _, _ in BAD.values()]
    rows, folder = write(tmp_path / "rows.jsonl", [*GOOD, *wrong]), tmp_path / "pictures"
    work = ("batch", "tiny", "--local", "--batch-size", "4")
    told = json.loads(gpuctl.ok(*work, rows, "-o", f"{folder}/", "--json", timeout=1500))
    assert (told["state"], told["done"], told["failed"]) == ("done", len(GOOD), len(BAD))

    errors = lines(folder / "errors.jsonl")
    assert errors.keys() == BAD.keys()
    for name, (_, code, message) in BAD.items():
        assert errors[name]["code"] == code, name
        assert message in errors[name]["message"], name
    answers = lines(folder / "answers.jsonl")
    assert list(answers) == [row["custom_id"] for row in GOOD]
    named = {name: [one["file"] for one in body["data"]] for name, body in answers.items()}
    assert named["cat"] == ["cat-1.png", "cat-2.png", "cat-3.png"]
    assert [one["seed"] for one in answers["cat"]["data"]] == [5, 6, 7]
    assert named["../../fish"] == ["fish.png"]
    assert named["dogs/small"] + named["dogs/SMALL"] == ["dogs/small.png", "dogs/SMALL-3.png"]
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert there == {name for names in named.values() for name in names} | {"answers.jsonl", "errors.jsonl"}
    made = {name: [(folder / file).read_bytes() for file in files] for name, files in named.items()}
    for row in GOOD:
        body, name = row["body"], row["custom_id"]
        size = body.get("size", "auto").replace("auto", "128x128")
        assert answers[name]["size"] == size
        assert {"{}x{}".format(*size_of(png)) for png in made[name]} == {size}
    assert made["cat"][1] == made["cat again"][0], "the second picture of a row has the next seed"
    assert made["dogs/small"] != made["dogs/SMALL"], "without a seed, each row has its own"

    # In another order, in two containers of which one is killed, as OpenAI's API has them.
    shuffled = random.Random(7).sample(GOOD, len(GOOD))
    again, out = write(tmp_path / "again.jsonl", shuffled), tmp_path / "lines.jsonl"
    words = [*work, again, "-o", str(out), "--max-containers", "2", "--events"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gpuctl", *words],
        env=gpuctl.env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    killed = 0
    for line in process.stdout:
        status = json.loads(line)
        if not killed and status["state"] == "running" and 0 < status["done"] < len(GOOD):
            kill_a_worker(gpuctl.state)
            killed = status["done"]
    assert process.wait(timeout=600) == 0, process.stderr and process.stderr.read()
    assert killed
    inside = lines(out)
    assert list(inside) == [row["custom_id"] for row in shuffled]
    for name, body in inside.items():
        assert [base64.b64decode(one["b64_json"]) for one in body["data"]] == made[name], name
        assert [one["seed"] for one in body["data"]] == [one["seed"] for one in answers[name]["data"]]


def test_a_folder_with_a_pipeline_is_a_model(gpuctl: Gpuctl, tmp_path: Path) -> None:
    """The same weights as `tiny` has, so the same pictures; of a table, into a table."""
    table = tmp_path / "things.csv"
    table.write_text("thing,colour\ncat,red\nhouse,\n", encoding="utf-8")
    words = ("--local", "--prompt", "a {colour} {thing}", "--size", "64x64", "--steps", "3", "--seed", "9")
    tiny = tmp_path / "tiny"
    words = (*words, "--format", "csv")
    gpuctl.ok("batch", "tiny", str(table), "--task", "images", "-o", str(tiny), *words, timeout=1500)

    maker = tmp_path / "maker.py"
    made = pieces.source("shared/tiny_diffusers.py.jinja") + "\nprint(make_tiny_diffusers())\n"
    maker.write_text(made, encoding="utf-8")
    done = subprocess.run([engine_python(), maker], capture_output=True, text=True, check=True, timeout=300)
    model = tmp_path / "my-model"
    shutil.move(done.stdout.splitlines()[-1], model)
    mine = tmp_path / "mine"
    gpuctl.ok("batch", str(model), str(table), "-o", str(mine), *words, timeout=600)
    for folder in (tiny, mine):
        assert (folder / "answers.csv").read_text(encoding="utf-8") == (
            "thing,colour,answer\ncat,red,row-0.png\nhouse,,row-1.png\n"
        )
    for name in ("row-0.png", "row-1.png"):
        assert (tiny / name).read_bytes() == (mine / name).read_bytes()
    assert (tiny / "row-0.png").read_bytes() != (tiny / "row-1.png").read_bytes()
