"""Every RPC of both services: served by a handler, or refused by its name; and none without the plane's token."""

from __future__ import annotations

import asyncio
from typing import Any

import grpclib
import pytest
from google.protobuf import empty_pb2
from grpclib.client import Channel
from modal_proto import api_pb2

from gpuctl.local import coverage

from .planes import TestPlane
from .rpc import SERVICES, call, call_on, credentials


def test_every_rpc_that_is_not_served_is_refused_by_name(plane: TestPlane) -> None:
    served = {service: set(coverage.served(service)) for service in SERVICES}
    metadata = credentials(plane.now)

    async def run() -> dict[str, Any]:
        channel = Channel("127.0.0.1", int(plane.now.url.rpartition(":")[2]))
        answers = {}
        for service, (base, stub) in SERVICES.items():
            for name in sorted(base.__abstractmethods__):
                if name not in served[service]:
                    request = getattr(stub(channel), name).request_type()
                    answers[f"{service}.{name}"] = await call_on(channel, service, name, request, metadata)
        channel.close()
        return answers

    answers = asyncio.run(run())
    assert len(answers) > 100
    for name, answer in answers.items():
        assert isinstance(answer, grpclib.GRPCError), name
        assert answer.status is grpclib.Status.UNIMPLEMENTED, (name, answer)
        assert name.partition(".")[2] in (answer.message or ""), (name, answer)


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {
            "x-modal-token-id": "ak-0000000000000000000000",
            "x-modal-token-secret": "as-0000000000000000000000",
        },
        {"x-modal-task-id": "ta-0000000000000000000000", "x-modal-task-secret": "wrong"},
        {"x-modal-task-id": "ta-0000000000000000000000", "x-modal-task-secret": "x"},
    ],
)
def test_no_rpc_without_the_plane_s_token(plane: TestPlane, metadata: dict[str, str]) -> None:
    for name, request in (("AppList", api_pb2.AppListRequest()), ("ClientHello", empty_pb2.Empty())):
        answer = call(plane.now, name, request, metadata)
        assert isinstance(answer, grpclib.GRPCError)
        assert answer.status is grpclib.Status.UNAUTHENTICATED
    # Not even the names of what is missing.
    refused = call(plane.now, "FunctionMap", api_pb2.FunctionMapRequest(), metadata)
    assert refused.status is grpclib.Status.UNAUTHENTICATED


def test_half_a_token_is_none(plane: TestPlane) -> None:
    half = credentials(plane.now) | {"x-modal-token-secret": "as-wrong"}
    assert call(plane.now, "AppList", api_pb2.AppListRequest(), half).status is grpclib.Status.UNAUTHENTICATED


def test_the_modal_cli_says_that_it_is_not_let_in(plane: TestPlane) -> None:
    done = plane.modal("app", "list", check=False, MODAL_TOKEN_SECRET="as-wrong")
    assert done.returncode == 1
    assert "Token missing" in done.stdout + done.stderr


def test_a_refusal_says_what_was_asked_for_where_the_rpc_s_name_does_not(plane: TestPlane) -> None:
    done = plane.modal("shell", check=False)
    assert done.returncode == 1
    assert "AuthTokenGet is not implemented by the local control plane: that is modal.Sandbox" in " ".join(
        (done.stdout + done.stderr).split()
    )


def test_the_table_in_the_docs_is_what_the_code_says() -> None:
    assert coverage.DOCS.read_text() == coverage.updated(coverage.DOCS.read_text()), (
        "run: python -m gpuctl.local.coverage"
    )
