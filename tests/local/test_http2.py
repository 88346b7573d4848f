"""The plane's HTTP/2 server against grpclib's client, which is the modal client's own, and against nonsense."""

from __future__ import annotations

import asyncio
import gc
import random
import struct
from typing import TYPE_CHECKING, Any

import grpclib
import grpclib.exceptions
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
begun = 0  # calls of `slow`


async def echo(request: Any, _call: Call) -> Any:
    """Any size, both ways."""
    return api_pb2.FunctionGetOutputsResponse(last_entry_id=request.last_entry_id)


async def slow(request: Any, _call: Call) -> Any:
    global begun
    begun += 1
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
    for block in (
        b"\x80",
        b"\xff\xff\xff\xff\xff\xff",
        b"\x40\x05abc",
        b"\xbf",
        b"\x3f\xff\xff\x7f",
        b"\x82\x20",
        b"\x40\x81\xff\x00",
    ):
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


async def cancellations(count: int) -> None:
    while len(cancelled) < count:
        await asyncio.sleep(0.01)
    assert cancelled == ["slow"] * count


def test_streams_errors_and_cancelled_calls(tmp_path: Path) -> None:
    global begun

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
        await cancellations(1)
        waiting = asyncio.create_task(stub.AppHeartbeat(api_pb2.AppHeartbeatRequest()))
        while begun < 2:
            await asyncio.sleep(0.01)
        channel.close()
        await asyncio.wait([waiting])
        await cancellations(2)

    cancelled.clear()
    begun = 0
    serve(tmp_path, use)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">HBBBI", len(payload) >> 8, len(payload) & 255, kind, flags, stream) + payload


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = frame(4, 0, 0)
HEADERS, DATA, RESET, PING, GOAWAY, WINDOW, CONTINUATION = 1, 0, 3, 6, 7, 8, 9
SLOW = hpack.Encoder().encode([(":method", "POST"), (":path", "/modal.client.ModalClient/AppHeartbeat")])
MESSAGE = struct.pack(">BI", 0, 0)  # an empty one
OPEN, ASK = frame(HEADERS, 4, 1, SLOW), frame(DATA, 1, 1, MESSAGE)
MOST = (1 << 31) - 1

