"""Verbs with `--local` where the control plane does not run: it is started where it is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gpuctl.local import client
from gpuctl.paths import state_dir
from gpuctl.reach import lost
from gpuctl.records import DeploymentRecord, Records
from gpuctl.target import Target

from .planes import TestPlane

if TYPE_CHECKING:
    from collections.abc import Iterator

RECORD = Path(__file__).parents[1] / "cli" / "record.json"


@pytest.fixture
def plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestPlane]:
    """The plane that verbs use, on which `tiny` was deployed, with a container that is always up."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("GPUCTL_TARGET", "local")
    plane = TestPlane(state_dir() / "local")
    plane.up()
    plane.deploy("tiny", min_containers=1)
    [app] = plane.json("app", "list")
    recorded = json.loads(RECORD.read_text()) | {"app_id": app["app_id"]}
    Records(state_dir()).save(DeploymentRecord.from_document(recorded))
    yield plane
    plane.down()


def gpuctl(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gpuctl", *words], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("words", [("ps",), ("logs", "tiny"), ("token", "tiny"), ("stop", "tiny")])
def test_a_plane_that_was_killed_is_brought_back_by_any_verb(
    plane: TestPlane, words: tuple[str, ...]
) -> None:
    url = plane.now.url
    plane.kill()
    done = gpuctl(*words)
    assert (done.returncode, plane.now.url) == (0, url), done.stderr
    if words == ("ps",):
        assert "deployed" in done.stdout


def test_a_plane_that_is_gone_is_told_apart(plane: TestPlane) -> None:
    assert lost(Target.LOCAL) is None
    plane.kill()
    assert "was killed" in str(lost(Target.LOCAL))
    plane.down()
    assert "was stopped" in str(lost(Target.LOCAL))
    assert lost(Target.MODAL) is None


@pytest.mark.parametrize("words", [("logs", "tiny"), ("token",), ("stop", "tiny")])
def test_a_plane_that_was_stopped_is_started_by_what_needs_it(
    plane: TestPlane, words: tuple[str, ...]
) -> None:
    plane.down()
    done = gpuctl(*words)
    assert done.returncode == 0, done.stderr
    assert client.running(plane.state_dir)


@pytest.mark.parametrize("end", ["stop", "kill, then stop"])
def test_ps_leaves_a_plane_that_was_stopped_as_it_is(plane: TestPlane, end: str) -> None:
    if end != "stop":
        plane.kill()
    plane.down()
    assert (state_dir() / "local" / client.STATE_FILE).exists() is False
    assert "is not running" in gpuctl("ps").stderr
    assert json.loads(gpuctl("ps", "--all", "--json").stdout)[0]["state"] == "down"
    assert client.running(plane.state_dir) is None


def test_a_name_that_is_unknown_starts_nothing(plane: TestPlane) -> None:
    plane.down()
    assert gpuctl("logs", "tinny").returncode == 2
    assert client.running(plane.state_dir) is None
