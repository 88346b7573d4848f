"""docs/cli.md is what docs/generate.py makes of the command line as it stands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def test_the_command_line_page_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(REPO / "docs/generate.py"), "--check"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
