"""The local control plane with grpclib's HTTP/2 server in the place of its own, for benchmarks/calls.py --rounds."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import grpclib.server
from google.protobuf.message import Message
from grpclib.const import Handler
from modal_proto.api_grpc import ModalClientBase
from modal_proto.task_command_router_grpc import TaskCommandRouterBase

from gpuctl.local import http2
from gpuctl.local.service import Route


def types_of(base: type) -> dict[str, Handler]:
    """Path → the handler that grpclib generated, whose types and cardinality count."""
    names = dict.fromkeys(getattr(base, "__abstractmethods__", ()))
    mapping: dict[str, Handler] = type(base.__name__, (base,), names)().__mapping__()
    return mapping


class GrpclibServer:
    """As http2.Server to the daemon."""

    def __init__(self, routes: Mapping[str, Route]) -> None:
        self._routes = routes
        handlers = {**types_of(ModalClientBase), **types_of(TaskCommandRouterBase)}
        self._mapping = {
            path: handlers[path]._replace(func=self._handler(route)) for path, route in routes.items()
        }
        self._server: grpclib.server.Server

    def __mapping__(self) -> dict[str, Handler]:
        return self._mapping

    def _handler(self, route: Route) -> Any:
        async def handle(stream: Any) -> None:
            call = route.admit(stream.metadata)
            # grpclib has parsed the request: `begin` would do so once more.
            assert route._handler is not None
            answer = route._handler(await stream.recv_message(), call)
            if inspect.isasyncgen(answer):
                async for message in answer:
                    await stream.send_message(message)
            else:
                await stream.send_message(answer if isinstance(answer, Message) else await answer)

        return handle

    async def start(self, *, sock: Any = None, path: str | None = None) -> None:
        self._server = grpclib.server.Server([self])
        await self._server.start(sock=sock) if sock is not None else await self._server.start(path=path)

    def close(self) -> None:
        self._server.close()

    async def wait_closed(self) -> None:
        await self._server.wait_closed()


if __name__ == "__main__":
    http2.Server = GrpclibServer  # type: ignore[assignment, misc]
    from gpuctl.local.daemon import main

    sys.exit(main())
