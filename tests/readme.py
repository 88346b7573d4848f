"""The commands that README.md tells people to type."""

from __future__ import annotations

import re
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


def commands(repo: Path = REPO) -> list[str]:
    """The lines of the README's bash blocks, in order, comments left out."""
    page = (repo / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]
