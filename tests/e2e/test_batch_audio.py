"""Recordings through `gpuctl batch` on this machine: a folder of them in, subtitles out."""

from __future__ import annotations

import re
import wave
from pathlib import Path

import pytest

from .conftest import Gpuctl


@pytest.mark.slow
def test_a_folder_of_recordings_becomes_subtitles(gpuctl: Gpuctl, tmp_path: Path) -> None:
    """With the small Whisper, which says words of two syllables and times, whatever it hears."""
    talks, subtitles = tmp_path / "talks", tmp_path / "subtitles"
    talks.mkdir()
    for name, seconds in (("short one.wav", 3), ("long.wav", 40)):
        with wave.open(str(talks / name), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16000)
            file.writeframes(
                b"".join((n * n // 999 % 20000).to_bytes(2, "little") for n in range(16000 * seconds))
            )
    (talks / "bad.mp3").write_bytes(b"no sound" * 999)
    # One of the recordings is none: it is reported, and the others are answered.
    done = gpuctl.run(
        *("batch", "tiny", str(talks), "-o", str(subtitles), "--format", "srt", "--local", "--yes"),
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "unreadable_audio" in done.stdout + done.stderr
    files = sorted(path.name for path in subtitles.glob("*.srt"))
    assert files == ["long.srt", "short one.srt"]
    for name in files:
        text = (subtitles / name).read_text(encoding="utf-8")
        assert re.match(r"1\n00:00:\d\d,\d\d\d --> 00:0\d:\d\d,\d\d\d\n\w", text), text
