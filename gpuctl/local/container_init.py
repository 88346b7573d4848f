"""Process 1 of a container: makes its mounts, starts its program, carries its connections, reaps, ends it all.

Run as `python -I -S container_init.py CONTROL_FD PLAN.json`, already inside new namespaces. Standard library only,
nothing of gpuctl's: it runs under whatever interpreter the plane has and must start in milliseconds.

It talks to the plane over one inherited socket, in lines:
    from the plane   `term`, `int`         SIGTERM or SIGINT to the program, so that its exit hooks run
                     `listen PORT PATH`    accept on the unix socket PATH for 127.0.0.1:PORT in here
                     `exec N`              start one more program; N descriptors come with it, see `Execution`
    to the plane     `started PID`, `exit CODE` (negative: killed by that signal), `error TEXT`
When the socket closes, the plane is gone (or wants an end): this process exits, and with process 1 the kernel ends
every process of the container. Nothing can be orphaned.
"""

from __future__ import annotations

import array  # noqa: F401 socket.recv_fds imports it when it is called, see below
import contextlib
import ctypes
import errno
import fcntl
import json
import os
import selectors
import signal
import socket
import struct
import sys
import termios
import warnings  # noqa: F401 os.execvpe likewise: in an image of its own this interpreter's files are gone by then

TYPE_CHECKING = False  # as typing's, which takes longer to import than a container takes to start
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
SYS_MOUNT_SETATTR = 442  # the same on every architecture
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = -100, 0x8000, 1
PR_CAPBSET_READ, PR_CAPBSET_DROP, CAPABILITY_VERSION_3 = 23, 24, 0x20080522
# chown, dac_override, fowner, fsetid, kill, setgid, setuid, setpcap, net_bind_service, net_raw, sys_chroot,
# sys_ptrace, mknod, audit_write, setfcap
CAPABILITIES = frozenset((0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 19, 27, 29, 31))

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    arguments = [s.encode() if s else None for s in (source, target, kind)]
    check(
        libc.mount(*arguments, ctypes.c_ulong(flags), data.encode() or None),
        f"mount {kind or source} at {target}",
    )


def make_read_only(target: str) -> None:
    """The whole tree under `target`, submounts too, as far as the kernel can (5.12 and newer)."""
    attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY, 0, 0, 0)
    if (
        libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, target.encode(), AT_RECURSIVE, attributes, len(attributes))
        == 0
    ):
        return
    # Older kernels: the top mount only, keeping the flags that a user namespace may not drop.
    locked = os.statvfs(target).f_flag & (MS_NOSUID | MS_NODEV | 8 | 1024 | 2048)
    mount(None, target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | locked)


