"""Hostile requests: every RPC that is served, with names, paths and ids that no client of Modal's would send."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import grpclib
import pytest
from grpclib.client import Channel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modal_proto import api_pb2

from gpuctl.local import coverage
from gpuctl.local.image_trees import place_in

from .planes import TestPlane
from .rpc import SERVICES, call, call_on, credentials

if TYPE_CHECKING:
    from pathlib import Path

HOSTILE = [
    "",
    "..",
    "../../../../../../tmp/hostile",
    "/etc/passwd",
    "/../../tmp/hostile",
    "a/../../../tmp/hostile",
    "~/hostile",
    "vo-../../../../../../etc/x",
    "ap-0000000000000000000000",
    "vo-0000000000000000000000",
    "x" * 5000,
    "nul\0nul",
    "new\nline",
    "'; DROP TABLE apps; --",
    "%s%n{0}$(touch /tmp/hostile)`touch /tmp/hostile`",
    "é\u202e\U0001f600",
]


def filled(message: Any, text: str, number: int, depth: int = 3) -> Any:
    """Every field of a message, and of those in it, set to something."""
    for field in message.DESCRIPTOR.fields:
        if field.containing_oneof and len(field.containing_oneof.fields) > 1:
            continue
        if field.message_type and field.message_type.GetOptions().map_entry:
            key, value = (field.message_type.fields_by_name[part].type for part in ("key", "value"))
            if key == value == 9:
                getattr(message, field.name)[text] = text
            continue
        if field.message_type:
            if depth:
                inner = getattr(message, field.name)
                filled(inner.add() if field.is_repeated else inner, text, number, depth - 1)
            continue
        kind: Any = {1: float(number), 2: 0.0, 8: bool(number), 9: text, 12: text.encode()}.get(field.type)
        if field.enum_type:
            kind = field.enum_type.values[number % len(field.enum_type.values)].number
        elif kind is None:
            kind = abs(number) % 100
        if "timeout" in field.name:
            kind = 0
        if field.is_repeated:
            getattr(message, field.name).append(kind)
        else:
            setattr(message, field.name, kind)
    return message


@pytest.mark.parametrize("service", sorted(SERVICES))
def test_no_request_is_our_failure(new_plane: TestPlane, service: str, tmp_path: Path) -> None:
    """An answer, or an error that says what is wrong; never INTERNAL, and nothing outside the state directory."""
    new_plane.up()
    outside = sorted(p.name for p in tmp_path.iterdir())
    metadata = credentials(new_plane.now)

    async def run() -> list[tuple[str, str, Any]]:
        channel = Channel("127.0.0.1", int(new_plane.now.url.rpartition(":")[2]))
        answers = []
        for name in sorted(coverage.served(service)):
            kind = getattr(SERVICES[service][1](channel), name).request_type
            for number, text in enumerate(HOSTILE):
                answer = await call_on(channel, service, name, filled(kind(), text, number), metadata)
                answers.append((name, text, answer))
        channel.close()
        return answers

    answers = asyncio.run(run())
    wrong = {
        (name, text[:40], answer.message)
        for name, text, answer in answers
        if isinstance(answer, grpclib.GRPCError)
        and answer.status in (grpclib.Status.INTERNAL, grpclib.Status.UNKNOWN)
    }
    assert not wrong
    assert sorted(p.name for p in tmp_path.iterdir()) == outside
    assert not os.path.lexists("/tmp/hostile")
    log = (new_plane.state_dir / "plane.log").read_text()
    assert "Traceback" not in log
    assert new_plane.now.token_secret not in log


_PIECES = ["/", "/", ".", "..", "a", "root", "tmp", "é", " "]


@given(path=st.lists(st.sampled_from(_PIECES), max_size=12).map("".join))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_path_leaves_an_image_s_tree(tmp_path: Path, path: str) -> None:
    place = place_in(tmp_path, path)
    assert place is None or os.path.normpath(place).startswith(str(tmp_path) + "/")


def test_every_call_needs_the_token(plane: TestPlane) -> None:
    """Every RPC of both services, served or not."""

    async def run() -> list[tuple[str, Any]]:
        channel = Channel("127.0.0.1", int(plane.now.url.rpartition(":")[2]))
        answers = []
        for service, (base, stub) in SERVICES.items():
            for name in sorted(base.__abstractmethods__):
                request = getattr(stub(channel), name).request_type()
                half = {"x-modal-token-id": plane.now.token_id, "authorization": "Bearer a.b.c"}
                answers += [
                    (name, await call_on(channel, service, name, request, metadata))
                    for metadata in ({}, half)
                ]
        channel.close()
        return answers

    for name, answer in asyncio.run(run()):
        assert isinstance(answer, grpclib.GRPCError), name
        assert answer.status is grpclib.Status.UNAUTHENTICATED, (name, answer)
    assert isinstance(call(plane.now, "AppList", api_pb2.AppListRequest()), api_pb2.AppListResponse)
