"""A folder for unix sockets, whose paths may have about 107 bytes, which a state directory's need not leave.

It lies in the machine's folder for temporary files; a link in the state directory remembers it, and is made first:
whenever the plane is killed, the next one (or `gpuctl local down`) knows what to remove. Standard library only.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path

_LINK = "sockets"
_PREFIX = "gpuctl-"
_LONGEST_PARENT = 50  # leaves room for the folder, a container's id and a port


def make(state_dir: Path) -> Path:
    """A new folder that only the user can enter; the one before it is removed."""
    remove(state_dir)
    parent = tempfile.gettempdir()
    if len(os.fsencode(parent)) > _LONGEST_PARENT:
        parent = "/tmp"  # noqa: S108 - the folder in it is private, and its name new
    while True:
        folder = Path(parent, _PREFIX + os.urandom(4).hex())
        (state_dir / _LINK).symlink_to(folder)
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            (state_dir / _LINK).unlink()
            continue
        return folder


def remove(state_dir: Path) -> None:
    """Remove the folder that the state directory remembers, if any; nothing that is not the user's own."""
    link = state_dir / _LINK
    try:
        folder = link.readlink()
    except OSError:
        return
    try:
        found = folder.lstat()
    except OSError:
        found = None
    mine = found and stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    if mine and folder.name.startswith(_PREFIX):
        shutil.rmtree(folder, ignore_errors=True)
    link.unlink(missing_ok=True)
