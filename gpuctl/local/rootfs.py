"""The file system of an engine's image, as a folder of this user's; and the Python in it.

Imports engines, image_trees, installers, overlays, sandbox.

A folder of these has files/, the root, and python.json, what its Python said of itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import os
import shutil
import stat
import sys
import tarfile
from dataclasses import asdict, dataclass
from typing import IO, TYPE_CHECKING

from gpuctl.local import sandbox
from gpuctl.local.image_trees import follow, remove_tree
from gpuctl.local.installers import ImageBuildError, Log, copy_output, pip_for, run

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from gpuctl.local.engines import Engine
    from gpuctl.local.overlays import Overlays

# What every container gets anew, whatever the image has there.
_OF_THE_KERNEL = ("dev", "proc", "sys")
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ASK_PYTHON = """
import json, os, platform, site, sys
try:
    libc = os.confstr("CS_GNU_LIBC_VERSION")
except (AttributeError, OSError, ValueError):
    libc = ""
print(json.dumps({
    "executable": sys.executable,
    "version": ".".join(map(str, sys.version_info[:3])),
    "sites": site.getsitepackages() if hasattr(site, "getsitepackages") else [],
    "libc": libc or "musl",
    "machine": platform.machine(),
}))
"""


@dataclass(frozen=True)
class RootPython:
    """A root's own Python: its path in there, what it is, and where it looks for packages last."""

    executable: str
    version: str
    site: str
    libc: str  # "glibc 2.36", "musl"
    machine: str

    @property
    def key(self) -> str:
        """What packages that are installed for it depend on, as part of a file's name."""
        series = ".".join(self.version.split(".")[:2])
        return f"{series}-{self.libc.replace(' ', '')}-{self.machine}"


