"""The HTTP side of a server: one loopback port, and requests carried to containers as they come. Imports aiohttp.

Bodies are streamed both ways, chunk by chunk, and never decoded; WebSockets pass; a client that leaves is noticed by
the container. Which container takes a request, or why none does, is the pool's decision (`Route`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import aiohttp
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from gpuctl.local.proxy_tokens import bearer_token

if TYPE_CHECKING:
    from types import TracebackType

    from gpuctl.local.listeners import Listeners

# RFC 9110, section 7.6.1: these speak of one connection, not of the message.
_HOP_BY_HOP = frozenset(
    (
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    )
)
_CREDENTIALS = frozenset(("modal-key", "modal-secret", "modal-authorization"))
_SESSION = "Modal-Session-ID"
# aiohttp answers `Expect: 100-continue` itself; a WebSocket's own headers are made anew on each side.
_NOT_FORWARDED = _HOP_BY_HOP | _CREDENTIALS | {"expect"}
_WEBSOCKET = frozenset(
    (
        "sec-websocket-key",
        "sec-websocket-version",
        "sec-websocket-protocol",
        "sec-websocket-extensions",
        "sec-websocket-accept",
    )
)
# Addresses as /proc/net/tcp writes them: four bytes at a time, in the machine's order.
_TCP_LISTEN = "0A"
_LOOPBACK_V4 = ("00000000", "0100007F")
_LOOPBACK_V6 = ("0" * 32, "0000000000000000FFFF00000100007F")
_AUTOMATIC = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")


@dataclass(frozen=True)
class Refusal:
    """An answer of the router itself."""

    status: int
    text: str
    retry_after: int | None = None


class Slot(Protocol):
    """A place in a container for one request; leaving the context gives it back."""

    upstream: Upstream
    port: int

    def __enter__(self) -> Slot: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


Route = Callable[[str], "Slot | Refusal"]  # from the session id, "" for none
Authorize = Callable[[CIMultiDictProxy[str]], "Refusal | None"]


class Upstream:
    """HTTP to one container, over the unix socket that leads to its port."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._session: aiohttp.ClientSession | None = None

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(str(self._path), limit=0),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),
                auto_decompress=False,
                skip_auto_headers=_AUTOMATIC,
            )
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


def listens(pid: int, port: int) -> bool:
    """Whether something accepts connections to 127.0.0.1:`port` in the network that process `pid` lives in.

    Read from the kernel's table and not tried: a connection would be the app's first, and it would log it.
    """
    for table, any_or_loopback in (("tcp", _LOOPBACK_V4), ("tcp6", _LOOPBACK_V6)):
        try:
            lines = Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            local, state = line.split()[1], line.split()[3]
            address, _, number = local.partition(":")
            if state == _TCP_LISTEN and int(number, 16) == port and address in any_or_loopback:
                return True
    return False


