"""Where gpuctl keeps things on this machine (XDG base directories). May import: the standard library, gpuctl.errors.

State (deployment records, tokens, the local control plane) is what a user would miss; cache (image layers) is
what can be made again. Both are private to the user (0700).
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from gpuctl.errors import GpuctlError


def _xdg(variable: str, fallback: str, *, make: bool = True) -> Path:
    root = os.environ.get(variable, "")
    # The XDG specification: a relative path in these variables is invalid and is to be ignored.
    try:
        base = Path(root) if root.startswith("/") else Path.home() / fallback
        directory = base / "gpuctl"
        if make:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise GpuctlError(
            f"no folder {directory} for what gpuctl keeps: {error.strerror}",
            hint=f"name one that you can write in: export {variable}=/path",
        ) from error
    except RuntimeError as error:  # pathlib: no HOME, and no such user
        raise GpuctlError(f"no home directory is known: set HOME, or {variable}=/path") from error
    return directory


def state_dir() -> Path:
    """`$XDG_STATE_HOME/gpuctl`, made when missing."""
    return _xdg("XDG_STATE_HOME", ".local/state")


def cache_dir(*, make: bool = True) -> Path:
    """`$XDG_CACHE_HOME/gpuctl`, made when missing; not with `make=False`, for who only looks."""
    return _xdg("XDG_CACHE_HOME", ".cache", make=make)


def config_dir(*, make: bool = True) -> Path:
    """`$XDG_CONFIG_HOME/gpuctl`, made when missing; not with `make=False`, for who only looks."""
    return _xdg("XDG_CONFIG_HOME", ".config", make=make)


def found_as(program: Path, *, folder: Path, path: str) -> str:
    """How a shell in `folder` with this PATH finds `program`: by its name, else by the shortest path, quoted."""
    import shutil  # costs more than the rest of what completion imports

    on_path = shutil.which(program.name, path=path)
    # Compared by folder: the `python` of a virtual environment is a link to another's.
    if on_path is not None and Path(on_path).parent.resolve() == program.parent.resolve():
        return program.name
    if program.is_relative_to(folder):
        below = str(program.relative_to(folder))
        return shlex.quote(below if "/" in below else f"./{below}")
    return shlex.quote(str(program))
