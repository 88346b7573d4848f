"""The processors of `gpuctl batch` with the real vLLM: that its answers are the server's, and what it refuses."""

from __future__ import annotations

import base64
import io
import json
import math
import signal
import struct
import subprocess
import sys
import wave
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import pieces

TRANSCRIPTIONS = "/v1/audio/transcriptions"
CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
TINY_ENV = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
TINY_ARGS = ["--load-format", "dummy", "--enforce-eager"]
ARGUMENTS = """\
def engine_arguments() -> list[str]:
    return {arguments!r}
"""


@dataclass(frozen=True)
class Engine:
    """The interpreter that has vLLM, and a folder to work in."""

    python: Path
    folder: Path
    env: dict[str, str] = field(default_factory=dict)

    def run(self, *argv: str | Path) -> None:
        log = self.folder / "log.txt"
        with log.open("wb") as output:
            done = subprocess.run(
                ["nice", self.python, *argv],
                env={"PATH": "/usr/bin:/bin", "HOME": str(self.folder), **TINY_ENV, **self.env},
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                timeout=1500,
            )
        said = log.read_text(errors="replace")
        # Now and then the interpreter's end aborts over a thread of the engine's, when all has been written.
        aborted = done.returncode == -signal.SIGABRT and said.rstrip().endswith("without an active exception")
        assert done.returncode == 0 or aborted, said[-6000:]

    def model(self, piece: str, maker: str) -> Path:
        """A model described on the spot."""
        maker_file = self.folder / f"{maker}.py"
        text = pieces.source(piece) + f"\n\nprint({maker}(), end='')\n"
        maker_file.write_text(
            text.replace("tempfile.mkdtemp(", "tempfile.mkdtemp(dir='.', "), encoding="utf-8"
        )
        made = subprocess.check_output([self.python, maker_file], cwd=self.folder, text=True)
        return self.folder / made.splitlines()[-1]

    def answers(
        self, rows: list[dict[str, Any]], arguments: list[str], *, kill: bool = False
    ) -> dict[str, Any]:
        (self.folder / "worker.py").write_text(
            pieces.source("batch/vllm.py.jinja") + "\n\n" + ARGUMENTS.format(arguments=arguments),
            encoding="utf-8",
        )
        write_lines(self.folder / "rows.jsonl", rows)
        job = {
            "module": str(self.folder / "worker.py"),
            "processor": "VllmProcessor",
            "rows": str(self.folder / "rows.jsonl"),
            "answers": str(self.folder / "answers.json"),
            "kill": kill,
        }
        (self.folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        (self.folder / "answers.json").unlink(missing_ok=True)
        self.run(Path(__file__).with_name("answer.py"), self.folder / "job.json")
        report: dict[str, Any] = json.loads((self.folder / "answers.json").read_text(encoding="utf-8"))
        assert len(report["ended"]) == len(rows)
        return report

    def run_batch(self, rows: list[dict[str, Any]], arguments: list[str]) -> list[dict[str, Any]]:
        """What `vllm run-batch` answers to the same rows.

        Now and then it fails one by itself (seen once in six runs of 638 rows): that is asked again.
        """
        answers = self._run_batch(rows, arguments)
        for _ in range(2):
            failed = [n for n, line in enumerate(answers) if line["response"]["body"] is None]
            if failed:
                again = self._run_batch([rows[n] for n in failed], arguments)
                answers = [again[failed.index(n)] if n in failed else line for n, line in enumerate(answers)]
        failures = [line for line in answers if line["response"]["body"] is None]
        assert not failures, "not by gpuctl, but by vLLM's own run-batch"
        return answers

    def _run_batch(self, rows: list[dict[str, Any]], arguments: list[str]) -> list[dict[str, Any]]:
        lines = [
            {"custom_id": row["id"], "method": "POST", "url": row["url"], "body": row["body"]} for row in rows
        ]
        write_lines(self.folder / "input.jsonl", lines)
        files = ["-i", "input.jsonl", "-o", "output.jsonl"]
        (self.folder / "output.jsonl").unlink(missing_ok=True)
        self.run("-m", "vllm.entrypoints.openai.run_batch", *files, *arguments)
        output = (self.folder / "output.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in output]


def write_lines(file: Path, values: list[Any]) -> None:
    file.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


@pytest.fixture(scope="module")
def engine(engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(engine_python, tmp_path_factory.mktemp("engine"))


def row(url: str, body: dict[str, Any]) -> dict[str, Any]:
    return {"row": 0, "id": "x", "url": url, "body": body}


def chat(text: str, **fields: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 12}
    return row(CHAT, body | fields)


def completion(prompt: Any, **fields: Any) -> dict[str, Any]:
    return row(COMPLETIONS, {"prompt": prompt, "temperature": 0, "max_tokens": 12} | fields)


def same(body: dict[str, Any]) -> dict[str, Any]:
    """What must be equal in two answers to one request: all but ids (one is of the engine's settings) and times."""
    for choice in body.get("choices", ()):
        for call in choice.get("message", {}).get("tool_calls", ()):
            call["id"] = "an id"
    return {
        name: value for name, value in body.items() if name not in {"id", "created", "system_fingerprint"}
    }


def near(value: Any) -> Any:
    """The value, equal also to one whose figures differ in their last places.

    Which rows the engine computes together is a matter of timing, and the order of a sum's terms with it: a
    log-probability or an embedding differs in the fifth place from one run to the next, and a text does not.
    """
    match value:
        case float():
            return pytest.approx(value, rel=1e-2, abs=1e-2)
        case dict():
            return {name: near(inner) for name, inner in value.items()}
        case list():
            return [near(inner) for inner in value]
        case _:
            return value


SCHEMA = {"type": "string", "enum": ["yes", "no"]}  # nothing that a random model could go on with for ever
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
ANSWERED = [
    *(chat(f"bado kifu {n}") for n in range(600)),  # more than the engine takes at once
    # Rows that have all but what they ask in common, of each kind several.
    *(chat(f"bado {'kifu ' * n}", max_tokens=None, max_completion_tokens=n % 3 + 1) for n in range(9)),
    *(chat(f"Hello {n}!", echo=True, min_tokens=2, seed=7, user="someone") for n in range(3)),
    *(
        chat(text, add_special_tokens=True)
        for text in ("", " ", "a<|said|>b", "é́ \U0001f600 ǅ\n\n", "bado " * 600)
    ),
    *(chat("bado " * n, truncate_prompt_tokens=40) for n in (5, 600)),
    *(chat("bado " * n, max_tokens=None) for n in (2020, 2025)),  # as many tokens as there is room for
    *(chat(f"Hello {n}!", n=3, temperature=1.0, seed=5) for n in range(2)),
    chat("Hello!", logprobs=True, top_logprobs=2),
    chat("Hello!", stop=["a", "e", "i"], max_tokens=100),
    chat("Hello!", response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}),
    chat("Hello!", tools=[TOOL], tool_choice="none"),
    chat("Hello!", max_completion_tokens=3, max_tokens=None),
    chat("Hello!", unheard_of=1, metadata={"a": "b"}),
    chat("Hello!", min_tokens=5, ignore_eos=True, repetition_penalty=1.3, logit_bias={"7": 5}),
    chat("Hello!", model="tiny", user="someone", return_token_ids=True),
    chat([{"type": "text", "text": "Hello!"}]),
]
COMPLETED: list[tuple[dict[str, Any], Callable[[dict[str, Any]], bool]]] = [
    (completion("Hello!"), lambda body: body["usage"]["completion_tokens"] == 12),
    (completion(["a", "b", "c"]), lambda body: [choice["index"] for choice in body["choices"]] == [0, 1, 2]),
    (completion([5, 6, 7]), lambda body: body["usage"]["prompt_tokens"] == 3),
    (completion("Hello!"), lambda body: body["usage"]["completion_tokens"] == 12),
    (completion("Goodbye!", echo=True), lambda body: body["choices"][0]["text"].startswith("Goodbye!")),
    (completion("Hello!", echo=True), lambda body: body["choices"][0]["text"].startswith("Hello!")),
    (completion("Hello!", logprobs=1), lambda body: len(body["choices"][0]["logprobs"]["tokens"]) == 12),
    (completion("Hello!", stream=True, stream_options={"include_usage": True}), lambda body: "usage" in body),
    (chat("Hello!", stream=True), lambda body: body["object"] == "chat.completion"),
]
REFUSED = [
    (chat("bado " * 3000), "context_length_exceeded", "the prompt has 3"),
    (chat("bado " * 9000), "context_length_exceeded", "the prompt has 9"),
    (completion("bado " * 3000), "context_length_exceeded", "and the model's context 2048"),
    (chat("Hello!", temperature="hot"), "invalid_request", "temperature: Input should be a valid number"),
    (chat("Hello!", temperature=-1), "invalid_request", "temperature must be non-negative"),
    (chat("Hello!", max_tokens=100_000), "invalid_request", "max_tokens"),
    (row(CHAT, {"temperature": 0}), "invalid_request", "messages: Field required"),
    (chat("Hello!", messages=[{"role": "user"}], n=0), "invalid_request", "n"),
    (chat("Hello!", model="gpt-4o"), "model_not_found", "The model `gpt-4o` does not exist"),
    (chat("Hello!", response_format={"type": "json_schema"}), "invalid_request", "json_schema"),
    (chat("Hello!", tools=[TOOL], tool_choice="required"), "invalid_request", "tool"),
    (row("/v1/embeddings", {"input": "Hello!"}), "unsupported", "the model cannot answer /v1/embeddings"),
]


@pytest.mark.slow
def test_text(engine: Engine) -> None:
    model = engine.model("shared/tiny.py.jinja", "make_tiny_model")
    arguments = ["--model", str(model), "--served-model-name", "tiny", *TINY_ARGS]
    rows = [
        *(wrong for wrong, _, _ in REFUSED),
        *ANSWERED,
        *(asked for asked, _ in COMPLETED),
        *(wrong for wrong, _, _ in REFUSED),
    ]
    report = engine.answers(rows, arguments, kill=True)
    ended = report["ended"]

    refused = ended[: len(REFUSED)]
    assert refused == ended[-len(REFUSED) :]
    for outcome, (_, code, message) in zip(refused, REFUSED, strict=True):
        assert (outcome["code"], outcome["retry"]) == (code, False), outcome
        assert message in outcome["message"]

    answered = ended[len(REFUSED) :][: len(ANSWERED)]
    theirs = engine.run_batch(ANSWERED, arguments)
    for ours, other in zip(answered, theirs, strict=True):
        assert same(ours) == near(same(other["response"]["body"]))
    bound = next(n for n, asked in enumerate(ANSWERED) if "response_format" in asked["body"])
    assert json.loads(answered[bound]["choices"][0]["message"]["content"]) in {"yes", "no"}

    for outcome, (_, right) in zip(ended[len(REFUSED) + len(ANSWERED) :], COMPLETED, strict=False):
        assert right(outcome), outcome

    assert report["capacity"] == 512  # twice what vLLM takes at once
    assert report["died"] == "EngineDeadError"


ADAPTER = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
folder = Path(sys.argv[1])
torch.manual_seed(1)
weights = {}
for layer in range(2):
    name = f"base_model.model.model.layers.{layer}.self_attn.v_proj"
    weights[f"{name}.lora_A.weight"] = torch.randn(8, 128)
    weights[f"{name}.lora_B.weight"] = torch.randn(256, 8)
save_file(weights, folder / "adapter_model.safetensors")
config = {"peft_type": "LORA", "r": 8, "lora_alpha": 64, "target_modules": ["v_proj"], "bias": "none"}
(folder / "adapter_config.json").write_text(json.dumps(config))
"""


@pytest.mark.slow
def test_an_adapter_and_tools(engine: Engine, tmp_path: Path) -> None:
    """A parser of tool calls, and a model that a row names.

    All rows name it: vLLM on a CPU answers those of the bare model, in one step with others, with the adapter too.
    """
    model = engine.model("shared/tiny.py.jinja", "make_tiny_model")
    engine.run("-c", ADAPTER, tmp_path)
    arguments = ["--model", str(model), "--served-model-name", "tiny", *TINY_ARGS]
    arguments += ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"mine={tmp_path}"]
    arguments += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    rows = [
        chat("Hello!", model="mine"),
        chat("Good day!", model="mine"),
        chat("Hello!", model="mine", tools=[TOOL]),
        chat("Hello!", model="mine", tools=[TOOL], tool_choice="required", max_tokens=60),
    ]
    adapted = engine.answers(rows, arguments)["ended"]
    called = adapted[3]["choices"][0]["message"]["tool_calls"]
    assert [call["function"]["name"] for call in called] == ["look"] * len(called)
    assert [same(body) for body in adapted] == [
        near(same(other["response"]["body"])) for other in engine.run_batch(rows, arguments)
    ]
    bare = engine.answers([chat("Hello!"), chat("Good day!")], arguments)["ended"]
    assert [body["model"] for body in [*adapted, *bare]] == ["mine"] * 4 + ["tiny"] * 2
    for ours, other in zip(adapted, bare, strict=False):
        assert ours["choices"] != other["choices"]


def embedding(text: Any, **fields: Any) -> dict[str, Any]:
    return row(EMBEDDINGS, {"input": text} | fields)


EMBEDDED = [
    *(embedding(f"bado kifu {n}") for n in range(600)),
    embedding(["a", "b", "c"]),
    embedding("Hello!", encoding_format="base64"),
    embedding("Hello!", dimensions=16),
    embedding([[5, 6, 7], [8, 9]]),
    embedding("bado " * 3000, truncate_prompt_tokens=100),
]
NOT_EMBEDDED = [
    (embedding("bado " * 3000), "context_length_exceeded", "and the model's context 2048"),
    (embedding(["a", "bado " * 3000]), "context_length_exceeded", "the prompt has 3"),
    (embedding("a", dimensions=3000), "invalid_request", "dimensions"),
    (embedding("a", encoding_format="bytes"), "invalid_request", "encoding_format"),
    (embedding([]), "invalid_request", "at least one prompt"),
    (chat("Hello!"), "unsupported", "the model cannot answer /v1/chat/completions, but /v1/embeddings"),
]


@pytest.mark.slow
def test_embeddings(engine: Engine) -> None:
    model = engine.model("shared/tiny.py.jinja", "make_tiny_model")
    arguments = ["--model", str(model), "--served-model-name", "tiny", *TINY_ARGS, "--runner", "pooling"]
    arguments += ["--hf-overrides", '{"is_matryoshka": true}']
    rows = [*EMBEDDED, *(wrong for wrong, _, _ in NOT_EMBEDDED)]
    ended = engine.answers(rows, arguments)["ended"]

    for outcome, (_, code, message) in zip(ended[len(EMBEDDED) :], NOT_EMBEDDED, strict=True):
        assert (outcome["code"], outcome["retry"]) == (code, False), outcome
        assert message in outcome["message"]

    theirs = engine.run_batch(EMBEDDED, arguments)
    for ours, other in zip(ended, theirs, strict=False):
        assert same(ours) == near(same(other["response"]["body"]))
    assert len(ended[602]["data"][0]["embedding"]) == 16


def sound(seconds: float) -> bytes:
    """A tone that rises, as the bytes of a WAV file."""
    rate = 16000
    samples = (int(9000 * math.sin(n * (0.05 + n / 8e6))) for n in range(int(rate * seconds)))
    made = io.BytesIO()
    with wave.open(made, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(b"".join(struct.pack("<h", sample) for sample in samples))
    return made.getvalue()


def transcription(url: Any, **fields: Any) -> dict[str, Any]:
    return row(TRANSCRIPTIONS, {"file_url": url} | fields)


def data_url(content: bytes) -> str:
    return "data:audio/wav;base64," + base64.b64encode(content).decode()


@pytest.mark.slow
def test_transcriptions(engine: Engine, tmp_path: Path) -> None:
    """With what `vllm[audio]` brings, beside the image."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        engine.python,
        "install",
        "-q",
        "--target",
        tmp_path / "audio",
    ]
    subprocess.run([*pip, "--no-deps", "av", "cffi", "scipy", "soundfile", "soxr"], check=True, timeout=600)
    engine = Engine(engine.python, engine.folder, {"PYTHONPATH": str(tmp_path / "audio")})
    model = engine.model("shared/tiny_whisper.py.jinja", "make_tiny_whisper")
    arguments = ["--model", str(model), "--served-model-name", "tiny-whisper", "--enforce-eager"]
    short, long, bad = tmp_path / "a b.wav", tmp_path / "long.wav", tmp_path / "bad.wav"
    short.write_bytes(sound(3))
    long.write_bytes(sound(70))
    bad.write_bytes(b"not sound at all" * 100)
    asked = [
        transcription(data_url(short.read_bytes())),
        transcription(data_url(short.read_bytes()), language="en", response_format="verbose_json"),
        transcription(data_url(long.read_bytes()), response_format="verbose_json"),
    ]
    same_files = [
        transcription(str(short)),
        transcription(short.as_uri(), language="en", response_format="verbose_json"),
        transcription(str(long), response_format="verbose_json"),
    ]
    refused = [
        (transcription(str(bad)), "unreadable_audio", "audio"),
        (transcription(data_url(b"")), "unreadable_audio", "audio"),
        (transcription(str(tmp_path / "none.wav")), "unreadable_audio", "No such file or directory: "),
        (transcription(5), "invalid_request", "file_url: Input should be a valid string"),
        (row(TRANSCRIPTIONS, {}), "invalid_request", "file_url: Field required"),
        (transcription(str(short), language="xx"), "invalid_request", "Unsupported language"),
        (transcription(str(short), response_format="srt"), "invalid_request", "response_format"),
    ]
    ended = engine.answers([*asked, *same_files, *(wrong for wrong, _, _ in refused)], arguments)["ended"]

    for outcome, (_, code, message) in zip(ended[6:], refused, strict=True):
        assert (outcome["code"], outcome["retry"]) == (code, False), outcome
        assert message in outcome["message"]
    theirs = [other["response"]["body"] for other in engine.run_batch(asked, arguments)]
    assert ended[:3] == near(theirs)
    assert ended[3:6] == near(theirs)
    assert theirs[2]["duration"] == 70
    assert all(segment["start"] <= segment["end"] for segment in theirs[2]["segments"])
