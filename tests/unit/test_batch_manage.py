"""What is done with a job that is there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from gpuctl.batch.jobs import Job
from gpuctl.batch.run import into
from gpuctl.errors import GpuctlError

JOB = Job(
    name="j",
    work="tiny",
    url="/v1/embeddings",
    rows=1,
    bad=0,
    copies=0,
    shards=1,
    digest="",
    inputs=("in.csv",),
    output="out.parquet",
    errors=None,
    format="parquet",
    columns=("input",),
    gpu=None,
    argv=(),
    created_at="",
    gpuctl_version="",
)


@pytest.mark.parametrize(
    ("kept", "output", "made"),
    [
        ("parquet", "a.jsonl", "jsonl"),
        ("parquet", "a.jsonl.gz", "jsonl"),
        ("csv", "a.tsv", "tsv"),
        ("csv", "a.parquet", "parquet"),
        ("csv", "a", "csv"),
        ("csv", "a.dat", "csv"),
        ("csv", "-", "csv"),
        ("jsonl", "a.jsonl", "jsonl"),
        ("openai", "a.jsonl", "openai"),
        ("json", "a.jsonl", "openai"),
        ("txt", "texts", "txt"),
    ],
)
def test_answers_are_fetched_as_what_the_file_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str, output: str, made: str
) -> None:
    monkeypatch.chdir(tmp_path)
    job = into(dataclasses.replace(JOB, format=kept), output)
    assert (job.format, job.output) == (made, output)


def test_answers_without_the_inputs_columns_make_no_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GpuctlError, match=r"'a.csv' would be csv, and job 'j' is of openai"):
        into(dataclasses.replace(JOB, format="openai"), "a.csv")
