"""The gRPC services, made from the generated base classes: known RPCs to their handlers, the others refused by name.

Imports grpclib, wire.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

from grpclib import GRPCError, Status

from gpuctl.local.wire import Call, Endpoint, unimplemented

log = logging.getLogger(__name__)

Authenticate = Callable[[Mapping[str, Any]], Call]


def rpc_names(base: type) -> list[str]:
    """The names of all RPCs of a generated service base class."""
    return sorted(getattr(base, "__abstractmethods__", ()))


def build(base: type, endpoints: Mapping[str, Endpoint], authenticate: Authenticate) -> Any:
    """An instance of `base` in which every RPC is authenticated, then served or refused."""
    methods = {name: _method(name, endpoints.get(name), authenticate) for name in rpc_names(base)}
    return type(base.__name__.removesuffix("Base"), (base,), methods)()


def _method(name: str, endpoint: Endpoint | None, authenticate: Authenticate) -> Callable[..., Any]:
    async def method(_self: Any, stream: Any) -> None:
        call = authenticate(stream.metadata)
        if endpoint is None:
            log.info("refused: %s is not implemented", name)
            raise unimplemented(f"{name} is not implemented by the local control plane")
        request = await stream.recv_message()
        log.debug("%s", name)
        try:
            answer = endpoint.handler(request, call)
            if inspect.isasyncgen(answer):
                async for message in answer:
                    await stream.send_message(message)
            else:
                await stream.send_message(await answer)
        except (GRPCError, asyncio.CancelledError, ConnectionError):
            raise
        except Exception as error:
            # A bug of ours, or a full disk: the log gets the traceback, the client what it needs to go on.
            log.exception("%s failed", name)
            raise GRPCError(
                Status.INTERNAL, f"{name} failed in the local control plane: {error!r}"
            ) from error

    method.__name__ = name
    return method
