"""Programs that are started in a container beside its own: their streams, kept until read, and their end.

`container_init` starts them. Pipes (or a terminal, made in the container) go over its control socket by descriptor,
so no byte of theirs passes through another process. Standard library only.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import signal
import socket
import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from pathlib import Path

_READ = 64 * 1024


class Spool:
    """What a stream has said so far, in a file without a name: read from any place, again, and waited for."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `close`
        self._size = 0
        self._ended = False
        self._news = asyncio.Event()

    def add(self, data: bytes) -> None:
        os.pwrite(self._file.fileno(), data, self._size)
        self._size += len(data)
        self._wake()

    def end(self) -> None:
        self._ended = True
        self._wake()

    def close(self) -> None:
        self.end()
        self._file.close()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def read(self, offset: int) -> AsyncIterator[bytes]:
        """From byte `offset` to the end of the stream, as it comes."""
        while True:
            news = self._news
            if offset < self._size and not self._file.closed:
                data = os.pread(self._file.fileno(), _READ, offset)
                offset += len(data)
                yield data
            elif self._ended:
                return
            else:
                await news.wait()


class Process:
    """One program in a container. `exit_code` is negative for a signal, None while it runs."""

    def __init__(self, folder: Path) -> None:
        self._loop = asyncio.get_running_loop()
        self.stdout, self.stderr = Spool(folder), Spool(folder)
        self.exit_code: int | None = None
        self.written = 0  # bytes of standard input so far
        self.input_closed = False
        self._input_lock = asyncio.Lock()
        self._input = -1
        self._terminal = False
        self._reading: dict[int, Spool] = {}
        self._channel: socket.socket | None = None
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._exited = asyncio.Event()

    async def start(
        self,
        pass_on: Callable[[Sequence[int]], None],
        *,
        argv: Sequence[str],
        env: Mapping[str, str],
        workdir: str,
        terminal: tuple[int, int] | None,
        merge_stderr: bool = False,
    ) -> None:
        """Start it; `pass_on` hands descriptors to `container_init`, `terminal` is its (rows, columns).

        Raises OSError when it cannot be started; a program that is not found ends with 127.
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._channel = ours
        document = {"argv": list(argv), "env": dict(env), "workdir": workdir, "terminal": terminal}
        passed = [theirs.detach(), os.memfd_create("plan")]  # in memory: it holds the container's secrets
        os.write(passed[1], json.dumps(document).encode())
        try:
            if terminal is None:
                self._pipes(passed, merge_stderr)
            else:
                self.stderr.end()
            pass_on(passed)
        finally:
            for descriptor in passed:
                os.close(descriptor)
        self._loop.add_reader(ours, self._hear)
        await self._started

    def _pipes(self, passed: list[int], merge_stderr: bool) -> None:
        read, self._input = os.pipe()
        passed.append(read)
        for spool in (self.stdout,) if merge_stderr else (self.stdout, self.stderr):
            read, write = os.pipe()
            passed.append(write)
            self._listen(read, spool)
        if merge_stderr:
            passed.append(os.dup(passed[-1]))
            self.stderr.end()
        os.set_blocking(self._input, False)

    def _listen(self, descriptor: int, spool: Spool) -> None:
        os.set_blocking(descriptor, False)
        self._reading[descriptor] = spool
        self._loop.add_reader(descriptor, self._pump, descriptor)

    def _pump(self, descriptor: int) -> None:
        spool = self._reading[descriptor]
        try:
            data = os.read(descriptor, _READ)
            if data:
                spool.add(data)
                return
        except BlockingIOError:
            return
        except OSError as error:
            # A terminal ends with EIO. Any other is the disk's: what cannot be kept is said in its place.
            if error.errno != errno.EIO:
                with contextlib.suppress(OSError):
                    spool.add(f"\n(output lost: {error})\n".encode())
        self._loop.remove_reader(descriptor)
        del self._reading[descriptor]
        if descriptor != self._input:
            os.close(descriptor)
        spool.end()

    def _hear(self) -> None:
        """A word from `container_init`, or the end of the container."""
        assert self._channel is not None
        try:
            data, descriptors, _, _ = socket.recv_fds(self._channel, 4096, 1)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        for descriptor in descriptors:  # the terminal: both our input and its output
            self._input, self._terminal = descriptor, True
            self._listen(descriptor, self.stdout)
        for line in data.decode(errors="replace").splitlines():
            word, _, rest = line.partition(" ")
            if word == "started" and not self._started.done():
                self._started.set_result(None)
            elif word == "error" and not self._started.done():
                self._started.set_exception(OSError(rest))
            elif word == "exit":
                self._end(int(rest))
        if not data:
            self._end(-signal.SIGKILL)

    def _end(self, code: int) -> None:
        if self._channel is not None:
            self._loop.remove_reader(self._channel)
            self._channel.close()
            self._channel = None
        if not self._started.done():
            self._started.set_exception(OSError("the container has ended"))
        if self.exit_code is None:
            self.exit_code = code
            self._exited.set()

    async def wait(self) -> int:
        await self._exited.wait()
        assert self.exit_code is not None
        return self.exit_code

    async def write(self, offset: int, data: bytes, *, end: bool) -> None:
        """Give it standard input from byte `offset` on; what it has got already is left out.

        Raises ValueError for a gap, and BrokenPipeError where it no longer reads.
        """
        async with self._input_lock:
            if offset > self.written:
                raise ValueError(f"offset {offset} is beyond the {self.written} bytes written")
            rest = memoryview(data)[self.written - offset :]
            while rest:
                if self._input < 0 or self.input_closed:
                    raise BrokenPipeError(errno.EPIPE, "standard input is closed")
                try:
                    sent = os.write(self._input, rest)
                except BlockingIOError:
                    await self._writable()
                    continue
                self.written += sent
                rest = rest[sent:]
            if end and not self.input_closed:
                self.input_closed = True
                if self._terminal:
                    with contextlib.suppress(OSError):
                        os.write(self._input, b"\x04")
                elif self._input >= 0:
                    os.close(self._input)
                    self._input = -1

    async def _writable(self) -> None:
        ready = asyncio.Event()
        self._loop.add_writer(self._input, ready.set)
        waiting = [asyncio.ensure_future(event.wait()) for event in (ready, self._exited)]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waiting:
                one.cancel()
            self._loop.remove_writer(self._input)
        if self._exited.is_set():
            raise BrokenPipeError(errno.EPIPE, "the program has ended")

    def kill(self) -> None:
        """End it, and what it has started in its own group."""
        if self._channel is not None:
            with contextlib.suppress(OSError):
                self._channel.send(b"kill\n")

    def close(self) -> None:
        """Forget it, and what it said."""
        self._end(-signal.SIGKILL)
        for descriptor in list(self._reading):
            self._loop.remove_reader(descriptor)
            del self._reading[descriptor]
            if descriptor != self._input:
                os.close(descriptor)
        if self._input >= 0:
            os.close(self._input)
            self._input = -1
        self.stdout.close()
        self.stderr.close()
