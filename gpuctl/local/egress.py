"""The way out for containers with a network of their own: an HTTP proxy on a unix socket. Standard library only.

A server's container can reach its own loopback and nothing else; so that engines can download weights, it gets
HTTP_PROXY and HTTPS_PROXY, which lead here. As in the cloud, this machine's own loopback cannot be reached through
it, but for the plane's signed URLs (blobs, files of Volumes), which a container asks for as its own. Where the plane
itself has to use a proxy (its environment says so), this one goes through that. A function with `block_network`
has the signed URLs alone.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ipaddress
import socket
import urllib.parse
import urllib.request
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_CHUNK = 64 * 1024
_CONNECT_SECONDS = 30
_HEAD_BYTES = 64 * 1024


class EgressProxy:
    """Serves CONNECT (https) and absolute-form (http) requests on the unix socket `path`.

    A request for a mere path goes to the plane's own port `http_port`, which serves signed URLs alone; 0 for none.
    With `only_plane`, that is all that goes anywhere.
    """

    def __init__(self, path: Path, http_port: int = 0, *, only_plane: bool = False) -> None:
        self.path = path
        self._only_plane = only_plane
        self._http_port = http_port
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_unix_server(self._serve, self.path, limit=_HEAD_BYTES)

    async def close(self) -> None:
        """Stop listening and remove the socket."""
        if self._server is not None:
            self._server.close()
        self.path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            method, target, _version = head.split(b"\r\n", 1)[0].decode("latin1").split(" ")
            if self._only_plane and not target.startswith("/"):
                raise PermissionError(f"{target}: the network of this container is blocked")
            if method == "CONNECT":
                await self._tunnel(target, reader, writer)
            else:
                await self._forward(method, target, head, reader, writer)
        except (
            PermissionError,
            OSError,
            ValueError,
            asyncio.IncompleteReadError,
            asyncio.LimitOverrunError,
        ) as error:
            status = "403 Forbidden" if isinstance(error, PermissionError) else "502 Bad Gateway"
            with contextlib.suppress(OSError):
                body = f"{error}\n".encode(errors="replace")
                writer.write(
                    f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
                    + body
                )
                await writer.drain()
        finally:
            writer.close()

    async def _tunnel(self, target: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = _host_and_port(target, 443)
        if (parent := _parent_proxy("https", host)) is not None:
            out_reader, out_writer = await _connect(parent.hostname or "", parent.port or 80, trusted=True)
            out_writer.write(
                f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{_authorization(parent)}\r\n".encode()
            )
            answer = await out_reader.readuntil(b"\r\n\r\n")
            if b" 200" not in answer.split(b"\r\n", 1)[0]:
                out_writer.close()
                raise OSError(
                    f"the machine's own proxy refused {target}: {answer.splitlines()[0].decode('latin1')}"
                )
        else:
            out_reader, out_writer = await _connect(host, port)
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await _join(reader, writer, out_reader, out_writer)

    async def _forward(
        self,
        method: str,
        target: str,
        head: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        own = target.startswith("/") and self._http_port
        url = urllib.parse.urlsplit(f"http://127.0.0.1:{self._http_port}{target}" if own else target)
        if url.scheme != "http" or not url.hostname:
            raise ValueError(f"only absolute http:// addresses can be asked for here, not {target}")
        _, headers = head.split(b"\r\n", 1)
        kept = [
            h for h in headers.split(b"\r\n") if h and not h.lower().startswith((b"proxy-", b"connection:"))
        ]
        if not own and (parent := _parent_proxy("http", url.hostname)) is not None:
            out_reader, out_writer = await _connect(parent.hostname or "", parent.port or 80, trusted=True)
            first = f"{method} {target} HTTP/1.1\r\n{_authorization(parent)}"
        else:
            out_reader, out_writer = await _connect(url.hostname, url.port or 80, trusted=bool(own))
            path = urllib.parse.urlunsplit(("", "", url.path or "/", url.query, ""))
            first = f"{method} {path} HTTP/1.1\r\n"
        # One request a connection: the next one may be for another host.
        out_writer.write(first.encode("latin1") + b"\r\n".join([*kept, b"Connection: close", b"", b""]))
        await _join(reader, writer, out_reader, out_writer)


def _host_and_port(target: str, default: int) -> tuple[str, int]:
    parts = urllib.parse.urlsplit("//" + target)
    if not parts.hostname:
        raise ValueError(f"no host in {target!r}")
    return parts.hostname, parts.port or default


def _parent_proxy(scheme: str, host: str) -> urllib.parse.SplitResult | None:
    """The proxy that this machine's own settings name for `host`, if any."""
    proxy = urllib.request.getproxies().get(scheme)
    if not proxy or urllib.request.proxy_bypass(host):
        return None
    return urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")


def _authorization(parent: urllib.parse.SplitResult) -> str:
    if not parent.username:
        return ""
    pair = f"{urllib.parse.unquote(parent.username)}:{urllib.parse.unquote(parent.password or '')}"
    return f"Proxy-Authorization: Basic {base64.b64encode(pair.encode()).decode()}\r\n"


async def _connect(
    host: str, port: int, *, trusted: bool = False
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to `host`. Unless `trusted`, raises PermissionError where that is this machine itself."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(info[4][0]) for info in found]
    if not trusted:
        addresses = [a for a in addresses if not _is_this_machine(a)]
        if not addresses:
            raise PermissionError(
                f"{host} is this machine: a container cannot reach it, nor could it in the cloud"
            )
    # The address that was checked is the address that is used: a name may resolve differently the next time.
    return await asyncio.wait_for(asyncio.open_connection(addresses[0], port), _CONNECT_SECONDS)


def _is_this_machine(address: str) -> bool:
    ip = ipaddress.ip_address(address.split("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return ip.is_loopback or ip.is_unspecified or ip.is_link_local


async def _join(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    out_reader: asyncio.StreamReader,
    out_writer: asyncio.StreamWriter,
) -> None:
    """Carry bytes both ways until both directions have ended."""

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(_CHUNK):
                sink.write(data)
                await sink.drain()
            if sink.can_write_eof():
                sink.write_eof()

    try:
        await asyncio.gather(copy(reader, out_writer), copy(out_reader, writer))
    finally:
        out_writer.close()
