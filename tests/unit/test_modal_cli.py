"""Argv as data, and the real process runner on harmless processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import modal_version
import pytest

from gpuctl import modal_cli
from gpuctl.errors import GpuctlError
from gpuctl.modal_cli import MODAL, TIMED_OUT, ModalEnv, ProcessRunner
from gpuctl.target import Target

PYTHON = sys.executable
ENV = ModalEnv(Target.LOCAL, dict(os.environ))


def words(argv: list[str]) -> list[str]:
    assert tuple(argv[: len(MODAL)]) == MODAL
    return argv[len(MODAL) :]


def test_argv() -> None:
    file = Path("/x/endpoint.py")
    assert words(modal_cli.deploy_argv(file)) == ["deploy", "/x/endpoint.py"]
    assert words(modal_cli.deploy_argv(file, environment="dev", tag="v1", strategy="recreate")) == [
        *("deploy", "/x/endpoint.py", "--tag", "v1", "--strategy", "recreate", "--env", "dev")
    ]
    assert words(modal_cli.app_list_argv()) == ["app", "list", "--json"]
    assert words(modal_cli.app_stop_argv("ap-1", environment="dev")) == [
        *("app", "stop", "ap-1", "--yes", "--env", "dev")
    ]
    assert words(modal_cli.server_info_argv("a", "Server")) == ["server", "info", "a/Server", "--json"]
    assert words(modal_cli.app_logs_argv("ap-1", follow=True, search="x")) == [
        *("app", "logs", "ap-1", "--follow", "--search", "x")
    ]
    assert words(modal_cli.app_logs_argv("ap-1", since="2h", tail=3, timestamps=True)) == [
        *("app", "logs", "ap-1", "--since", "2h", "--tail", "3", "--timestamps")
    ]
    assert words(modal_cli.proxy_token_create_argv("gpuctl")) == [
        *("workspace", "proxy-tokens", "create", "--name", "gpuctl", "--json")
    ]


def test_shown_reads_as_one_would_type_it() -> None:
    assert (
        modal_cli.shown(modal_cli.app_logs_argv("ap-1", search="a b")) == "modal app logs ap-1 --search 'a b'"
    )


def test_the_local_environment_keeps_the_users_account_out() -> None:
    user = {"PATH": "/bin", "MODAL_TOKEN_ID": "ak-mine", "MODAL_PROFILE": "work", "MODAL_ENVIRONMENT": "prod"}
    env = ModalEnv.local({"MODAL_TOKEN_ID": "ak-plane"}, user)
    assert dict(env.variables) == {"PATH": "/bin", "MODAL_TOKEN_ID": "ak-plane"}
    assert "ak-plane" not in repr(env)


def test_an_untested_client_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modal_version, "__version__", "1.7.0")
    with pytest.raises(GpuctlError, match=r"modal 1\.7\.0 was not tested") as refused:
        modal_cli.check_version({})
    assert refused.value.exit_code == 2
    assert f"modal=={modal_cli.TESTED_VERSION}" in str(refused.value)
    assert modal_cli.check_version({modal_cli.ANY_VERSION: "1"}) == "1.7.0"


def test_run_keeps_output_apart() -> None:
    done = ProcessRunner().run(
        [PYTHON, "-c", "import sys; print('o'); print('e', file=sys.stderr); exit(3)"], ENV
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "o\n", "e\n")


def test_stream_hands_lines_on_as_they_come() -> None:
    program = (
        "import sys, time; print('one'); time.sleep(0.5); print('two'); print('e', file=sys.stderr); exit(4)"
    )
    seen: list[tuple[str, float]] = []
    errors: list[str] = []
    code = ProcessRunner().stream(
        [PYTHON, "-c", program],
        ENV,
        on_output=lambda line: seen.append((line, time.monotonic())),
        on_error=errors.append,
    )
    assert code == 4
    assert [line for line, _ in seen] == ["one", "two"]
    assert seen[1][1] - seen[0][1] > 0.3
    assert errors == ["e"]


def test_follow_goes_on_until_cancelled() -> None:
    came = threading.Event()
    pids: list[int] = []

    def line(text: str) -> None:
        pids.append(int(text))
        came.set()

    follower = ProcessRunner().follow(
        [PYTHON, "-c", "import os, time; print(os.getpid()); time.sleep(60)"], ENV, line
    )
    assert came.wait(10)
    assert follower.returncode() is None
    follower.cancel()
    assert follower.returncode() == -signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
    follower.cancel()  # harmless


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels do not tell a child of its parent's end")
@pytest.mark.parametrize("way", ["follow", "hand_over"])
def test_what_goes_on_ends_with_gpuctl_however_that_ends(way: str) -> None:
    program = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    ours = f"""
import sys, time
from gpuctl.modal_cli import ModalEnv, ProcessRunner
argv, env = [sys.executable, "-c", {program!r}], ModalEnv.modal()
if {way!r} == "hand_over":
    ProcessRunner().hand_over(argv, env)
follower = ProcessRunner().follow(argv, env, lambda line: print(line, flush=True))
time.sleep(600)
"""
    parent = subprocess.Popen([PYTHON, "-c", ours], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 30
    while runs(child):
        assert time.monotonic() < deadline, "it is still there"
        time.sleep(0.05)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_hand_over_gives_the_exit_code() -> None:
    assert ProcessRunner().hand_over([PYTHON, "-c", "exit(5)"], ENV) == 5
    with pytest.raises(KeyboardInterrupt):
        ProcessRunner().hand_over([PYTHON, "-c", "import os; os.kill(os.getpid(), 2)"], ENV)


def test_a_child_that_takes_too_long_is_ended() -> None:
    argv = [PYTHON, "-c", "import time; time.sleep(60)"]
    done = ProcessRunner().run(argv, ENV, timeout=0.2)
    assert (done.returncode, done.stderr) == (TIMED_OUT, "no answer within 0.2 s")


def test_a_box_of_the_client_is_shown_without_its_frame() -> None:
    lines: list[str] = []
    box = ["╭─ Modal Warning ───╮", "│ no GPU here       │", "╰───────────────────╯", "├── ✓ Created", "│"]
    program = "import sys; sys.stdout.reconfigure(encoding='utf-8'); print(sys.argv[1])"
    argv = [sys.executable, "-c", program, "\n".join(box)]
    env = ModalEnv(Target.MODAL, dict(os.environ))
    assert ProcessRunner().stream(argv, env, on_output=lines.append, on_error=lines.append) == 0
    assert lines == ["Modal Warning", "no GPU here", "├── ✓ Created"]
