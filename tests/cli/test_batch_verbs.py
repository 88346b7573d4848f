"""`gpuctl batch status, logs, resume, …`: what is wrong with a command is said before anybody is asked."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from fakes import FakeRunner
from gpuctl.__main__ import main
from gpuctl.batch import jobs
from gpuctl.batch.jobs import Job
from gpuctl.modal_cli import Completed
from gpuctl.target import Target

FORMER: dict[str, Any] = {
    "name": "rows-1", "work": "work.py:f", "url": "function", "rows": 600, "bad": 0, "copies": 0, "shards": 8,
    "digest": "", "inputs": ("rows.jsonl",), "output": "out.jsonl", "errors": None, "format": "openai",
    "columns": (), "gpu": None, "argv": ("batch", "work.py:f", "rows.jsonl", "-o", "out.jsonl"),
    "created_at": "2026-11-29T00:00:00Z", "gpuctl_version": "0",
}  # fmt: skip
NONE = Completed(1, "", "Error: No such file or directory")
VOLUMES = {"volume get": NONE, "volume list": Completed(0, "[]", "")}


@pytest.fixture(autouse=True)
def _nobody_to_ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a network call")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for variable in ("XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    for name in ("GPUCTL_TARGET", "MODAL_ENVIRONMENT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MODAL_TOKEN_ID", "ak-1")
    monkeypatch.setenv("MODAL_TOKEN_SECRET", "as-1")
    monkeypatch.chdir(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], *words: str, runner: FakeRunner | None = None) -> str:
    assert main(["batch", *words], runner=runner or FakeRunner()) == 2
    out, err = capsys.readouterr()
    assert not out
    return err


@pytest.mark.parametrize("local", [(), ("--local",)])
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("resume", "J", "--max-cost", "x"), "--max-cost: 'x' is not a positive number"),
        (("resume", "J", "--gpu", "H1000"), "--gpu: unknown type 'H1000'"),
        (("resume", "J", "--max-containers", "0"), "--max-containers: '0' is not a whole number"),
        (("resume", "J", "--concurrency", "1.5"), "--concurrency: '1.5' is not a whole number"),
        (("resume", "J", "--retries", "101"), "--retries: '101' is not a whole number from 0 to 100"),
        (("resume", "J", "-o", ""), "--output: '' names no file"),
        (("logs", "J", "--tail", "0"), "--tail: '0' is not a number of lines"),
        (("logs", "J", "--tail", "3", "-f"), "--follow: shows what comes"),
        (("wait", "J", "-o", "s3://bucket/x"), "--output: 's3://bucket/x' is in the cloud"),
        (("fetch", "J", "-o", ""), "--output: '' names no file"),
        (("fetch", "J", "-o", "-", "--json"), "--json: does not go with answers on stdout"),
        (("wait", "J", "--events", "--json"), "--json: tells how the job ended"),
        (("wait", "J", "--events", "-o", "-"), "--events: does not go with -o -"),
        (("resume", "J", "--events", "--detach"), "--events: follows a job"),
        (("status", "a/b"), "JOB: 'a/b' is no name of a job"),
        (("rm", ""), "JOB: '' is no name of a job"),
        (("cancel", "x" * 52), "is no name of a job"),
        (("list",), "there is no command 'list'; did you mean ls?"),
        (("delete", "J"), "there is no command 'delete'; did you mean rm?"),
        (("stop", "J"), "there is no command 'stop'; did you mean cancel?"),
    ],
)
def test_before_anybody_is_asked(
    words: tuple[str, ...],
    says: str,
    local: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert says in refused(capsys, *words, *local)
    assert not (tmp_path / "XDG_STATE_HOME" / "gpuctl" / "local").exists(), "no plane was started for it"


def test_all_that_a_resume_cannot_take_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    err = refused(capsys, "resume", "J", "--gpu", "H1000", "--max-cost", "0", "--retries", "-1")
    assert [line.split(":")[1].strip() for line in err.splitlines()] == ["--gpu", "--max-cost", "--retries"]


def volumes(*names: str) -> dict[str, Completed]:
    listed = json.dumps([{"name": f"gpuctl-batch-{name}"} for name in names])
    return {**VOLUMES, "volume list": Completed(0, listed, "")}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("rows", "there is no job 'rows'; did you mean rows-1 or rows-2?"),
        ("tabel-3", "there is no job 'tabel-3'; did you mean table-3?"),
        ("zzz", "there is no job 'zzz'; there are: rows-2, rows-1, table-3"),
    ],
)
def test_a_job_that_there_is_not_names_those_that_may_be_meant(
    name: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = FakeRunner(volumes("rows-2", "rows-1", "table-3"))
    assert says in refused(capsys, "status", name, runner=runner)


def test_of_many_jobs_some_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    runner = FakeRunner(volumes(*(f"job-{n}" for n in range(1000))))
    assert "job-9, and 990 more\n" in refused(capsys, "status", "zzz", runner=runner)


def test_a_job_of_this_machine_is_not_on_modal(capsys: pytest.CaptureFixture[str]) -> None:
    jobs.save(Target.LOCAL, "main", Job(**FORMER), "")
    jobs.save(Target.MODAL, "dev", Job(**{**FORMER, "name": "other"}), "")
    err = refused(capsys, "status", "rows-1", runner=FakeRunner(VOLUMES))
    assert (
        "hint: there is one on the control plane of this machine, in environment 'main': with --local" in err
    )
    err = refused(capsys, "status", "other", runner=FakeRunner(VOLUMES))
    assert "hint: there is one on Modal, in environment 'dev': with --env dev" in err


def test_what_was_not_uploaded_is_no_job_yet_and_can_be_removed(capsys: pytest.CaptureFixture[str]) -> None:
    runner = FakeRunner(volumes("rows-1"))
    err = refused(capsys, "resume", "rows-1", runner=runner)
    assert "'rows-1' was not started" in err
    assert "gpuctl batch rm rows-1" in err
    done = Completed(0, "", "")
    runner = FakeRunner({**volumes("rows-1"), "app stop": done, "volume delete": done, "dict delete": done})
    assert main(["batch", "rm", "rows-1", "--yes"], runner=runner) == 0


def test_an_input_is_never_taken_for_the_errors(capsys: pytest.CaptureFixture[str]) -> None:
    Path("work.py").write_text("def f(row):\n    return row\n")
    Path("rows.errors.jsonl").write_text('{"n": 1}\n')
    err = refused(capsys, "work.py:f", "rows.errors.jsonl", "-o", "rows.jsonl")
    assert "--errors rows.errors.jsonl: is a file of the input" in err
    assert Path("rows.errors.jsonl").read_text() == '{"n": 1}\n'


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("-o", "-", "--json"), "--json: does not go with -o -"),
        (("-o", "-", "--events"), "--events: does not go with -o -"),
        (("-o", "x.jsonl", "--events", "--detach"), "--events: follows a job"),
        (("-o", "", "--errors", ""), "--output: '' names no file\nerror: --errors: '' names no file"),
        (("-o", "S3://bucket/x.jsonl"), "'S3://bucket/x.jsonl': S3:// is none of s3://BUCKET/KEY"),
    ],
)
def test_options_that_do_not_go_together(
    words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("work.py").write_text("def f(row):\n    return row\n")
    Path("rows.jsonl").write_text('{"n": 1}\n')
    assert says in refused(capsys, "work.py:f", "rows.jsonl", *words)


# -- what containers printed


def test_logs_are_what_a_person_wants_to_read(capsys: pytest.CaptureFixture[str]) -> None:
    """The driver's figures, one in two seconds, are left out, and the last lines are looked for among more of them."""
    jobs.save(Target.MODAL, "main", Job(**FORMER), "")
    figures = ['@gpuctl {"state": "running"}'] * 500

    class Logs(FakeRunner):
        def run(self, argv: Any, env: Any, *, timeout: float | None = None) -> Completed:
            super().run(argv, env, timeout=timeout)
            count = int(argv[argv.index("--tail") + 1])
            said = [f"line {n}" for n in range(5)]
            return Completed(0, "\n".join([*said, *figures, "bye"][-count:]) + "\n", "")

    runner = Logs({"app logs": Completed(0, "", "")})
    assert main(["batch", "logs", "rows-1", "--tail", "3"], runner=runner) == 0
    assert capsys.readouterr().out == "line 3\nline 4\nbye\n"
    assert main(["batch", "logs", "rows-1"], runner=runner) == 0
    assert capsys.readouterr().out.splitlines() == [*(f"line {n}" for n in range(5)), "bye"]


