"""What a pool knows of its function (Settings) and of each of its containers (Worker). Imports ledger, capacity."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gpuctl.local.capacity import Need
from gpuctl.local.servers import effective_settings

if TYPE_CHECKING:
    from gpuctl.local.ledger import Input
    from gpuctl.local.tasks import Task

DEFAULT_SCALEDOWN_WINDOW = 60.0
DEFAULT_TIMEOUT = 300.0
LEAST_STARTUP_TIMEOUT = (
    30.0  # where it is not set apart from the timeout: this machine may be slow to start any
)
_HEARTBEAT_SECONDS = 14.0  # the client expects an answer within 15


@dataclass(frozen=True)
class Settings:
    """How a function runs: from its definition, with what was changed live since."""

    timeout: float
    startup_timeout: float
    retries: int
    initial_delay: float
    backoff: float
    max_delay: float
    inputs_at_once: int  # that the plane counts on for one container
    inputs_at_most: int  # that one container may have
    single_use: bool
    min_containers: int
    max_containers: int  # 0: no limit of the function's own
    buffer_containers: int
    scaledown_window: float
    need: Need

    @classmethod
    def of(cls, data: Any, override: bytes) -> Settings:
        function = data.ranked_functions[0].function
        scaling = effective_settings(data, override)
        policy = function.retry_policy
        target = function.target_concurrent_inputs or function.max_concurrent_inputs or 1
        batch = max(function.batch_max_size, 1)
        timeout = float(function.timeout_secs or data.timeout_secs) or DEFAULT_TIMEOUT
        startup_timeout = float(function.startup_timeout_secs or data.startup_timeout_secs) or timeout
        if startup_timeout == timeout:
            # The client sends the timeout where no startup_timeout is set; one second is meant for the input then.
            startup_timeout = max(timeout, LEAST_STARTUP_TIMEOUT)
        return cls(
            timeout=timeout,
            startup_timeout=startup_timeout,
            retries=policy.retries,
            initial_delay=policy.initial_delay_ms / 1000,
            backoff=policy.backoff_coefficient or 1.0,
            max_delay=policy.max_delay_ms / 1000 or 60.0,
            inputs_at_once=target * batch,
            inputs_at_most=(function.max_concurrent_inputs or 1) * batch,
            single_use=function.single_use_containers or function.max_inputs == 1,
            min_containers=scaling.min_containers,
            max_containers=scaling.max_containers,
            buffer_containers=scaling.buffer_containers,
            scaledown_window=float(scaling.scaledown_window) or DEFAULT_SCALEDOWN_WINDOW,
            need=Need.of(function.resources),
        )

    def retry_delay(self, attempt: int) -> float:
        """Seconds before the `attempt`th retry, counted from 1."""
        return min(self.initial_delay * self.backoff ** (attempt - 1), self.max_delay)


@dataclass(eq=False)
class Worker:
    """One container of a pool, and the inputs that it has."""

    task: Task
    inputs: dict[str, Input] = field(default_factory=dict)
    asks: asyncio.Future[None] | None = None  # it waits for an input
    ready_at: float = 0.0  # when it asked for the first time
    idle_since: float = 0.0
    late: bool = False  # it was not ready within the startup_timeout
    leaving: bool = False  # it was told to end, or is about to be
    outdated: bool = False  # it is to be replaced
    waits: int = 0  # calls of its own that it waits for
    _cancels: list[str] = field(default_factory=list)  # inputs that it is still to be told to cancel
    _cancel_news: asyncio.Event = field(default_factory=asyncio.Event)
    heeded: bool = False  # its death is no surprise: the plane ended it for an input that did not end

    @property
    def id(self) -> str:
        return self.task.id

    @property
    def ending(self) -> bool:
        """It gets no more inputs."""
        return self.leaving or self.outdated

    @property
    def idle(self) -> bool:
        """It has nothing to do, and says so."""
        return self.asks is not None and not self.inputs

    def stop_asking(self) -> bool:
        """Let it look again whether there is an input, or that it is to end; False when it does not wait for that."""
        if self.asks is None or self.asks.done():
            return False
        self.asks.set_result(None)
        return True

    def tell_to_cancel(self, item: Input) -> None:
        """By the answer to its heartbeat."""
        self._cancels.append(item.id)
        self._cancel_news.set()

    async def cancels(self) -> list[str]:
        """The inputs that it is to cancel; waits a while for some."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_HEARTBEAT_SECONDS):
                await self._cancel_news.wait()
        self._cancel_news.clear()
        cancels, self._cancels = self._cancels, []
        return [input_id for input_id in cancels if input_id in self.inputs]

    def kill(self) -> None:
        """End it at once, for the sake of an input that would not end, or because it is late."""
        self.leaving = self.heeded = True
        if self.task.container is not None:
            self.task.container.kill()

    def note_input(self) -> None:
        """Its inputs have changed: note whose words it prints. Without any it is still those of the last one."""
        if len(self.inputs) == 1:
            [item] = self.inputs.values()
            self.task.call_id, self.task.input_id = item.call.id, item.id
        elif self.inputs:
            first = next(iter(self.inputs.values())).call.id
            same = all(item.call.id == first for item in self.inputs.values())
            self.task.call_id, self.task.input_id = first if same else "", ""

    @property
    def rests(self) -> bool:
        """It needs no core: all the inputs that it has, if any, wait for other calls."""
        return self.waits >= len(self.inputs)
