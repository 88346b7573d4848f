"""How builds by an engine are asked for, and asked for again. The engine is a script that answers as Podman does."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gpuctl.local.engines import Engine, Order
from gpuctl.local.installers import ImageBuildError

_DISTURBED = """\
Error: committing container for step {Env:[A=1]}: copying layers and metadata for container "ab12": layer not known
"""
_FAILED = """\
STEP 2/2: RUN make
make: layer not known
Error: building at STEP "RUN make": while running runtime: exit status 2
"""


def build(folder: Path, monkeypatch: pytest.MonkeyPatch, words: str, fails: int) -> tuple[int, str]:
    """Build with a `podman` that fails so often with these words: how often it was called, and the log."""
    (folder / "bin").mkdir()
    (folder / "words").write_text(words)
    podman = folder / "bin/podman"
    podman.write_text(
        f"#!/bin/sh\necho call >> {folder}/calls\n"
        f"[ $(wc -l < {folder}/calls) -gt {fails} ] || {{ cat {folder}/words >&2; exit 125; }}\n"
    )
    podman.chmod(0o755)
    monkeypatch.setenv("PATH", str(podman.parent), prepend=":")
    log: list[str] = []
    order = Order(folder / "Dockerfile", folder, "localhost/gpuctl/im-1:latest", {}, [], {})
    try:
        asyncio.run(Engine("podman", "5").build(order, log.append))
    finally:
        calls = len((folder / "calls").read_text().splitlines())
        (folder / "count").write_text(str(calls))
    return calls, "".join(log)


def test_a_build_that_another_disturbs_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, log = build(tmp_path, monkeypatch, _DISTURBED, fails=2)
    assert calls == 3
    assert log.count("podman was disturbed by another of its commands: again\n") == 2


@pytest.mark.parametrize(
    ("words", "calls", "said"), [(_DISTURBED, 3, "layer not known"), (_FAILED, 1, "RUN make")]
)
def test_one_that_fails_for_good_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, calls: int, said: str
) -> None:
    with pytest.raises(ImageBuildError, match=said):
        build(tmp_path, monkeypatch, words, fails=9)
    assert (tmp_path / "count").read_text() == str(calls)
