"""This machine's NVIDIA GPUs, and which container has which. Imports the standard library only.

The driver says what is there, in /proc/driver/nvidia/gpus/*/information. A card belongs to one container at a time;
it sees the device files of its own cards alone, and CUDA_VISIBLE_DEVICES names them by UUID, which holds however
CUDA numbers what it finds.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_DRIVER = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True)
class Card:
    """One GPU: `minor` is the number of its device file (/dev/nvidia3), `model` what the driver calls it."""

    minor: int
    uuid: str
    model: str


def cards(driver: Path = _DRIVER) -> list[Card]:
    """The cards of this machine whose device files are there, in the order of those."""
    found = []
    for information in driver.glob("*/information"):
        try:
            text = information.read_text()
        except OSError:
            continue
        fields = dict(re.findall(r"^([^:\n]+):[ \t]*(.*)$", text, re.MULTILINE))
        minor, uuid = fields.get("Device Minor", "").strip(), fields.get("GPU UUID", "").strip()
        if minor.isdecimal() and re.fullmatch(r"GPU-[0-9a-f-]+", uuid):
            found.append(Card(int(minor), uuid, fields.get("Model", "").strip()))
    return sorted(found, key=lambda card: card.minor)


DRIVER_PLACE = "/usr/local/nvidia"  # where images built for GPUs look for the driver, of old
_LIBRARY = re.compile(
    r"\s*(lib(?:cuda|cudadebugger|nvcuvid|nvoptix|nvidia-[\w-]+|(?:GLX|EGL|GLESv\d\w*)_nvidia)\.so[.\d]*)"
    r" \([^)]*(?:x86-64|AArch64)[^)]*\) => (/\S+)"
)


def driver_files() -> dict[str, str]:
    """What of the driver programs need, as {path in DRIVER_PLACE: path here}: an image has none, for any card."""
    try:
        done = subprocess.run(
            ["ldconfig", "-p"],
            env={"PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"},
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    found = driver_libraries(done.stdout)
    if place := shutil.which("nvidia-smi"):
        found["bin/nvidia-smi"] = place
    return {inside: os.path.realpath(place) for inside, place in found.items()}


def driver_libraries(listing: str) -> dict[str, str]:
    """Those of a list of `ldconfig -p`, the first of each name."""
    found: dict[str, str] = {}
    for line in listing.splitlines():
        if match := _LIBRARY.fullmatch(line.rstrip()):
            found.setdefault(f"lib64/{match[1]}", match[2])
    return found


class Gpus:
    """Hands out cards, in the order in which they are asked for."""

    def __init__(self, all_cards: Sequence[Card]) -> None:
        self.all = tuple(all_cards)
        self._held: dict[str, tuple[Card, ...]] = {}
        self._waiting: list[tuple[str, int, asyncio.Future[None]]] = []

    def covers(self, count: int) -> bool:
        """Whether this machine has so many at all."""
        return 0 < count <= len(self.all)

    @property
    def free(self) -> list[Card]:
        held = {card for cards in self._held.values() for card in cards}
        return [card for card in self.all if card not in held]

    def ready(self, count: int) -> bool:
        """Whether so many can be had without waiting."""
        return not self._waiting and count <= len(self.free)

    async def take(self, task_id: str, count: int) -> tuple[Card, ...] | None:
        """So many cards for a container alone, once there are; none where this machine never has so many.

        None when it was withdrawn meanwhile.
        """
        if not self.covers(count):
            return ()
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((task_id, count, future))
        self._hand_out()
        try:
            await future
        except asyncio.CancelledError:
            self.give_back(task_id)
            raise
        return self._held.get(task_id)

    def withdraw(self, task_id: str) -> None:
        """End its waiting, if it waits."""
        for entry in list(self._waiting):
            if entry[0] == task_id:
                self._waiting.remove(entry)
                if not entry[2].done():
                    entry[2].set_result(None)
        self._hand_out()

    def give_back(self, task_id: str) -> None:
        """When the container has ended."""
        self._held.pop(task_id, None)
        self.withdraw(task_id)

    def _hand_out(self) -> None:
        # Strictly in turn: a container that wants eight is not starved by those that want one.
        while self._waiting:
            task_id, count, future = self._waiting[0]
            if count > len(self.free):
                return
            self._waiting.pop(0)
            if not future.done():
                self._held[task_id] = tuple(self.free[:count])
                future.set_result(None)
