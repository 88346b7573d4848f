"""Where a command works: on Modal, or on the control plane of this machine. Imports nothing of ours."""

from __future__ import annotations

from enum import StrEnum


class Target(StrEnum):
    """The two places that the same rendered file can go to."""

    MODAL = "modal"
    LOCAL = "local"
