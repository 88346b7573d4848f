"""A job where there is no room: it stops, says so and what to do, spoils nothing, and goes on when there is room."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from . import batch_full_disk
from .batch_full_disk import ROWS
from .planes import eventually
from .test_batch import Batch, batch, batch_plane

__all__ = ["batch", "batch_plane"]  # fixtures

pytestmark = pytest.mark.slow


def right(lines: list[Any]) -> None:
    """One line for each row, and nothing else."""
    assert [line["custom_id"] for line in lines] == [f"row-{n}" for n in range(ROWS)]
    for n, line in enumerate(lines):
        more = hashlib.shake_256(b"%d" % n).hexdigest(400)
        assert line["response"]["body"] == {"n": n, "more": more}


def test_disks_that_are_full(tmp_path: Path) -> None:
    root = Path(batch_full_disk.__file__).parents[2]
    program = [sys.executable, "-m", "tests.local.batch_full_disk", str(tmp_path)]
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", *program],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for what, says, hint in (
        ("rows", "No space left on device", "make room"),
        ("answers", "No space left on device", "make room"),
        ("fetching", f"no space left on the disk of {tmp_path}/cache", "XDG_CACHE_HOME"),
        ("stopped", "no space left", "make room"),
    ):
        code, err = found[what]
        assert code == 1, (what, err)
        assert "Traceback" not in err, (what, err)
        error = next(line for line in err.splitlines() if line.startswith("error: "))
        assert says.lower() in error.lower(), (what, err)
        assert hint in err, (what, err)
    assert "gpuctl batch resume volume" in found["stopped"][1]
    assert found["kept"] == found["kept too"] == ["as it was\n"], "and no part of what was not written"
    for what in ("fetched", "resumed"):
        assert found[what][0] == 0, found[what][1]
    right(found["client"])
    right(found["volume"])


COMMITS = '''
import hashlib
import time
from pathlib import Path

import modal

commit = vars(modal.Volume)["commit"]


def broken(volume):
    """As where Modal's server refuses it."""
    if Path("/marks/broken").exists() and not Path("/marks/repaired").exists():
        raise modal.exception.InternalError("the commit failed")
    commit.__get__(volume, type(volume))()


modal.Volume.commit = broken


def process(row):
    time.sleep(0.005)
    return {"n": row["n"], "more": hashlib.shake_256(b"%d" % row["n"]).hexdigest(400)}
'''


def test_a_volume_that_cannot_commit(batch: Batch) -> None:
    (batch.folder / "commits.py").write_text(COMMITS)
    (batch.folder / "mark").write_text("yes")
    batch.plane.modal("volume", "create", "commits")
    words = ("commits.py:process", batch.rows(ROWS), "-o", "out.jsonl", "--volume", "commits:/marks")
    batch.run(*words, "--name", "commits", "--detach")
    eventually(lambda: batch.json("status", "commits").get("done", 0) > 0, seconds=240, every=0.5)
    batch.plane.modal("volume", "put", "commits", str(batch.folder / "mark"), "/broken")
    _, err = batch.run("wait", "commits", code=1)
    assert "Traceback" not in err
    assert "the job's Volume cannot be written: InternalError: the commit failed" in err
    assert "gpuctl batch resume commits" in err
    assert not (batch.folder / "out.jsonl").exists()
    stopped = batch.json("status", "commits")
    assert stopped["state"] == "stopped"
    assert 0 < stopped["done"] < ROWS
    batch.plane.modal("volume", "put", "commits", str(batch.folder / "mark"), "/repaired")
    told = batch.json("resume", "commits")
    assert (told["state"], told["done"], told["failed"]) == ("done", ROWS, 0)
    right(batch.lines("out.jsonl"))
