"""Large data by HTTP, on a loopback port beside the gRPC one: blobs, and blocks of Volume files. Imports aiohttp.

As in the cloud, a URL is the permission: each carries a signature that only this plane can make.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import os
import secrets
import shutil
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from aiohttp import web
from modal_proto import api_pb2

from gpuctl.local.ids import content_id, is_id
from gpuctl.local.sandbox import EGRESS_PORT
from gpuctl.local.uploads import Wanted
from gpuctl.local.wire import Call, invalid, not_found, rpc

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from pathlib import Path

    from gpuctl.local.uploads import Uploads

    _Result = TypeVar("_Result")

_CHUNK = 1 << 20
_LARGE = 1 << 20  # a block of this size is worth looking for on this machine
_KEEP_SECONDS = 8 * 86400.0  # a day longer than the calls that name them
_HEX = frozenset("0123456789abcdef")


class Blobs:
    """Content-addressed files under `folder`, and the signed URLs that lead to them.

    `folder/files/<sha256>` holds mounted files, `folder/blobs/<id>` what BlobCreate announced.
    """

    def __init__(self, folder: Path, key: bytes) -> None:
        self._files = folder / "files"
        self._blobs = folder / "blobs"
        self._key = key
        self._runner: web.ServerRunner | None = None
        self.port = 0
        self._readers: dict[str, Callable[[str, int], tuple[Path, int, int]]] = {}
        self._uploads: Uploads | None = None
        # Threads of its own: hundreds of blocks may come at once, and what else blocks in the plane is not to wait.
        self._threads = ThreadPoolExecutor(os.cpu_count(), "blobs")
        for directory in (self._files, self._blobs):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    async def start(self, listener: socket.socket) -> None:
        """Serve what connects to a loopback port that listens."""
        self._runner = web.ServerRunner(
            web.Server(self._handle, access_log=None, read_bufsize=_CHUNK), shutdown_timeout=1
        )
        await self._runner.setup()
        self.port = int(listener.getsockname()[1])
        await web.SockSite(self._runner, listener, backlog=1024).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        if self._uploads is not None:
            self._uploads.stop()
        self._threads.shutdown(wait=False, cancel_futures=True)

    # ---- files by their SHA-256

    def file(self, sha256_hex: str) -> Path | None:
        """The file with this content, if it is here."""
        path = self._files / _checked_hash(sha256_hex)
        return path if path.exists() else None

    def executable(self, sha256_hex: str) -> Path | None:
        """The same with the executable bit set, as its own file: modes belong to files, not to names."""
        plain = self.file(sha256_hex)
        if plain is None:
            return None
        path = plain.with_name(plain.name + ".x")
        if not path.exists():
            part = path.with_name(f".{secrets.token_hex(8)}")
            shutil.copyfile(plain, part)
            part.chmod(0o755)
            part.replace(path)
        return path

    def put(self, sha256_hex: str, data: bytes) -> None:
        """Keep a file whose hash the client named; the hash is checked."""
        if hashlib.sha256(data).hexdigest() != _checked_hash(sha256_hex):
            raise invalid("The data does not have the SHA-256 that was given for it.")
        part = self._files / f".{secrets.token_hex(8)}"
        part.write_bytes(data)
        part.chmod(0o644)
        part.replace(self._files / sha256_hex)

    def put_blob(self, sha256_hex: str, blob_id: str) -> None:
        """The same of a blob, which may be of any size: its file gets a second name. Blocks while it is hashed."""
        path = self.blob(blob_id)
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != _checked_hash(sha256_hex):
                raise invalid("The data does not have the SHA-256 that was given for it.")
        part = path.with_name(f".{secrets.token_hex(8)}")
        part.hardlink_to(path)
        try:
            part.replace(self._files / sha256_hex)
        finally:
            part.unlink(missing_ok=True)  # replacing a name of the same file does nothing

    def blob(self, blob_id: str) -> Path:
        """Its file. Raises NOT_FOUND for one that was never uploaded."""
        path = self._blobs / blob_id
        if not is_id(blob_id, "bl") or not path.exists():
            raise not_found(f"Blob '{blob_id}' not found.")
        return path

    def sweep(self) -> None:
        """Remove the blobs of calls that are forgotten: arguments and results, older than any result is kept."""
        before = time.time() - _KEEP_SECONDS
        for path in self._blobs.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < before:
                    path.unlink()

    # ---- RPCs

    @rpc("BlobCreate", differs="always one PUT, never parts")
    async def create(self, request: Any, call: Call) -> Any:
        try:
            digest = base64.b64decode(request.content_sha256_base64, validate=True)
        except ValueError as error:  # also of text that is not ASCII
            raise invalid("content_sha256_base64 is not base64") from error
        blob_id = content_id("bl", digest)
        urls = api_pb2.UploadUrlList(items=[self.url(f"/blob/{blob_id}", call)])
        return api_pb2.BlobCreateResponse(blob_id=blob_id, blob_ids=[blob_id], upload_urls=urls)

    @rpc("BlobGet")
    async def get(self, request: Any, call: Call) -> Any:
        if not is_id(request.blob_id, "bl") or not (self._blobs / request.blob_id).exists():
            raise not_found(f"Blob '{request.blob_id}' not found.")
        return api_pb2.BlobGetResponse(download_url=self.url(f"/blob/{request.blob_id}", call))

    # ---- HTTP

    def url(self, path: str, call: Call) -> str:
        """A URL for `path` that this plane will honour, as the caller reaches it."""
        port = EGRESS_PORT if call.isolated else self.port
        return f"http://127.0.0.1:{port}{urllib.parse.quote(path)}?signature={self._sign(path)}"

    def serve(self, kind: str, find: Callable[[str, int], tuple[Path, int, int]]) -> None:
        """GET /KIND/NAME/BLOCK is answered by a part of a file, `find(name, block)`: (path, start, length)."""
        self._readers[kind] = find

    def receive(self, uploads: Uploads) -> None:
        """PUT /block/UPLOAD/INDEX/SHA256 goes there."""
        self._uploads = uploads

    def _sign(self, path: str) -> str:
        return hmac.new(self._key, path.encode(), hashlib.sha256).hexdigest()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if not hmac.compare_digest(request.query.get("signature", ""), self._sign(request.path)):
            return web.Response(status=403, text="the signature does not fit\n")
        kind, _, rest = request.path.lstrip("/").partition("/")
        if request.method == "PUT" and kind == "blob":
            return await self._receive(request, self._blobs / rest)
        if request.method == "PUT" and kind == "block":
            return await self._receive_block(request, *rest.split("/"))
        if request.method == "GET" and kind == "blob" and (self._blobs / rest).exists():
            return web.FileResponse(self._blobs / rest)
        if request.method == "GET" and kind in self._readers:
            name, _, block = rest.rpartition("/")
            try:
                return await _send(request, *self._readers[kind](name, int(block)))
            except OSError as error:
                return web.Response(status=404, text=f"{error}\n")
        return web.Response(status=404)

    async def _receive(self, request: web.BaseRequest, path: Path) -> web.Response:
        """Take a body in. Answers as S3 does, with the MD5 as ETag."""
        md5 = hashlib.md5(usedforsecurity=False)
        part = path.with_name(f".{secrets.token_hex(8)}")
        try:
            with part.open("wb") as file:
                async for data in request.content.iter_chunked(_CHUNK):
                    await self._in_thread(_keep, data, file, md5)
            part.replace(path)
        except OSError as error:
            return web.Response(status=507, text=f"could not be kept: {error}\n")
        finally:
            part.unlink(missing_ok=True)
        return web.Response(headers={"ETag": f'"{md5.hexdigest()}"'})

    async def _receive_block(
        self, request: web.BaseRequest, upload: str, index: str, sha256_hex: str
    ) -> web.StreamResponse:
        """Take a block in; the body of the answer is its name, by which the client refers to it."""
        assert self._uploads is not None
        writer = self._uploads.writer(upload, int(index))
        if writer is None:
            return web.Response(status=410, text="this upload is over\n")
        name = self._uploads.name_of(upload, int(index))
        answer = web.Response(body=name)
        try:
            if self._uploads.has(name) or await self._take_unsent(
                request, Wanted(upload, int(index), request.content_length or 0, sha256_hex)
            ):
                return await _answer_early(request, answer)
            async for data in request.content.iter_chunked(_CHUNK):
                await self._in_thread(writer.add, data)
            if not await self._in_thread(writer.commit, sha256_hex):
                return web.Response(
                    status=400, text="the data does not have the SHA-256 that was given for it\n"
                )
        except ValueError as error:
            return web.Response(status=413, text=f"{error}\n")
        except OSError as error:
            return web.Response(status=507, text=f"could not be kept: {error}\n")
        finally:
            writer.close()
        return answer

    async def _take_unsent(self, request: web.BaseRequest, block: Wanted) -> bool:
        """Whether a large block could be read from the file that its sender has open on this machine."""
        transport = request.transport
        if block.length < _LARGE or transport is None:
            return False
        assert self._uploads is not None
        if self._uploads.promise(block):
            return True
        peer = transport.get_extra_info("peername")
        transport.pause_reading()  # what is not read, the client does not go on to send
        try:
            return await self._in_thread(self._uploads.take, block, peer[:2], self.port)
        finally:
            transport.resume_reading()

    async def _in_thread(self, work: Callable[..., _Result], *arguments: Any) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)


def _keep(data: bytes, file: BinaryIO, digest: hashlib._Hash) -> None:
    file.write(data)
    digest.update(data)


async def _answer_early(request: web.BaseRequest, answer: web.Response) -> web.Response:
    """Answer, and read what still comes of the body: the answer could get lost if that were refused."""
    await answer.prepare(request)
    await answer.write_eof()
    with contextlib.suppress(Exception):  # the client has stopped sending, as it may
        while await request.content.readany():
            pass
    return answer


async def _send(request: web.BaseRequest, path: Path, start: int, length: int) -> web.StreamResponse:
    """A part of a file: a first piece with the headers, the rest by sendfile, which copies nothing."""
    response = web.StreamResponse()
    response.content_length = length
    with path.open("rb") as file:
        first = os.pread(file.fileno(), min(length, 64 << 10), start)
        await response.prepare(request)
        await response.write(first)
        if len(first) < length:
            assert request.transport is not None
            await asyncio.get_running_loop().sendfile(
                request.transport, file, start + len(first), length - len(first)
            )
    await response.write_eof()
    return response


def _checked_hash(sha256_hex: str) -> str:
    """A hash becomes a file name: nothing but 64 hexadecimal digits gets through."""
    if len(sha256_hex) != 64 or not set(sha256_hex) <= _HEX:
        raise invalid(f"'{sha256_hex}' is not a SHA-256 in hexadecimal.")
    return sha256_hex
