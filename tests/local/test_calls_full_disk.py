"""A full disk under the plane's state: a clear error, nothing corrupted, and on it goes when there is room again."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import textwrap
import time
from typing import TYPE_CHECKING

import pytest

from .planes import APPS, TestPlane

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def small(tmp_path: Path) -> Iterator[TestPlane]:
    """A plane whose state is on a file system of 48 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("mounting a small file system needs root")
    plane = TestPlane(disk / "state")
    try:
        yield plane
        plane.down()
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(folder: Path) -> Path:
    """Take every byte of its file system."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return path


def client(plane: TestPlane, code: str) -> subprocess.Popen[str]:
    setup = "import modal\nsquare = modal.Function.from_name('calls', 'square')\n"
    return subprocess.Popen(
        [sys.executable, "-c", setup + textwrap.dedent(code)],
        env=plane.environment(),
        cwd=APPS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_calls_while_the_disk_is_full(small: TestPlane) -> None:
    small.up()
    small.modal("deploy", "calls.py")
    mapping = client(
        small,
        """
        import time
        def inputs():
            for n in range(200):
                print(n, flush=True)
                yield n
                time.sleep(0.02)
        assert list(square.map(inputs())) == [n * n for n in range(200)]
        print("all there")
        """,
    )
    assert mapping.stdout is not None
    while mapping.stdout.readline().strip() != "50":
        pass
    filler = fill(small.state_dir.parent)
    # A single call is refused, in words; the map waits.
    single = client(small, "square.remote(5)")
    said, _ = single.communicate(timeout=60)
    assert single.returncode != 0
    assert "no space is left on this machine's disk" in " ".join(said.split()), said
    time.sleep(1)
    assert mapping.poll() is None
    filler.unlink()
    said, _ = mapping.communicate(timeout=60)
    assert said.splitlines()[-1] == "all there", said
    again = client(small, "assert square.remote(5) == 25")
    assert again.wait(60) == 0
    db = sqlite3.connect(small.state_dir / "plane.db")
    assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    db.close()