def make_mountpoint(path: str, like: str) -> None:
    """A file or folder to mount upon, of the same sort as `like`."""
    if os.path.lexists(path):
        return
    if os.path.isdir(like):
        os.makedirs(path, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w"):
            pass


def make_mounts(mounts: Sequence[dict[str, str]], root: str) -> None:
    """Make the mounts under `root` (an empty folder) and make that the root. Only for the `unshare` back end."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    for step in mounts:
        kind, source, target = step["kind"], step["source"], root + step["target"].rstrip("/")
        if kind == "tmpfs":
            os.makedirs(target, exist_ok=True)
            mount("tmpfs", target, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755")
        elif kind in ("bind", "ro_bind"):
            make_mountpoint(target, source)
            mount(source, target, None, MS_BIND | MS_REC)
            if kind == "ro_bind":
                make_read_only(target)
        elif kind == "symlink":
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.symlink(source, target)
        elif kind == "proc":
            os.makedirs(target, exist_ok=True)
            mount("proc", target, "proc", MS_NOSUID | MS_NODEV | 8)
        elif kind == "dev":
            make_devices(target)
        elif kind == "overlay":
            os.makedirs(target, exist_ok=True)
            mount("overlay", target, "overlay", MS_NOSUID | MS_NODEV, source)
        elif kind == "dir":
            os.makedirs(target, exist_ok=True)
    os.chdir(root)
    machine = os.uname().machine
    if machine not in SYS_PIVOT_ROOT:
        raise OSError(errno.ENOSYS, f"pivot_root: unknown on {machine}; install bubblewrap")
    check(libc.syscall(SYS_PIVOT_ROOT[machine], b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "umount of the old root")
    os.chdir("/")


def make_devices(dev: str) -> None:
    """A `/dev` of the container's own: the harmless devices, its own terminals, its own shared memory."""
    os.makedirs(dev, exist_ok=True)
    mount("tmpfs", dev, "tmpfs", MS_NOSUID, "mode=0755")
    for name in ("null", "zero", "full", "random", "urandom", "tty"):
        make_mountpoint(f"{dev}/{name}", f"/dev/{name}")
        mount(f"/dev/{name}", f"{dev}/{name}", None, MS_BIND)
    os.mkdir(f"{dev}/pts")
    mount("devpts", f"{dev}/pts", "devpts", MS_NOSUID | 8, "newinstance,ptmxmode=0666,mode=0620")
    os.mkdir(f"{dev}/shm")
    mount("tmpfs", f"{dev}/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    os.symlink("pts/ptmx", f"{dev}/ptmx")
    os.symlink("/proc/self/fd", f"{dev}/fd")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", f"{dev}/{name}")


def raise_loopback() -> None:
    """A new network namespace has its loopback down; ioctl SIOCSIFFLAGS with IFF_UP | IFF_RUNNING."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", 0x1 | 0x40))


def drop_capabilities() -> None:
    """Keep what Docker's containers have, and ptrace; above all not what mounts: with that a program could take away
    what hides the plane's state, and make writable what it sees of this machine. A user namespace that it makes has
    all capabilities, but the kernel locks the mounts that it inherits.
    """
    for number in range(64):
        if number not in CAPABILITIES and libc.prctl(PR_CAPBSET_READ, number, 0, 0, 0) == 1:
            check(libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0), "prctl PR_CAPBSET_DROP")
    # What is bounded above concerns the programs that are executed; this, ourselves.
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    data = ctypes.create_string_buffer(24)
    check(libc.capget(header, data), "capget")
    kept = sum(1 << number for number in CAPABILITIES)
    low, high = kept & 0xFFFFFFFF, kept >> 32
    masks = (
        low,
        low,
        low,
        high,
        high,
        high,
    )  # effective, permitted, inheritable; of the first 32, and of the rest
    had = struct.unpack("=6I", data)
    check(
        libc.capset(header, struct.pack("=6I", *(a & b for a, b in zip(had, masks, strict=True)))), "capset"
    )


HALVES: dict[socket.socket, Half] = {}  # socket -> the Half that serves it


class Relay:
    """Carries bytes between pairs of sockets, and accepts new pairs, on one selector. No byte is kept for long."""

    CHUNK = 256 * 1024

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self.selector = selector

    def accept_on(self, listener: socket.socket, connect: Callable[[], socket.socket]) -> None:
        """Join each connection to `listener` with a new socket from `connect()`."""
        listener.setblocking(False)
        self.selector.register(listener, selectors.EVENT_READ, lambda _events: self.accept(listener, connect))

    def accept(self, listener: socket.socket, connect: Callable[[], socket.socket]) -> None:
        try:
            one, _ = listener.accept()
        except OSError:
            return
        try:
            other = connect()
        except OSError:
            one.close()  # nobody listens in there (yet): the caller sees a closed connection
            return
        for end, peer in ((one, other), (other, one)):
            end.setblocking(False)
            HALVES[end] = Half(self.selector, end, peer)
        for end in (one, other):
            HALVES[end].watch()


class Half:
    """One end of a relayed connection: what it reads is written to its peer."""

    def __init__(self, selector: selectors.BaseSelector, end: socket.socket, peer: socket.socket) -> None:
        self.selector, self.end, self.peer = selector, end, peer
        self.unsent = b""  # bytes for *this* end that it did not take yet
        self.reading, self.finishing, self.registered = True, False, 0

    def watch(self) -> None:
        other = HALVES.get(self.peer)
        events = 0
        if self.reading and not (other and other.unsent):
            events |= selectors.EVENT_READ
        if self.unsent:
            events |= selectors.EVENT_WRITE
        if events == self.registered:
            return
        if not self.registered:
            self.selector.register(self.end, events, self.ready)
        elif not events:
            self.selector.unregister(self.end)
        else:
            self.selector.modify(self.end, events, self.ready)
        self.registered = events

    def ready(self, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                self.flush()
            if events & selectors.EVENT_READ and self.reading:
                self.read()
        except OSError:
            self.close()
            return
        for half in (self, HALVES.get(self.peer)):
            if half and half.end.fileno() >= 0:
                half.watch()
        other = HALVES.get(self.peer)
        if other and not self.reading and not other.reading and not self.unsent and not other.unsent:
            self.close()

    def read(self) -> None:
        try:
            data = self.end.recv(Relay.CHUNK)
        except BlockingIOError:
            return
        other = HALVES[self.peer]
        if data:
            other.send(data)
        else:
            self.reading = False
            other.finishing = True
            other.flush()

    def send(self, data: bytes) -> None:
        try:
            sent = self.end.send(data)
        except BlockingIOError:
            sent = 0
        self.unsent = data[sent:]

    def flush(self) -> None:
        if self.unsent:
            self.send(self.unsent)
        if self.finishing and not self.unsent:
            self.finishing = False
            self.end.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for half in (self, HALVES.pop(self.peer, None)):
            if half is None:
                continue
            HALVES.pop(half.end, None)
            if half.registered:
                half.registered = 0
                self.selector.unregister(half.end)
            half.end.close()


def connect_tcp(port: int) -> Callable[[], socket.socket]:
    def connect() -> socket.socket:
        # Not create_connection: that imports a codec, of a Python that is no longer there in an image of its own.
        end = socket.socket(socket.AF_INET)
        end.settimeout(5)
        end.connect(("127.0.0.1", port))
        return end

    return connect


def connect_unix(path: str) -> Callable[[], socket.socket]:
    def connect() -> socket.socket:
        end = socket.socket(socket.AF_UNIX)
        end.settimeout(5)
        end.connect(path)
        return end

    return connect


def start_program(plan: dict[str, Any], streams: Sequence[int] = (), *, terminal: bool = False) -> int:
    """Fork and execute; `streams` become its standard ones, of which a terminal becomes its controlling one."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        for number, descriptor in enumerate(streams):
            os.dup2(descriptor, number)
        if terminal:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.makedirs(plan["workdir"], exist_ok=True)
        os.chdir(plan["workdir"])
        os.execvpe(plan["argv"][0], plan["argv"], plan["env"])
    except BaseException as error:
        os.write(2, f"container: cannot start {plan['argv'][0]}: {error}\n".encode())
    finally:
        os._exit(127)


class Execution:
    """A program that is started beside the first: `modal container exec`.

    Its descriptors are a channel, a file with its plan, and its three standard streams, or none for a terminal: that
    is made in here, where it has a name, and its other end is sent back. The channel carries `started` or `error TEXT`
    and `exit CODE` to the plane, and `kill` from it.
    """

    def __init__(self, descriptors: list[int], on_word: Callable[[Execution], None]) -> None:
        channel, plan_file, *streams = descriptors
        self.channel = socket.socket(fileno=channel)
        with os.fdopen(plan_file) as file:
            file.seek(0)
            plan = json.load(file)
        self.on_word = on_word
        ours: list[int] = []
        if plan["terminal"]:
            master, slave = os.openpty()
            size = struct.pack("HHHH", *plan["terminal"], 0, 0)
            fcntl.ioctl(slave, termios.TIOCSWINSZ, size)
            streams, ours = [slave] * 3, [master]
        self.pid = start_program(plan, streams, terminal=bool(ours))
        for descriptor in set(streams):
            os.close(descriptor)
        socket.send_fds(self.channel, [b"started\n"], ours)
        for descriptor in ours:
            os.close(descriptor)

    def ready(self, _events: int) -> None:
        """`kill`, or the plane has forgotten it, which leaves it running."""
        self.on_word(self)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def ended(self, code: int) -> None:
        with contextlib.suppress(OSError):
            self.channel.sendall(f"exit {code}\n".encode())


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)

    def tell(line: str) -> None:
        try:
            control.sendall(line.encode() + b"\n")
        except OSError:
            os._exit(1)

    try:
        with open(sys.argv[2]) as file:
            plan = json.load(file)
        if plan["mounts"] is not None:
            make_mounts(plan["mounts"], plan["new_root"])
        socket.sethostname("modal")
        if plan["isolated_network"]:
            raise_loopback()
        drop_capabilities()
    except (OSError, ValueError, KeyError) as error:
        tell(f"error {error}")
        os._exit(1)

    selector = selectors.DefaultSelector()
    relay = Relay(selector)
    if plan["egress_port"]:
        listener = socket.create_server(("127.0.0.1", plan["egress_port"]), backlog=128)
        relay.accept_on(listener, connect_unix(plan["egress_socket"]))

    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)

    program = start_program(plan)
    for fd in (0, 1, 2):  # so that the plane sees the end of the output when the program ends, not when we do
        os.dup2(os.open("/dev/null", os.O_RDWR), fd)
    tell(f"started {program}")
    pending = b""
    descriptors: list[int] = []
    executions: dict[int, Execution] = {}

    def from_plane(_events: int) -> None:
        nonlocal pending
        try:
            data, received, _, _ = socket.recv_fds(control, 65536, 16, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            data, received = b"", []
        descriptors.extend(received)
        if not data:
            os._exit(1)
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            command, *rest = line.decode().split(" ", 2)
            if command in ("term", "int"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(program, signal.SIGTERM if command == "term" else signal.SIGINT)
            elif command == "listen":
                listener = socket.socket(socket.AF_UNIX)
                listener.bind(rest[1])
                listener.listen(128)
                relay.accept_on(listener, connect_tcp(int(rest[0])))
            elif command == "exec":
                mine = descriptors[: int(rest[0])]
                del descriptors[: int(rest[0])]
                start_execution(mine)

    def start_execution(mine: list[int]) -> None:
        try:
            execution = Execution(mine, word)
        except (OSError, ValueError, KeyError) as error:
            with contextlib.suppress(OSError):
                socket.socket(fileno=os.dup(mine[0])).sendall(f"error {error}\n".encode())
            for descriptor in mine:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
            return
        executions[execution.pid] = execution
        selector.register(execution.channel, selectors.EVENT_READ, execution.ready)

    def word(execution: Execution) -> None:
        try:
            data = execution.channel.recv(4096)
        except OSError:
            data = b""
        if data:
            execution.kill()
        else:
            selector.unregister(execution.channel)

    def reap(_events: int) -> None:
        os.read(wake_read, 4096)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if execution := executions.pop(pid, None):
                execution.ended(os.waitstatus_to_exitcode(status))
                if execution.channel in selector.get_map():
                    selector.unregister(execution.channel)
                execution.channel.close()
            if pid == program:
                tell(f"exit {os.waitstatus_to_exitcode(status)}")
                os._exit(0)

    selector.register(control, selectors.EVENT_READ, from_plane)
    selector.register(wake_read, selectors.EVENT_READ, reap)
    while True:
        for key, events in selector.select():
            if key.fileobj in selector.get_map():
                key.data(events)


if __name__ == "__main__":
    main()
