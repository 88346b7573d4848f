"""Pythons for images that have none (`add_python`). Imports installers, image_trees.

In the cloud that is a build of Python that needs nothing of the image but its libc. Here it is the same where uv has
one, or can download it; else this machine's own interpreter of that version, with the libraries that it needs.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gpuctl.local.image_trees import remove_tree
from gpuctl.local.installers import ImageBuildError, Log, find_python, pip_for, run

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

LIBRARIES = (
    "lib/gpuctl-libraries"  # below the prefix: those that the image may lack; `SETTLE` puts them in place
)
_HOME = "lib/gpuctl-python"  # below the prefix: where a Python is that has to be in a virtual environment
# What follows the copy: the image's own libraries stay, those that it lacks are put where its loader finds them.
SETTLE = (
    f"cd /usr/local/{LIBRARIES} 2>/dev/null || exit 0; have=$(ldconfig -p); "
    'for l in *; do case "$have" in *"$l "*) ;; *) mv "$l" /usr/local/lib/ ;; esac; done; '
    f"rm -rf /usr/local/{LIBRARIES}; "
    "[ -f /etc/ld.so.conf.d/libc.conf ] || echo /usr/local/lib >> /etc/ld.so.conf; ldconfig"
)
# Of the C library, which the image has itself; and modules that need what no image of this kind wants.
_OF_LIBC = (
    "ld-linux",
    "libc.so",
    "libm.so",
    "libpthread.so",
    "libdl.so",
    "librt.so",
    "libutil.so",
    "libresolv.so",
)
_MODULES_LEFT_OUT = ("_tkinter", "nis", "_dbm", "_gdbm")
_FOLDERS_LEFT_OUT = (
    "test",
    "tests",
    "__pycache__",
    "site-packages",
    "dist-packages",
    "idlelib",
    "turtledemo",
    "config-*",
)
_DOWNLOAD_SECONDS = 600
_PIP = "#!/usr/local/bin/python3\nimport sys\nfrom pip._internal.cli.main import main\nsys.exit(main())\n"


async def bring_python(
    version: str,
    target: Path,
    cache: Path,
    log: Log,
    get_uv: Callable[[], Awaitable[str]],
    *,
    python: bool = True,
) -> None:
    """A Python of `version` ("3.12") into the folder `target`, as /usr/local is to have it. Raises ImageBuildError.

    `python`: also by that name, and not as python3 alone.
    """
    problem = ""
    if (found := _standalone(version, cache)) is None:
        found, problem = await _download(version, cache, log, get_uv)
    if found is not None:
        await asyncio.to_thread(_copy, found, target, version)
        _make_names(target, version, python=python)
        return
    executable, have = await asyncio.to_thread(find_python, version)
    if not have.startswith(f"{version}."):
        raise ImageBuildError(
            f"add_python: no Python {version} is on this machine, and uv cannot download it: {problem}"
        )
    log(f"This machine's own Python {have} goes into the image: uv has no other ({problem})\n")
    prefix = Path(executable).resolve().parent.parent
    site = target / "lib" / f"python{version}" / "site-packages"
    home = target
    if await asyncio.to_thread(_is_a_distributions, executable):
        # It has packages where only its distribution's layout has folders, except in a virtual environment.
        home = target / _HOME
        site.mkdir(parents=True)
        (target / "pyvenv.cfg").write_text(
            f"home = /usr/local/{_HOME}/bin\ninclude-system-site-packages = false\n"
        )
    await asyncio.to_thread(_copy, prefix, home, version)
    await asyncio.to_thread(_copy_libraries, home, target, Path(executable), version)
    if home != target:
        (target / "bin").mkdir()
        (target / "bin" / f"python{version}").symlink_to(f"../{_HOME}/bin/python{version}")
    site.mkdir(exist_ok=True)
    pip = [*pip_for(sys.executable, sys.executable), "install", "--quiet", "--target", str(site), "pip"]
    await run(pip, log=log, name="pip install pip")
    shutil.rmtree(site / "bin", ignore_errors=True)
    _make_names(target, version, python=python)
    for name in ("pip", "pip3"):
        (target / "bin" / name).write_text(_PIP)
        (target / "bin" / name).chmod(0o755)


def _standalone(version: str, cache: Path) -> Path | None:
    """One that uv has installed, for us or for this user."""
    homes = [cache, Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "uv" / "python"]
    if own := os.environ.get("UV_PYTHON_INSTALL_DIR"):
        homes.append(Path(own))
    for home in homes:
        for found in sorted(home.glob(f"cpython-{version}.*"), reverse=True):
            if (found / "bin" / f"python{version}").is_file() and not found.is_symlink():
                return found
    return None


async def _download(
    version: str, cache: Path, log: Log, get_uv: Callable[[], Awaitable[str]]
) -> tuple[Path | None, str]:
    cache.mkdir(mode=0o700, exist_ok=True)
    making = cache / f"making-{os.urandom(8).hex()}"
    said: list[str] = []
    try:
        uv = await get_uv()
        log(f"uv python install {version} (once)\n")
        argv = [uv, "python", "install", "--no-bin", "--install-dir", str(making), version]
        env = {**os.environ, "UV_HTTP_RETRIES": "1"}
        await asyncio.wait_for(run(argv, log=said.append, env=env, name="uv"), _DOWNLOAD_SECONDS)
        for found in making.glob(f"cpython-{version}.*"):
            if not found.is_symlink():
                place = cache / found.name
                if not place.exists():
                    found.rename(place)
                return place, ""
    except (ImageBuildError, TimeoutError) as error:
        said.append(str(error))
    finally:
        await asyncio.to_thread(remove_tree, making)
    words = [line.strip() for line in "".join(said).splitlines() if line.strip()]
    return None, words[-1].removeprefix("cause: ") if words else "no reason given"


def _copy(prefix: Path, target: Path, version: str) -> None:
    """The parts of an installation that make it whole at another place."""
    standalone = (prefix / "lib" / f"python{version}" / "site-packages" / "pip").is_dir() and not list(
        prefix.glob(f"lib/python{version}/site-packages/[!p]*-*.dist-info")
    )
    left_out = [n for n in _FOLDERS_LEFT_OUT if not (standalone and n == "site-packages")]
    (target / "bin").mkdir(parents=True)
    shutil.copy2(prefix / "bin" / f"python{version}", target / "bin")
    shutil.copytree(
        prefix / "lib" / f"python{version}",
        target / "lib" / f"python{version}",
        symlinks=True,
        ignore=shutil.ignore_patterns(*left_out),
    )
    for library in prefix.glob(f"lib/libpython{version}*.so*"):
        shutil.copy2(library, target / "lib", follow_symlinks=False)
    if (headers := prefix / "include" / f"python{version}").is_dir():
        shutil.copytree(headers, target / "include" / f"python{version}")


def _is_a_distributions(executable: str) -> bool:
    """Whether it is a Python as Debian and Ubuntu have it, whose packages are in dist-packages."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    done = subprocess.run(
        [executable, "-I", "-c", code], capture_output=True, text=True, timeout=20, check=False
    )
    return Path(done.stdout.strip()).name == "dist-packages"


