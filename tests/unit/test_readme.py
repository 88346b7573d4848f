"""The README's commands are what CI and the end-to-end tests run, and its links lead somewhere."""

from __future__ import annotations

import re

import pytest

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


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_relative_links_lead_somewhere(page: str) -> None:
    text = (REPO / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (REPO / link).exists()] == []