class Router:
    """Listens on a loopback port and carries requests to where `route` says."""

    def __init__(self, authorize: Authorize, route: Route, listeners: Listeners) -> None:
        self._authorize = authorize
        self._route = route
        self._listeners = listeners
        self._runner: web.ServerRunner | None = None
        self._site: web.BaseSite | None = None
        self.port = 0

    async def listen(self, port: int) -> int:
        """Bind `port`, or a free one where that is 0 or taken; returns the port."""
        server = web.Server(
            self._handle,
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,
            keepalive_timeout=75,
        )
        self._runner = web.ServerRunner(server, shutdown_timeout=0.5)
        await self._runner.setup()
        try:
            listener = self._listeners.open(port)
        except OSError:
            listener = self._listeners.open(0)
        self.port = int(listener.getsockname()[1])
        self._site = web.SockSite(self._runner, listener, backlog=1024)
        await self._site.start()
        return self.port

    async def stop_listening(self) -> None:
        """Release the port; requests that are under way go on."""
        if self._site is not None:
            site, self._site = self._site, None
            await site.stop()
            self._listeners.close(self.port)

    async def close(self) -> None:
        """End it, and what is under way."""
        await self.stop_listening()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        refusal = self._authorize(request.headers)
        if refusal is not None:
            return _answer(refusal)
        slot = self._route(request.headers.get(_SESSION, ""))
        if isinstance(slot, Refusal):
            return _answer(slot)
        with slot:
            try:
                if _is_websocket(request):
                    return await self._websocket(request, slot)
                return await self._forward(request, slot)
            except aiohttp.WSServerHandshakeError as error:
                return _answer(Refusal(error.status, error.message))
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
                return _answer(Refusal(502, f"the container ended the connection: {error}"))

    async def _forward(self, request: web.BaseRequest, slot: Slot) -> web.StreamResponse:
        async with slot.upstream.session.request(
            request.method,
            _inner_url(request, slot),
            headers=_request_headers(request, _NOT_FORWARDED),
            data=request.content if request.body_exists else None,
            allow_redirects=False,
        ) as answer:
            response = web.StreamResponse(
                status=answer.status, reason=answer.reason, headers=_without(answer.headers, _HOP_BY_HOP)
            )
            response.force_close() if answer.headers.get("Connection", "").lower() == "close" else None
            await response.prepare(request)
            try:
                async for data in answer.content.iter_any():
                    await response.write(data)
            except (aiohttp.ClientError, ConnectionError):
                # The head is sent, so all that is left is to break off: a client must not take this for the end.
                if request.transport is not None:
                    request.transport.abort()
                return response
            await response.write_eof()
            return response

    async def _websocket(self, request: web.BaseRequest, slot: Slot) -> web.StreamResponse:
        protocols = [
            p.strip() for p in request.headers.get("Sec-WebSocket-Protocol", "").split(",") if p.strip()
        ]
        async with slot.upstream.session.ws_connect(
            _inner_url(request, slot),
            protocols=protocols,
            headers=_request_headers(request, _NOT_FORWARDED | _WEBSOCKET),
            autoping=False,
            autoclose=False,
            max_msg_size=0,
        ) as inner:
            outer = web.WebSocketResponse(
                protocols=[inner.protocol] if inner.protocol else (),
                autoping=False,
                autoclose=False,
                max_msg_size=0,
            )
            await outer.prepare(request)
            pumps = {asyncio.create_task(_pump(outer, inner)), asyncio.create_task(_pump(inner, outer))}
            try:
                done, _ = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                code = done.pop().result()
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
            # 1005 and 1006 stand for "no code" and "no close"; neither may be sent.
            code = aiohttp.WSCloseCode.OK if code in (None, 1005, 1006) else code
            await asyncio.gather(outer.close(code=code), inner.close(code=code), return_exceptions=True)
            return outer


_WebSocket = web.WebSocketResponse | aiohttp.ClientWebSocketResponse


async def _pump(source: _WebSocket, target: _WebSocket) -> int | None:
    """Carry messages one way until the source closes; returns its close code."""
    with contextlib.suppress(ConnectionError, RuntimeError):
        while True:
            message = await source.receive()
            if message.type is aiohttp.WSMsgType.TEXT:
                await target.send_str(message.data)
            elif message.type is aiohttp.WSMsgType.BINARY:
                await target.send_bytes(message.data)
            elif message.type is aiohttp.WSMsgType.PING:
                await target.ping(message.data)
            elif message.type is aiohttp.WSMsgType.PONG:
                await target.pong(message.data)
            elif message.type is aiohttp.WSMsgType.CLOSE:
                return int(message.data) if message.data else None
            else:
                break
    return aiohttp.WSCloseCode.GOING_AWAY  # it broke


def _inner_url(request: web.BaseRequest, slot: Slot) -> URL:
    """The same path and query, byte for byte, on the container's own loopback."""
    path = request.raw_path if request.raw_path.startswith("/") else "/"
    return URL(f"http://127.0.0.1:{slot.port}{path}", encoded=True)


def _is_websocket(request: web.BaseRequest) -> bool:
    return (
        request.headers.get("Upgrade", "").lower() == "websocket"
        and "upgrade" in request.headers.get("Connection", "").lower()
    )


def _without(headers: CIMultiDictProxy[str], dropped: frozenset[str]) -> CIMultiDict[str]:
    """The headers without `dropped`, and without those that `Connection` names."""
    named = {name.strip().lower() for value in headers.getall("Connection", []) for name in value.split(",")}
    return CIMultiDict(
        (k, v) for k, v in headers.items() if k.lower() not in dropped and k.lower() not in named
    )


def _request_headers(request: web.BaseRequest, dropped: frozenset[str]) -> CIMultiDict[str]:
    headers = _without(request.headers, dropped)
    if bearer_token(headers.get("Authorization", "")):
        del headers["Authorization"]  # it was for the router; the app has no use for it, and its logs neither
    peer = request.remote or "127.0.0.1"
    before = headers.get("X-Forwarded-For")
    headers["X-Forwarded-For"] = f"{before}, {peer}" if before else peer
    headers.setdefault("X-Forwarded-Proto", "http")
    return headers


def _answer(refusal: Refusal) -> web.Response:
    headers = {"Retry-After": str(refusal.retry_after)} if refusal.retry_after is not None else {}
    return web.Response(status=refusal.status, text=f"modal-http: {refusal.text}\n", headers=headers)
