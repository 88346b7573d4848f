"""The plane's ports on the loopback, and the supervisor that keeps them while the plane is away. Standard library.

Every port that the plane listens on is opened here: the one of a plane that was killed is still open then, because
its supervisor held it, and is handed on. `supervisor.py` says what is said between the two.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger(__name__)

SUPERVISOR = Path(__file__).with_name("supervisor.py")
_RESPAWN_SECONDS = 5.0  # of supervisors that end sooner, the second is replaced that much later


class Listeners:
    """Listening sockets by port. Used without `supervise`, and for none that is given, they are plain sockets.

    `channel` and `inherited` are what a supervisor gave to this process, where it was one that started it.
    """

    def __init__(self, channel: socket.socket | None = None, inherited: Sequence[socket.socket] = ()) -> None:
        self._channel = channel
        self.inherited = channel is not None  # a supervisor started this process
        self._waiting = {int(listener.getsockname()[1]): listener for listener in inherited}
        self._open: dict[int, socket.socket] = {}

    def open(self, port: int) -> socket.socket:
        """Listen on 127.0.0.1:`port`, or on a free one for 0. Raises OSError or OverflowError where that cannot be."""
        listener = self._waiting.pop(port, None)
        if listener is None:
            # The protocol is named because asyncio sets TCP_NODELAY only where it is; without, a call takes 44 ms.
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(("127.0.0.1", port))
                listener.listen(1024)
            except BaseException:
                listener.close()
                raise
            self._tell(b"hold", listener)
        self._open[listener.getsockname()[1]] = listener
        return listener

    def close(self, port: int) -> None:
        """Listen there no longer."""
        if listener := self._open.pop(port, None):
            listener.close()
            self._tell(f"release {port}".encode())

    def serving(self) -> None:
        """Everything that is to listen does: what nobody wants any more of the plane before is given up."""
        for port, listener in self._waiting.items():
            listener.close()
            self._tell(f"release {port}".encode())
        self._waiting.clear()
        self._tell(b"serving")

    def stopping(self) -> None:
        """From now on nobody is to bring this plane back."""
        self._tell(b"stopping")

    async def supervise(self, command: Sequence[str], lock: int, state_dir: Path) -> None:
        """See to it that a supervisor is there that would start `command`. Runs for ever."""
        loop = asyncio.get_running_loop()
        short_lives = 0
        while True:
            began = time.monotonic()
            process = None
            if self._channel is None:
                process = await self._start_supervisor([str(lock), str(state_dir), *command], lock)
            assert self._channel is not None
            self._channel.setblocking(False)
            with contextlib.suppress(OSError):
                await loop.sock_recv(self._channel, 1)
            self._channel.close()
            self._channel = None
            if process is not None:
                await process.wait()
            log.warning("the supervisor was killed: another takes its place")
            short_lives = short_lives + 1 if time.monotonic() - began < _RESPAWN_SECONDS else 0
            if short_lives > 1:
                await asyncio.sleep(_RESPAWN_SECONDS)

    async def _start_supervisor(self, arguments: list[str], lock: int) -> asyncio.subprocess.Process:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(SUPERVISOR), str(theirs.fileno()), *arguments),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), lock],
                start_new_session=True,
            )
        self._channel = ours
        for listener in self._open.values():
            self._tell(b"hold", listener)
        self._tell(b"serving")
        return process

    def _tell(self, word: bytes, listener: socket.socket | None = None) -> None:
        """A supervisor that is not there needs to know nothing: the next one is told all."""
        if self._channel is not None:
            with contextlib.suppress(OSError):
                socket.send_fds(self._channel, [word], [listener.fileno()] if listener else [])
