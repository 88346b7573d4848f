"""requirements.lock is exact, and covers all that pyproject.toml asks for and all that it brings along.

Without a network. `.ci/lock --check`, which needs one, also checks that it is what the resolver makes of it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).resolve().parents[2]


def locked() -> dict[str, Requirement]:
    lines = (REPO / "requirements.lock").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.lstrip().startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def asked_for() -> list[Requirement]:
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + [
        line for extra in project["optional-dependencies"].values() for line in extra
    ]
    # An extra that takes another one in names the project itself.
    return [Requirement(line) for line in lines if not line.startswith("gpuctl[")]


def version_of(requirement: Requirement) -> str:
    (pin,) = requirement.specifier
    assert pin.operator == "==", f"{requirement} is not exact"
    return pin.version


def brought_along(requirements: list[Requirement]) -> Iterator[str]:
    """The names of all that is installed here because of these requirements, themselves included."""
    seen: set[tuple[str, str]] = set()
    waiting = [(requirement, extra) for requirement in requirements for extra in {"", *requirement.extras}]
    while waiting:
        requirement, extra = waiting.pop()
        key = (canonicalize_name(requirement.name), extra)
        if key in seen:
            continue
        seen.add(key)
        try:
            below = distribution(requirement.name).requires or []
        except PackageNotFoundError:
            continue
        yield canonicalize_name(requirement.name)
        for line in below:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                waiting += [(needed, wanted) for wanted in {"", *needed.extras}]


def test_every_line_is_exact() -> None:
    assert all(version_of(requirement) for requirement in locked().values())


def test_it_fits_what_pyproject_asks_for() -> None:
    lock = locked()
    misfits = [
        str(requirement)
        for requirement in asked_for()
        if not requirement.specifier.contains(version_of(lock[canonicalize_name(requirement.name)]))
    ]
    assert misfits == []


def test_it_covers_what_is_brought_along() -> None:
    lock = locked()
    assert [name for name in brought_along(asked_for()) if name not in lock] == []
