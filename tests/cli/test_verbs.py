"""The command line as a user meets it: exit codes, stderr, stdout. Modal's client is played."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.core import TyperGroup

from fakes import FakeRunner
from gpuctl import __version__
from gpuctl.__main__ import main
from gpuctl.cli import VERBS, command
from gpuctl.cli.console import Console
from gpuctl.errors import GpuctlError
from gpuctl.modal_cli import Completed, ModalEnv
from gpuctl.paths import state_dir
from gpuctl.reach import modal_command
from gpuctl.records import DeploymentRecord, Records
from gpuctl.specs import serve as limits
from gpuctl.target import Target

ENV = ModalEnv.local({"MODAL_TOKEN_ID": "ak-plane"}, {})


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("MODAL_CONFIG_PATH", str(tmp_path / "none.toml"))
    for name in ("GPUCTL_TARGET", "MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET", "MODAL_ENVIRONMENT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def plane(monkeypatch: pytest.MonkeyPatch) -> None:
    """A local control plane that runs."""
    for room in ("listing", "stop", "tokens", "reach"):
        monkeypatch.setattr(f"gpuctl.{room}.reach", lambda *_, **__: ENV)
    monkeypatch.setattr("gpuctl.listing.plane_is_down", lambda: False)


@pytest.fixture
def record() -> DeploymentRecord:
    document = json.loads((Path(__file__).parent / "record.json").read_text())
    made = DeploymentRecord.from_document(document)
    Records(state_dir()).save(made)
    return made


Printed = tuple[int, str, str]


def gpuctl(capsys: pytest.CaptureFixture[str], *words: str, runner: FakeRunner | None = None) -> Printed:
    code = main(words, runner=runner or FakeRunner())
    printed = capsys.readouterr()
    return code, printed.out, printed.err


# -- the boundary


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpuctl(capsys, "--version") == (0, f"gpuctl {__version__}\n", "")
    code, out, _ = gpuctl(capsys, "-h")
    assert code == 0
    assert all(verb.name in out for verb in VERBS)


def test_no_arguments_is_a_usage_error_that_helps(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = gpuctl(capsys)
    assert (code, out) == (2, "")
    assert "Commands:" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["lgos"], "no such command 'lgos'; did you mean logs"),
        (["frobnicate"], "there are: serve, batch, fit, models, gpus, ps"),
        (["--frob"], "gpuctl: no such option: --frob"),
        (["ps", "--lcal"], "gpuctl ps: no such option: --lcal; did you mean --local"),
        (["ps", "extra"], "gpuctl ps: "),
        (["logs"], "gpuctl logs: Missing argument"),
        (["logs", "x", "--since"], "--since"),
        (["logs", "x", "--tail", "0"], "--tail: '0' is not a number of lines"),
        (["logs", "x", "--tail", "20001"], "from 1 to 20000"),
        (["logs", "x", "--since", "yesterday"], "--since: 'yesterday' is no time"),
        (["logs", "x", "--until", ""], "--until: '' is no time"),
        (["logs", "x", "--json"], "gpuctl logs: no such option: --json"),
        (["logs", "x", "-f", "--tail", "3"], "--follow: "),
        (["logs", "x", "--source", "stdin"], "--source: unknown source 'stdin'"),
        (["stop", "../main/x", "--local"], "no deployment named '../main/x' on this machine"),
        (["stop", "x", "--local"], "no deployment named 'x' on this machine"),
        (["ps"], "modal setup"),
        (["serve", "qwen3", "--gpu", "L40S", "--yes"], "modal setup"),  # before the hub is asked
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    code, out, err = gpuctl(capsys, *words)
    assert (code, out) == (2, "")
    errors = [line for line in err.splitlines() if not line.startswith("hint: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert says in errors[0]


def test_an_unknown_target_in_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUCTL_TARGET", "cloud")
    code, _, err = gpuctl(capsys, "ps")
    assert code == 2
    assert err == "error: GPUCTL_TARGET: unknown target 'cloud'; use 'modal' or 'local'\n"


def test_every_problem_its_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise GpuctlError(["--a: one", "--b: two"], hint="try c", exit_code=2)

    monkeypatch.setattr("gpuctl.__main__._run", fail)
    assert gpuctl(capsys, "ps") == (2, "", "error: --a: one\nerror: --b: two\nhint: try c\n")


def test_a_bug_keeps_its_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("gpuctl.__main__._run", fail)
    code, _, err = gpuctl(capsys, "ps")
    assert code == 1
    assert "Traceback" in err
    assert "ZeroDivisionError: oops" in err
    assert "bug in gpuctl" in err


def test_ctrl_c(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gpuctl.listing.deployments", fail)
    assert gpuctl(capsys, "ps", "--local") == (130, "", "interrupted\n")


def test_a_reader_that_goes_away_causes_no_noise(tmp_path: Path) -> None:
    script = f"{sys.executable} -m gpuctl serve --help | head -1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr == ""


def shell(command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command.replace("gpuctl", f"'{sys.executable}' -m gpuctl")],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("closed", ["<&-", "2>&-", ">&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_as_an_empty_one(closed: str) -> None:
    done = shell(f"gpuctl ps --local --json {closed}")
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", ["--help", "local status", "serve tiny --local --dry-run"])
def test_a_full_disk_is_told_in_a_line(words: str) -> None:
    done = shell(f"gpuctl {words} >/dev/full")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("note:")]
    assert line.startswith("error: ")
    assert "No space left on device" in line


def test_in_a_folder_that_was_deleted() -> None:
    done = shell(
        "cd $(mktemp -d) && rmdir $PWD && gpuctl serve tiny --local --dry-run -q && gpuctl ps --local"
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_programs_are_named_in_a_folder_that_was_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert modal_command(Target.LOCAL).endswith("gpuctl local exec -- modal")


def test_no_place_for_state(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = shell("gpuctl ps --local", XDG_STATE_HOME=str(tmp_path / "file"))
    assert done.returncode == 1
    error, hint = done.stderr.splitlines()
    assert error == f"error: no folder {tmp_path}/file/gpuctl for what gpuctl keeps: Not a directory"
    assert hint == "hint: name one that you can write in: export XDG_STATE_HOME=/path"


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from gpuctl.__main__ import main; main(['--help']); "
        "print([m for m in ('rich', 'jinja2', 'modal', 'modal_proto', 'pydantic', 'aiohttp', 'urllib.request', "
        "'gpuctl.plan', 'gpuctl.cli.serve') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_the_help_says_which_verbs_take_local() -> None:
    group = command()
    without = set()
    for verb in VERBS:
        made = group.get_command(None, verb.name)  # type: ignore[arg-type]
        assert made is not None
        commands = made.commands.values() if isinstance(made, TyperGroup) else [made]
        if not all(any("--local" in parameter.opts for parameter in one.params) for one in commands):
            without.add(verb.name)
    assert without == {"fit", "models", "local"}
    assert "All but fit, models and local itself take --local" in (group.epilog or "")


def test_the_table_of_verbs_says_what_they_say() -> None:
    group = command()
    context = group.make_context("gpuctl", [], resilient_parsing=True)
    for verb in VERBS:
        made = group.get_command(context, verb.name)
        assert made is not None
        first = (made.help or "").strip().splitlines()[0]
        assert first.rstrip(".").startswith(verb.help.split(":")[0].split(",")[0].rstrip(".")), verb.name
        commands = [made, *made.commands.values()] if isinstance(made, TyperGroup) else [made]
        for one in commands:
            inner = one.make_context(one.name, [], parent=context, resilient_parsing=True)
            assert {"-h", "--help"} == set(inner.help_option_names), one.name


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("up", "--port", "web"), "--port: 'web' is not a port: a whole number from 1 to 65535"),
        (("up", "--port", "65536"), "--port: '65536' is not a port: a whole number from 1 to 65535"),
        (("logs", "--tail", "-5"), "--tail: '-5' is not a number of lines: a whole number from 0"),
    ],
)
def test_a_wrong_number_for_the_plane(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    code, out, err = gpuctl(capsys, "local", *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {says}")


# -- ps


def listed(record: DeploymentRecord, **changes: object) -> Completed:
    app = {
        "app_id": record.app_id,
        "description": record.name,
        "state": "deployed",
        "tasks": "1",
        "created_at": "2026-11-21 07:48:36+00:00",
        "stopped_at": None,
    }
    other = app | {"app_id": "ap-other", "description": "not-gpuctls"}
    return Completed(0, json.dumps([app | changes, other]), "")


@pytest.mark.usefixtures("plane")
def test_ps_costs_one_modal_call(capsys: pytest.CaptureFixture[str], record: DeploymentRecord) -> None:
    runner = FakeRunner({"app list": listed(record)})
    code, out, err = gpuctl(capsys, "ps", "--local", runner=runner)
    assert (code, err) == (0, "")
    header, row = out.splitlines()
    assert header.split() == ["NAME", "MODEL", "GPU", "STATE", "CONTAINERS", "URL", "AGE"]
    assert row.split()[:6] == ["tiny", "tiny", "cpu", "deployed", "1", record.url]
    assert runner.calls == [["app", "list", "--json"]]


@pytest.mark.usefixtures("plane")
def test_ps_json(capsys: pytest.CaptureFixture[str], record: DeploymentRecord) -> None:
    code, out, _ = gpuctl(capsys, "ps", "--local", "--json", runner=FakeRunner({"app list": listed(record)}))
    assert code == 0
    (one,) = json.loads(out)
    assert (one["name"], one["state"], one["containers"], one["app_id"]) == (
        "tiny",
        "deployed",
        1,
        record.app_id,
    )


@pytest.mark.usefixtures("plane")
def test_what_was_stopped_is_shown_on_demand(
    capsys: pytest.CaptureFixture[str], record: DeploymentRecord
) -> None:
    gone = FakeRunner({"app list": listed(record, state="stopped", stopped_at="2026-11-21 08:00:00+00:00")})
    assert json.loads(gpuctl(capsys, "ps", "--local", "--json", runner=gone)[1]) == []
    (one,) = json.loads(gpuctl(capsys, "ps", "--local", "--json", "--all", runner=gone)[1])
    assert one["state"] == "stopped"


@pytest.mark.usefixtures("plane")
def test_deployed_again_behind_our_back(capsys: pytest.CaptureFixture[str], record: DeploymentRecord) -> None:
    runner = FakeRunner({"app list": listed(record, app_id="ap-new")})
    (one,) = json.loads(gpuctl(capsys, "ps", "--local", "--json", runner=runner)[1])
    assert (one["state"], one["app_id"]) == ("deployed", "ap-new")


@pytest.mark.usefixtures("plane")
def test_ps_with_nothing_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = gpuctl(capsys, "ps", "--local", runner=FakeRunner({"app list": Completed(0, "[]", "")}))
    assert (code, out) == (0, "")
    assert (
        err == "nothing of gpuctl's is deployed on this machine; deploy a model: gpuctl serve MODEL --local\n"
    )


@pytest.mark.usefixtures("plane")
def test_an_environment_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    refused = Completed(1, "", "Error: Environment 'dev' not found.")
    code, out, err = gpuctl(
        capsys, "ps", "--local", "-e", "dev", "--json", runner=FakeRunner({"app list": refused})
    )
    assert (code, out) == (2, "")
    assert "--env: there is no environment named 'dev'" in err
    assert "local exec -- modal environment create dev" in err


@pytest.mark.usefixtures("record")
def test_a_name_of_another_environment(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = gpuctl(capsys, "stop", "tiny", "--local", "--env", "dev")
    assert code == 2
    assert "on this machine (environment 'dev'), but there is one on this machine: use --env main" in err


def test_ps_starts_no_plane(capsys: pytest.CaptureFixture[str], record: DeploymentRecord) -> None:
    code, out, err = gpuctl(capsys, "ps", "--local", "--json")
    assert (code, json.loads(out)) == (0, [])
    assert "gpuctl local up" in err


# -- questions


@pytest.mark.parametrize(("typed", "agreed"), [("y\n", True), ("YES\n", True), ("\n", False), ("", False)])
def test_a_question_leaves_the_cursor_on_a_new_line(typed: str, agreed: bool) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stderr = Terminal()
    assert Console(stdin=Terminal(typed), stderr=stderr).confirm("Deploy?", refused="--yes") == agreed
    assert stderr.getvalue() == "Deploy? [y/N] " + "\n" * (
        not typed
    )  # what was typed, the terminal echoed itself


# -- logs, stop, token


@pytest.mark.usefixtures("plane", "record")
def test_logs_hands_the_terminal_over(capsys: pytest.CaptureFixture[str]) -> None:
    runner = FakeRunner({"app logs": Completed(3, "", "")})
    words = ("logs", "tiny", "--local", "--since", "2h", "--search", "a b", "-n", "5", "--timestamps")
    code, _, _ = gpuctl(capsys, *words, runner=runner)
    assert code == 3
    assert runner.calls == [
        ["app", "logs", "ap-AbCdEf123456", "--since", "2h", "--search", "a b", "--tail", "5", "--timestamps"]
    ]


@pytest.mark.usefixtures("plane", "record")
def test_stop(capsys: pytest.CaptureFixture[str]) -> None:
    runner = FakeRunner({"app stop": Completed(0, "", "")})
    code, out, err = gpuctl(capsys, "stop", "tiny", "--local", runner=runner)
    assert (code, out) == (0, "")
    assert "stopped tiny" in err
    assert runner.calls == [["app", "stop", "ap-AbCdEf123456", "--yes"]]
    assert not Records(state_dir()).find("tiny", Target.LOCAL, "main").running


@pytest.mark.usefixtures("plane", "record")
def test_stop_what_does_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    runner = FakeRunner({"app stop": Completed(1, "", "App is already stopped.")})
    code, _, err = gpuctl(capsys, "stop", "tiny", "--local", runner=runner)
    assert code == 1
    assert "error: 'tiny' was not running" in err


def test_stop_on_modal_asks(
    capsys: pytest.CaptureFixture[str], record: DeploymentRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = record.document() | {"target": "modal"}
    Records(state_dir()).save(DeploymentRecord.from_document(document))
    monkeypatch.setenv("MODAL_TOKEN_ID", "ak-1")
    code, _, err = gpuctl(capsys, "stop", "tiny")
    assert code == 2
    assert "--yes" in err
    assert gpuctl(capsys, "stop", "tiny", "-y", runner=FakeRunner({"app stop": Completed(0, "", "")}))[0] == 0


@pytest.mark.usefixtures("plane", "record")
def test_token_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    made = Completed(0, json.dumps({"Modal-Key": "wk-1", "Modal-Secret": "ws-2"}), "")
    runner = FakeRunner({"workspace": made})
    assert gpuctl(capsys, "token", "tiny", "--local", "-v", runner=runner) == (0, "wk-1.ws-2\n", "")
    assert gpuctl(capsys, "token", runner=FakeRunner()) == (
        0,
        "wk-1.ws-2\n",
        "",
    )  # kept; the only deployment's
    again = Completed(0, json.dumps({"Modal-Key": "wk-3", "Modal-Secret": "ws-4"}), "")
    new = gpuctl(capsys, "token", "--local", "--new", runner=FakeRunner({"workspace": again}))
    assert new == (0, "wk-3.ws-4\n", "")


def test_token_on_modal_is_made_after_asking(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODAL_TOKEN_ID", "ak-1")
    code, out, err = gpuctl(capsys, "token")
    assert (code, out) == (2, "")
    assert "--yes" in err
    made = Completed(0, json.dumps({"Modal-Key": "wk-1", "Modal-Secret": "ws-2"}), "")
    assert gpuctl(capsys, "token", "--yes", runner=FakeRunner({"workspace": made}))[1] == "wk-1.ws-2\n"


@pytest.mark.usefixtures("plane")
def test_no_auth_has_no_token(capsys: pytest.CaptureFixture[str], record: DeploymentRecord) -> None:
    Records(state_dir()).save(DeploymentRecord.from_document(record.document() | {"auth": False}))
    code, out, err = gpuctl(capsys, "token", "tiny", "--local")
    assert (code, out) == (2, "")
    assert "wants no token" in err


# -- completion


def complete(words: str) -> list[str]:
    env = os.environ | {
        "_GPUCTL_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-m", "gpuctl"], env=env, capture_output=True, text=True, check=False
    )
    return done.stdout.split()


def test_names_complete_from_the_records(record: DeploymentRecord) -> None:
    assert complete("gpuctl logs --local t") == ["tiny"]
    assert complete("gpuctl stop t") == ["tiny"]  # --local may follow
    on_modal = dataclasses.replace(record, target=Target.MODAL, name="tower")
    Records(state_dir()).save(on_modal)
    assert complete("gpuctl stop t") == ["tower"]
    assert complete("gpuctl logs --local t") == ["tiny"]
    assert complete("gpuctl l") == ["logs", "local"]
    assert complete("gpuctl serve tiny --strategy r") == list(limits.STRATEGIES)
    assert set(complete("gpuctl serve tiny --cloud ")) == set(limits.CLOUDS)
    assert set(complete("gpuctl serve tiny --routing-region ")) == set(limits.ROUTING_REGIONS)


ROW = {
    "object_id": "ap-1",
    "description": "llama3",
    "environment": "main",
    "interval_start": "2026-11-01T00:00:00",
    "cost": "12.5",
    "tags": '{"team": "nlp"}',
}
SUMMARY = {"billed_cost": "0E-8", "metered_cost": "12.5", "adjustments": {"credits": "-12.5"}}


def test_cost_shows_a_table_or_one_document(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODAL_TOKEN_ID", "ak-mine")
    answers = {
        "billing report": Completed(0, json.dumps([ROW]), ""),
        "billing summary": Completed(0, json.dumps(SUMMARY), ""),
    }
    command = ("cost", "--since", "2h")
    code, out, err = gpuctl(capsys, *command, runner=FakeRunner(answers))
    assert (code, out) == (
        0,
        "NAME    ENVIRONMENT  BILLED  ESTIMATED  TOTAL\nllama3  main         $12.50  -          $12.50\n",
    )
    assert "note: billed: Modal's own figures" in err
    assert "$17.50 on Starter" in err
    code, out, err = gpuctl(capsys, *command, "--quiet", runner=FakeRunner(answers))
    assert (code, err) == (0, "")
    code, out, err = gpuctl(capsys, *command, "--json", "--tag", "team", runner=FakeRunner(answers))
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert (document["usd"], document["lines"][0]["name"]) == (12.5, "nlp")


def test_cost_of_a_wrong_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = gpuctl(capsys, "cost")
    assert (code, out) == (2, "")
    assert "no credentials for Modal: run `modal setup`" in err
    monkeypatch.setenv("MODAL_TOKEN_ID", "ak-mine")
    for words in (("--since", "soon"), ("--tag", "=x")):
        code, out, err = gpuctl(capsys, "cost", *words)
        assert (code, out) == (2, "")
        assert f"error: {words[0]}: {words[1]!r} " in err
        assert err.count("\n") == 1


def test_cost_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = gpuctl(capsys, "cost", "--local")
    assert code == 0
    assert "total" in out
    assert "nothing is charged on this machine" in err
    assert json.loads(gpuctl(capsys, "cost", "--local", "--json")[1])["usd"] == 0
