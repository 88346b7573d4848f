"""The README's own first command in a fresh clone: nothing of this machine's user is used but Python, pip and git."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from readme import REPO, commands

from .conftest import processes_of, wait_for

pytestmark = pytest.mark.slow


@pytest.mark.skipif(not (REPO / ".git").exists(), reason="not a clone")
def test_the_readmes_first_command_serves_and_the_second_finds_its_tests(tmp_path: Path) -> None:
    clone = tmp_path / "gpuctl"
    subprocess.run(["git", "clone", "--quiet", str(REPO), str(clone)], check=True)
    first, second = commands(clone)[:2]
    dropped = ("MODAL_", "GPUCTL_", "XDG_", "VIRTUAL_ENV", "PYTHON")
    env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    # Not this environment's python3, but the one that it was made of.
    own = Path(sys.prefix) / "bin"
    env["PATH"] = os.pathsep.join(part for part in env["PATH"].split(os.pathsep) if Path(part) != own)
    folders = {name: tmp_path / name for name in ("state", "cache", "config")}
    env |= {f"XDG_{name.upper()}_HOME": str(folder) for name, folder in folders.items() if name != "config"}
    env |= {"XDG_CONFIG_HOME": env.get("XDG_CONFIG_HOME", str(Path.home() / ".config"))}  # pip's settings

    def shell(command: str, timeout: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", command],
            cwd=clone,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    try:
        done = shell(first, timeout=900)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        url = re.search(r"https?://[\w.:-]+/v1", said)
        assert url, said
        for advice in ("curl ", "OpenAI(", "gpuctl logs tiny", "gpuctl stop tiny"):
            assert advice in said, advice

        ask = (
            "curl -sf --retry 3 -H 'Content-Type: application/json'"
            ' -H "Authorization: Bearer $(.venv/bin/gpuctl token tiny --local)"'
            f" {url[0]}/chat/completions -d "
            + shlex.quote(
                '{"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}'
            )
        )
        answer = shell(ask, timeout=60)
        assert '"choices"' in answer.stdout, answer.stderr

        collected = shell(f"{second} --collect-only -q", timeout=300)
        assert collected.returncode == 0, collected.stdout + collected.stderr
    finally:
        shell(".venv/bin/gpuctl stop tiny --local --yes; .venv/bin/gpuctl local down", timeout=60)
    assert wait_for(lambda: not processes_of(tmp_path), 15), processes_of(tmp_path)
