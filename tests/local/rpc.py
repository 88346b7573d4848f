"""A bare gRPC client for the tests: any RPC, with any credentials."""

from __future__ import annotations

import asyncio
from typing import Any

import grpclib
from grpclib.client import Channel
from modal_proto import api_grpc, task_command_router_grpc

from gpuctl.local.client import Plane

SERVICES = {
    "ModalClient": (api_grpc.ModalClientBase, api_grpc.ModalClientStub),
    "TaskCommandRouter": (
        task_command_router_grpc.TaskCommandRouterBase,
        task_command_router_grpc.TaskCommandRouterStub,
    ),
}


def credentials(plane: Plane) -> dict[str, str]:
    return {"x-modal-token-id": plane.token_id, "x-modal-token-secret": plane.token_secret}


async def call_on(channel: Channel, service: str, name: str, request: Any, metadata: dict[str, str]) -> Any:
    """The answer, or the GRPCError that came instead."""
    method = getattr(SERVICES[service][1](channel), name)
    try:
        async with method.open(timeout=60, metadata=metadata) as stream:
            await stream.send_message(request, end=True)
            return await stream.recv_message()
    except grpclib.GRPCError as error:
        return error


def call(plane: Plane, name: str, request: Any, metadata: dict[str, str] | None = None) -> Any:
    """One call of the client's service."""

    async def run() -> Any:
        channel = Channel("127.0.0.1", int(plane.url.rpartition(":")[2]))
        try:
            return await call_on(
                channel, "ModalClient", name, request, credentials(plane) if metadata is None else metadata
            )
        finally:
            channel.close()

    return asyncio.run(run())