async def export(engine: Engine, image: str, folder: Path) -> None:
    """An engine's image into the empty `folder`. Raises EngineError, or what `extract` does."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb", buffering=1 << 20) as stream:
        async with engine.exported(image, writing) as process:
            await asyncio.to_thread(extract, stream, folder)
            stream.read()  # what follows the end of the archive
            await process.wait()


def extract(stream: IO[bytes], folder: Path) -> None:
    """A tar of a whole file system into the empty `folder`, as this user's; nothing of it lands anywhere else.

    Owners, set-user bits, devices and extended attributes are left out; links and times are kept.
    """
    with tarfile.open(fileobj=stream, mode="r|", errorlevel=1) as archive:
        root = os.open(folder, _FOLDER)
        try:
            modes = _extract_all(archive, root)
            for path, mode in reversed(modes):
                with _opened(root, path) as directory:
                    os.fchmod(directory, mode)
        finally:
            os.close(root)
    (folder / ".dockerenv").unlink(missing_ok=True)  # of the container that it was exported from
    remove_tree(folder / "run" / "gpuctl-folders")  # where builds saw some of this machine's
    for name in _OF_THE_KERNEL:
        place = folder / name
        if place.is_symlink() or not place.is_dir():
            place.unlink(missing_ok=True)
        else:
            remove_tree(place)
        place.mkdir(mode=0o755)


def _extract_all(archive: tarfile.TarFile, root: int) -> list[tuple[list[str], int]]:
    modes: list[tuple[list[str], int]] = []
    for member in archive:
        parts = _parts(member.name)
        if not parts:
            continue
        with _opened(root, parts[:-1]) as at:
            if member.isdir():
                with contextlib.suppress(FileExistsError):
                    os.mkdir(parts[-1], 0o755, dir_fd=at)
                modes.append((parts, member.mode & 0o1777 | 0o700))
                continue
            _unlink(parts[-1], at)
            if member.issym():
                os.symlink(member.linkname, parts[-1], dir_fd=at)
            elif member.islnk():
                target = _parts(member.linkname)
                if not target:
                    raise ValueError(f"a link to the root itself in the image: {member.name}")
                with _opened(root, target[:-1]) as there:
                    os.link(target[-1], parts[-1], src_dir_fd=there, dst_dir_fd=at, follow_symlinks=False)
            elif member.isfile():
                _write(archive, member, parts[-1], at)
    return modes


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, name: str, at: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    content = archive.extractfile(member)
    assert content is not None
    with os.fdopen(os.open(name, flags, 0o600, dir_fd=at), "wb") as file:
        shutil.copyfileobj(content, file, 1 << 20)
        file.flush()
        os.fchmod(file.fileno(), member.mode & 0o1777)
        os.utime(file.fileno(), (member.mtime, member.mtime))


def _parts(name: str) -> list[str]:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ValueError(f"a path in the image leaves it: {name}")
    return parts


@contextlib.contextmanager
def _opened(root: int, parts: list[str]) -> Iterator[int]:
    """The folder at this path, of which no part may be a link."""
    at = os.dup(root)
    try:
        for part in parts:
            try:
                below = os.open(part, _FOLDER, dir_fd=at)
            except FileNotFoundError:
                os.mkdir(part, 0o755, dir_fd=at)
                below = os.open(part, _FOLDER, dir_fd=at)
            os.close(at)
            at = below
        yield at
    finally:
        os.close(at)


def _unlink(name: str, at: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(os.stat(name, dir_fd=at, follow_symlinks=False).st_mode):
            raise ValueError(f"the image has both a folder and a file called {name}")
        os.unlink(name, dir_fd=at)


def find_program(files: Path, path: str, *names: str) -> str | None:
    """The first of these programs that is on this PATH in a root, by its path in there."""

    def place_of(inside: str) -> Path:
        return files / inside.lstrip("/")

    for name in names:
        for folder in path.split(":"):
            if not folder.startswith("/"):
                continue
            inside = os.path.join(folder, name)
            with contextlib.suppress(OSError):
                real = os.path.dirname(follow(follow(inside, place_of) + "/.x", place_of))
                place = place_of(real)
                if place.is_file() and not place.is_symlink() and os.access(place, os.X_OK):
                    return inside
    return None


def kept_python(tree: Path) -> RootPython | None:
    """What `find_python` has found."""
    try:
        return RootPython(**json.loads((tree / "python.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


async def find_python(overlays: Overlays, tree: Path, env: Mapping[str, str]) -> RootPython:
    """The Python that containers of this root run on, as its PATH says. Raises ImageBuildError where there is none."""
    if found := kept_python(tree):
        return found
    program = find_program(tree / "files", env.get("PATH", sandbox.SYSTEM_PATH), "python", "python3")
    if program is None:
        raise ImageBuildError(
            'the image has no Python, on which Modal\'s client runs: add_python="3.12" (of from_registry and '
            "from_dockerfile) brings one, or install one so that it is on the image's PATH"
        )
    said = await run_in(overlays, tree, (program, "-c", _ASK_PYTHON), env)
    try:
        answer = json.loads(said.strip().splitlines()[-1])
        sites = [s for s in answer["sites"] if isinstance(s, str)]
        python = RootPython(program, answer["version"], sites[0], answer["libc"], answer["machine"])
    except (ValueError, LookupError, TypeError):
        raise ImageBuildError(
            f"the image's Python, {program}, does not work: {said.strip()[-500:]}"
        ) from None
    making = tree / "python.making"
    making.write_text(json.dumps(asdict(python)))
    making.replace(tree / "python.json")
    return python


async def run_in(
    overlays: Overlays,
    tree: Path,
    argv: tuple[str, ...],
    env: Mapping[str, str],
    *,
    binds: Mapping[Path, str] | None = None,
) -> str:
    """Run a program in a root of this tree, of which nothing stays but what it writes to `binds`; what it says."""
    scratch = overlays.scratch()
    try:
        root = overlays.root(scratch, tree, (), (), whole=True)
        for source, target in (binds or {}).items():
            root.bind(source, target, read_only=False)
        program = sandbox.Program(
            argv, {"PATH": sandbox.SYSTEM_PATH, "HOME": "/root", "LANG": "C.UTF-8", **env}, "/"
        )
        launched = await sandbox.launch(scratch, root, program, merge_stderr=True)
        said: list[str] = []
        try:
            await copy_output(launched.process, said.append)
            words = (await launched.reader.read()).decode(errors="replace")
            await launched.process.wait()
        finally:
            launched.writer.close()
        if "exit 0" not in words.splitlines():
            raise ImageBuildError(f"{argv[0]} in the image: {''.join(said).strip()[-1000:] or words.strip()}")
        return "".join(said)
    finally:
        remove_tree(scratch)


async def install_client_for(python: RootPython, folder: Path, log: Log) -> None:
    """The modal client and what it needs into `folder`, by this machine's installer, for a Python that is not here."""
    series = python.version.split(".")[:2]
    pip = pip_for(sys.executable, sys.executable)
    target = ["--target", str(folder / "deps"), f"modal=={importlib.metadata.version('modal')}"]
    if pip[0].endswith("uv"):
        libc = "musl" if python.libc == "musl" else "gnu"
        options = [
            "--python-version",
            ".".join(series),
            "--python-platform",
            f"{python.machine}-unknown-linux-{libc}",
        ]
    else:
        options = ["--no-compile", "--implementation", "cp", "--python-version", ".".join(series)]
        options += ["--abi", f"cp{''.join(series)}", "--abi", "abi3", "--abi", "none"]
        for platform in _platforms(python):
            options += ["--platform", platform]
    try:
        await run([*pip, "install", "--quiet", "--only-binary=:all:", *options, *target], log=log)
    except ImageBuildError as error:
        raise ImageBuildError(
            f"the modal client could not be installed for the image's Python {python.version} "
            f"({python.libc}, {python.machine}); it needs one that it supports: {error}"
        ) from error
    split_client(folder)


def _platforms(python: RootPython) -> list[str]:
    """The tags of wheels that run there, the newest first."""
    machine = python.machine
    if python.libc == "musl":
        return [f"musllinux_1_{minor}_{machine}" for minor in range(2, -1, -1)]
    minor = int(python.libc.rpartition(".")[2])
    old = {17: ["manylinux2014"], 12: ["manylinux2010"], 5: ["manylinux1"]}
    tags: list[str] = []
    for at in range(minor, 4, -1):
        tags += [f"manylinux_2_{at}_{machine}", *(f"{name}_{machine}" for name in old.get(at, ()))]
    return [*tags, f"linux_{machine}"]


def split_client(folder: Path) -> None:
    """The client's own code in pkg/, apart from its dependencies in deps/."""
    (folder / "pkg").mkdir()
    for entry in list((folder / "deps").iterdir()):
        if entry.name.startswith(("modal", "synchronicity")):
            entry.rename(folder / "pkg" / entry.name)