def _copy_libraries(home: Path, target: Path, executable: Path, version: str) -> None:
    """What the interpreter and modules in `home` load goes to where the image's loader finds it."""
    folder = target / LIBRARIES
    folder.mkdir(parents=True, exist_ok=True)
    dynamic = home / "lib" / f"python{version}" / "lib-dynload"
    for module in list(dynamic.glob("*.so")):
        if module.name.startswith(_MODULES_LEFT_OUT):
            module.unlink()
    for name, place in needed([executable, *dynamic.glob("*.so")]):
        if name.startswith("libpython"):
            shutil.copy2(place, target / "lib" / name)
        elif not name.startswith(_OF_LIBC):
            shutil.copy2(place, folder / name)


def needed(programs: list[Path]) -> Iterator[tuple[str, str]]:
    """(name, place) of the shared libraries that these load."""
    said = subprocess.run(
        ["ldd", *map(str, programs)], capture_output=True, text=True, timeout=60, check=False
    ).stdout
    found: dict[str, str] = {}
    for line in said.splitlines():
        name, arrow, rest = line.strip().partition(" => ")
        if arrow and rest.startswith("/"):
            found[name] = rest.rpartition(" (")[0]
    yield from found.items()


def _make_names(target: Path, version: str, *, python: bool) -> None:
    for name in ("python", "python3"):
        place = target / "bin" / name
        place.unlink(missing_ok=True)
        if python or name != "python":
            place.symlink_to(f"python{version}")
