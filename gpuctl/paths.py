"""Where gpuctl keeps things on this machine (XDG base directories). May import: the standard library.

State (deployment records, tokens, the local control plane) is what a user would miss; cache (image layers) is
what can be made again. Both are private to the user (0700).
"""

from __future__ import annotations

import os
from pathlib import Path


def _xdg(variable: str, fallback: str) -> Path:
    root = os.environ.get(variable, "")
    # The XDG specification: a relative path in these variables is invalid and is to be ignored.
    base = Path(root) if root.startswith("/") else Path.home() / fallback
    directory = base / "gpuctl"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    return directory


def state_dir() -> Path:
    """`$XDG_STATE_HOME/gpuctl`, made when missing."""
    return _xdg("XDG_STATE_HOME", ".local/state")


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/gpuctl`, made when missing."""
    return _xdg("XDG_CACHE_HOME", ".cache")


def config_dir() -> Path:
    """`$XDG_CONFIG_HOME/gpuctl`, made when missing."""
    return _xdg("XDG_CONFIG_HOME", ".config")
