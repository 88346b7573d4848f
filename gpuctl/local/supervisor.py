"""What brings a killed plane back: a small process that outlives it and holds its ports. Run by path.

Run as `python -I -S supervisor.py CHANNEL LOCK STATE_DIR COMMAND…` by a plane that serves (`listeners`). CHANNEL is
one end of a socket pair; as long as the plane has the other, nothing is to be done, and no poll wakes this process.
When that closes without a word, the plane was killed or has crashed: COMMAND starts another, which finds the lock of
the state directory (LOCK) held for it and the ports listening, so that whoever connects meanwhile waits instead of
being refused. The plane in turn replaces a supervisor that was killed; only who kills both at once ends both.

From the plane, one message each:
    `hold`          with a descriptor: a port that listens
    `release PORT`  that port is listened on no longer
    `serving`       it answers
    `stopping`      it is being stopped: this process ends

Standard library only, nothing of gpuctl's, few modules: it waits for as long as the plane lives.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time

_SHORT_SECONDS = 5.0  # a plane that ends sooner is started again more slowly each time
_LONGEST_DELAY = 2.0
_MOST_FAILED_STARTS = 5  # in a row, that never served
_MOST_SHORT_LIVES = 100  # in a row
_LOG_FILE, _LOCK_FILE = "plane.log", "lock"


class Supervisor:
    """The plane's ports and its channel; `watch` for its end, `start` another."""

    def __init__(self, channel: socket.socket, lock: int, state_dir: str, command: list[str]) -> None:
        self._channel = channel
        self._lock = lock
        self._state_dir = state_dir
        self._command = command
        self._listeners: dict[int, socket.socket] = {}
        self._pid = 0  # of a plane that is our child
        self._began = time.monotonic()
        self._failed_starts = 0
        self._short_lives = 0

    def run(self) -> None:
        """Until the plane is stopped, or cannot be kept up."""
        while not self._watch():
            how = self._end()
            if not self._is_locked():
                return  # the state directory was removed, or is another
            self._short_lives = (
                0 if time.monotonic() - self._began > _SHORT_SECONDS else self._short_lives + 1
            )
            never_served = self._failed_starts >= _MOST_FAILED_STARTS
            if never_served or self._short_lives >= _MOST_SHORT_LIVES:
                times = self._failed_starts if never_served else self._short_lives
                self._say("ERROR", f"the plane {how}, for the {times}th time in a row: it stays down")
                self._say("ERROR", "what was wrong with it is said above; `gpuctl local up` tries again")
                return
            self._say("WARNING", f"the plane {how}: another takes its place")
            if self._short_lives > 1:
                time.sleep(min(0.1 * 2 ** min(self._short_lives - 2, 10), _LONGEST_DELAY))
            self._start()

    def _watch(self) -> bool:
        """Until the plane ends; True where that is wanted."""
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._channel, 256, 1, socket.MSG_CMSG_CLOEXEC)
            except OSError:
                return False
            word, _, rest = data.decode().partition(" ")
            if word == "hold":
                listener = socket.socket(fileno=descriptors[0])
                self._release(port := listener.getsockname()[1])
                self._listeners[port] = listener
            elif word == "release":
                self._release(int(rest))
            elif word == "serving":
                self._failed_starts = 0
            else:
                return word == "stopping"

    def _release(self, port: int) -> None:
        if listener := self._listeners.pop(port, None):
            listener.close()

    def _end(self) -> str:
        """How the plane ended, as far as one can know of what is not one's own child."""
        self._channel.close()
        try:
            code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1]) if self._pid else None
        except ChildProcessError:
            code = None
        if code is None:
            return "was killed or crashed"
        return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"

    def _is_locked(self) -> bool:
        """Whether the lock that we hold is the state directory's."""
        try:
            return os.path.samestat(os.fstat(self._lock), os.stat(os.path.join(self._state_dir, _LOCK_FILE)))
        except OSError:
            return False

    def _start(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        given = [theirs.fileno(), self._lock, *(listener.fileno() for listener in self._listeners.values())]
        self._began = time.monotonic()
        self._failed_starts += 1  # until it says that it serves
        self._pid = os.fork()
        if not self._pid:
            try:
                for descriptor in given:
                    os.set_inheritable(descriptor, True)
                os.execv(self._command[0], [*self._command, "--inherit", ",".join(map(str, given))])
            finally:
                os._exit(127)
        theirs.close()

    def _say(self, level: str, text: str) -> None:
        now = time.time()
        stamp = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now))},{int(now % 1 * 1000):03}"
        line = f"{stamp} {level} gpuctl.local.supervisor: {text}\n"
        path = os.path.join(self._state_dir, _LOG_FILE)
        try:
            log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            os.write(log, line.encode())
            os.close(log)
        except OSError:
            pass  # a full disk is no reason to leave the plane down


def main() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    channel, lock, state_dir, *command = sys.argv[1:]
    for descriptor in (int(channel), int(lock)):
        os.set_inheritable(descriptor, False)
    Supervisor(socket.socket(fileno=int(channel)), int(lock), state_dir, command).run()


if __name__ == "__main__":
    main()
