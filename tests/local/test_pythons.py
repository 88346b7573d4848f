"""A Python for an image that has none, where no uv can download one: this machine's own, whatever its layout."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path

import pytest

from gpuctl.local import pythons
from gpuctl.local.installers import ImageBuildError, interpreter_behind

SYSTEM = "/usr/bin/python3"
_ASK = """
import json, pip, ssl, sys, sysconfig
print(json.dumps([sys.prefix, sysconfig.get_path("purelib"), pip.__file__]))
"""


async def no_uv() -> str:
    raise ImageBuildError("uv: none here")


def test_that_of_a_distribution_finds_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's looks for them in dist-packages, and has no pip."""
    found = interpreter_behind(SYSTEM) if Path(SYSTEM).exists() else None
    if found is None or not pythons._is_a_distributions(found[0]):
        pytest.skip("no Python of Debian's or Ubuntu's on this machine")
    version = ".".join(found[1].split(".")[:2])
    monkeypatch.setattr(pythons, "find_python", lambda _: found)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "none"))
    log: list[str] = []
    target = tmp_path / "local"
    asyncio.run(pythons.bring_python(version, target, tmp_path / "cache", log.append, no_uv))
    assert (
        f"This machine's own Python {found[1]} goes into the image: uv has no other (uv: none here)\n" in log
    )

    # An image has it at /usr/local.
    settings = target / "pyvenv.cfg"
    settings.write_text(settings.read_text().replace("/usr/local", str(target)))
    done = subprocess.run(
        [target / "bin/python", "-I", "-c", _ASK], capture_output=True, text=True, check=True, env={}
    )
    site = f"{target}/lib/python{version}/site-packages"
    assert json.loads(done.stdout) == [str(target), site, f"{site}/pip/__init__.py"]
