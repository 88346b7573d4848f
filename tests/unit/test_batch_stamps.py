"""An input that changed is noticed, without reading it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpuctl.batch.stamps import changed, stamps


def written_again(file: Path, text: str = "other") -> None:
    before = file.stat()
    file.write_text(text)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))  # whatever the clock's grain is


@pytest.mark.parametrize("typed", ["rows.jsonl", "texts", "texts/*.txt", "**/*.txt"])
def test_what_was_written_again_is_another(tmp_path: Path, typed: str) -> None:
    (tmp_path / "texts").mkdir()
    for name in ("rows.jsonl", "texts/a.txt", "texts/b.txt"):
        (tmp_path / name).write_text("some")
    before = stamps([typed], tmp_path)
    assert list(before) == [typed]
    assert changed(before, stamps([typed], tmp_path)) == []
    written_again(tmp_path / ("rows.jsonl" if typed == "rows.jsonl" else "texts/b.txt"))
    assert changed(before, stamps([typed], tmp_path)) == [typed]


def test_a_file_more_is_a_change_and_no_file_at_all_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some")
    before = stamps(["*.txt"], tmp_path)
    (tmp_path / "b.txt").write_text("some")
    assert changed(before, stamps(["*.txt"], tmp_path)) == ["*.txt"]
    for file in tmp_path.iterdir():
        file.unlink()
    # What was read may be gone: the job has its rows.
    assert changed(before, stamps(["*.txt"], tmp_path)) == []


def test_what_is_not_here_has_no_stamp(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert stamps(["-", "pipe", "nothing", "volume://v/rows.jsonl", "s3://b/rows.jsonl"], tmp_path) == {}
