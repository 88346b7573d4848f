"""gRPC over HTTP/2 (RFC 9113), as far as the modal client speaks it, with little overhead. Imports headers, service.

grpclib's server takes 0.3 ms of CPU for a call, most of it in h2's state machine; each input of a `.map` is two calls
of its container alone. This one takes a quarter (docs/architecture.md has the measurement). A call is one message; its
answer is one or a stream of them. Left out: streams of requests, compression, server push, priorities, deadlines (a
client whose deadline has passed resets its stream, which cancels the handler).

Whoever is on this machine can connect: a call's headers are judged before its data is kept, and what breaks the
protocol ends the connection (which RFC 9113, 5.4.2, allows also where less would do) with the RFC's error code.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import struct
import urllib.parse
from typing import TYPE_CHECKING, Any

from google.protobuf.message import Message
from grpclib import GRPCError, Status

from gpuctl.local.headers import HeaderError, HeaderReader

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

    from gpuctl.local.service import Route
    from gpuctl.local.wire import Call

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _PRIORITY, _RST_STREAM, _SETTINGS = 0, 1, 2, 3, 4
_PUSH_PROMISE, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = 5, 6, 7, 8, 9
_END_STREAM, _ACK, _END_HEADERS, _PADDED, _PRIORITIZED = 1, 1, 4, 8, 32
_SET_PUSH, _SET_STREAMS, _SET_WINDOW, _SET_FRAME = 2, 3, 4, 5
_NO_ERROR, _PROTOCOL_ERROR, _FLOW_CONTROL_ERROR, _STREAM_CLOSED, _FRAME_SIZE_ERROR = 0, 1, 3, 5, 6
_REFUSED_STREAM, _CANCEL, _COMPRESSION_ERROR, _CALM = 7, 8, 9, 11
# Frames that belong to the connection, to a stream, and to either; those whose payload has one size.
_OF_CONNECTION = frozenset((_SETTINGS, _PING, _GOAWAY))
_OF_STREAM = frozenset((_DATA, _HEADERS, _PRIORITY, _RST_STREAM, _CONTINUATION))
_SIZES = {_PRIORITY: 5, _RST_STREAM: 4, _PING: 8, _WINDOW_UPDATE: 4}

_FRAME = 16384  # bytes that one frame may carry; neither side asks for more
_WINDOW = (
    16 << 20
)  # bytes that a client may send ahead; each frame is acknowledged before half of it is used up
_MOST_MESSAGE = 256 << 20
_MOST_HEADERS = 64 << 10
_MOST_STREAMS = 1 << 16
_DEFAULT_WINDOW = 65535
_MOST_WINDOW = (1 << 31) - 1
_MOST_FRAME = (1 << 24) - 1


_FRAME_HEAD = struct.Struct(">IBI")  # the payload's size and the kind in one; flags; stream
_MESSAGE_HEAD = struct.Struct(">BI")  # 1 for a compressed one; the message's size


def _frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return _FRAME_HEAD.pack(len(payload) << 8 | kind, flags, stream_id) + payload


def _header(name: str, value: str) -> bytes:
    """A header without compression, which every peer reads."""
    both = b"\x00"
    for text in (name.encode(), value.encode()):
        # Seven bits of length, the rest in groups of seven.
        length = len(text)
        if length < 127:
            both += bytes([length]) + text
        else:
            coded, length = bytearray([127]), length - 127
            while length >= 128:
                coded.append(length & 127 | 128)
                length >>= 7
            both += bytes(coded) + bytes([length]) + text
    return both


_STATUS_200 = b"\x88"  # the static table's entry
_BEGIN = _STATUS_200 + _header("content-type", "application/grpc")
_GOOD_END = _header("grpc-status", "0")
_SETTINGS_PAYLOAD = struct.pack(">HIHI", _SET_STREAMS, _MOST_STREAMS, _SET_WINDOW, _WINDOW)


class _Stream:
    """One call."""

    __slots__ = (
        "_begun",
        "_call",
        "_connection",
        "_out",
        "_parts",
        "_route",
        "_size",
        "_unacknowledged",
        "ended",
        "id",
        "task",
        "window",
    )

    def __init__(self, connection: _Connection, stream_id: int, route: Route, call: Call) -> None:
        self.id = stream_id
        self.window = connection.first_window
        self.ended = False  # the client sends no more
        self.task: asyncio.Task[None] | None = None
        self._connection = connection
        self._route = route
        self._call = call
        self._parts: list[bytes] = []  # of the request, as it came; a hundred megabytes are thousands
        self._size = 0
        self._out: list[bytes] = []
        self._begun = False  # headers have been sent
        self._unacknowledged = 0

    # ---- the request

    def receive(self, data: bytes) -> bool:
        """Take in what came; False for more than a message may be."""
        self._parts.append(data)
        self._size += len(data)
        return self._size <= _MOST_MESSAGE

    def acknowledge(self, size: int) -> bytes:
        """What lets the client send on."""
        self._unacknowledged += size
        if self.ended or self._unacknowledged < _WINDOW // 4:
            return b""
        update = _frame(_WINDOW_UPDATE, 0, self.id, struct.pack(">I", self._unacknowledged))
        self._unacknowledged = 0
        return update

    def answer(self, loop: asyncio.AbstractEventLoop) -> None:
        """The request is here: answer it, at once where the handler does."""
        self.ended = True
        data = b"".join(self._parts)
        self._parts.clear()
        answer: Any
        try:
            if len(data) < 5 or _MESSAGE_HEAD.unpack_from(data) != (0, len(data) - 5):
                raise GRPCError(Status.UNIMPLEMENTED, "not one uncompressed message")
            answer = self._route.begin(self._call, data[5:])
            if isinstance(answer, Message) and self._reply(answer.SerializeToString()):
                return
        except Exception as error:
            self._finish(error)
            return
        self.task = loop.create_task(self._run(answer))
        if inspect.iscoroutine(answer):
            # A task that is cancelled before its first step awaits nothing.
            self.task.add_done_callback(lambda _: answer.close())

    # ---- the answer

    async def _run(self, answer: Any) -> None:
        """Send what the handler answers, and end the stream as it ended."""
        try:
            if inspect.isasyncgen(answer):
                stream: Any = answer
                async with contextlib.aclosing(stream):
                    async for message in stream:
                        await self._send(message.SerializeToString())
                        self._flush()
                        await self._connection.drain()
            else:
                message = (answer if isinstance(answer, Message) else await answer).SerializeToString()
                if self._reply(message):
                    return
                await self._send(message)
        except asyncio.CancelledError:
            if self._connection.streams.pop(self.id, None) is not None:
                self._connection.write(_reset(self.id, _CANCEL))
            raise
        except Exception as error:
            self._finish(error)
        else:
            self._finish(None)

    def _reply(self, message: bytes) -> bool:
        """The whole answer, where it is short and there is room for it: nearly always. Else False."""
        connection, size = self._connection, len(message) + _MESSAGE_HEAD.size
        if size > _FRAME or size > self.window or size > connection.window:
            return False
        if connection.streams.pop(self.id, None) is not None:
            connection.window -= size
            connection.write(
                b"".join(
                    (
                        _FRAME_HEAD.pack(len(_BEGIN) << 8 | _HEADERS, _END_HEADERS, self.id),
                        _BEGIN,
                        _FRAME_HEAD.pack(size << 8 | _DATA, 0, self.id),
                        _MESSAGE_HEAD.pack(0, len(message)),
                        message,
                        _FRAME_HEAD.pack(len(_GOOD_END) << 8 | _HEADERS, _END_HEADERS | _END_STREAM, self.id),
                        _GOOD_END,
                    )
                )
            )
        return True

    async def _send(self, message: bytes) -> None:
        """In frames, as the client makes room."""
        connection, at = self._connection, 0
        self._head()
        data = _MESSAGE_HEAD.pack(0, len(message)) + message
        while at < len(data):
            size = min(_FRAME, self.window, connection.window, len(data) - at)
            if size <= 0:
                self._flush()
                await connection.room()
                continue
            self.window -= size
            connection.window -= size
            self._out.append(_frame(_DATA, 0, self.id, data[at : at + size]))
            at += size
            if len(self._out) > 16:
                self._flush()
                await connection.drain()

    def _head(self) -> None:
        if not self._begun:
            self._begun = True
            self._out.append(_frame(_HEADERS, _END_HEADERS, self.id, _BEGIN))

    def _finish(self, error: Exception | None) -> None:
        status, text = Status.OK, ""
        if error is not None and not isinstance(error, ConnectionError):
            refusal = self._route.refusal(error)
            status, text = refusal.status, refusal.message or ""
        if self._connection.streams.pop(self.id, None) is not None:
            self._out.append(_end(self.id, self._begun, status, text))
            self._flush()

    def _flush(self) -> None:
        if self._out:
            self._connection.write(b"".join(self._out))
            self._out.clear()


def _reset(stream_id: int, code: int) -> bytes:
    return _frame(_RST_STREAM, 0, stream_id, struct.pack(">I", code))


def _end(stream_id: int, begun: bool, status: Status, message: str) -> bytes:
    """The trailers, or, where nothing was sent, headers and trailers in one."""
    if status is Status.OK:
        block = _GOOD_END
    else:
        # Percent-encoded as the protocol says; a header block must fit one frame.
        text = urllib.parse.quote(message, safe=" !\"#$&'()*+,/:;<=>?@[\\]^`{|}~")[: _FRAME - 512]
        block = _header("grpc-status", str(status.value)) + _header("grpc-message", text)
    return _frame(_HEADERS, _END_HEADERS | _END_STREAM, stream_id, block if begun else _BEGIN + block)


class _Connection(asyncio.Protocol):
    """One client."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._transport: asyncio.Transport
        self._pending = b""
        self._greeted = False
        self._settled = False  # the client's settings came
        self._headers = HeaderReader()
        self._block: tuple[int, int, bytes] | None = (
            None  # a header block that goes on: stream, flags, so far
        )
        self._unacknowledged = 0
        self._full = False
        self._drained: list[asyncio.Future[None]] = []
        self._room: list[asyncio.Future[None]] = []
        self._last_id = 0
        self._told_to_stop = 0  # the last stream that was, beyond its end
        self.streams: dict[int, _Stream] = {}
        self.window = _DEFAULT_WINDOW
        self.first_window = _DEFAULT_WINDOW

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._server.connections.add(self)
        self.write(
            _frame(_SETTINGS, 0, 0, _SETTINGS_PAYLOAD)
            + _frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", _WINDOW - _DEFAULT_WINDOW))
        )

    def connection_lost(self, _error: Exception | None) -> None:
        self._server.connections.discard(self)
        streams, self.streams = self.streams, {}
        for stream in streams.values():
            if stream.task is not None:
                stream.task.cancel()
        self._wake(self._room)
        self._wake(self._drained)

    def pause_writing(self) -> None:
        # Who does not read is not listened to: answers to pings, say, would pile up.
        self._full = True
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._full = False
        self._transport.resume_reading()
        self._wake(self._drained)

    def data_received(self, data: bytes) -> None:
        data = self._pending + data if self._pending else data
        at, end = 0, len(data)
        try:
            if not self._greeted:
                if end < len(_PREFACE):
                    self._pending = data
                    return
                if not data.startswith(_PREFACE):
                    raise _ConnectionError(_PROTOCOL_ERROR)
                self._greeted, at = True, len(_PREFACE)
            while end - at >= 9:
                head, flags, stream_id = _FRAME_HEAD.unpack_from(data, at)
                size = head >> 8
                if size > _FRAME:
                    raise _ConnectionError(_FRAME_SIZE_ERROR)
                begin = at + 9
                at = begin + size
                if at > end:
                    at = begin - 9
                    break
                self._receive(head & 0xFF, flags, stream_id & 0x7FFFFFFF, data[begin:at])
        except _ConnectionError as error:
            self.close(error.code)
            return
        self._pending = data[at:]

    # ---- frames

    def _receive(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if self._block is not None and (kind != _CONTINUATION or stream_id != self._block[0]):
            raise _ConnectionError(_PROTOCOL_ERROR)
        if kind in (_OF_CONNECTION if stream_id else _OF_STREAM) or not (
            self._settled or (kind == _SETTINGS and not flags & _ACK)
        ):
            raise _ConnectionError(_PROTOCOL_ERROR)
        if kind == _DATA:
            self._on_data(flags, stream_id, payload)
        elif len(payload) != _SIZES.get(kind, len(payload)):
            raise _ConnectionError(_FRAME_SIZE_ERROR)
        elif kind == _HEADERS:
            payload = _unpadded(flags, payload)
            if flags & _PRIORITIZED:
                if len(payload) < 5:
                    raise _ConnectionError(_FRAME_SIZE_ERROR)
                payload = payload[5:]
            self._on_block(stream_id, flags, payload)
        elif kind == _CONTINUATION:
            if self._block is None:
                raise _ConnectionError(_PROTOCOL_ERROR)
            stream_id, first_flags, so_far = self._block
            self._on_block(stream_id, first_flags | flags & _END_HEADERS, so_far + payload)
        elif kind == _WINDOW_UPDATE:
            self._on_window(stream_id, payload)
        elif kind == _SETTINGS:
            self._on_settings(flags, payload)
        elif kind == _PING:
            if not flags & _ACK:
                self.write(_frame(_PING, _ACK, 0, payload))
        elif kind == _PUSH_PROMISE:
            raise _ConnectionError(_PROTOCOL_ERROR)
        elif kind == _RST_STREAM:
            self._must_be_open_or_closed(stream_id)
            stream = self.streams.pop(stream_id, None)
            if stream is not None and stream.task is not None:
                stream.task.cancel()
        # What is left (PRIORITY, GOAWAY, unknown kinds) asks for nothing.

    def _on_block(self, stream_id: int, flags: int, block: bytes) -> None:
        if len(block) > _MOST_HEADERS:
            raise _ConnectionError(_CALM)
        if not flags & _END_HEADERS:
            self._block = (stream_id, flags, block)
            return
        self._block = None
        try:
            metadata = self._headers.read(block)
        except HeaderError as error:
            raise _ConnectionError(_COMPRESSION_ERROR) from error
        stream = self.streams.get(stream_id)
        if stream is not None:  # trailers, which gRPC clients do not send
            if stream.ended:
                raise _ConnectionError(_STREAM_CLOSED)
            if not flags & _END_STREAM:
                raise _ConnectionError(_PROTOCOL_ERROR)
            stream.answer(self._server.loop)
            return
        if not stream_id & 1:
            raise _ConnectionError(_PROTOCOL_ERROR)
        if stream_id <= self._last_id:
            raise _ConnectionError(_STREAM_CLOSED)
        self._last_id = stream_id
        if len(self.streams) >= _MOST_STREAMS:
            self.write(_reset(stream_id, _REFUSED_STREAM))
            return
        route = self._server.routes.get(metadata.get(":path", ""))
        if route is None:
            self.write(_end(stream_id, False, Status.UNIMPLEMENTED, "no such method"))
            return
        try:
            call = route.admit(metadata)
        except Exception as error:
            refusal = route.refusal(error)
            self.write(_end(stream_id, False, refusal.status, refusal.message or ""))
            return
        stream = self.streams[stream_id] = _Stream(self, stream_id, route, call)
        if flags & _END_STREAM:
            stream.answer(self._server.loop)

    def _on_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        size = len(payload)
        stream = self.streams.get(stream_id)
        if stream is None:
            self._must_be_open_or_closed(stream_id)
        acknowledge = b""
        self._unacknowledged += size
        if self._unacknowledged >= _WINDOW // 4:
            acknowledge = _frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", self._unacknowledged))
            self._unacknowledged = 0
        if stream is None:
            # It was refused, or has been reset. Who has much more to say there is told to stop, once.
            if not flags & _END_STREAM and stream_id != self._told_to_stop:
                self._told_to_stop = stream_id
                acknowledge += _reset(stream_id, _NO_ERROR)
        elif stream.ended:
            raise _ConnectionError(_STREAM_CLOSED)
        elif not stream.receive(_unpadded(flags, payload)):
            del self.streams[stream_id]
            self._told_to_stop = stream_id
            acknowledge += _end(stream_id, False, Status.RESOURCE_EXHAUSTED, "too large a message")
            acknowledge += _reset(stream_id, _NO_ERROR)
        elif flags & _END_STREAM:
            stream.answer(self._server.loop)
        else:
            acknowledge += stream.acknowledge(size)
        if acknowledge:
            self.write(acknowledge)

    def _must_be_open_or_closed(self, stream_id: int) -> None:
        """For frames that nobody may send on a stream that was never opened."""
        if stream_id > self._last_id or not stream_id & 1:
            raise _ConnectionError(_PROTOCOL_ERROR)

    def _on_window(self, stream_id: int, payload: bytes) -> None:
        more = int.from_bytes(payload, "big") & 0x7FFFFFFF
        if not more:
            raise _ConnectionError(_PROTOCOL_ERROR)
        if stream_id:
            self._must_be_open_or_closed(stream_id)
        target = self.streams.get(stream_id) if stream_id else self
        if target is not None:
            target.window += more
            if target.window > _MOST_WINDOW:
                raise _ConnectionError(_FLOW_CONTROL_ERROR)
        self._wake(self._room)

    def _on_settings(self, flags: int, payload: bytes) -> None:
        if len(payload) % 6 or (flags & _ACK and payload):
            raise _ConnectionError(_FRAME_SIZE_ERROR)
        if flags & _ACK:
            return
        self._settled = True
        for name, value in struct.iter_unpack(">HI", payload):
            if name == _SET_WINDOW:
                for stream in self.streams.values():
                    stream.window += value - self.first_window
                self.first_window = value
                if max(value, *(stream.window for stream in self.streams.values()), 0) > _MOST_WINDOW:
                    raise _ConnectionError(_FLOW_CONTROL_ERROR)
            elif (name == _SET_PUSH and value > 1) or (
                name == _SET_FRAME and not _FRAME <= value <= _MOST_FRAME
            ):
                raise _ConnectionError(_PROTOCOL_ERROR)
        self.write(_frame(_SETTINGS, _ACK, 0, b""))
        self._wake(self._room)

    # ---- writing

    def write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)

    async def drain(self) -> None:
        """Until what was written has left for the most part."""
        while self._full and not self._transport.is_closing():
            await self._wait(self._drained)

    async def room(self) -> None:
        """Until the client has made room, perhaps."""
        if self._transport.is_closing():
            raise ConnectionError("the client is gone")
        await self._wait(self._room)

    async def _wait(self, waiting: list[asyncio.Future[None]]) -> None:
        future = self._server.loop.create_future()
        waiting.append(future)
        await future

    def _wake(self, waiting: list[asyncio.Future[None]]) -> None:
        for future in waiting:
            if not future.done():
                future.set_result(None)
        waiting.clear()

    def close(self, code: int = _NO_ERROR) -> None:
        """Tell the client up to which stream its calls were seen, and why; what was written is still sent."""
        self.write(_frame(_GOAWAY, 0, 0, struct.pack(">II", self._last_id, code)))
        self._transport.close()


