"""How many containers this machine holds at once, by its cores and its memory. Imports the standard library.

A container counts with what its function asks for (`cpu=`, `memory=`), and with what a Python process needs at least.
One whose inputs all wait for other calls uses no core, and does not count against them: else functions that call
functions could block each other for ever. For the same reason every function may have one container.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_MILLI_CPU_AT_LEAST = (
    250  # a function that says nothing asks for 125 in the cloud; a boot alone takes half a second
)
_MEMORY_AT_LEAST_MB = 128  # as in the cloud
_MEMORY_SHARE = 0.8  # of what the machine has


@dataclass(frozen=True)
class Need:
    """What one container takes."""

    milli_cpu: int
    memory_mb: int

    @classmethod
    def of(cls, resources: object) -> Need:
        """From an api_pb2.Resources."""
        return cls(
            max(getattr(resources, "milli_cpu", 0), _MILLI_CPU_AT_LEAST),
            max(getattr(resources, "memory_mb", 0), _MEMORY_AT_LEAST_MB),
        )


class Capacity:
    """What is taken. `changed` is called when something was given back or has begun to wait."""

    def __init__(self, cores: int | None = None, memory_mb: int | None = None) -> None:
        self.cores = cores or len(os.sched_getaffinity(0))
        self.memory_mb = memory_mb or int(
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 20) * _MEMORY_SHARE
        )
        self._held: dict[str, Need] = {}
        self._blocked: set[str] = set()
        self._booting: set[str] = set()
        self._listeners: list[Callable[[], None]] = []

    def listen(self, changed: Callable[[], None]) -> None:
        self._listeners.append(changed)

    def unlisten(self, changed: Callable[[], None]) -> None:
        self._listeners.remove(changed)

    def refusal(self, need: Need, *, first: bool) -> str:
        """Why no container of this size may start now; "" if it may. `first`: its function has none yet."""
        if first:
            return ""
        cpu = sum(held.milli_cpu for task, held in self._held.items() if task not in self._blocked)
        if cpu + need.milli_cpu > self.cores * 1000:
            return f"{self.cores} cores"
        memory = sum(held.memory_mb for held in self._held.values())
        if memory + need.memory_mb > self.memory_mb:
            return f"{self.memory_mb} MB of memory"
        return ""

    def may_boot(self) -> bool:
        """Booting takes a core for half a second: more at once than cores would only make all of them late."""
        return len(self._booting) < self.cores

    def take(self, task_id: str, need: Need) -> None:
        self._held[task_id] = need
        self._booting.add(task_id)

    def booted(self, task_id: str) -> None:
        if task_id in self._booting:
            self._booting.remove(task_id)
            self._changed()

    def block(self, task_id: str, blocked: bool) -> None:
        """Whether the container only waits for other calls."""
        if blocked and task_id in self._held:
            self._blocked.add(task_id)
            self._changed()
        else:
            self._blocked.discard(task_id)

    def give_back(self, task_id: str) -> None:
        self._held.pop(task_id, None)
        self._blocked.discard(task_id)
        self._booting.discard(task_id)
        self._changed()

    def _changed(self) -> None:
        for changed in list(self._listeners):
            changed()
