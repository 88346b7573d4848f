"""Schedules fire on the local plane: at their times, once each, whatever is killed, while they are deployed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from gpuctl.local import client

from .planes import TestPlane, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestPlane]:
    plane = TestPlane(tmp_path_factory.mktemp("scheduled") / "local")
    plane.up()
    yield plane
    plane.down()


def deploy(plane: TestPlane, name: str, **settings: object) -> str:
    extra = {f"T_{key.upper()}": str(value) for key, value in settings.items()}
    return plane.modal("deploy", "scheduled.py", T_NAME=name, **extra).stdout


def ticks(plane: TestPlane, name: str) -> list[tuple[str, float]]:
    """When its schedule called it, by the function itself, with the version that it is of."""
    found = list(plane.state_dir.glob(f"volumes/*/{name}"))
    lines = found[0].read_text().splitlines() if found else []
    return [(version, float(at)) for version, at in (line.split() for line in lines)]


def stop(plane: TestPlane, name: str) -> None:
    plane.quick("app", "stop", name, "--yes")


def test_a_period_begins_with_the_deployment_and_ends_with_the_app(plane: TestPlane) -> None:
    deployed = time.time()
    said = deploy(plane, "often", seconds=3)
    assert "does not fire" not in said
    found = eventually(lambda: len(found := ticks(plane, "often")) >= 3 and found)
    assert found[0][1] - deployed >= 3
    stop(plane, "often")
    after = len(ticks(plane, "often"))
    time.sleep(4)
    assert len(ticks(plane, "often")) == after
    # A call for each time that was due, and no more.
    assert after <= (time.time() - deployed) / 3


def test_a_plane_that_is_killed_fires_what_was_due_and_nothing_twice(plane: TestPlane) -> None:
    deployed = time.time()
    deploy(plane, "killed", seconds=2)
    for _ in range(3):
        eventually(lambda: ticks(plane, "killed"))
        plane.crash()
        time.sleep(1.5)
        eventually(lambda: client.running(plane.state_dir))
    before = len(ticks(plane, "killed"))
    eventually(lambda: len(ticks(plane, "killed")) >= before + 2)
    stop(plane, "killed")
    found = ticks(plane, "killed")
    assert len(found) <= (time.time() - deployed) / 2


def test_a_deployment_changes_the_schedule_or_ends_it(plane: TestPlane) -> None:
    deploy(plane, "changed", seconds=3600)
    deploy(plane, "changed", seconds=2, version=2)
    found = eventually(lambda: ticks(plane, "changed"))
    assert {version for version, _ in found} == {"2"}
    deploy(plane, "changed", seconds=0, version=3)
    eventually(lambda: not plane.containers())  # what was called has ended
    count = len(ticks(plane, "changed"))
    time.sleep(3)
    assert len(ticks(plane, "changed")) == count
    stop(plane, "changed")


def test_cron_fires_in_its_minute(plane: TestPlane) -> None:
    deploy(plane, "cron", cron="* * * * *", zone="Asia/Kolkata")
    ((_, at), *more) = eventually(lambda: ticks(plane, "cron"), seconds=120)
    stop(plane, "cron")
    assert at % 60 < 45  # a container had to start
    assert not more


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"cron": "61 * * * *"}, "not within 0 and 59"),
        ({"cron": "* * * *"}, "five fields"),
        ({"cron": "0 0 30 2 *"}, "it never happens"),
        ({"cron": "0 0 * * *", "zone": "Mars/Olympus"}, "Mars/Olympus"),
    ],
)
def test_a_schedule_that_says_nothing_is_refused(
    plane: TestPlane, settings: dict[str, str], says: str
) -> None:
    extra = {f"T_{key.upper()}": value for key, value in settings.items()}
    done = plane.modal("deploy", "scheduled.py", check=False, T_NAME="never", **extra)
    assert done.returncode == 1
    assert says in " ".join((done.stdout + done.stderr).split())
