"""How many containers this machine holds at once, by its cores and its memory. Imports the standard library.

A container counts with what its function asks for (`cpu=`, `memory=`), or with what the cloud takes where it asks for
nothing. One that has no input, or whose inputs all wait for other calls, uses no core, and does not count against
them: else functions that call functions could block each other for ever. For the same reason every function may have
one container. Where the memory is used up, containers that have nothing to do make room.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

# What a function gets in the cloud that asks for nothing: https://modal.com/docs/guide/resources, November 2026.
_MILLI_CPU_AT_LEAST = 125
_MEMORY_AT_LEAST_MB = 128
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
    """What is taken, by whom, and who waits for some of it."""

    def __init__(self, cores: int | None = None, memory_mb: int | None = None) -> None:
        self.cores = cores or len(os.sched_getaffinity(0))
        self.memory_mb = memory_mb or int(
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 20) * _MEMORY_SHARE
        )
        self._held: dict[str, Need] = {}
        self._idle: set[str] = set()
        self._booting: set[str] = set()
        self._pools: dict[Callable[[], None], Callable[[], bool]] = {}
        self._refused = False  # somebody waits

    def join(self, changed: Callable[[], None], make_room: Callable[[], bool]) -> None:
        """`changed`: it may be worth asking again. `make_room` ends an idle container, if there is one."""
        self._pools[changed] = make_room

    def leave(self, changed: Callable[[], None]) -> None:
        self._pools.pop(changed, None)

    def refusal(self, need: Need, *, first: bool) -> str:
        """Why no container of this size may start now, in a few words; "" if it may.

        `first`: its function has none yet. Who is refused is told when that may have changed.
        """
        if first:
            return ""
        cpu = sum(held.milli_cpu for task, held in self._held.items() if task not in self._idle)
        if cpu + need.milli_cpu > self.cores * 1000:
            self._refused = True
            return f"{self.cores} cores"
        memory = sum(held.memory_mb for held in self._held.values())
        if memory + need.memory_mb > self.memory_mb:
            self._refused = True
            for make_room in list(self._pools.values()):
                if make_room():
                    break
            return f"{self.memory_mb} MB of memory"
        return ""

    def may_boot(self) -> bool:
        """Booting takes a core for half a second: more at once than cores would only make all of them late."""
        self._refused = self._refused or len(self._booting) >= self.cores
        return len(self._booting) < self.cores

    def take(self, task_id: str, need: Need) -> None:
        """A container starts."""
        self._held[task_id] = need
        self._booting.add(task_id)

    def booted(self, task_id: str) -> None:
        self._booting.discard(task_id)
        self._changed()

    def idle(self, task_id: str, idle: bool) -> None:
        """Whether the container has nothing to do, or only waits."""
        if not idle:
            self._idle.discard(task_id)
        elif task_id in self._held and task_id not in self._idle:
            self._idle.add(task_id)
            self._changed()

    def give_back(self, task_id: str) -> None:
        """A container has ended."""
        self._held.pop(task_id, None)
        self._idle.discard(task_id)
        self._booting.discard(task_id)
        self._changed()

    def _changed(self) -> None:
        if self._refused:
            self._refused = False
            for changed in list(self._pools):
                changed()
