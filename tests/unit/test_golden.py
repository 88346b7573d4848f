"""The golden renderings: made by the CLI to the byte, clean by a user's tools, and accepted by the pinned modal."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import modal
import pytest

# By its full name: pytest puts `tests` itself on the path too.
golden: ModuleType = importlib.import_module("golden.__main__")
CASES: list[Path] = golden.cases()
SERVED: list[Path] = golden.of("serve")
BATCHES: list[Path] = golden.of("batch")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GPUCTL_TARGET", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # prices of the account of who runs the tests
    monkeypatch.setenv("HF_TOKEN", "only-for-this-test")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_to_the_byte(case: Path) -> None:
    expected = (case / "app.py").read_bytes().decode()
    assert golden.rendered(case) == expected, "if this is meant: python -m tests.golden"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_pinned_modal_builds_an_app_of_it(case: Path) -> None:
    source = (case / "app.py").read_text(encoding="utf-8")
    module = ModuleType("endpoint")
    module.__file__ = str(case / "app.py")
    sys.modules["endpoint"] = module
    try:
        exec(compile(source, str(case / "app.py"), "exec", dont_inherit=True), module.__dict__)
    finally:
        del sys.modules["endpoint"]
    assert isinstance(module.app, modal.App)
    if case in SERVED:
        assert isinstance(module.Server, modal.Server)
    assert module.app.name == module.APP_NAME


def test_every_option_of_serve_is_rendered_by_some_case() -> None:
    from gpuctl.cli import command

    serve = command().get_command(None, "serve")  # type: ignore[arg-type]
    assert serve is not None
    used = {word.partition("=")[0] for case in SERVED for word in golden.words(case)}
    talk = {"--dry-run", "--render", "--wait", "--yes", "--json", "--quiet", "--verbose", "--help"}
    for option in serve.params:
        names = {*option.opts, *option.secondary_opts}
        if any(name.startswith("--") for name in names) and not names & talk:
            assert names & used, f"no golden case uses {option.opts}"


@pytest.mark.parametrize("width", ["88", "110"])
def test_formatted_as_ruff_would(width: str) -> None:
    cases = CASES if width == "88" else SERVED
    check("ruff", "format", "--isolated", "--check", "--line-length", width, cases=cases)


def test_ruff_finds_nothing() -> None:
    check("ruff", "check", "--isolated", "--no-cache")


def test_mypy_strict_finds_nothing(tmp_path: Path) -> None:
    for case in CASES:  # one module name each
        (tmp_path / f"{case.name.replace('-', '_')}.py").write_bytes((case / "app.py").read_bytes())
    made = sorted(map(str, tmp_path.iterdir()))
    # vllm is in the images alone, and modal's type stubs miss some of its own.
    run("mypy", "--strict", "--no-incremental", "--ignore-missing-imports", "--config-file=", *made)


def check(*argv: str, cases: list[Path] = CASES) -> None:
    run(*argv, *(str(case / "app.py") for case in cases))


def run(*argv: str) -> None:
    done = subprocess.run([sys.executable, "-m", *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
