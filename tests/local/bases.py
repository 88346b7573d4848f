"""Base images for an engine, made of this machine's own programs: no registry is asked for anything."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from gpuctl.local import engine_keeper
from gpuctl.local.engines import Engine, Engines
from gpuctl.local.installers import ImageBuildError
from gpuctl.local.pythons import LIBRARIES, bring_python, needed

PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
BARE, WITH_PYTHON = "localhost/gpuctl-tests/bare:1", f"localhost/gpuctl-tests/python:{PYTHON}-1"
# What the plane takes for an official image of Python, of which it makes an environment of its own.
OFFICIAL = f"docker.io/library/python:{PYTHON}.99-gpuctl-tests"
_PROGRAMS = [
    "sh",
    "bash",
    "cat",
    "ls",
    "mkdir",
    "rm",
    "cp",
    "mv",
    "ln",
    "env",
    "id",
    "touch",
    "chmod",
    "grep",
    "sed",
    "head",
    "sleep",
    "stat",
    "test",
    "find",
    "ldconfig",
]
_APT = """#!/bin/sh
for last; do :; done
[ "$last" = update ] && exit
printf '#!/bin/sh\\necho %s of the image' $last > /usr/bin/$last
chmod +x /usr/bin/$last
"""


def ask(engine: Engine, *argv: str) -> str:
    """What a command of the engine says.

    As the plane runs them: a superuser's Podman mounts things for all otherwise.
    """
    keeper = [sys.executable, "-I", "-S", engine_keeper.__file__, str(os.getpid()), "direct", "0"]
    return subprocess.run([*keeper, engine.name, *argv], check=True, capture_output=True, text=True).stdout


def engine() -> tuple[Engine | None, str]:
    """The engine of this machine, and why there is none."""
    was = os.environ.pop("GPUCTL_LOCAL_ENGINE", None)
    try:
        engines = Engines()
        return asyncio.run(engines.find()), engines.problem
    finally:
        if was is not None:
            os.environ["GPUCTL_LOCAL_ENGINE"] = was


def make(engine: Engine, folder: Path) -> None:
    """Make those that it does not have."""
    for name, python in ((BARE, False), (WITH_PYTHON, True)):
        if asyncio.run(engine.facts(name)) is None:
            root = folder / name.rpartition("/")[2].replace(":", "-")
            _lay_out(root)
            if python:
                _add_python(root, folder)
            subprocess.run(["ldconfig", "-r", str(root)], check=True, capture_output=True)
            archive = root.with_suffix(".tar")
            with tarfile.open(archive, "w") as tar:
                tar.add(root, arcname=".", filter=_roots)
            ask(engine, "import", str(archive), name)
            archive.unlink()
            shutil.rmtree(root)
    ask(engine, "tag", WITH_PYTHON, OFFICIAL)


def _roots(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.mode |= 0o755 if member.isdir() else 0o444
    return member


def _lay_out(root: Path) -> None:
    for name in ("usr/bin", "usr/lib", "usr/sbin", "etc", "tmp", "root", "opt", "var"):
        (root / name).mkdir(parents=True)
    for link, target in (("bin", "usr/bin"), ("lib", "usr/lib"), ("lib64", "usr/lib"), ("sbin", "usr/sbin")):
        (root / link).symlink_to(target)
    places = [
        Path(found)
        for name in _PROGRAMS
        if (found := shutil.which(name, path="/usr/bin:/bin:/usr/sbin:/sbin"))
    ]
    for place in places:
        shutil.copy2(place, root / "usr/bin" / place.name)
    for name, place in needed(places):
        shutil.copy2(place, root / "usr/lib" / name)
    for pattern in ("lib64/ld-linux*", "lib/ld-linux*"):
        for loader in Path("/").glob(pattern):
            shutil.copy2(loader, root / "usr/lib" / loader.name)
    (root / "etc/os-release").write_text("NAME=gpuctl-tests\n")
    (root / "etc/ld.so.conf").write_text("/usr/local/lib\n")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nworker:x:1234:1234::/:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\nworker:x:1234:\n")
    for name in ("apt-get", "apt"):
        (root / "usr/bin" / name).write_text(_APT)
        (root / "usr/bin" / name).chmod(0o755)


def _add_python(root: Path, cache: Path) -> None:
    async def no_uv() -> str:
        raise ImageBuildError("none is asked for")

    target = root / "usr/local"
    asyncio.run(bring_python(PYTHON, target, cache / "pythons", lambda _: None, no_uv))
    if (libraries := target / LIBRARIES).is_dir():
        for place in libraries.iterdir():
            place.rename(target / "lib" / place.name)
        libraries.rmdir()
