"""The gRPC services as routes: known RPCs to their handlers, the others refused by name. Imports grpclib, wire."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from grpclib import GRPCError, Status

from gpuctl.local.wire import Call, forbidden, is_disk_full, unimplemented

if TYPE_CHECKING:
    from gpuctl.local.wire import Endpoint

log = logging.getLogger(__name__)

# What a container calls to get its inputs and say what came of them: all that one without access to Modal may.
_OF_THE_RUNTIME = frozenset(
    {
        "BlobCreate",
        "BlobGet",
        "ClientHello",
        "ContainerHeartbeat",
        "ContainerHello",
        "ContainerLog",
        "FunctionCallPutDataOut",
        "FunctionGetDynamicConcurrency",
        "FunctionGetInputs",
        "FunctionPutOutputs",
        "TaskResult",
        "VolumeCommit",
    }
)

# What the user asked for, where the RPC's own name does not say: by the beginnings of names.
_ASKED_FOR = {
    "AuthToken": "modal.Sandbox (which `modal shell` without a container's id is, too)",
    "Sandbox": "modal.Sandbox",
    "PersistentSandbox": "modal.Sandbox",
    "SharedVolume": "modal.NetworkFileSystem; modal.Volume is there",
    "Proxy": "modal.Proxy",
    "Tunnel": "modal.forward; @app.server gives a URL",
    "FunctionStartPtyShell": "an interactive run (modal.interact, a breakpoint)",
}

Authenticate = Callable[[Mapping[str, str]], Call]


def rpc_names(base: type) -> list[str]:
    """The names of all RPCs of a generated service base class."""
    return sorted(getattr(base, "__abstractmethods__", ()))


class Route:
    """One RPC: a call is admitted, or refused, then it goes to the handler."""

    def __init__(
        self, name: str, endpoint: Endpoint | None, request_type: Any, authenticate: Authenticate
    ) -> None:
        self.name = name
        self._handler = endpoint.handler if endpoint else None
        self._parse = request_type.FromString
        self._authenticate = authenticate
        what = next((what for start, what in _ASKED_FOR.items() if name.startswith(start)), "")
        self._refusal = f"{name} is not implemented by the local control plane" + (
            f": that is {what}" if what else ""
        )

    def admit(self, metadata: Mapping[str, str]) -> Call:
        """Who calls, by the headers alone. Raises what the client is told where that is not to be."""
        call = self._authenticate(metadata)
        if call.restricted and self.name not in _OF_THE_RUNTIME:
            raise forbidden(f"{self.name}: this container's function has restrict_modal_access=True")
        if self._handler is None:
            log.info("refused: %s is not implemented", self.name)
            raise unimplemented(self._refusal)
        return call

    def begin(self, call: Call, request: bytes) -> Any:
        """The answer; or an awaitable of it; or, for an RPC that streams, an async generator of answers."""
        assert self._handler is not None  # it was admitted
        return self._handler(self._parse(request), call)

    def refusal(self, error: Exception) -> GRPCError:
        """What the client is told of an exception."""
        if isinstance(error, GRPCError):
            return error
        if is_disk_full(error):
            # The client's own word for it, and where it can wait, as in a .map, it waits and tries again.
            log.warning("%s: the disk is full", self.name)
            return GRPCError(
                Status.RESOURCE_EXHAUSTED,
                f"{self.name}: no space is left on this machine's disk for the local control plane's state; "
                "nothing was changed",
            )
        # A bug of ours: the log gets the traceback, the client what it needs to go on.
        log.error("%s failed", self.name, exc_info=error)
        return GRPCError(Status.INTERNAL, f"{self.name} failed in the local control plane: {error!r}")


def routes(base: type, endpoints: Mapping[str, Endpoint], authenticate: Authenticate) -> dict[str, Route]:
    """Every RPC of a generated service base class, by its path."""
    names = dict.fromkeys(rpc_names(base))
    mapping = type(base.__name__, (base,), names)().__mapping__()  # paths and types are only in there
    found = {}
    for path, handler in mapping.items():
        name = path.rpartition("/")[2]
        found[path] = Route(name, endpoints.get(name), handler.request_type, authenticate)
    return found
