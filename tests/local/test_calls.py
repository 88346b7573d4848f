"""Calls through the real client in processes of its own: `modal run`, and scripts that use deployed functions."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

from .planes import APPS

if TYPE_CHECKING:
    from .planes import TestPlane


def script(plane: TestPlane, code: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a Python program that uses the modal SDK against this plane."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=plane.environment(),
        cwd=APPS,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if check:
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def deployed(plane: TestPlane) -> TestPlane:
    """A plane on which `calls.py` is deployed as `calls`."""
    plane.modal("deploy", "calls.py")
    return plane


def test_run_calls_functions_of_an_ephemeral_app(plane: TestPlane) -> None:
    output = plane.modal("run", "calls.py", "--n", "4", "--word", "yo").stdout
    assert "remote 16 local 16 yo" in output
    assert "map [0, 1, 4, 9]" in output
    assert "App completed" in output


def test_functions_of_a_deployed_app_are_called_from_outside(deployed: TestPlane) -> None:
    code = """
        import modal
        square = modal.Function.from_name("calls", "square")
        double = modal.Function.from_name("calls", "double")
        assert square.remote(7) == 49
        assert double.remote(21) == 42
        assert list(square.map(range(60), kwargs={"power": 3})) == [n**3 for n in range(60)]
    """
    script(deployed, code)
