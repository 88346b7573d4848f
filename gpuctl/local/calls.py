"""Calls: the RPCs of `.remote`, `.map`, `.spawn` and generators, from both sides. Imports ledger, pools.

The caller makes a call (FunctionMap), puts inputs and gets outputs; a container gets inputs and puts outputs. What
waits is in `backlog`, who runs it in `pools`, what lasts in `ledger`. The plane itself retries, for every kind of call.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pickle
import time
from typing import TYPE_CHECKING, Any

from modal_proto import api_pb2

from gpuctl.local.ids import is_id, new_id
from gpuctl.local.ledger import GATHER_SECONDS, CallRow, Input, Ledger, input_id, parse_input_id, wait_on
from gpuctl.local.pools import Pool
from gpuctl.local.wire import Call, conflict, empty, not_found, rpc, unimplemented

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from gpuctl.local.builders import Build
    from gpuctl.local.capacity import Capacity
    from gpuctl.local.functions import Functions
    from gpuctl.local.logs import Logs
    from gpuctl.local.store import Deployment, Store
    from gpuctl.local.tasks import Task, Tasks
    from gpuctl.local.workers import Worker

log = logging.getLogger(__name__)

_MOST_OUTSTANDING = 1000  # inputs of one map that the client sends ahead of their outputs
_MOST_OUTPUTS, _MOST_OUTPUT_BYTES = 1000, 8 << 20  # in one answer
_MOST_IN_GRAPH = 1000  # inputs of one call
_STREAM_SECONDS = 55.0
_PRUNE_SECONDS = 60.0
_AWAITED = (  # by the caller: of `.remote` and `.map`, and of `.remote_gen`
    api_pb2.FUNCTION_CALL_INVOCATION_TYPE_SYNC,
    api_pb2.FUNCTION_CALL_INVOCATION_TYPE_SYNC_LEGACY,
)
_LIVE = (api_pb2.APP_STATE_DEPLOYED, api_pb2.APP_STATE_EPHEMERAL, api_pb2.APP_STATE_DETACHED)

_CATEGORIES: dict[int, str] = {
    api_pb2.GenericResult.GENERIC_STATUS_SUCCESS: "succeeded_inputs",
    api_pb2.GenericResult.GENERIC_STATUS_TIMEOUT: "timeout_inputs",
    api_pb2.GenericResult.GENERIC_STATUS_TERMINATED: "cancelled_inputs",
}


class Calls:
    """Every call of every function, and the pools of the functions that are called."""

    def __init__(
        self,
        store: Store,
        ledger: Ledger,
        functions: Functions,
        tasks: Tasks,
        logs: Logs,
        capacity: Capacity,
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._functions = functions
        self._tasks = tasks
        self._logs = logs
        self._capacity = capacity
        self._pools: dict[str, Pool] = {}
        self._janitor: asyncio.Task[None] | None = None
        tasks.stop_hooks.append(self._task_stopped)

    # ---- deployments

    async def publish(self, deployment: Deployment) -> None:
        """Run what was deployed: pools for what must always be there, the new version in those that are there."""
        gone = []
        for pool in self.of_app(deployment.app_id):
            definition_id = deployment.layout.definition_ids.get(self._functions.base_of(pool.function_id))
            if definition_id is None:
                gone.append(pool)
            else:
                pool.publish(deployment, definition_id)
        for pool in gone:
            await self._close(pool, "its function is no longer part of the app")
        for function_id, definition_id in deployment.layout.definition_ids.items():
            data = self._functions.data(definition_id)
            if not data.is_server and data.autoscaler_settings.min_containers:
                self._pool(function_id)

    def configure(self, function_id: str) -> None:
        """Its settings were changed live."""
        row = self._functions.row(function_id)
        data = self._functions.data(self._functions.definition_of(function_id))
        if pool := self._pools.get(function_id):
            pool.configure()
        elif not data.is_server and api_pb2.AutoscalerSettings.FromString(row.settings).min_containers:
            self._pool(function_id)

    def resume(self) -> None:
        """After a start of the plane: run what had not been answered."""
        for call in self._ledger.unfinished_calls():
            app = self._store.app(call.app_id)
            inputs = self._ledger.unfinished_inputs(call)
            for item in inputs:
                item.method = _method(item.data or b"")
                item.data = self._ledger.kept_in_memory(item.data or b"")
            if app is not None and app.state in _LIVE and app.version:
                with contextlib.suppress(Exception):
                    self._pool(call.function_id).inputs.add(inputs)
                    continue
            for item in inputs:
                self._terminate(item, "the app was stopped")
        self._janitor = asyncio.create_task(self._prune())

    def _terminate(self, item: Input, reason: str) -> None:
        status = api_pb2.GenericResult.GENERIC_STATUS_TERMINATED
        output = api_pb2.FunctionGetOutputsItem(
            result=api_pb2.GenericResult(status=status, exception=reason), idx=item.idx, input_id=item.id
        )
        self._ledger.finish(item, status, output.SerializeToString)

    async def _prune(self) -> None:
        while True:
            try:
                self._ledger.prune(time.time())
            except Exception:
                log.exception("old calls could not be removed")
            await asyncio.sleep(_PRUNE_SECONDS)

    def of_app(self, app_id: str) -> list[Pool]:
        return [pool for pool in self._pools.values() if pool.app_id == app_id]

    def busy(self, app_id: str) -> bool:
        """Whether the app has inputs without an output."""
        return any(pool.inputs.waiting or pool.inputs.running for pool in self.of_app(app_id))

    async def close_app(self, app_id: str) -> None:
        """Answer what waits, and end the containers."""
        await asyncio.gather(*(self._close(pool, "the app was stopped") for pool in self.of_app(app_id)))

    async def close(self) -> None:
        """For the end of the plane: what has no answer goes on with the next."""
        if self._janitor is not None:
            self._janitor.cancel()
        await asyncio.gather(*(pool.close(grace=5.0) for pool in self._pools.values()))
        self._ledger.flush()

    async def _close(self, pool: Pool, reason: str) -> None:
        # Its containers end by a signal; until then they are still answered.
        pool.inputs.cancel("", reason, tell=False)
        await pool.close()
        if self._pools.get(pool.function_id) is pool:
            del self._pools[pool.function_id]

    def _pool(self, function_id: str) -> Pool:
        """The function's pool; made when it is called for the first time."""
        pool = self._pools.get(function_id)
        if pool is not None and not pool.closing:
            return pool
        function = self._functions.row(function_id)
        app = self._store.app(function.app_id)
        if app is None or app.state not in _LIVE:
            raise conflict(f"The app of '{function.name}' is not running.")
        deployment = self._store.deployment(app.id, app.version) if app.version else None
        base = self._functions.base_of(function_id)
        if deployment is None or base not in deployment.layout.definition_ids:
            raise conflict(f"'{function.name}' is not part of what is deployed as '{app.name}'.")
        definition_id = deployment.layout.definition_ids[base]
        if self._functions.data(definition_id).is_server:
            raise conflict(f"'{function.name}' is a server: it is reached by HTTP, not called.")
        pool = Pool(
            function,
            deployment,
            definition_id,
            self._ledger,
            self._functions,
            self._tasks,
            self._logs,
            self._capacity,
        )
        self._pools[function_id] = pool
        return pool

    def _worker(self, call: Call) -> tuple[Pool, Worker]:
        """The container that speaks."""
        task = self._tasks.live.get(call.task_id)
        pool = self._pools.get(task.function_id) if task else None
        worker = pool.workers.get(call.task_id) if pool else None
        if pool is None or worker is None:
            raise conflict("Only a function's container can say this.")
        return pool, worker

    def _worker_if_any(self, call: Call) -> Worker | None:
        """The same, where others may speak too."""
        task = self._tasks.live.get(call.task_id)
        pool = self._pools.get(task.function_id) if task else None
        return pool.workers.get(call.task_id) if pool else None

    def _build(self, call: Call) -> Build | None:
        """What the container that speaks builds, if it is for that."""
        task = self._tasks.live.get(call.task_id)
        return task.build if task else None

    def _task_stopped(self, task: Task) -> None:
        pool = self._pools.get(task.function_id)
        if pool is not None:
            pool.dropped(task)

    def _require(self, call_id: str) -> CallRow:
        call = self._ledger.call(call_id) if is_id(call_id, "fc") else None
        if call is None:
            raise not_found(f"Function call '{call_id}' not found.")
        return call

    # ---- what the caller says

    @rpc("FunctionMap", differs="the plane retries, never the client")
    async def map(self, request: Any, call: Call) -> Any:
        pool = self._pool(request.function_id)
        row = CallRow(
            num=0,
            id=new_id("fc"),
            app_id=pool.app_id,
            function_id=pool.function_id,
            kind=request.function_call_type,
            invocation=request.function_call_invocation_type,
            parent_input_id=request.parent_input_id,
            created_at=time.time(),
        )
        items = [(item.idx, item.input.SerializeToString()) for item in request.pipelined_inputs]
        row, new = self._ledger.add(row, call.idempotency_key, items)
        if new and items:
            pool.inputs.add(self._inputs(row, request.pipelined_inputs, items))
        return api_pb2.FunctionMapResponse(
            function_call_id=row.id,
            pipelined_inputs=_receipts(row, request.pipelined_inputs),
            retry_policy=pool.retry_policy,
            max_inputs_outstanding=_MOST_OUTSTANDING,
        )

    def fire(self, function_id: str, key: str) -> None:
        """Call a function without arguments and without a caller, as its schedule does; once for each `key`."""
        pool = self._pool(function_id)
        arguments = api_pb2.FunctionInput(
            args=pickle.dumps(((), {})), data_format=api_pb2.DATA_FORMAT_PICKLE
        ).SerializeToString()
        row = CallRow(
            num=0,
            id=new_id("fc"),
            app_id=pool.app_id,
            function_id=pool.function_id,
            kind=api_pb2.FUNCTION_CALL_TYPE_UNARY,
            invocation=api_pb2.FUNCTION_CALL_INVOCATION_TYPE_ASYNC,
            parent_input_id="",
            created_at=time.time(),
        )
        row, new = self._ledger.add(row, key, [(0, arguments)])
        if new:
            pool.inputs.add([Input(row, 0, 0, 0.0, self._ledger.kept_in_memory(arguments), "")])

    @rpc("FunctionPutInputs")
    async def put_inputs(self, request: Any, _call: Call) -> Any:
        row = self._require(request.function_call_id)
        pool = self._pool(row.function_id)
        items = [(item.idx, item.input.SerializeToString()) for item in request.inputs]
        if items:
            new = self._ledger.put(row, items)
            inputs = self._inputs(row, request.inputs, items)
            pool.inputs.add(
                [item for item in inputs if item.idx in new] if len(new) < len(inputs) else inputs
            )
        return api_pb2.FunctionPutInputsResponse(inputs=_receipts(row, request.inputs))

    def _inputs(self, row: CallRow, sent: Iterable[Any], items: list[tuple[int, bytes]]) -> list[Input]:
        keep = self._ledger.kept_in_memory
        return [
            Input(row, idx, 0, 0.0, keep(data), item.input.method_name)
            for item, (idx, data) in zip(sent, items, strict=True)
        ]

    @rpc("FunctionFinishInputs")
    async def finish_inputs(self, request: Any, _call: Call) -> Any:
        self._require(request.function_call_id)
        return empty()

    @rpc("FunctionGetOutputs")
    async def get_outputs(self, request: Any, call: Call) -> Any:
        row = self._require(request.function_call_id)
        ranged = request.HasField("start_idx")
        if ranged and row.kind == api_pb2.FUNCTION_CALL_TYPE_UNARY and request.start_idx >= row.total:
            raise not_found(
                f"Function call '{row.id}' has one input, with index 0: there is no {request.start_idx}."
            )
        if request.clear_on_success and not ranged:
            self._ledger.cleared(row)  # the end of a map: the caller has what it wanted
            return api_pb2.FunctionGetOutputsResponse(num_unfinished_inputs=row.unfinished)
        after = int(request.last_entry_id.partition("-")[0] or 0)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + request.timeout
        limit = min(request.max_values or _MOST_OUTPUTS, _MOST_OUTPUTS)
        with self._waiting(call):
            while True:
                if ranged:
                    outputs = self._ledger.outputs_of(row, request.start_idx, request.end_idx)
                else:
                    while row.unfinished and (early := row.answered_at + GATHER_SECONDS - loop.time()) > 0:
                        await wait_on(row.news, early)
                    outputs = self._ledger.outputs_after(row, after, limit)
                left = deadline - loop.time()
                if outputs or left <= 0:
                    break
                await wait_on(row.news, left)
        if not ranged:
            row.answered_at = loop.time()
        response = api_pb2.FunctionGetOutputsResponse(num_unfinished_inputs=row.unfinished)
        size = 0
        for output in outputs:
            size += len(output.data)
            if size > _MOST_OUTPUT_BYTES and response.outputs:
                break
            response.outputs.add().ParseFromString(output.data)
            after = output.seq
        response.last_entry_id = f"{after}-0"
        if request.clear_on_success and outputs:
            self._ledger.cleared(row)
        return response

    @contextlib.contextmanager
    def _waiting(self, call: Call) -> Any:
        """While a container waits for another call, it needs no core."""
        worker = self._worker_if_any(call)
        if worker is None:
            yield
            return
        worker.waits += 1
        self._capacity.idle(worker.id, worker.rests)
        try:
            yield
        finally:
            worker.waits -= 1
            self._capacity.idle(worker.id, worker.rests)

    @rpc("FunctionCallGetDataOut")
    async def get_data_out(self, request: Any, _call: Call) -> AsyncIterator[Any]:
        if request.attempt_token:
            raise unimplemented("Attempt tokens do not exist in the local control plane")
        row = self._require(request.function_call_id)
        last = request.last_index
        # Held open: the client would ask again at once.
        while True:
            chunks = self._ledger.chunks_after(row, last, 100)
            for chunk in chunks:
                yield api_pb2.DataChunk.FromString(chunk)
            last += len(chunks)
            if not chunks:
                await wait_on(row.chunk_news, _STREAM_SECONDS)

    # ---- handles of calls

    @rpc("FunctionCallFromId")
    async def from_id(self, request: Any, _call: Call) -> Any:
        row = self._require(request.function_call_id)
        return api_pb2.FunctionCallFromIdResponse(
            function_call_id=row.id,
            num_inputs=row.total,
            metadata=api_pb2.FunctionCallHandleMetadata(app_id=row.app_id, function_id=row.function_id),
        )

    @rpc("FunctionCallGetInfo", differs="inputs are counted, and not listed")
    async def info(self, request: Any, _call: Call) -> Any:
        row = self._require(request.function_call_id)
        info = api_pb2.FunctionCallInfo(
            function_call_id=row.id, created_at=row.created_at, total_inputs=row.total
        )
        pending = row.total  # that are written, or on their way
        for status, count in self._ledger.counts(row).items():
            if status:
                category = _CATEGORIES.get(status, "failed_inputs")
                getattr(info, category).total += count
                pending -= count
        info.pending_inputs.total = pending
        return api_pb2.FunctionCallGetInfoResponse(info=info)

    @rpc("FunctionCallCancel")
    async def cancel(self, request: Any, _call: Call) -> Any:
        self._cancel(self._require(request.function_call_id), terminate=request.terminate_containers)
        self._ledger.flush()
        return empty()

    def _cancel(self, row: CallRow, *, terminate: bool) -> None:
        """Terminate its inputs, and what they called and wait for."""
        pool = self._pools.get(row.function_id)
        if pool is None:
            return
        for item in pool.inputs.cancel(row.id, "Input was cancelled by user", terminate=terminate):
            for child in self._ledger.children(item.id):
                if child.invocation in _AWAITED:
                    self._cancel(child, terminate=terminate)

    @rpc("FunctionGetCallGraph", differs=f"at most {_MOST_IN_GRAPH} inputs of each call")
    async def graph(self, request: Any, _call: Call) -> Any:
        row = self._require(request.function_call_id)
        while row.parent_input_id:
            parent = self._ledger.call(parse_input_id(row.parent_input_id)[0])
            if parent is None:
                break
            row = parent
        answer = api_pb2.FunctionGetCallGraphResponse()
        calls = [row]
        for row in calls:
            definition = self._functions.data(self._functions.definition_of(row.function_id))
            answer.function_calls.add(
                function_call_id=row.id,
                parent_input_id=row.parent_input_id,
                function_name=definition.function_name,
                module_name=definition.module_name,
            )
            statuses = self._ledger.statuses(row, _MOST_IN_GRAPH)
            answer.truncated = answer.truncated or len(statuses) < row.total
            for idx, status, task_id in statuses:
                one = input_id(row.id, idx)
                answer.inputs.add(input_id=one, function_call_id=row.id, task_id=task_id, status=status)
                calls += self._ledger.children(one)
        return answer

    @rpc("FunctionGetCurrentStats")
    async def stats(self, request: Any, _call: Call) -> Any:
        self._functions.row(request.function_id)
        pool = self._pools.get(request.function_id)
        if pool is None:
            return api_pb2.FunctionStats()
        return api_pb2.FunctionStats(
            backlog=pool.inputs.waiting,
            num_total_tasks=len(pool.workers),
            num_running_inputs=pool.inputs.running,
            input_headroom=pool.headroom,
        )

    # ---- what containers say

    @rpc("FunctionGetInputs")
    def get_inputs(self, request: Any, call: Call) -> Any:
        if build := self._build(call):
            return build.inputs()
        pool, worker = self._worker(call)
        if request.batch_max_size <= 1 and (item := pool.inputs.take_one(worker)):
            return self._given([item])
        return self._get_inputs(pool, worker, request)

    async def _get_inputs(self, pool: Pool, worker: Worker, request: Any) -> Any:
        return self._given(
            await pool.take(worker, max(request.batch_max_size, 1), request.batch_linger_ms / 1000)
        )

    def _given(self, items: list[Input] | None) -> Any:
        response = api_pb2.FunctionGetInputsResponse()
        if items is None:
            response.inputs.add(kill_switch=True)
            return response
        for item in items:
            entry = response.inputs.add(
                input_id=item.id,
                function_call_id=item.call.id,
                function_call_invocation_type=item.call.invocation,
                retry_count=item.attempt,
                function_map_idx=item.idx,
            )
            entry.input.ParseFromString(self._ledger.input_data(item))
        return response

    @rpc("FunctionPutOutputs")
    def put_outputs(self, request: Any, call: Call) -> Any:
        if build := self._build(call):
            build.put(request.outputs)
            return empty()
        pool, worker = self._worker(call)
        for output in request.outputs:
            pool.output(worker, output)
        return empty()

    @rpc("FunctionCallPutDataOut")
    async def put_data_out(self, request: Any, call: Call) -> Any:
        self._worker(call)
        row = self._require(request.function_call_id)
        self._ledger.add_chunks(
            row, [(chunk.index, chunk.SerializeToString()) for chunk in request.data_chunks]
        )
        return empty()

    @rpc("FunctionGetDynamicConcurrency")
    async def concurrency(self, request: Any, call: Call) -> Any:
        pool, _ = self._worker(call)
        wanted = request.max_concurrency if pool.inputs.pending else request.target_concurrency
        return api_pb2.FunctionGetDynamicConcurrencyResponse(concurrency=wanted)

    @rpc("ContainerHeartbeat")
    async def heartbeat(self, _request: Any, call: Call) -> Any:
        worker = self._worker_if_any(call)
        response = api_pb2.ContainerHeartbeatResponse()
        if worker is not None and (cancels := await worker.cancels()):
            response.cancel_input_event.input_ids.extend(cancels)
        return response


def _method(data: bytes) -> str:
    return str(api_pb2.FunctionInput.FromString(data).method_name)


def _receipts(row: CallRow, items: Iterable[Any]) -> list[Any]:
    return [
        api_pb2.FunctionPutInputsResponseItem(idx=item.idx, input_id=input_id(row.id, item.idx))
        for item in items
    ]
