"""What an image is on disk, and where its parts stand in a container. Imports sandbox.

A tree has venv/ (the Python environment), files/ (what lies outside it, by its path in the container) and home/ (what
is in /root). A layer starts as a copy of its parent's tree made of hard links, so that 3 GB of packages are not copied.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from gpuctl.local import sandbox

if TYPE_CHECKING:
    from collections.abc import Callable

# Where a container finds its image and the modal client. Fixed, so that a tree can be used under any layer's id.
IMAGE_PATH = "/__image"
CLIENT_PATH = "/__client"

LARGE = 64 << 20  # bytes; a file of this size or more is not copied for each container, and read-only in it


def is_large(place: Path) -> bool:
    return not place.is_symlink() and place.is_file() and place.stat().st_size >= LARGE


def place_in(tree: Path, path: str) -> Path | None:
    """Where in an image's tree the container's `path` is kept; None for /tmp, which is not."""
    inside = os.path.normpath("/" + path).lstrip("/")
    if inside.startswith("tmp/"):
        return None
    if inside.startswith("root/"):
        return tree / "home" / inside.removeprefix("root/")
    return tree / "files" / inside


def follow_in(tree: Path, path: str) -> str:
    """`path` with the links in it followed that the image of this tree has."""
    return follow(path, lambda inside: place_in(tree, inside))


def follow(path: str, place_of: Callable[[str], Path | None]) -> str:
    """`path` in a container with the links in it followed as there, not as on this machine, where they lead elsewhere.

    `place_of` says where on this machine a path of the container is kept.
    """
    path = os.path.normpath("/" + path.lstrip("/"))
    for _ in range(40):  # as many as the kernel follows
        parts = path.split("/")[1:]
        for count in range(1, len(parts)):  # what is written replaces a link at the end
            prefix = "/" + "/".join(parts[:count])
            place = place_of(prefix)
            if place is not None and place.is_symlink():
                target = os.path.join(os.path.dirname(prefix), os.readlink(place), *parts[count:])
                path = os.path.normpath("/" + target.lstrip("/"))
                break
        else:
            return path
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)


def tops(files: Path) -> list[tuple[Path, str]]:
    """(place on this machine, path in the container) of what an image has outside /root: each folder that this machine
    lacks, as a whole, and each file in one that it has.
    """
    found: list[tuple[Path, str]] = []
    waiting = [files]
    while waiting:
        for place in sorted(waiting.pop().iterdir()):
            path = "/" + str(place.relative_to(files))
            own = any(path.startswith(f"{top}/") for top in sandbox.OWN_PLACES)  # not this machine's
            there = path in sandbox.OWN_PLACES or (Path(path).is_dir() and not own)
            shared = there and place.is_dir() and not place.is_symlink()
            if shared and (path == "/tmp" or not path.startswith("/tmp/")):
                waiting.append(place)
            else:
                found.append((place, path))
    return found


def keep_tops(root: Path, files: Path) -> None:
    """What a program made at the top of its container, where the host has nothing, becomes the image's; so does what
    it made in the folders that are a container's own.
    """
    own = [root / place.lstrip("/") for place in sandbox.OWN_PLACES]
    made = [place for place in root.iterdir() if place not in own and not os.path.lexists(f"/{place.name}")]
    for place in own:
        made += place.iterdir() if place.is_dir() else ()
    for place in made:
        kept = files / place.relative_to(root)
        if place.is_symlink() and kept.is_symlink():
            kept.unlink()
        if not place.name.startswith("__") and not os.path.lexists(kept):
            kept.parent.mkdir(exist_ok=True)
            shutil.move(place, kept)


def link_tree(source: Path, target: Path) -> None:
    """A copy of a folder tree made of hard links: quick, and small until something is replaced."""
    shutil.copytree(source, target, symlinks=True, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def remove_tree(folder: Path) -> None:
    """Remove a folder with all that is in it, also what its owner has closed, as the kernel does an overlay's own."""
    shutil.rmtree(folder, ignore_errors=True)
    if not os.path.lexists(folder):
        return
    with contextlib.suppress(OSError):
        os.chmod(folder, 0o700)
    for at, names, _ in os.walk(folder):
        for name in names:
            inside = os.path.join(at, name)
            if not os.path.islink(inside):
                with contextlib.suppress(OSError):
                    os.chmod(inside, 0o700)
    shutil.rmtree(folder, ignore_errors=True)


def break_links(tree: Path) -> None:
    """Make every file of the tree a file of its own."""
    for folder, _, names in os.walk(tree):
        for name in names:
            path = os.path.join(folder, name)
            state = os.lstat(path)
            if state.st_nlink > 1 and not os.path.islink(path):
                shutil.copy2(path, path + ".own")
                os.replace(path + ".own", path)


def relocate_scripts(venv: Path) -> None:
    """Let the environment's scripts start the interpreter where containers see it.

    pip writes the path of the environment that it filled into the first line of every script.
    """
    here = f"{venv}/bin/"
    for script in (venv / "bin").iterdir():
        if script.is_symlink() or not script.is_file():
            continue
        with script.open("rb") as file:
            head = file.read(1024)
        if not head.startswith(b"#!") or here.encode() not in head:
            continue
        text = script.read_bytes().replace(here.encode(), f"{IMAGE_PATH}/venv/bin/".encode(), 2)
        mode = script.stat().st_mode
        script.unlink()  # it may be a hard link to the parent's
        script.write_bytes(text)
        script.chmod(mode)
