"""The wait, against a real HTTP endpoint and a log that is fed to it; lines are those of vLLM 0.32 and Modal 1.6."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fakes import FakeRunner, chat_answer, endpoint
from gpuctl.cli.console import Console
from gpuctl.errors import GpuctlError
from gpuctl.modal_cli import ModalEnv
from gpuctl.target import Target
from gpuctl.tokens import ProxyToken
from gpuctl.wait import (
    Asked,
    Endpoint,
    Log,
    LogLine,
    Ready,
    StoppedError,
    ask,
    hint_for,
    wait_until_answers,
)

TOKEN = ProxyToken("wk-a", "ws-SECRET")
UNAVAILABLE = (503, "no container")
STARTS = (
    "[serve] container up: starting vLLM 0.32.0 for tiny",
    "(Worker pid=7282) INFO 11-21 07:55:20 [default_loader.py:501] Loading weights took 0.00 seconds",
    "[serve] engine listening: asking a first question",
    "[serve] ready: first answer in 0.4 s",
)


def waiting(
    url: str,
    runner: FakeRunner,
    *,
    stderr: io.StringIO | None = None,
    target: Target = Target.LOCAL,
    began: float | None = None,
    expect_new: bool = False,
    startup_timeout: float = 60,
    lost: Callable[[], GpuctlError | None] = lambda: None,
) -> Ready:
    return wait_until_answers(
        Endpoint(f"{url}/v1", "tiny", TOKEN, target),
        app_id="ap-1",
        env=ModalEnv(target, {}),
        environment=None,
        startup_timeout=startup_timeout,
        began=began,
        expect_new_container=expect_new,
        lost=lost,
        runner=runner,
        console=Console(stderr=stderr or io.StringIO()),
    )


def test_it_waits_through_503_and_429_and_says_the_stages() -> None:
    stderr = io.StringIO()
    runner = FakeRunner(followed=STARTS)
    with endpoint(UNAVAILABLE, UNAVAILABLE, (429, "busy"), chat_answer("hello there")) as served:
        ready = waiting(served.url, runner, stderr=stderr)
    assert ready.text == "hello there"
    assert list(ready.seconds) == ["container", "weights", "engine", "first_answer"]
    headers, body = served.requests[-1]
    assert headers["Authorization"] == "Bearer wk-a.ws-SECRET"
    assert body["model"] == "tiny"
    assert runner.calls == [["app", "logs", "ap-1", "--follow", "--timestamps", "--show-container-id"]]
    assert runner.followers[0].cancelled
    assert "weights: " in stderr.getvalue()
    assert "SECRET" not in stderr.getvalue()


def test_ready_is_said_soon_after_the_engine_answers() -> None:
    class Late(FakeRunner):
        """Its log goes on while it is followed."""

        def follow(self, argv, env, on_line):  # type: ignore[no-untyped-def]
            threading.Timer(1.0, lambda: [on_line(line) for line in STARTS]).start()
            return super().follow(argv, env, on_line)

    started = time.monotonic()
    with endpoint(UNAVAILABLE, chat_answer("hi")) as served:
        # On Modal it asks once a second while nothing stirs; the log wakes it.
        waiting(served.url, Late(), target=Target.MODAL)
    assert time.monotonic() - started < 1.5


def test_a_crash_ends_the_wait_at_once() -> None:
    stderr = io.StringIO()
    runner = FakeRunner(
        followed=[
            STARTS[0],
            *(f"line {n}" for n in range(40)),
            "api_server.py: error: unrecognized arguments: --no-such-flag",
            "[serve] engine exited with code 2 before it was ready",
            "Traceback (most recent call last):",
            '  File "/root/endpoint.py", line 111, in start',
            "RuntimeError: vLLM exited with code 2 before it was ready",
        ]
    )
    started = time.monotonic()
    with endpoint(UNAVAILABLE) as served, pytest.raises(GpuctlError) as crashed:
        waiting(served.url, runner, stderr=stderr)
    assert time.monotonic() - started < 2
    assert crashed.value.exit_code == 1
    assert "engine exited with code 2" in str(crashed.value)
    assert crashed.value.hint is not None
    assert "flag" in crashed.value.hint
    said = stderr.getvalue()
    assert "unrecognized arguments: --no-such-flag" in said
    assert "line 39" in said
    assert "RuntimeError" not in said  # the same again
    assert "line 5\n" not in said  # the last twenty only
    assert runner.followers[0].cancelled


@pytest.mark.parametrize(
    "line",
    [
        "Runner failed with exception: ModuleNotFoundError(\"No module named 'x'\")",
        "container ta-0123 exited with code 1",
        "container ta-0123 exited with signal 9",
        "container ta-0123 exited with code 0 before it was ready: ModuleNotFoundError(\"No module named 'x'\")",
        "container ta-0123 could not be started: no space left on the device",
        "[serve] engine exited with code -9 while serving",
        "[serve] engine not ready within the startup timeout of 600 s",
        "[serve] engine refused the first question (400): no",
    ],
)
def test_what_counts_as_a_crash(line: str) -> None:
    log = Log(began=None)
    log.add(f"2026-11-21 08:00:00+00:00 ta-0123 {line}")
    assert log.crash == line


@pytest.mark.parametrize(
    "line",
    [
        "container ta-0123 exited with code 0",
        "Traceback (most recent call last):",
        "Runner interrupted due to worker preemption. Your Function will be restarted",
        "ERROR something that vLLM survives",
    ],
)
def test_what_does_not(line: str) -> None:
    log = Log(began=None)
    log.add(line)
    assert log.crash is None


def test_an_earlier_deployments_container_counts_for_nothing() -> None:
    log = Log(began=LogLine.parse("2026-11-21 08:00:00+00:00 ta-1 x").at)
    assert not log.add("2026-11-21 07:59:00+00:00 ta-old [serve] container up: starting")
    assert not log.add("2026-11-21 08:00:03+00:00 ta-old [serve] engine exited with code -15 while serving")
    assert log.add("2026-11-21 08:00:04+00:00 ta-new [serve] container up: starting")
    assert log.crash is None
    assert log.stage == "weights"


def test_a_changed_deployment_waits_for_its_own_container() -> None:
    class Late(FakeRunner):
        def follow(self, argv, env, on_line):  # type: ignore[no-untyped-def]
            threading.Timer(0.3, on_line, [STARTS[0]]).start()
            threading.Timer(1.0, lambda: [on_line(line) for line in STARTS[1:]]).start()
            return super().follow(argv, env, on_line)

    started = time.monotonic()
    with endpoint(chat_answer("the old container")) as served:
        waiting(served.url, Late(), expect_new=True, began=1.0)
    assert time.monotonic() - started > 0.9


def test_a_refused_token_is_told() -> None:
    with (
        endpoint((401, "missing credentials")) as served,
        pytest.raises(GpuctlError, match=r"refuses the token \(HTTP 401\): missing credentials"),
    ):
        waiting(served.url, FakeRunner())


def test_a_refused_request_is_told_in_the_engines_words() -> None:
    body = '{"error": {"message": "max_tokens is too large", "code": 400}}'
    with endpoint((400, body)) as served, pytest.raises(GpuctlError, match="max_tokens is too large"):
        waiting(served.url, FakeRunner())


def test_a_model_that_cannot_chat_completes() -> None:
    stderr = io.StringIO()
    refusal = (400, '{"error": {"message": "default chat template is no longer allowed"}}')
    with endpoint(refusal, (200, '{"choices": [{"text": " and so on"}]}')) as served:
        assert waiting(served.url, FakeRunner(), stderr=stderr).text == " and so on"
    assert "prompt" in served.requests[-1][1]
    assert "cannot chat" in stderr.getvalue()


def test_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpuctl.wait.PULL_ALLOWANCE", 0.0)
    with endpoint(UNAVAILABLE) as served, pytest.raises(GpuctlError, match="no answer after 1 s") as late:
        waiting(served.url, FakeRunner(followed=STARTS[:1]), startup_timeout=0.5)
    assert "loading the weights" in str(late.value)
    assert "--startup-timeout" in str(late.value.hint)


def test_a_control_plane_that_is_gone_ends_the_wait() -> None:
    gone = GpuctlError("the local control plane was killed", hint="gpuctl local up")
    stderr = io.StringIO()
    started = time.monotonic()
    with pytest.raises(GpuctlError, match="was killed while starting vLLM") as ended:
        waiting("http://127.0.0.1:9", FakeRunner(followed=STARTS[:1]), stderr=stderr, lost=lambda: gone)
    assert time.monotonic() - started < 3
    assert (ended.value.exit_code, ended.value.hint) == (1, "gpuctl local up")
    assert STARTS[0] in stderr.getvalue()


def test_one_that_is_back_at_once_does_not() -> None:
    gone = iter([GpuctlError("the local control plane was killed")] * 3)
    with endpoint(UNAVAILABLE, UNAVAILABLE, UNAVAILABLE, chat_answer("hi")) as served:
        assert waiting(served.url, FakeRunner(followed=STARTS), lost=lambda: next(gone, None)).text == "hi"


def test_an_app_that_somebody_stops_ends_the_wait() -> None:
    class Ends(FakeRunner):
        """`logs -f` ends by itself, and well, where the app did."""

        def follow(self, argv, env, on_line):  # type: ignore[no-untyped-def]
            follower = super().follow(argv, env, on_line)
            follower.code = 0
            return follower

    runner = Ends(followed=STARTS[:1])
    started = time.monotonic()
    with endpoint(UNAVAILABLE) as served, pytest.raises(StoppedError, match="the app was stopped while"):
        waiting(served.url, runner)
    assert time.monotonic() - started < 5
    assert len(runner.followers) == 2  # once more, to be sure


def test_nobody_listens_yet() -> None:
    assert ask(Endpoint("http://127.0.0.1:9/v1", "tiny", None, Target.LOCAL)).status is None


def test_a_reasoning_model_may_answer_with_its_thoughts() -> None:
    assert Asked(*chat_answer(None, reasoning_content="Hmm")).text == "Hmm"
    assert Asked(*chat_answer(None)).text == ""
    assert Asked(*chat_answer(None)).answered


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("OSError: Can't load the configuration of 'org/none'. If you were trying to load it", "check MODEL"),
        ("pydantic_core._pydantic_core.ValidationError: 1 validation error for SchedulerConfig", "a setting"),
        ("ImportError: cannot import name 'x' from 'tokenizers'", "see --pip"),
        (
            "ta-1 exited with code 0 before it was ready: ModuleNotFoundError(\"No module named 'x'\")",
            "--pip",
        ),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "bigger GPU"),
        (
            "ValueError: To serve at least one request with the models's max seq len (131072), (16.00 GiB KV cache "
            "is needed, which is larger than the available KV cache memory (5.00 GiB).",
            "--max-model-len",
        ),
        (
            "Value error, User-specified max_model_len (2000000) is greater than the derived max_model_len",
            "--max-model-len",
        ),
        ("huggingface_hub.errors.GatedRepoError: 401 Client Error.", "licence"),
        ("Value error, Model architectures ['NewArch'] are not supported for now.", "--vllm-version"),
        ("[serve] engine exited with code -9 before it was ready", "--memory"),
        ("OSError: [Errno 98] Address already in use", "port"),
        ("a line that says nothing", None),
    ],
)
def test_hints(line: str, hint: str | None) -> None:
    found = hint_for(["INFO fine", line])
    assert (found is None) if hint is None else (found is not None and hint in found)


def test_the_log_of_a_real_engine() -> None:
    """What vLLM 0.32 for CPUs printed when it started a tiny model."""
    log = Log(began=None)
    stages = []
    for line in (Path(__file__).parent / "vllm-0.32-start.log").read_text().splitlines():
        log.add(line)
        stages.append(log.stage)
    assert list(dict.fromkeys(stages)) == ["weights", "engine", "first_answer"]
    assert log.crash is None
    assert hint_for(log.lines()) is None
