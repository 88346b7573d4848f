"""Rows with pictures through the real vLLM: that its answers are the server's, and what it refuses."""

from __future__ import annotations

import base64
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from .test_batch_engine import TINY_ARGS, Engine, chat, near, same


@pytest.fixture
def engine(engine_python: Path, tmp_path: Path) -> Engine:
    return Engine(engine_python, tmp_path)


def about(*urls: str, says: str = "What is it?", **fields: Any) -> dict[str, Any]:
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return chat([*pictures, {"type": "text", "text": says}], **fields)  # type: ignore[arg-type]


@pytest.mark.slow
def test_pictures(engine: Engine) -> None:
    model = engine.folder / "model"
    model.mkdir()
    llama = engine.model("shared/tiny.py.jinja", "make_tiny_model")
    engine.run(Path(__file__).with_name("tiny_vision.py"), llama, model)
    engine = dataclasses.replace(engine, env={"PYTHONPATH": str(model / "path")})
    pictures = model / "pictures"
    # As a job's containers have them, with a name that a URL has to quote; and as OpenAI's API has them.
    red, blue, grey, torn = (
        f"file://{pictures}/{name}" for name in ("red.png", "blue%20one.jpg", "grey.webp", "torn.png")
    )
    sent = "data:image/png;base64," + base64.b64encode((pictures / "red.png").read_bytes()).decode()
    arguments = ["--model", str(model), "--served-model-name", "tiny", *TINY_ARGS]
    arguments += ["--allowed-local-media-path", str(pictures)]
    rows = [
        *(about(url, says=f"bado {n}") for n in range(40) for url in (red, blue, grey)),
        about(red),
        about(sent),
        about(red, blue, grey),
        chat("Hello!"),
        about(torn),
        about(f"file://{model}/config.json"),
    ]
    ended = engine.answers(rows, arguments)["ended"]
    *answered, unreadable, elsewhere = ended
    theirs = engine.run_batch(rows[:-2], arguments)
    for ours, other in zip(answered, theirs, strict=True):
        assert same(ours) == near(same(other["response"]["body"]))

    of_red, of_sent, of_three, _ = answered[-4:]
    assert of_red["choices"] == of_sent["choices"]
    tokens = [body["usage"]["prompt_tokens"] for body in (of_red, of_three)]
    assert tokens[1] - tokens[0] == 2 * (16 + 3), "a picture is 16 tokens between three others"
    assert (unreadable["code"], unreadable["retry"]) == ("unreadable_image", False), unreadable
    assert (elsewhere["code"], elsewhere["retry"]) == ("invalid_request", False), elsewhere
