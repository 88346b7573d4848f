"""What is done to the files in a Volume's folder: listed, copied, removed. Imports wire's errors only.

These functions block, so the plane calls them in threads. They get paths that were checked to be in the Volume.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from typing import TYPE_CHECKING, Any

from modal_proto import api_pb2

from gpuctl.local.wire import already_exists, conflict, invalid, is_disk_full, not_found

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_KINDS = {
    stat.S_IFREG: api_pb2.FileEntry.FILE,
    stat.S_IFDIR: api_pb2.FileEntry.DIRECTORY,
    stat.S_IFLNK: api_pb2.FileEntry.SYMLINK,
    stat.S_IFIFO: api_pb2.FileEntry.FIFO,
    stat.S_IFSOCK: api_pb2.FileEntry.SOCKET,
}


@contextlib.contextmanager
def refusing(root: Path) -> Iterator[None]:
    """What the file system refuses becomes the client's error, with paths as they are in the Volume `root`."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise
        if isinstance(error, shutil.Error):  # of a tree: what could not be copied, each with its reason
            reasons = "; ".join(str(reason) for _, _, reason in error.args[0])
        else:
            reasons = f"{error.strerror}: '{error.filename}'"
        raise conflict(reasons.replace(f"{root}{os.sep}", "")) from error


def entries(top: Path, root: Path, *, recursive: bool) -> Iterator[Any]:
    """An api_pb2.FileEntry of each file and folder in the folder `top`, by name; or of `top`, where it is none."""
    for path in _walk(top, recursive=recursive):
        with contextlib.suppress(FileNotFoundError):  # containers remove files meanwhile
            state = path.lstat()
            kind = _KINDS.get(stat.S_IFMT(state.st_mode), api_pb2.FileEntry.UNSPECIFIED)
            yield api_pb2.FileEntry(
                path=str(path.relative_to(root)),
                type=kind,
                mtime=int(state.st_mtime),
                size=state.st_size if kind == api_pb2.FileEntry.FILE else 0,
            )


def _walk(top: Path, *, recursive: bool) -> Iterator[Path]:
    if not _is_folder(top):
        yield top
        return
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(top.iterdir()):
            yield path
            if recursive and _is_folder(path):
                yield from _walk(path, recursive=True)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def can_take_a_file(target: Path, path: str, *, overwrite: bool) -> None:
    """Raises what the client makes FileExistsError of, or InvalidError, where no file can be put at `target`."""
    if target.is_dir():
        raise already_exists(f"'{path}' is a directory.")
    if os.path.lexists(target) and not overwrite:
        raise already_exists(f"'{path}' already exists.")
    parent = next(folder for folder in target.parents if os.path.lexists(folder))
    if not parent.is_dir():
        raise invalid(f"'{path}' cannot be made: '{parent.name}' is not a directory.")


def remove(path: Path, name: str, *, recursive: bool) -> None:
    """The file, or the folder and all that is in it. `name` is what errors call it."""
    if not os.path.lexists(path):
        raise not_found(f"No such file or directory: '{name}'.")
    if not _is_folder(path):
        path.unlink()
    elif recursive:
        shutil.rmtree(path)
    else:
        raise invalid(f"'{name}' is a directory; remove it recursively.")


def copy(sources: list[tuple[Path, str]], target: Path, name: str, *, recursive: bool) -> None:
    """As `cp` does, but that folders on the way to `target` are made. `name`, and those of sources, are for errors."""
    if not target.is_dir() and (len(sources) > 1 or name.endswith("/")):
        raise invalid(f"'{name}' is not a directory.")
    for source, what in sources:
        if not source.exists():
            raise not_found(f"No such file or directory: '{what}'.")
        place = target / source.name if target.is_dir() else target
        if place.exists() and place.samefile(source):
            raise invalid(f"'{what}' and '{name}' are the same file.")
        if source.is_dir():
            if not recursive:
                raise invalid(f"'{what}' is a directory; copy it recursively.")
            if place.is_relative_to(source):
                raise invalid(f"The directory '{what}' cannot be copied into itself.")
            if place.exists() and not place.is_dir():
                raise invalid(f"'{name}' is not a directory, and '{what}' is.")
            shutil.copytree(source, place, symlinks=True, dirs_exist_ok=True)
        else:
            if place.is_dir():
                raise invalid(f"'{name}' has a directory '{place.name}', which a file cannot replace.")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, place)
