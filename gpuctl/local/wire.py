"""What every handler shares: the `rpc` mark, who is calling, and Modal's errors. Imports grpclib.

A handler is a method `async def f(self, request, call)`, or an async generator for a streaming RPC, marked with the
name of its RPC. One that is called for each input of a `.map` may be a plain function, and answer at once. `service`
collects the marks; nothing else knows which RPCs exist.
"""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from google.protobuf import empty_pb2, timestamp_pb2
from grpclib import GRPCError, Status

IMAGE_BUILDER_VERSION = (
    "2025.06"  # the newest that client 1.6.4 knows; it is also the default of new workspaces
)
WORKSPACE = "local"  # what stands where the cloud shows a user's name

_MARK = "__modal_rpc__"


class Call(NamedTuple):
    """Who makes a call: the user's client, or the container `task_id`.

    `isolated`: the caller has a network of its own, and reaches the plane's URLs only by its way out.
    `idempotency_key` is the same for a call and its retries; "" for none. `router`: a client with the command
    router's token for that container. `restricted`: a container of a function with `restrict_modal_access=True`.
    """

    task_id: str
    client_version: str
    isolated: bool = False
    idempotency_key: str = ""
    router: bool = False
    restricted: bool = False


@dataclass(frozen=True)
class Endpoint:
    """One served RPC. `differs` says in a few words what is not as in the cloud, for the table in docs/local.md."""

    name: str
    differs: str
    handler: Callable[..., Any]


F = TypeVar("F", bound=Callable[..., Any])


def rpc(*names: str, differs: str = "") -> Callable[[F], F]:
    """Mark a method as the handler of these RPCs."""

    def mark(function: F) -> F:
        setattr(function, _MARK, (names, differs))
        return function

    return mark


def marked(noun: type) -> dict[str, tuple[str, str]]:
    """RPC name → (method name, how it differs) of one class of handlers."""
    found = {}
    for attribute, value in vars(noun).items():
        for name in getattr(value, _MARK, ((), ""))[0]:
            found[name] = (attribute, getattr(value, _MARK)[1])
    return found


def collect(*nouns: object) -> dict[str, Endpoint]:
    """Every RPC that these objects serve, by name; two handlers for one RPC are a mistake."""
    endpoints: dict[str, Endpoint] = {}
    for noun in nouns:
        for name, (attribute, differs) in marked(type(noun)).items():
            if name in endpoints:
                raise ValueError(f"{name} has two handlers")
            endpoints[name] = Endpoint(name, differs, getattr(noun, attribute))
    return endpoints


def empty() -> Any:
    """The answer that says nothing but "done"."""
    return empty_pb2.Empty()


def timestamp(seconds: float) -> Any:
    """Seconds since 1970 as a protobuf Timestamp."""
    return timestamp_pb2.Timestamp(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))


def not_found(message: str) -> Exception:
    """The client raises NotFoundError."""
    return _error(Status.NOT_FOUND, message)


def already_exists(message: str) -> Exception:
    """The client raises AlreadyExistsError."""
    return _error(Status.ALREADY_EXISTS, message)


def invalid(message: str) -> Exception:
    """The client raises InvalidError."""
    return _error(Status.INVALID_ARGUMENT, message)


def conflict(message: str) -> Exception:
    """The client raises ConflictError: the object is not in a state that allows this."""
    return _error(Status.FAILED_PRECONDITION, message)


def exhausted(message: str) -> Exception:
    """The client raises ResourceExhaustedError, or waits for room where it was told to."""
    return _error(Status.RESOURCE_EXHAUSTED, message)


def too_large(limit: str) -> Exception:
    """The client raises RequestSizeError: it looks for the words of the cloud's proxy.

    Not with that proxy's status, UNKNOWN, upon which a blocking put tries again for ever.
    """
    return _error(Status.INVALID_ARGUMENT, f"Received :status = '413': {limit}")


def unimplemented(message: str) -> Exception:
    """What the cloud does and this plane does not: always by name."""
    return _error(Status.UNIMPLEMENTED, message)


def forbidden(message: str) -> Exception:
    """What this caller in particular may not."""
    return _error(Status.PERMISSION_DENIED, message)


def unauthenticated(message: str) -> Exception:
    """The client raises AuthError."""
    return _error(Status.UNAUTHENTICATED, message)


def _error(status: Status, message: str) -> Exception:
    error: Exception = GRPCError(status, message)
    return error


def is_disk_full(error: Exception) -> bool:
    """Whether that is what the exception says."""
    if isinstance(error, sqlite3.OperationalError):
        return "full" in str(error) or "disk I/O error" in str(error)
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
