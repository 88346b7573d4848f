"""The inputs of one function: those that wait, those that its containers have, and how each comes to its output.

It has in memory what `ledger` wrote down. It hands inputs to the containers that ask, takes their outputs, retries,
times out and cancels; which containers there are is the business of `pools`. Imports ledger, workers.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from modal_proto import api_pb2

from gpuctl.local.ledger import Input

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from gpuctl.local.capacity import Capacity
    from gpuctl.local.ledger import Ledger
    from gpuctl.local.workers import Settings, Worker

Status = api_pb2.GenericResult
_SUSPECT = 2  # containers that ended with an input before it gets one for itself
_CANCEL_SECONDS = 5.0  # what the code of an input that timed out gets to end by itself
_RETRIED = (
    Status.GENERIC_STATUS_FAILURE,
    Status.GENERIC_STATUS_TIMEOUT,
    Status.GENERIC_STATUS_INIT_FAILURE,
    Status.GENERIC_STATUS_INTERNAL_FAILURE,
)


class Backlog:
    """`workers` are the function's containers, by id, kept by the pool. `wake()` is called when it has to decide anew;
    `say(text, task id)` writes to the app's log."""

    def __init__(
        self,
        workers: Mapping[str, Worker],
        settings: Settings,
        ledger: Ledger,
        capacity: Capacity,
        *,
        wake: Callable[[], None],
        say: Callable[[str, str], None],
    ) -> None:
        self.settings = settings
        self.last_input = -math.inf  # when one came, began or ended, by time.monotonic()
        self._workers = workers
        self._ledger = ledger
        self._capacity = capacity
        self._wake = wake
        self._say = say
        self._pending: deque[Input] = deque()
        self._delayed: list[tuple[float, int, Input]] = []  # a heap: those that wait for their next attempt
        self._order = itertools.count()
        self._asking: list[Worker] = []  # those that wait for an input, the one that was busy last at the end

    # ---- how many there are

    @property
    def pending(self) -> int:
        """Inputs that a container could have now."""
        return len(self._pending)

    @property
    def waiting(self) -> int:
        """Inputs that no container has."""
        return len(self._pending) + len(self._delayed)

    @property
    def running(self) -> int:
        """Inputs that a container has."""
        return sum(len(worker.inputs) for worker in self._workers.values())

    @property
    def next_attempt(self) -> float | None:
        """When the next delayed input is due, in seconds since 1970."""
        return self._delayed[0][0] if self._delayed else None

    # ---- in

    def add(self, items: list[Input]) -> None:
        """Inputs that the ledger has; in order, after those that wait."""
        now = time.time()
        for item in items:
            if item.not_before > now:
                self._delay(item)
            else:
                self._pending.append(item)
        self.last_input = time.monotonic()
        self._hand_out()
        self._wake()

    def _delay(self, item: Input) -> None:
        heapq.heappush(self._delayed, (item.not_before, next(self._order), item))

    def wake_delayed(self) -> None:
        """Those whose delay is over wait for a container like the others."""
        now = time.time()
        while self._delayed and self._delayed[0][0] <= now:
            self._pending.append(heapq.heappop(self._delayed)[2])
        self._hand_out()

    def give_back(self, items: list[Input]) -> None:
        """They come first again: their container is gone, or never got them. Suspects come last."""
        items = [item for item in items if not item.done]
        self._pending.extendleft(item for item in reversed(items) if item.crashes < _SUSPECT)
        self._pending.extend(item for item in items if item.crashes >= _SUSPECT)
        self._hand_out()
        self._wake()

    # ---- to the containers

    def _hand_out(self) -> None:
        """Wake as many waiting containers as there are inputs for; all, where not each may have the next one."""
        number = min(len(self._pending), len(self._asking))
        if number and self._pending[0].crashes >= _SUSPECT:
            number = len(self._asking)
        for _ in range(number):
            worker = self._asking.pop()
            if worker.stop_asking():
                # It has not taken its input yet: nobody else is to have its core meanwhile.
                self._capacity.idle(worker.id, False)

    def take_one(self, worker: Worker) -> Input | None:
        """The next input for a container that was there before, if it need not wait for it."""
        if not worker.ready_at or worker.ending or self.settings.single_use:
            return None
        while self._pending:
            item = self._pending[0]
            if not item.done and not _goes_with(item, worker):
                return None
            self._pending.popleft()
            if not item.done:
                self._claim(worker, item)
                return item
        return None

    async def take(self, worker: Worker, size: int, linger: float) -> list[Input] | None:
        """The next inputs for a container that asks, at most `size`; None when it is to end.

        Waits for the first as long as it takes, and then `linger` seconds for the others. All are of one method.
        """
        if not worker.inputs:
            worker.idle_since = time.monotonic()
        items: list[Input] = []
        try:
            return await self._collect(worker, items, size, linger)
        except BaseException:
            # The container never got them.
            self.give_back([item for item in items if worker.inputs.pop(item.id, None) is not None])
            raise

    async def _collect(
        self, worker: Worker, items: list[Input], size: int, linger: float
    ) -> list[Input] | None:
        deadline = math.inf
        while True:
            if worker.ending and not items:
                worker.leaving = True
                return None
            while self._pending and len(items) < size:
                item = self._pending[0]
                if item.done:
                    self._pending.popleft()
                    continue
                if items and (item.method != items[0].method or not _goes_with(item, worker)):
                    return items
                if not _goes_with(item, worker):
                    break
                self._pending.popleft()
                self._claim(worker, item)
                items.append(item)
            now = time.monotonic()
            if items and (len(items) == size or linger <= 0 or now >= deadline or worker.ending):
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

    def _claim(self, worker: Worker, item: Input) -> None:
        item.task_id = worker.id
        item.started_at = time.time()
        item.deadline = time.monotonic() + self.settings.timeout
        item.condemned = False
        worker.inputs[item.id] = item
        worker.note_input()
        if len(worker.inputs) == 1:
            self._capacity.idle(worker.id, False)
        self.last_input = time.monotonic()

    # ---- out

    def output(self, worker: Worker, answer: Any) -> bool:
        """What a container made of an input: an api_pb2.FunctionPutOutputsItem. False for late and second answers."""
        item = worker.inputs.get(answer.input_id)
        if item is None or answer.retry_count != item.attempt:
            return False
        del worker.inputs[answer.input_id]
        worker.note_input()
        if not worker.inputs:
            worker.idle_since = self.last_input = time.monotonic()
        if self._pending:
            worker.stop_asking()  # it may have waited until it has nothing else
        status = answer.result.status
        if item.done:  # it was cancelled or timed out; its caller was told, or it is tried again already
            return True
        if status in _RETRIED and self._retry(item):
            return True
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
        return True

    def _retry(self, item: Input) -> bool:
        """Try again as the function's retry policy says; False when it has no attempt left."""
        if item.attempt >= self.settings.retries:
            return False
        # The attempt that may still be running is another object: its end concerns nobody.
        again = Input(item.call, item.idx, item.attempt + 1, 0.0, item.data, item.method, item.crashes)
        item.done = True
        again.not_before = time.time() + self.settings.retry_delay(again.attempt)
        self._ledger.retry(again)
        self._delay(again)
        self._wake()
        return True

    def fail(self, item: Input, status: Any, message: str, result: Any = None) -> None:
        """Answer an input that no container will answer, with `result` (an api_pb2.GenericResult) if there is one."""
        made = api_pb2.GenericResult(exception=message)
        if result is not None:
            made.CopyFrom(result)
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

    def fail_waiting(self, status: Any, message: str, result: Any = None) -> None:
        """Answer all that no container has."""
        for item in self._waiting():
            self.fail(item, status, message, result)
        self._pending.clear()
        self._delayed.clear()

    def cancel(self, call_id: str, reason: str, *, terminate: bool = False, tell: bool = True) -> list[Input]:
        """Answer the inputs of a call (of all, without one) as terminated, and have containers drop them."""
        held = (item for worker in self._workers.values() for item in worker.inputs.values())
        items = [
            item
            for item in itertools.chain(self._waiting(), held)
            if not item.done and call_id in ("", item.call.id)
        ]
        for item in items:
            worker = self._workers.get(item.task_id)
            self.fail(item, Status.GENERIC_STATUS_TERMINATED, reason)
            if worker is None or item.id not in worker.inputs:
                continue
            if terminate:
                worker.kill()
            elif tell:
                worker.tell_to_cancel(item)
        self._pending = deque(item for item in self._pending if not item.done)
        self._delayed = [entry for entry in self._delayed if not entry[2].done]
        heapq.heapify(self._delayed)
        self._wake()
        return items

    def _waiting(self) -> Iterator[Input]:
        return itertools.chain(self._pending, (entry[2] for entry in self._delayed))

    def time_out(self, now: float) -> None:
        """Answer, or retry, what has reached the timeout, and have its container drop it; kill one that does not."""
        for worker in list(self._workers.values()):
            for item in list(worker.inputs.values()):
                if now < item.deadline:
                    continue
                if item.condemned:
                    text = f"its input did not end within {_CANCEL_SECONDS:g} s after its timeout"
                    self._say(f"container {worker.id} is killed: {text}", worker.id)
                    worker.kill()
                    break
                item.condemned = True
                item.deadline = now + _CANCEL_SECONDS
                worker.tell_to_cancel(item)
                if item.done:
                    continue
                text = f"Task's current input in {item.id} hit its timeout of {self.settings.timeout:g}s"
                self._say(text, worker.id)
                if not self._retry(item):
                    self.fail(item, Status.GENERIC_STATUS_TIMEOUT, text)


def _goes_with(item: Input, worker: Worker) -> bool:
    """Whether the container may have it beside the inputs that it has.

    One with which two containers have ended is alone in the next, lest it takes the same others with it each time.
    """
    inputs = worker.inputs
    return not inputs or (
        item.crashes < _SUSPECT and all(other.crashes < _SUSPECT for other in inputs.values())
    )
