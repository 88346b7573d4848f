"""Pools: the inputs of one function that wait, the containers that run them, and how many of those there should be.

A pool has what `ledger` wrote down, in memory: who waits, who is with which container. It starts containers by
backlog, hands inputs out, gives inputs back to the queue when a container dies, retries, times out and cancels. As in
`servers`, all decisions about containers are made in `_decide`, from what is there. Imports ledger, tasks, workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
import math
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from modal_proto import api_pb2

from gpuctl.local.ledger import Input, Ledger
from gpuctl.local.tasks import EXIT_HOOK_SECONDS, Task, Tasks, describe_exit
from gpuctl.local.workers import Settings, Worker

if TYPE_CHECKING:
    from gpuctl.local.capacity import Capacity
    from gpuctl.local.functions import Functions
    from gpuctl.local.logs import Logs
    from gpuctl.local.store import Deployment, Function

log = logging.getLogger(__name__)

Status = api_pb2.GenericResult
MOST_CRASHES = (
    8  # containers that may die with one input, beside its retries; the client's own limit for the cloud
)
MOST_BAD_STARTS = (
    3  # containers in a row that say why they cannot start, or are late, before the callers are told
)
MOST_SILENT_STARTS = 8  # containers in a row that die while they start, without a word
_CANCEL_SECONDS = 5.0  # what the code of an input that timed out gets to end by itself
_BACK_OFF_FIRST, _BACK_OFF_MOST = 0.25, 60.0
_MOST_CRASH_STEPS = 3  # of doubling: an input that ends its containers is given up after a few anyway
_TICK_SECONDS = 0.5
_HEARTBEAT_SECONDS = 14.0  # the client expects an answer within 15


class Pool:
    """One function, or one variant of one, of an app that is not stopped."""

    def __init__(
        self,
        function: Function,
        ledger: Ledger,
        functions: Functions,
        tasks: Tasks,
        logs: Logs,
        capacity: Capacity,
    ) -> None:
        self.function_id = function.id
        self.app_id = function.app_id
        self._name = function.name
        self._ledger = ledger
        self._functions = functions
        self._tasks = tasks
        self._logs = logs
        self._capacity = capacity
        self._deployment: Deployment | None = None
        self.definition_id = ""
        self.settings: Settings | None = None  # None until the app is published
        self.retry_policy: Any = None
        self.pending: deque[Input] = deque()
        self._delayed: list[tuple[float, int, Input]] = []
        self._order = itertools.count()
        self.workers: dict[str, Worker] = {}
        self._asking: list[Worker] = []  # those that wait for an input, the one that was busy last at the end
        self._last_input = -math.inf
        self._bad_starts = self._silent_starts = self._failures = 0
        self._not_before = 0.0
        self._said = ""  # what was said of this machine's limit
        self._wake = asyncio.Event()
        self.closing = False
        self._jobs: set[asyncio.Task[None]] = set()
        capacity.join(self._wake.set, self._make_room)
        self._loop = self._spawn(self._run())

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
        row = self._functions.row(self.function_id)
        data = self._functions.data_of(self.function_id, self.definition_id)
        self.settings = Settings.of(data, row.settings)
        self.retry_policy = data.ranked_functions[0].function.retry_policy
        self._wake.set()

    def forgive(self) -> None:
        """Forget the failures so far: try again now."""
        self._bad_starts = self._silent_starts = self._failures = 0
        self._not_before = 0.0
        self._wake.set()

    def roll(self) -> None:
        """Replace every container by a fresh one of the same definition."""
        for worker in self.workers.values():
            worker.task.definition_id = ""
        self.forgive()

    async def close(self, *, grace: float = EXIT_HOOK_SECONDS) -> None:
        """No more inputs; end the containers. What has no output yet stays so: `cancel_all` is for that."""
        self.closing = True
        self._loop.cancel()
        self._capacity.leave(self._wake.set)
        await asyncio.gather(*(self._stop(worker, grace) for worker in list(self.workers.values())))
        for job in list(self._jobs):
            job.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)

    # ---- inputs

    @property
    def running(self) -> int:
        return sum(len(worker.inputs) for worker in self.workers.values())

    @property
    def backlog(self) -> int:
        return len(self.pending) + len(self._delayed)

    @property
    def headroom(self) -> int:
        """How many more inputs the containers that are ready could take at once."""
        assert self.settings is not None
        each = self.settings.inputs_at_once
        ready = (worker for worker in self.workers.values() if worker.ready_at and not worker.leaving)
        return sum(max(each - len(worker.inputs), 0) for worker in ready)

    def add(self, items: list[Input]) -> None:
        """Inputs that the ledger has; in order, after those that wait."""
        now = time.time()
        for item in items:
            if item.not_before > now:
                heapq.heappush(self._delayed, (item.not_before, next(self._order), item))
            else:
                self.pending.append(item)
        self._last_input = time.monotonic()
        self._hand_out()
        self._wake.set()

    def _hand_out(self) -> None:
        """Wake as many waiting containers as there are inputs for."""
        for _ in range(min(len(self.pending), len(self._asking))):
            worker = self._asking.pop()
            if worker.asks is not None and not worker.asks.done():
                worker.asks.set_result(None)
                # It has not taken its input yet: nobody else is to have its core meanwhile.
                self._capacity.idle(worker.id, False)

    def take_one(self, worker: Worker) -> Input | None:
        """The next input for a container that was there before, if it need not wait for it."""
        if not worker.ready_at or self._outdated(worker) or (self.settings and self.settings.single_use):
            return None
        while self.pending:
            item = self.pending.popleft()
            if not item.done:
                self._claim(worker, item)
                return item
        return None

    async def take(self, worker: Worker, size: int, linger: float) -> list[Input] | None:
        """The next inputs for a container that asks, at most `size`; None when it is to end.

        Waits for the first as long as it takes, and then `linger` seconds for the others. All are of one method.
        """
        if not worker.ready_at:
            worker.ready_at = time.monotonic()
            worker.task.announced.set()
            self._capacity.booted(worker.id)
            self._bad_starts = self._silent_starts = 0
        if not worker.inputs:
            worker.idle_since = time.monotonic()
        items: list[Input] = []
        try:
            return await self._collect(worker, items, size, linger)
        except BaseException:
            self._put_back(worker, items)  # the container never got them
            raise

    async def _collect(
        self, worker: Worker, items: list[Input], size: int, linger: float
    ) -> list[Input] | None:
        deadline = math.inf
        while True:
            if self._outdated(worker) and not items:
                worker.leaving = True
                return None
            while self.pending and len(items) < size:
                item = self.pending[0]
                if item.done:
                    self.pending.popleft()
                    continue
                if items and item.method != items[0].method:
                    return items
                self.pending.popleft()
                self._claim(worker, item)
                items.append(item)
            now = time.monotonic()
            if items and (len(items) == size or linger <= 0 or now >= deadline or self._outdated(worker)):
                assert self.settings is not None
                worker.leaving = worker.leaving or self.settings.single_use
                return items
            if items and deadline == math.inf:
                deadline = now + linger
            await self._ask(worker, deadline - now)

    async def _ask(self, worker: Worker, seconds: float) -> None:
        worker.asks = asyncio.get_running_loop().create_future()
        self._asking.append(worker)
        self._capacity.idle(worker.id, worker.rests)
        try:
            async with asyncio.timeout(None if seconds == math.inf else seconds):
                await worker.asks
        except TimeoutError:
            pass
        finally:
            worker.asks = None
            if worker in self._asking:
                self._asking.remove(worker)

    def _outdated(self, worker: Worker) -> bool:
        return worker.leaving or self.closing or worker.task.definition_id != self.definition_id

    def _claim(self, worker: Worker, item: Input) -> None:
        assert self.settings is not None
        item.task_id = worker.id
        item.started_at = time.time()
        item.deadline = time.monotonic() + self.settings.timeout
        item.condemned = False
        worker.inputs[item.id] = item
        worker.note_input()
        if len(worker.inputs) == 1:
            self._capacity.idle(worker.id, False)
        self._last_input = time.monotonic()

    def _put_back(self, worker: Worker, items: list[Input]) -> None:
        for item in reversed(items):
            if worker.inputs.pop(item.id, None) is not None and not item.done:
                self.pending.appendleft(item)
        self._hand_out()
        self._wake.set()

    def output(self, worker: Worker, answer: Any) -> None:
        """What a container made of an input: an api_pb2.FunctionPutOutputsItem. Late and second answers are dropped."""
        item = worker.inputs.get(answer.input_id)
        if item is None or answer.retry_count != item.attempt or self.settings is None:
            return
        del worker.inputs[answer.input_id]
        worker.note_input()
        self._failures = 0
        if not worker.inputs:
            worker.idle_since = self._last_input = time.monotonic()
        status = answer.result.status
        if item.done:  # it was cancelled or timed out; its caller was told, or it is tried again already
            return
        if status in _RETRIED and self._retry(item):
            return
        self._ledger.finish(
            item,
            status,
            lambda: api_pb2.FunctionGetOutputsItem(
                result=answer.result,
                idx=item.idx,
                input_id=answer.input_id,
                data_format=answer.data_format,
                task_id=worker.id,
                input_started_at=answer.input_started_at,
                output_created_at=answer.output_created_at,
            ).SerializeToString(),
            worker.id,
        )

    def _retry(self, item: Input) -> bool:
        """Try again as the function's retry policy says; False when it has no attempt left."""
        assert self.settings is not None
        if item.attempt >= self.settings.retries:
            return False
        # The attempt that may still be running is another object: its end concerns nobody.
        again = Input(item.call, item.idx, item.attempt + 1, 0.0, item.data, item.method, item.crashes)
        item.done = True
        again.not_before = time.time() + self.settings.retry_delay(again.attempt)
        self._ledger.retry(again)
        heapq.heappush(self._delayed, (again.not_before, next(self._order), again))
        self._wake.set()
        return True

    def fail(self, item: Input, status: Any, message: str, result: Any = None) -> None:
        """Answer an input that no container will answer."""
        made = api_pb2.GenericResult()
        if result is not None:
            made.CopyFrom(result)
        else:
            made.exception = message
        made.status = status
        self._ledger.finish(
            item,
            status,
            lambda: api_pb2.FunctionGetOutputsItem(
                result=made,
                idx=item.idx,
                input_id=item.id,
                data_format=api_pb2.DATA_FORMAT_PICKLE if result else api_pb2.DATA_FORMAT_UNSPECIFIED,
                task_id=item.task_id,
                output_created_at=time.time(),
            ).SerializeToString(),
            item.task_id,
        )

    # ---- cancellation and timeouts

    def unfinished(self, call_id: str = "") -> list[Input]:
        """The inputs without an output, of one call or of all."""
        delayed = (entry[2] for entry in self._delayed)
        held = (item for worker in self.workers.values() for item in worker.inputs.values())
        return [
            item
            for item in itertools.chain(self.pending, delayed, held)
            if not item.done and call_id in ("", item.call.id)
        ]

    def cancel(self, call_id: str, reason: str, *, terminate: bool = False, tell: bool = True) -> list[Input]:
        """Answer the inputs of a call (of all, without one) as terminated, and have containers drop them."""
        items = self.unfinished(call_id)
        for item in items:
            worker = self.workers.get(item.task_id)
            self.fail(item, Status.GENERIC_STATUS_TERMINATED, reason)
            if worker is None or item.id not in worker.inputs:
                continue
            if terminate:
                self._kill(worker)
            elif tell:
                self._tell_to_cancel(worker, item)
        self.pending = deque(item for item in self.pending if not item.done)
        self._delayed = [entry for entry in self._delayed if not entry[2].done]
        heapq.heapify(self._delayed)
        self._wake.set()
        return items

    def _tell_to_cancel(self, worker: Worker, item: Input) -> None:
        worker.cancels.append(item.id)
        worker.cancel_news.set()

    async def heartbeat(self, worker: Worker) -> list[str]:
        """The inputs that the container is to cancel; waits a while for some."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_HEARTBEAT_SECONDS):
                await worker.cancel_news.wait()
        worker.cancel_news.clear()
        cancels, worker.cancels = worker.cancels, []
        return [input_id for input_id in cancels if input_id in worker.inputs]

    def _kill(self, worker: Worker) -> None:
        """End a container at once, for the sake of an input that would not end."""
        worker.leaving = worker.heeded = True
        if worker.task.container is not None:
            worker.task.container.kill()

    def _time_out(self, now: float) -> None:
        assert self.settings is not None
        for worker in list(self.workers.values()):
            for item in list(worker.inputs.values()):
                if now < item.deadline:
                    continue
                if not item.condemned:
                    item.condemned = True
                    item.deadline = now + _CANCEL_SECONDS
                    self._tell_to_cancel(worker, item)
                    if item.done:
                        continue
                    text = f"Task's current input in {item.id} hit its timeout of {self.settings.timeout:g}s"
                    self._say(text, worker.id)
                    if not self._retry(item):
                        self.fail(item, Status.GENERIC_STATUS_TIMEOUT, text)
                else:
                    self._say(
                        f"container {worker.id} is killed: its input did not end within {_CANCEL_SECONDS:g} s after "
                        "its timeout",
                        worker.id,
                    )
                    self._kill(worker)
                    break

    # ---- decisions

    async def _run(self) -> None:
        while True:
            try:
                wait = self._decide(time.monotonic()) if self.settings else None
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
        assert settings is not None
        self._wake_delayed()
        self._time_out(now)
        staying = [w for w in self.workers.values() if not w.leaving]
        for worker in staying:
            if worker.task.definition_id != self.definition_id:
                self._dismiss(worker)
        current = [w for w in staying if not w.leaving]
        for worker in current:
            launched = worker.task.launched_at
            if launched and not worker.ready_at and now - launched > settings.startup_timeout:
                worker.late = True
                worker.task.failure = (
                    f"not ready within its startup_timeout of {settings.startup_timeout:g} s"
                )
                self._kill(worker)
        wanted = self._wanted(now, settings)
        missing = wanted - len(current)
        if missing > 0:
            self._start_some(now, settings, missing, len(current))
        elif missing < 0:
            self._dismiss_some(now, settings, current, -missing)
        waits = [_TICK_SECONDS] if self.running or any(not w.ready_at for w in current) or missing > 0 else []
        if self._delayed:
            waits.append(max(self._delayed[0][0] - time.time(), 0.0))
        if len(current) > settings.min_containers:
            idle_for = [now - w.idle_since for w in current if w.asks and not w.inputs]
            if idle_for:
                waits.append(max(settings.scaledown_window - max(idle_for), _TICK_SECONDS))
        return min(waits, default=None)

    def _wake_delayed(self) -> None:
        now = time.time()
        while self._delayed and self._delayed[0][0] <= now:
            self.pending.append(heapq.heappop(self._delayed)[2])
        self._hand_out()

    def _wanted(self, now: float, settings: Settings) -> int:
        """How many containers the work is enough for, within the function's own limits."""
        load = len(self.pending) + sum(
            min(len(w.inputs), settings.inputs_at_once) for w in self.workers.values() if not w.leaving
        )
        each = 1 if settings.single_use else settings.inputs_at_once
        wanted = math.ceil(load / each)
        if wanted or now - self._last_input < settings.scaledown_window:
            wanted += settings.buffer_containers
        wanted = max(wanted, settings.min_containers)
        if settings.max_containers:
            busy = sum(1 for w in self.workers.values() if w.leaving and w.inputs)
            wanted = min(wanted, settings.max_containers - busy)
        return wanted

    def _start_some(self, now: float, settings: Settings, missing: int, have: int) -> None:
        if now < self._not_before or self._deployment is None:
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
            idle = worker.asks and not worker.inputs and now - worker.idle_since >= settings.scaledown_window
            if idle or number < beyond:
                self._dismiss(worker)

    # ---- the life of one container

    def _start(self) -> None:
        assert self.settings is not None
        assert self._deployment is not None
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
        for item in reversed(lost):
            if not worker.task.stopping and not worker.heeded:
                item.crashes += 1
            if item.crashes > MOST_CRASHES + (self.settings.retries if self.settings else 0):
                how = describe_exit(worker.task.exit_code) if worker.task.exit_code is not None else "ended"
                self.fail(
                    item,
                    Status.GENERIC_STATUS_INTERNAL_FAILURE,
                    f"{item.crashes} containers ended with this input; the last one {how}",
                )
            else:
                self.pending.appendleft(item)
        if self.closing:
            return
        self._hand_out()
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
            for item in [*self.pending, *(entry[2] for entry in self._delayed)]:
                self.fail(item, status, f"{self._name} cannot start: {why}", worker.task.result)
            self.pending.clear()
            self._delayed.clear()
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
        if worker in self._asking and worker.asks is not None and not worker.asks.done():
            worker.asks.set_result(None)
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
        if worker.asks is not None and not worker.asks.done():
            worker.asks.set_result(None)  # it is told to end in the answer
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace):
                    await worker.task.ended.wait()
        await self._tasks.stop(worker.task, grace=grace)

    def _make_room(self) -> bool:
        """End a container that has nothing to do; False when all have."""
        staying = [w for w in self.workers.values() if not w.leaving]
        idle = [w for w in staying if w.asks and not w.inputs]
        if self.pending or not idle or len(staying) <= (self.settings.min_containers if self.settings else 0):
            return False
        self._dismiss(min(idle, key=lambda w: w.idle_since))
        return True

    def dropped(self, task: Task) -> None:
        """The client stops one of the containers."""
        if worker := self.workers.get(task.id):
            worker.leaving = True
        self._wake.set()


_RETRIED = (
    Status.GENERIC_STATUS_FAILURE,
    Status.GENERIC_STATUS_TIMEOUT,
    Status.GENERIC_STATUS_INIT_FAILURE,
    Status.GENERIC_STATUS_INTERNAL_FAILURE,
)