class _ConnectionError(Exception):
    """The client broke the protocol: the connection ends."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def _unpadded(flags: int, payload: bytes) -> bytes:
    if not flags & _PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise _ConnectionError(_PROTOCOL_ERROR)
    return payload[1 : len(payload) - payload[0]]


class Server:
    """Serves routes, by their paths."""

    def __init__(self, routes: Mapping[str, Route]) -> None:
        self.routes = routes
        self.connections: set[_Connection] = set()
        self.loop: asyncio.AbstractEventLoop
        self._server: asyncio.Server

    async def start(self, *, sock: socket.socket | None = None, path: str | None = None) -> None:
        """Listen on a socket that is bound, or on a new unix socket."""
        self.loop = asyncio.get_running_loop()
        if sock is not None:
            self._server = await self.loop.create_server(lambda: _Connection(self), sock=sock, backlog=1024)
        else:
            self._server = await self.loop.create_unix_server(lambda: _Connection(self), path, backlog=1024)

    def close(self) -> None:
        """No new connections; calls that are under way are cancelled."""
        self._server.close()
        for connection in list(self.connections):
            for stream in list(connection.streams.values()):
                if stream.task is not None:
                    stream.task.cancel()
            connection.close()

    async def wait_closed(self) -> None:
        """Until every handler has ended."""
        tasks = [s.task for c in self.connections for s in c.streams.values() if s.task is not None]
        if tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait(tasks)
