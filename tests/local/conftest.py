"""Fixtures of the control plane's tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from .planes import TestPlane

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def new_plane(tmp_path: Path) -> Iterator[TestPlane]:
    """A state directory for this test alone; nothing runs yet."""
    plane = TestPlane(tmp_path / "state")
    yield plane
    plane.down()


@pytest.fixture(scope="session")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestPlane]:
    """A plane that many tests share; each uses names of its own."""
    plane = TestPlane(tmp_path_factory.mktemp("plane") / "state")
    plane.up()
    yield plane
    plane.down()
    assert plane.containers() == []