# -- a job that nothing works on


class Volume(FakeRunner):
    """With one job in it, that has no status yet."""

    def run(self, argv: Any, env: Any, *, timeout: float | None = None) -> Completed:
        if argv[-2].endswith("job.json") or "job.json" in argv:
            self.calls.append(list(argv))
            Path(argv[-1]).write_text(json.dumps(Job(**FORMER).document()))
            return Completed(0, "", "")
        return super().run(argv, env, timeout=timeout)


def test_nobody_waits_for_a_job_that_was_not_started(capsys: pytest.CaptureFixture[str]) -> None:
    jobs.save(Target.MODAL, "main", Job(**FORMER), "")
    assert main(["batch", "wait", "rows-1"], runner=Volume(VOLUMES)) == 1
    err = capsys.readouterr().err
    assert "job rows-1 was not started yet" in err
    assert "gpuctl batch resume rows-1" in err


def test_the_status_of_a_job_that_has_not_begun_has_all_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["batch", "status", "rows-1", "--json"], runner=Volume(VOLUMES)) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["rows"], told["done"], told["failed"], told["shards"]) == (
        "uploaded",
        600,
        0,
        0,
        8,
    )
    assert told["containers"] == told["retrying"] == 0
    assert told["usd"] is None


def test_a_cap_that_is_spent_starts_nothing_and_the_hint_leaves_something_to_spend(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where the job is done, and only what failed would be tried again."""
    status = {
        "run": "1", "state": "done", "problem": None, "time": 0.0, "began": 0.0, "done": 590, "failed": 10,
        "usd": 0.021, "max_usd": 0.01,
    }  # fmt: skip

    class Spent(Volume):
        def run(self, argv: Any, env: Any, *, timeout: float | None = None) -> Completed:
            if "status.json" in argv:
                Path(argv[-1]).write_text(json.dumps(status))
                return Completed(0, "", "")
            return super().run(argv, env, timeout=timeout)

    jobs.save(Target.MODAL, "main", Job(**FORMER), "")
    for state, more in (("done", ("--retry-failed",)), ("stopped", ())):
        status["state"] = state
        err = refused(capsys, "resume", "rows-1", "--yes", *more, runner=Spent(VOLUMES))
        assert "--max-cost: $0.02 are spent already, and the cap is $0.01" in err
        assert "gpuctl batch resume rows-1 --max-cost 0.04` goes on" in err
