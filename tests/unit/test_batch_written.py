"""What a job wrote itself, it may write again."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuctl.batch import jobs, written
from gpuctl.batch.jobs import Job
from gpuctl.batch.outputs import destination
from gpuctl.batch.rows import Url
from gpuctl.target import Target

HERE = (Target.LOCAL, "main")


def a_job(name: str) -> Job:
    return Job(
        name=name, work="work.py:f", url="function", rows=1, bad=0, copies=0, shards=1, digest="", inputs=("in.jsonl",),
        output="out.jsonl", errors=None, format="openai", columns=(), gpu=None, argv=(),
        created_at="2026-11-29T00:00:00Z", gpuctl_version="0",
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        jobs.save(*HERE, a_job(name), "")


def test_what_is_as_it_was_written_is_the_jobs_own() -> None:
    where = destination("out.jsonl", url=Url.FUNCTION)
    assert not written.wrote(*HERE, "one", where)
    Path("out.jsonl").write_text("answers\n")
    assert not written.wrote(*HERE, "one", where), "which is not known to be of it"
    written.remember(*HERE, "one", where)
    assert written.wrote(*HERE, "one", where)
    assert written.wrote(*HERE, "one", destination(str(Path("out.jsonl").absolute()), url=Url.FUNCTION))
    assert not written.wrote(*HERE, "two", where)
    assert written.writer(*HERE, where) == "one"
    Path("out.jsonl").write_text("answers, and a note of mine\n")
    assert not written.wrote(*HERE, "one", where)
    assert written.writer(*HERE, where) is None


def test_a_folder_is_the_jobs_own_until_somebody_puts_a_file_there() -> None:
    Path("out").mkdir()
    Path("out/1.txt").write_text("one")
    where = destination("out", url=Url.TRANSCRIPTIONS)
    written.remember(*HERE, "one", where)
    assert written.wrote(*HERE, "one", where)
    Path("out/2.txt").write_text("mine")
    assert not written.wrote(*HERE, "one", where)


def test_stdout_and_what_is_gone_are_nobodys() -> None:
    written.remember(*HERE, "one", destination("-", url=Url.FUNCTION))
    written.remember(*HERE, "one", destination("gone.jsonl", url=Url.FUNCTION))
    assert not written.wrote(*HERE, "one", destination("-", url=Url.FUNCTION))
    assert not written.wrote(*HERE, "one", destination("gone.jsonl", url=Url.FUNCTION))
