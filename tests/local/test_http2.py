"""The plane's HTTP/2 server against grpclib's client, which is the modal client's own, and against nonsense."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import grpclib
import hpack
import pytest
from google.protobuf import empty_pb2
from grpclib.client import Channel
from modal_proto import api_grpc, api_pb2

from gpuctl.local.headers import HeaderError, HeaderReader
from gpuctl.local.http2 import Server
from gpuctl.local.service import routes
from gpuctl.local.wire import Call, Endpoint, invalid

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

cancelled: list[str] = []


async def echo(request: Any, _call: Call) -> Any:
    """Any size, both ways."""
    return api_pb2.FunctionGetOutputsResponse(last_entry_id=request.last_entry_id)


async def slow(request: Any, _call: Call) -> Any:
    try:
        await asyncio.sleep(request.duration if hasattr(request, "duration") else 30)
    except asyncio.CancelledError:
        cancelled.append("slow")
        raise
    return empty_pb2.Empty()


async def many(request: Any, _call: Call) -> Any:
    for index in range(1, 201):
        yield api_pb2.DataChunk(index=index, data=bytes(20_000))


async def refuse(_request: Any, _call: Call) -> Any:
    raise invalid("no: 100 % wröng\n" + "x" * 30_000)


ENDPOINTS = {
    "FunctionGetOutputs": echo,
    "AppHeartbeat": slow,
    "FunctionCallGetDataOut": many,
    "AppStop": refuse,
}


def serve(tmp_path: Path, use: Callable[[str], Awaitable[None]]) -> None:
    """Run `use` with the path of a socket at which those endpoints are served."""

    async def main() -> None:
        endpoints = {name: Endpoint(name, "", handler) for name, handler in ENDPOINTS.items()}
        server = Server(routes(api_grpc.ModalClientBase, endpoints, lambda _: Call("", "")))
        path = str(tmp_path / "socket")
        await server.start(path=path)
        await asyncio.wait_for(use(path), 60)
        server.close()
        await server.wait_closed()

    asyncio.run(main())


def test_header_blocks_are_read_as_hpack_reads_them() -> None:
    chance = random.Random(7)
    names = [f"x-name-{n}" for n in range(40)] + [":path", "te", "content-type"]
    for _ in range(20):
        encoder, reader = hpack.Encoder(), HeaderReader()
        for _ in range(60):
            if chance.random() < 0.05:
                encoder.header_table_size = chance.choice([0, 100, 4096])
            headers = {
                name: "".join(chance.choices("abcXYZ019-/%ü", k=chance.choice([0, 3, 40, 700])))
                for name in chance.sample(names, chance.randint(1, 12))
            }
            wanted = {name: value.encode().decode("latin-1") for name, value in headers.items()}
            assert reader.read(encoder.encode(headers.items(), huffman=chance.random() < 0.7)) == wanted


def test_broken_header_blocks_are_refused() -> None:
    for block in (b"\x80", b"\xff\xff\xff\xff\xff\xff", b"\x40\x05abc", b"\xbf", b"\x3f\xff\xff\x7f"):
        with pytest.raises(HeaderError):
            HeaderReader().read(block)


def test_messages_of_any_size_and_many_at_once(tmp_path: Path) -> None:
    async def use(path: str) -> None:
        stub = api_grpc.ModalClientStub(channel := Channel(path=path))
        for size in (0, 1, 16_379, 16_380, 70_000, 20 << 20):
            request = api_pb2.FunctionGetOutputsRequest(last_entry_id="z" * size)
            assert len((await stub.FunctionGetOutputs(request)).last_entry_id) == size
        requests = [api_pb2.FunctionGetOutputsRequest(last_entry_id=str(n) * 5000) for n in range(300)]
        answers = await asyncio.gather(*(stub.FunctionGetOutputs(request) for request in requests))
        assert [a.last_entry_id for a in answers] == [r.last_entry_id for r in requests]
        channel.close()

    serve(tmp_path, use)


def test_streams_errors_and_cancelled_calls(tmp_path: Path) -> None:
    async def use(path: str) -> None:
        stub = api_grpc.ModalClientStub(channel := Channel(path=path))
        async with stub.FunctionCallGetDataOut.open() as stream:
            await stream.send_message(api_pb2.FunctionCallGetDataRequest(), end=True)
            chunks = [chunk async for chunk in stream]
        assert [(chunk.index, len(chunk.data)) for chunk in chunks] == [(n, 20_000) for n in range(1, 201)]
        with pytest.raises(grpclib.GRPCError) as refused:
            await stub.AppStop(api_pb2.AppStopRequest())
        assert refused.value.status is grpclib.Status.INVALID_ARGUMENT
        assert (refused.value.message or "").startswith("no: 100 % wröng\nxxx")
        with pytest.raises(grpclib.GRPCError, match="FunctionMap is not implemented"):
            await stub.FunctionMap(api_pb2.FunctionMapRequest())
        with pytest.raises(TimeoutError):
            await stub.AppHeartbeat(api_pb2.AppHeartbeatRequest(), timeout=0.1)
        await asyncio.sleep(0.1)
        assert cancelled == ["slow"]
        waiting = asyncio.create_task(stub.AppHeartbeat(api_pb2.AppHeartbeatRequest()))
        await asyncio.sleep(0.1)
        channel.close()
        await asyncio.wait([waiting])
        await asyncio.sleep(0.1)
        assert cancelled == ["slow", "slow"]

    cancelled.clear()
    serve(tmp_path, use)


def test_nonsense_ends_its_own_connection_only(tmp_path: Path) -> None:
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    chance = random.Random(11)

    async def use(path: str) -> None:
        stub = api_grpc.ModalClientStub(channel := Channel(path=path))
        for number in range(80):
            reader, writer = await asyncio.open_unix_connection(path)
            frames = b"".join(
                (size := chance.choice([0, 1, 4, 6, 8, 50])).to_bytes(3, "big")
                + bytes([chance.randint(0, 10), chance.randint(0, 255)])
                + chance.choice([0, 1, 2, 3, 1 << 31]).to_bytes(4, "big")
                + chance.randbytes(size)
                for _ in range(8)
            )
            writer.write(frames if number % 10 == 0 else preface + frames)
            writer.write_eof()
            await asyncio.wait_for(reader.read(), 5)
            writer.close()
        request = api_pb2.FunctionGetOutputsRequest(last_entry_id="still here")
        assert (await stub.FunctionGetOutputs(request)).last_entry_id == "still here"
        channel.close()

    serve(tmp_path, use)
