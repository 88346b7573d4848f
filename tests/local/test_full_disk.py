"""A disk that fills up under a plane: it says so, breaks nothing, and goes on when there is room."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    done = subprocess.run(
        [
            *("unshare", "--user", "--map-root-user", "--mount"),
            *(sys.executable, str(Path(__file__).with_name("full_disk.py")), str(tmp_path / "disk")),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    code, said = found["volume"]
    assert code == 1
    assert "No room for 12,582,912 bytes on this machine's disk" in said
    assert "no space is left on this machine's disk" in found["full"]["dict"]
    assert "no space is left on this machine's disk" in found["full"]["queue"]
    code, said = found["secret"]
    assert code == 1
    assert "no space is left on this machine's disk" in said
    assert found["up"]
    # With room again all of it works, and what was refused left nothing.
    assert found["room"][0] == 0
    assert sorted(f["filename"] for f in found["listed"]) == ["large", "small"]
    assert found["secrets"] == []
    assert found["after"] == {"dict": {"more": "works"}, "queue": 1}
    assert found["again"] == {"dict": {"more": "works"}, "queue": 2}
    assert found["left"] == []
