"""Pools: the containers of one function, and how many of those there should be.

A pool starts containers by backlog, ends those that nobody needs, and tells those who wait when none can start. As in
`servers`, all decisions about containers are made in `_decide`, from what is there. The inputs that they run are in
`backlog`. Imports backlog, tasks, workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from typing import TYPE_CHECKING, Any

from modal_proto import api_pb2

from gpuctl.local.backlog import Backlog
from gpuctl.local.tasks import EXIT_HOOK_SECONDS, Task, Tasks, describe_exit
from gpuctl.local.workers import Settings, Worker

if TYPE_CHECKING:
    from gpuctl.local.capacity import Capacity
    from gpuctl.local.functions import Functions
    from gpuctl.local.ledger import Input, Ledger
    from gpuctl.local.logs import Logs
    from gpuctl.local.store import Deployment, Function

log = logging.getLogger(__name__)

Status = api_pb2.GenericResult
MOST_CRASHES = (
    8  # containers that may die with one input, beside its retries; the client's own limit in the cloud
)
MOST_BAD_STARTS = (
    3  # containers in a row that are late, or say why they cannot start, before the callers are told
)
MOST_SILENT_STARTS = 8  # containers in a row that die while they start, without a word
_BACK_OFF_FIRST, _BACK_OFF_MOST = 0.25, 60.0
_MOST_CRASH_STEPS = 3  # of doubling: an input that ends its containers is given up after a few anyway
_TICK_SECONDS = 0.5
_LAST_QUESTION_SECONDS = 3.0  # what a container that has done its input gets to ask for another


class Pool:
    """One function, or one variant of one, of an app that is not stopped."""

    def __init__(
        self,
        function: Function,
        deployment: Deployment,
        definition_id: str,
        ledger: Ledger,
        functions: Functions,
        tasks: Tasks,
        logs: Logs,
        capacity: Capacity,
    ) -> None:
        self.function_id = function.id
        self.app_id = function.app_id
        self._name = function.name
        self._functions = functions
        self._tasks = tasks
        self._logs = logs
        self._capacity = capacity
        self._deployment = deployment
        self.definition_id = definition_id
        self.retry_policy: Any = None
        self.workers: dict[str, Worker] = {}
        self._wake = asyncio.Event()
        self.inputs = Backlog(
            self.workers, self._read_settings(), ledger, capacity, wake=self._wake.set, say=self._say
        )
        self._bad_starts = self._silent_starts = self._failures = 0
        self._not_before = 0.0
        self._said = ""  # what was said of this machine's limit
        self.closing = False
        self._jobs: set[asyncio.Task[None]] = set()
        capacity.join(self._wake.set, self._make_room)
        self._loop = self._spawn(self._run())
        self._warn_of_gpus()

    @property
    def settings(self) -> Settings:
        """How the function runs, as things stand."""
        return self.inputs.settings

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        job: asyncio.Task[None] = asyncio.create_task(work)
        self._jobs.add(job)
        job.add_done_callback(self._job_done)
        return job

    def _job_done(self, job: asyncio.Task[None]) -> None:
        self._jobs.discard(job)
        if not job.cancelled() and job.exception() is not None:
            log.error("function %s: a job failed", self.function_id, exc_info=job.exception())

    def _say(self, line: str, task_id: str = "") -> None:
        self._logs.say(self.app_id, self.function_id, task_id, line)

    # ---- deployments

    def publish(self, deployment: Deployment, definition_id: str) -> None:
        """Run this version from now on; containers of an earlier one get no more inputs."""
        self._deployment = deployment
        self.definition_id = definition_id
        for worker in self.workers.values():
            worker.outdated = worker.outdated or worker.task.definition_id != definition_id
        self.forgive()
        self.configure()
        self._warn_of_gpus()

    def _warn_of_gpus(self) -> None:
        """A deployment was told of what its functions ask for; what a variant asks for is known only now."""
        of, base = self._functions, self._functions.base_of(self.function_id)
        warning = of.gpu_warning(self._name, of.data_of(self.function_id, self.definition_id))
        if base != self.function_id and warning != of.gpu_warning(
            self._name, of.data_of(base, self.definition_id)
        ):
            self._say(warning)

    def configure(self) -> None:
        """Read the settings again."""
        self.inputs.settings = self._read_settings()
        self._wake.set()

    def _read_settings(self) -> Settings:
        row = self._functions.row(self.function_id)
        data = self._functions.data_of(self.function_id, self.definition_id)
        self.retry_policy = data.ranked_functions[0].function.retry_policy
        return Settings.of(data, row.settings)

    def forgive(self) -> None:
        """Forget the failures so far: try again now."""
        self._bad_starts = self._silent_starts = self._failures = 0
        self._not_before = 0.0
        self._wake.set()

    def roll(self) -> None:
        """Replace every container by a fresh one of the same definition."""
        for worker in self.workers.values():
            worker.outdated = True
        self.forgive()

    async def close(self, *, grace: float = EXIT_HOOK_SECONDS) -> None:
        """No more inputs; end the containers. What has no output yet stays so: `inputs.cancel` is for that."""
        self.closing = True
        for worker in self.workers.values():
            worker.outdated = True
        self._loop.cancel()
        self._capacity.leave(self._wake.set)
        await asyncio.gather(*(self._stop(worker, grace) for worker in list(self.workers.values())))
        for job in list(self._jobs):
            job.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)

    # ---- what its containers say

    async def take(self, worker: Worker, size: int, linger: float) -> list[Input] | None:
        """As Backlog.take; who asks for the first time is ready."""
        if not worker.ready_at:
            worker.ready_at = time.monotonic()
            worker.task.announced.set()
            self._capacity.booted(worker.id)
            self._bad_starts = self._silent_starts = 0
        return await self.inputs.take(worker, size, linger)

    def output(self, worker: Worker, answer: Any) -> None:
        """As Backlog.output."""
        if self.inputs.output(worker, answer):
            self._failures = 0

    @property
    def headroom(self) -> int:
        """How many more inputs the containers that are ready could take at once."""
        each = self.settings.inputs_at_once
        ready = (worker for worker in self.workers.values() if worker.ready_at and not worker.leaving)
        return sum(max(each - len(worker.inputs), 0) for worker in ready)

    # ---- decisions

    async def _run(self) -> None:
        while True:
            try:
                wait = self._decide(time.monotonic())
            except Exception:
                # A full disk, say. The function must outlive it.
                log.exception("function %s: could not decide", self.function_id)
                wait = 1.0
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._wake.wait()
            self._wake.clear()

    def _decide(self, now: float) -> float | None:
        """Start and stop containers as things stand; returns in how many seconds to look again, None for not at all."""
        settings = self.settings
        self.inputs.wake_delayed()
        self.inputs.time_out(now)
        staying = [w for w in self.workers.values() if not w.leaving]
        for worker in staying:
            if worker.outdated:
                self._dismiss(worker)
        current = [w for w in staying if not w.leaving]
        for worker in current:
            since = worker.task.loading_since
            if since and not worker.ready_at and now - since > settings.startup_timeout:
                worker.late = True
                worker.task.failure = (
                    f"not ready within its startup_timeout of {settings.startup_timeout:g} s"
                )
                worker.kill()
        wanted = self._wanted(now, settings)
        missing = wanted - len(current)
        if missing > 0:
            self._start_some(now, settings, missing, len(current))
        elif missing < 0:
            self._dismiss_some(now, settings, current, -missing)
        busy = self.inputs.running or any(not w.ready_at for w in current) or missing > 0
        waits = [_TICK_SECONDS] if busy else []
        if (due := self.inputs.next_attempt) is not None:
            waits.append(max(due - time.time(), 0.0))
        if len(current) > settings.min_containers:
            idle_for = [now - w.idle_since for w in current if w.idle]
            if idle_for:
                waits.append(max(settings.scaledown_window - max(idle_for), _TICK_SECONDS))
        return min(waits, default=None)

    def _wanted(self, now: float, settings: Settings) -> int:
        """How many containers the work is enough for, within the function's own limits."""
        load = self.inputs.pending + sum(
            min(len(w.inputs), settings.inputs_at_once) for w in self.workers.values() if not w.leaving
        )
        each = 1 if settings.single_use else settings.inputs_at_once
        wanted = math.ceil(load / each)
        if wanted or now - self.inputs.last_input < settings.scaledown_window:
            wanted += settings.buffer_containers
        wanted = max(wanted, settings.min_containers)
        if settings.max_containers:
            busy = sum(1 for w in self.workers.values() if w.leaving and w.inputs)
            wanted = min(wanted, settings.max_containers - busy)
        return wanted

    def _start_some(self, now: float, settings: Settings, missing: int, have: int) -> None:
        if now < self._not_before:
            return
        for number in range(missing):
            refusal = self._capacity.refusal(settings.need, first=have + number == 0)
            if refusal:
                if self._said != refusal:
                    self._said = refusal
                    self._say(
                        f"{self._name}: {have + missing} containers would have work, {have + number} run: this machine "
                        f"({refusal}) holds no more"
                    )
                return
            if not self._capacity.may_boot() and have + number > 0:
                return
            self._start()
        self._said = ""

    def _dismiss_some(self, now: float, settings: Settings, current: list[Worker], surplus: int) -> None:
        """Dismiss those that have been idle for the scaledown_window, and at once those beyond a lowered limit."""
        beyond = len(current) - settings.max_containers if settings.max_containers else 0
        idle_first = sorted(current, key=lambda worker: (len(worker.inputs), worker.idle_since))
        for number, worker in enumerate(idle_first[:surplus]):
            long_idle = worker.idle and now - worker.idle_since >= settings.scaledown_window
            if long_idle or number < beyond:
                self._dismiss(worker)

    # ---- the life of one container

    def _start(self) -> None:
        task = self._tasks.create(self._functions.row(self.function_id), self.definition_id)
        worker = Worker(task)
        self.workers[task.id] = worker
        self._capacity.take(task.id, self.settings.need)
        self._spawn(self._live(worker, self._deployment))

    async def _live(self, worker: Worker, deployment: Deployment) -> None:
        await self._tasks.start(worker.task, deployment)
        await worker.task.ended.wait()
        self.workers.pop(worker.id, None)
        self._capacity.give_back(worker.id)
        self._ended(worker)
        self._wake.set()

    def _ended(self, worker: Worker) -> None:
        """Its container is gone: its inputs go back to the queue, and failures are counted."""
        lost = [item for item in worker.inputs.values() if not item.done]
        worker.inputs.clear()
        asked = worker.task.stopping or worker.heeded or worker.leaving
        for item in lost:
            if not worker.task.stopping and not worker.heeded:
                item.crashes += 1
            if item.crashes > MOST_CRASHES + self.settings.retries:
                how = describe_exit(worker.task.exit_code) if worker.task.exit_code is not None else "ended"
                text = f"{item.crashes} containers ended with this input; the last one {how}"
                self.inputs.fail(item, Status.GENERIC_STATUS_INTERNAL_FAILURE, text)
        if self.closing:
            return
        self.inputs.give_back(lost)
        if worker.ready_at:
            if not asked and lost:
                self._failures += 1
                if self._failures > 1:
                    self._back_off(min(self._failures - 1, _MOST_CRASH_STEPS))
        elif worker.late or not asked:
            self._bad_start(worker)

    def _bad_start(self, worker: Worker) -> None:
        """A container that ended before it asked for an input."""
        if worker.late or worker.task.result is not None:
            self._bad_starts += 1
        else:
            self._silent_starts += 1
        given_up = self._bad_starts >= MOST_BAD_STARTS or self._silent_starts >= MOST_SILENT_STARTS
        if given_up:
            # Those who wait are told; who calls after this makes the next attempt.
            why = worker.task.failure or "its containers end while they start"
            status = Status.GENERIC_STATUS_INIT_FAILURE
            if worker.late:
                status = Status.GENERIC_STATUS_TIMEOUT
            elif worker.task.result is not None:
                status = Status.GENERIC_STATUS_FAILURE
            self.inputs.fail_waiting(status, f"{self._name} cannot start: {why}", worker.task.result)
            self._bad_starts = self._silent_starts = 0
        self._failures += 1
        if self._failures >= MOST_BAD_STARTS:
            self._back_off(self._failures - MOST_BAD_STARTS + 1)

    def _back_off(self, failures: int) -> None:
        delay = min(_BACK_OFF_FIRST * 2 ** (failures - 1), _BACK_OFF_MOST)
        self._not_before = time.monotonic() + delay
        asyncio.get_running_loop().call_later(delay, self._wake.set)

    def _dismiss(self, worker: Worker) -> None:
        """No more inputs for this container; it ends when it has finished those that it has."""
        worker.leaving = worker.task.stopping = True
        worker.stop_asking()
        self._spawn(self._see_off(worker))

    async def _see_off(self, worker: Worker) -> None:
        """A container that was told to end, and does not, is ended."""
        while worker.inputs:
            await asyncio.sleep(_TICK_SECONDS)
        try:
            async with asyncio.timeout(EXIT_HOOK_SECONDS if worker.ready_at else 0.0):
                await worker.task.ended.wait()
        except TimeoutError:
            await self._stop(worker, 5.0)

    async def _stop(self, worker: Worker, grace: float) -> None:
        worker.leaving = worker.task.stopping = True
        if not worker.ready_at:
            grace = 0.0  # nothing has run in it that could want to be told
        told = worker.stop_asking()  # it is told to end in the answer
        if (
            told or not worker.inputs
        ):  # else it is about to ask, or ends by itself: a signal amid that is a traceback
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace if told else min(grace, _LAST_QUESTION_SECONDS)):
                    await worker.task.ended.wait()
        await self._tasks.stop(worker.task, grace=grace)

    def _make_room(self) -> bool:
        """End a container that has nothing to do; False when all have."""
        staying = [w for w in self.workers.values() if not w.leaving]
        idle = [w for w in staying if w.idle]
        if self.inputs.pending or not idle or len(staying) <= self.settings.min_containers:
            return False
        self._dismiss(min(idle, key=lambda w: w.idle_since))
        return True

    def dropped(self, task: Task) -> None:
        """The client stops one of the containers."""
        if worker := self.workers.get(task.id):
            worker.leaving = True
        self._wake.set()