# What breaks the protocol, and the error that RFC 9113 (or 7541) has for it.
PROTOCOL, FLOW, CLOSED, SIZE, COMPRESSION, CALM = 1, 3, 5, 6, 9, 11
BROKEN = {
    "no settings first": (frame(PING, 0, 0, bytes(8)), PROTOCOL),
    "an acknowledgement first": (frame(4, 1, 0), PROTOCOL),
    "settings of a stream": (SETTINGS + frame(4, 0, 1), PROTOCOL),
    "half a setting": (SETTINGS + frame(4, 0, 0, bytes(5)), SIZE),
    "an acknowledgement with settings": (SETTINGS + frame(4, 1, 0, bytes(6)), SIZE),
    "push neither on nor off": (frame(4, 0, 0, struct.pack(">HI", 2, 2)), PROTOCOL),
    "a window too large": (frame(4, 0, 0, struct.pack(">HI", 4, 1 << 31)), FLOW),
    "a window of a stream too large": (
        SETTINGS
        + OPEN
        + frame(WINDOW, 0, 1, struct.pack(">I", MOST))
        + frame(4, 0, 0, struct.pack(">HI", 4, MOST)),
        FLOW,
    ),
    "frames too small": (frame(4, 0, 0, struct.pack(">HI", 5, 100)), PROTOCOL),
    "a frame too large": (SETTINGS + struct.pack(">HBBBI", 1 << 7, 0, 0, 0, 1), SIZE),
    "a ping of 7 bytes": (SETTINGS + frame(PING, 0, 0, bytes(7)), SIZE),
    "a ping of a stream": (SETTINGS + frame(PING, 0, 1, bytes(8)), PROTOCOL),
    "a push": (SETTINGS + frame(5, 4, 1, bytes(8)), PROTOCOL),
    "data of the connection": (SETTINGS + frame(DATA, 0, 0, b"x"), PROTOCOL),
    "data of an idle stream": (SETTINGS + frame(DATA, 0, 1, b"x"), PROTOCOL),
    "data after the end": (SETTINGS + OPEN + ASK + ASK, CLOSED),
    "more padding than data": (SETTINGS + OPEN + frame(DATA, 8, 1, b"\x05abc"), PROTOCOL),
    "a reset of an idle stream": (SETTINGS + frame(RESET, 0, 3, bytes(4)), PROTOCOL),
    "a reset of 3 bytes": (SETTINGS + OPEN + frame(RESET, 0, 1, bytes(3)), SIZE),
    "no more window": (SETTINGS + frame(WINDOW, 0, 0, bytes(4)), PROTOCOL),
    "too much window": (SETTINGS + frame(WINDOW, 0, 0, struct.pack(">I", MOST)), FLOW),
    "too much window of a stream": (SETTINGS + OPEN + frame(WINDOW, 0, 1, struct.pack(">I", MOST)), FLOW),
    "window of an idle stream": (SETTINGS + frame(WINDOW, 0, 1, struct.pack(">I", 1)), PROTOCOL),
    "a stream of even number": (SETTINGS + frame(HEADERS, 4, 2, SLOW), PROTOCOL),
    "headers of the connection": (SETTINGS + frame(HEADERS, 4, 0, SLOW), PROTOCOL),
    "a number used again": (SETTINGS + OPEN + frame(RESET, 0, 1, bytes(4)) + OPEN, CLOSED),
    "headers after the end": (SETTINGS + OPEN + ASK + frame(HEADERS, 5, 1, SLOW), CLOSED),
    "trailers that are not the end": (SETTINGS + OPEN + frame(HEADERS, 4, 1, SLOW), PROTOCOL),
    "a priority that is cut off": (SETTINGS + frame(HEADERS, 4 | 32, 1, b"abc"), SIZE),
    "a continuation of nothing": (SETTINGS + frame(CONTINUATION, 4, 1, SLOW), PROTOCOL),
    "something amid headers": (SETTINGS + frame(HEADERS, 0, 1, SLOW) + frame(PING, 0, 0, bytes(8)), PROTOCOL),
    "a continuation of another": (
        SETTINGS + frame(HEADERS, 0, 1, SLOW) + frame(CONTINUATION, 4, 3, SLOW),
        PROTOCOL,
    ),
    "headers without an end": (
        SETTINGS + frame(HEADERS, 0, 1, SLOW) + frame(CONTINUATION, 0, 1, bytes(16000)) * 5,
        CALM,
    ),
    "headers that cannot be read": (
        SETTINGS + frame(HEADERS, 4, 1, b"\xff\xff\xff\xff\xff\xff"),
        COMPRESSION,
    ),
    "another protocol": (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", PROTOCOL),
}


def test_what_breaks_the_protocol_is_told_the_rfc_s_error(tmp_path: Path) -> None:
    async def use(path: str) -> None:
        for name, (frames, code) in BROKEN.items():
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(frames if name == "another protocol" else PREFACE + frames)
            answer = await asyncio.wait_for(reader.read(), 30)
            writer.close()
            assert answer[-17:-8] == frame(GOAWAY, 0, 0, bytes(8))[:9], name
            assert struct.unpack(">I", answer[-4:])[0] == code, name

    serve(tmp_path, use)


def test_what_is_allowed_is_no_error(tmp_path: Path) -> None:
    """Padding, priorities, continuations, frames of unknown kinds, early ends, small windows."""
    path_of = hpack.Encoder().encode(
        [(":method", "POST"), (":path", "/modal.client.ModalClient/FunctionGetOutputs")]
    )
    message = api_pb2.FunctionGetOutputsRequest(last_entry_id="x" * 100).SerializeToString()
    body = struct.pack(">BI", 0, len(message)) + message
    frames = [
        frame(4, 0, 0, struct.pack(">HIHI", 4, 10, 5, 1 << 20)),  # 10 bytes may be sent at first
        frame(99, 255, 1, b"of an extension"),
        frame(2, 0, 1, bytes(5)),
        frame(HEADERS, 8 | 32, 1, b"\x03" + bytes(5) + path_of[:7] + bytes(3)),
        frame(CONTINUATION, 0, 1, path_of[7:9]),
        frame(CONTINUATION, 4, 1, path_of[9:]),
        frame(DATA, 8, 1, b"\x02" + body[:50] + bytes(2)),
        frame(DATA, 0, 1, b""),
        frame(DATA, 1, 1, body[50:]),
        frame(PING, 0, 0, b"are you?"),
    ]

    async def use(path: str) -> None:
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(PREFACE + b"".join(frames))
        seen: list[tuple[int, int, bytes]] = []
        received = b""
        while not (seen and seen[-1][:2] == (HEADERS, 5)):
            head = await asyncio.wait_for(reader.readexactly(9), 30)
            payload = await reader.readexactly(head[0] << 16 | head[1] << 8 | head[2])
            seen.append((head[3], head[4], payload))
            if head[3] == DATA:
                assert len(payload) <= 10, "more than there was room for"
                received += payload
                writer.write(frame(WINDOW, 0, 1, struct.pack(">I", 10)))
        assert (PING, 1, b"are you?") in seen
        assert (len(received), received[-100:]) == (len(body), b"x" * 100)
        writer.write(frame(HEADERS, 5, 3, path_of))  # no message at all: an answer too
        while (await reader.readexactly(9))[8] != 3:
            pass
        writer.close()

    serve(tmp_path, use)


def test_a_call_that_is_withdrawn_at_once_leaves_no_warning_in_the_log(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    async def use(path: str) -> None:
        reader, writer = await asyncio.open_unix_connection(path)
        withdrawn = OPEN + ASK + frame(RESET, 0, 1, struct.pack(">I", 8))
        writer.write(PREFACE + SETTINGS + withdrawn + frame(PING, 0, 0, b"are you?"))
        while b"are you?" not in await asyncio.wait_for(reader.read(1000), 30):
            pass
        writer.close()
        gc.collect()

    serve(tmp_path, use)
    assert not [str(warning.message) for warning in recwarn]


def test_nobody_s_data_is_kept_before_the_call_is_admitted(tmp_path: Path) -> None:
    async def use(path: str) -> None:
        stub = api_grpc.ModalClientStub(channel := Channel(path=path))
        large = api_pb2.FunctionMapRequest(function_id="x" * (40 << 20))  # more than a stream's window
        with pytest.raises((grpclib.GRPCError, grpclib.exceptions.StreamTerminatedError)):
            await asyncio.wait_for(stub.FunctionMap(large), 30)
        with pytest.raises(grpclib.GRPCError, match="FunctionMap is not implemented"):
            await stub.FunctionMap(api_pb2.FunctionMapRequest(function_id="x" * 10_000))
        request = api_pb2.FunctionGetOutputsRequest(last_entry_id="still here")
        assert (await stub.FunctionGetOutputs(request)).last_entry_id == "still here"
        channel.close()

    serve(tmp_path, use)


def test_nonsense_ends_its_own_connection_only(tmp_path: Path) -> None:
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
            writer.write(frames if number % 10 == 0 else PREFACE + frames)
            writer.write_eof()
            await asyncio.wait_for(reader.read(), 30)
            writer.close()
        request = api_pb2.FunctionGetOutputsRequest(last_entry_id="still here")
        assert (await stub.FunctionGetOutputs(request)).last_entry_id == "still here"
        channel.close()

    serve(tmp_path, use)
