"""The README's commands are what CI and the end-to-end tests run, and its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from gpuctl.__main__ import main
from readme import REPO, commands


def test_the_first_command_makes_its_environment_and_serves() -> None:
    first = commands()[0]
    assert first.startswith("python3 -m venv --without-pip .venv && ")
    assert "-c requirements.lock" in first
    assert first.endswith("&& .venv/bin/gpuctl serve tiny --local")


def test_ci_runs_the_second_command_word_for_word() -> None:
    second = commands()[1]
    assert second.endswith("&& .venv/bin/python -m pytest")
    ci_lines = [line.strip() for line in (REPO / ".ci/run").read_text(encoding="utf-8").splitlines()]
    assert second in ci_lines


def test_every_serve_in_the_readme_is_one_that_gpuctl_takes(capsys: pytest.CaptureFixture[str]) -> None:
    page = (REPO / "README.md").read_text(encoding="utf-8")
    examples = [line for line in page.splitlines() if line.startswith("gpuctl serve ")]
    assert examples
    for example in examples:
        _, verb, *words = shlex.split(example)
        assert main([verb, "--dry-run", *words]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", [*REPO.glob("*.md"), *REPO.glob("docs/*.md")], ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []
