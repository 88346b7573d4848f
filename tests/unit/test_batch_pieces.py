"""The pieces of templates/batch/ are code that a user reads and lints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import pieces


@pytest.mark.parametrize(
    "piece",
    [
        "batch/function.py.jinja",
        "batch/vllm.py.jinja",
        "batch/diffusers.py.jinja",
        "shared/tiny_whisper.py.jinja",
        "shared/tiny_diffusers.py.jinja",
    ],
)
def test_clean_by_a_users_tools(piece: str, tmp_path: Path) -> None:
    """As the goldens are: `ruff check` and `ruff format`, with ruff's defaults."""
    file = tmp_path / "piece.py"
    file.write_text(pieces.source(piece), encoding="utf-8")
    ruff = [sys.executable, "-m", "ruff"]
    # What a piece does not import, or does not use of the imports, is the app's affair.
    for command in (["format", "--diff"], ["check", "--ignore", "F401,F821"]):
        done = subprocess.run([*ruff, *command, "--isolated", str(file)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
