"""Images and containers, really built and really run, without the control plane around them."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from modal_proto import api_pb2

from gpuctl.local import installers, sandbox, sockets
from gpuctl.local.containers import Container, ContainerRuntime, ContainerSpec, FileBind, VolumeBind
from gpuctl.local.egress import _is_this_machine
from gpuctl.local.image_rpcs import Images
from gpuctl.local.images import ImageStore
from gpuctl.local.installers import ImageBuildError, find_python, interpreter_behind
from gpuctl.local.layers import BuiltImage
from gpuctl.local.overlays import Overlays
from gpuctl.local.wire import Call

PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
BASE = [f"FROM python:{PYTHON}.1-slim-bookworm", "RUN apt-get update", "RUN apt-get install -y gcc"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    return ImageStore(tmp_path_factory.mktemp("cache"))


def build(store: ImageStore, commands: list[str], base: str = "", **files: Path) -> tuple[BuiltImage, str]:
    image = api_pb2.Image(dockerfile_commands=commands)
    if base:
        image.base_images.append(api_pb2.BaseImage(docker_tag="base", image_id=base))
    lines: list[str] = []
    image_id = store.image_id(image, "2025.06")
    context = {f"/{name}": path for name, path in files.items()}
    built = asyncio.run(store.build(image_id, image, context_files=context, secret_env={}, log=lines.append))
    return built, "".join(lines)


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch, store: ImageStore) -> None:
    """As where overlayfs does not mount."""

    async def prepare(overlays: Overlays) -> bool:
        overlays.problem = "mount overlay at /: Operation not permitted"
        return False

    monkeypatch.setattr(Overlays, "prepare", prepare)
    monkeypatch.setattr(store.overlays, "problem", "")


@pytest.fixture(scope="module")
def base(store: ImageStore) -> BuiltImage:
    built, log = build(store, BASE)
    assert built.python_version.startswith(PYTHON)
    assert "system packages" not in log, "what debian_slim itself installs is no news"
    return built


@pytest.fixture(scope="module")
def image(store: ImageStore, base: BuiltImage, tmp_path_factory: pytest.TempPathFactory) -> BuiltImage:
    note = tmp_path_factory.mktemp("context") / "note"
    note.write_text("from the context\n")
    commands = [
        "FROM base",
        "RUN /.uv/uv pip install --python $(command -v python) --compile-bytecode 'six==1.17.0'",
        "ENV GREETING='hello there'",
        "WORKDIR /root/work",
        "COPY /note /srv/data/note",
        "RUN echo made > /root/by-a-command && python -c 'import six'",
        "RUN apt-get install -y ffmpeg",
    ]
    built, log = build(store, commands, base.id, note=note)
    assert "Successfully installed six-1.17.0" in log
    return built


def run(image: BuiltImage, code: str, tmp_path: Path, **overrides: object) -> tuple[int, str, str]:
    """Run Python code in a container to its end: (exit code, standard output, standard error)."""
    out: dict[int, str] = {1: "", 2: ""}

    async def main() -> int:
        def log(_task: str, fd: int, text: str) -> None:
            assert text.endswith("\n")
            out[fd] += text

        runtime = ContainerRuntime(tmp_path / "state" / "run", socket_folder(tmp_path), on_log=log)
        container = await runtime.start(spec(image, code, tmp_path, **overrides))
        code_ = await asyncio.wait_for(container.wait(), 60)
        await runtime.close()
        sockets.remove(tmp_path / "state")
        assert list((tmp_path / "state" / "run").glob("ta-*")) == [], (
            "nothing is left of a container that ended"
        )
        return code_

    return asyncio.run(main()), out[1], out[2]


def socket_folder(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir(exist_ok=True)
    return sockets.make(tmp_path / "state")


def spec(image: BuiltImage, code: str, tmp_path: Path, **overrides: object) -> ContainerSpec:
    plane = tmp_path / "plane.sock"
    plane.touch()
    values: dict[str, object] = {
        "task_id": "ta-1",
        "argv": (str(image.python), "-u", "-c", textwrap.dedent(code)),
        "env": dict(image.env),
        "image": image,
        "workdir": image.workdir or "/root",
        "volumes": (),
        "files": (),
        "isolated_network": False,
        "arguments": b"arguments",
        "server_socket": plane,
    }
    return ContainerSpec(**{**values, **overrides})  # type: ignore[arg-type]


def test_an_image_brings_packages_env_files_and_what_commands_made(image: BuiltImage, tmp_path: Path) -> None:
    assert image.warnings == ("system packages are not installed here: ffmpeg",)
    code, out, err = run(
        image,
        """
        import os, six, shutil
        print(six.__version__, os.environ["GREETING"], os.getcwd())
        print(open("/srv/data/note").read() + open("/root/by-a-command").read(), end="")
        print(shutil.which("python"), shutil.which("pip"))
        """,
        tmp_path,
    )
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "1.17.0 hello there /root/work",
        "from the context",
        "made",
        "/__image/venv/bin/python /__image/venv/bin/pip",
    ]


def test_the_modal_client_is_there_but_nothing_else_of_ours(image: BuiltImage, tmp_path: Path) -> None:
    code, out, _ = run(
        image,
        """
        import importlib.util, modal
        print(modal.__version__, [m for m in ("typer", "gpuctl", "jinja2", "pytest") if importlib.util.find_spec(m)])
        """,
        tmp_path,
    )
    assert (code, out) == (0, "1.6.4 []\n")


def test_a_layer_does_not_change_its_parent(
    store: ImageStore, image: BuiltImage, base: BuiltImage, tmp_path: Path
) -> None:
    build(
        store,
        ["FROM base", "RUN pip uninstall -y six", "RUN echo more >> /root/by-a-command; true"],
        image.id,
    )
    code, out, _ = run(image, "import six; print(open('/root/by-a-command').read())", tmp_path)
    assert (code, out.strip()) == (0, "made")
    assert run(base, "import six", tmp_path)[0] == 1


def test_a_built_image_is_found_again_and_changed_commands_make_another(
    store: ImageStore, base: BuiltImage
) -> None:
    again, log = build(store, BASE)
    assert (again, log) == (base, "")
    other = store.image_id(api_pb2.Image(dockerfile_commands=[*BASE, "ENV A=1"]), "2025.06")
    assert other != base.id


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("RUN pip install no-such-package-of-ours==0.0.1", "no-such-package-of-ours"),
        ("RUN echo about to fail && false", "ended with exit code 1"),
    ],
)
def test_a_failing_command_fails_the_build_and_can_be_tried_again(
    store: ImageStore, base: BuiltImage, command: str, said: str
) -> None:
    for _ in range(2):
        with pytest.raises(ImageBuildError, match=said):
            build(store, ["FROM base", command], base.id)


def test_a_failing_command_is_told_with_what_the_image_lacks_here(
    store: ImageStore, image: BuiltImage
) -> None:
    said = r"RUN ffmpeg-of-old -v ended with exit code 127 \(note: system packages are not installed here: ffmpeg\)"
    with pytest.raises(ImageBuildError, match=said):
        build(store, ["FROM base", "RUN ffmpeg-of-old -v"], image.id)


def test_shell_lasts_and_uv_is_there(store: ImageStore, image: BuiltImage) -> None:
    shell, _ = build(store, ["FROM base", 'SHELL ["/bin/bash", "-c"]'], image.id)
    commands = [
        "FROM base",
        "RUN [[ -n yes ]] && uv pip freeze --system | grep six && uv --version > /root/uv",
    ]
    _, log = build(store, commands, shell.id)
    assert "six==1.17.0" in log


def test_an_index_that_cannot_be_reached_is_left_out(store: ImageStore, base: BuiltImage) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    url = f"http://127.0.0.1:{port}/simple"
    _, log = build(store, ["FROM base", f"RUN pip install --extra-index-url {url} six==1.17.0"], base.id)
    assert f"going on without --extra-index-url {url}" in log
    assert "Successfully installed six-1.17.0" in log


def test_what_a_container_cannot_see_or_change(image: BuiltImage, tmp_path: Path) -> None:
    secret = tmp_path / "state" / "secret"
    secret.parent.mkdir()
    secret.write_text("not for containers")
    mine = Path.home() / f".gpuctl-test-{os.getpid()}"
    mine.write_text("not for containers")
    try:
        _, out, _ = run(
            image,
            f"""
            import os
            print([os.path.exists(p) for p in ({str(secret)!r}, {str(mine)!r})])
            for path in ("/usr/x", "/etc/passwd", "/opt/x"):
                open(path, "w").write("its own")
            print(*map(os.listdir, ("/tmp", "/var/tmp", "/home")))
            print(os.getpid() < 10, len([p for p in os.listdir("/proc") if p.isdigit()]) < 5)
            print(sorted(k for k in os.environ if "TOKEN" in k or "SECRET" in k))
            # Nor can it take away what hides, or make writable what it sees: not even in namespaces of its own.
            import ctypes, errno
            libc = ctypes.CDLL(None, use_errno=True)
            MS_REMOUNT_BIND, CLONE_NEWUSER_NEWNS = 32 | 4096, 0x10020000
            for again in (False, True):
                if again:
                    print(libc.unshare(CLONE_NEWUSER_NEWNS))
                for call in (
                    lambda: libc.umount2(b"/etc", 2),
                    lambda: libc.mount(None, b"/__client", None, ctypes.c_ulong(MS_REMOUNT_BIND), None),
                ):
                    print(call(), errno.errorcode[ctypes.get_errno()])
            """,
            tmp_path,
        )
    finally:
        mine.unlink()
    assert out.splitlines() == [
        "[False, False]",
        "[] [] []",
        "True True",
        "[]",
        *("-1 EPERM", "-1 EPERM"),
        "0",
        *("-1 EINVAL", "-1 EPERM"),  # what was inherited is locked
    ]
    assert "root:" in Path("/etc/passwd").read_text()
    assert not os.path.lexists("/usr/x")
    assert not list((tmp_path / "state" / "run").iterdir()), "what it wrote is gone with it"


def test_volumes_and_files_appear_where_the_app_wants_them(image: BuiltImage, tmp_path: Path) -> None:
    volume, source = tmp_path / "volume", tmp_path / "app.py"
    volume.mkdir()
    source.write_text("VALUE = 7\n")
    code, out, err = run(
        image,
        """
        import app, os
        print(app.VALUE, open("/opt/assets/deep/app.py").read().strip())
        open("/opt/models/written", "w").write("kept")
        open("/models/too", "w").write("kept")
        try: open("/usr/share/read/only", "w")
        except OSError as error: print(error.strerror)
        print(os.path.isdir("/usr/share/doc"))
        """,
        tmp_path,
        files=(FileBind(source, "/root/app.py"), FileBind(source, "/opt/assets/deep/app.py")),
        volumes=(
            VolumeBind(volume, "/opt/models", False),
            VolumeBind(volume, "/models", False),
            VolumeBind(volume, "/usr/share/read", True),
        ),
    )
    assert (code, err) == (0, "")
    assert out.splitlines() == ["7 VALUE = 7", "Read-only file system", "True"]
    assert sorted(p.name for p in volume.iterdir()) == ["too", "written"]
    assert source.read_text() == "VALUE = 7\n"


@pytest.mark.parametrize(
    ("ending", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", -9), ("1/0", 1)]
)
def test_the_exit_code_is_the_programs(image: BuiltImage, tmp_path: Path, ending: str, code: int) -> None:
    assert run(image, f"import os, sys\nprint('last words', end='')\nsys.stdout.flush()\n{ending}", tmp_path)[
        :2
    ] == (
        code,
        "last words\n",
    )


SERVER = """
import http.server, os, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass
signal.signal(signal.SIGTERM, lambda *_: (print("exit hook", flush=True), sys.exit(0)))
server = http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Handler)
print("up", flush=True)
server.serve_forever()
"""


async def post(container: Container, body: bytes) -> bytes:
    connector = aiohttp.UnixConnector(path=str(container.port_socket(8000)))
    async with aiohttp.ClientSession(connector=connector) as session:
        for _ in range(200):
            try:
                async with session.post("http://container/", data=body) as answer:
                    return await answer.read()
            except aiohttp.ClientError:
                await asyncio.sleep(0.05)
    raise AssertionError("never answered")


def test_two_containers_listen_on_one_port_and_large_bodies_pass(image: BuiltImage, tmp_path: Path) -> None:
    async def main() -> None:
        lines: list[str] = []
        runtime = ContainerRuntime(
            tmp_path / "state" / "run",
            socket_folder(tmp_path),
            on_log=lambda _t, _f, text: lines.append(text),
        )
        containers = [
            await runtime.start(spec(image, SERVER, tmp_path, task_id=f"ta-{n}", isolated_network=True))
            for n in range(2)
        ]
        body = os.urandom(1 << 20) * 8
        for container in containers:
            assert await post(container, b"hello") == b"hello"
        assert await asyncio.gather(*(post(c, body) for c in containers)) == [body, body]
        assert [await c.stop(10) for c in containers] == [0, 0]
        assert lines.count("exit hook\n") == 2
        await runtime.close()

    asyncio.run(main())


def test_a_program_that_ignores_the_request_to_end_is_ended_with_all_its_children(
    image: BuiltImage, tmp_path: Path
) -> None:
    marker = f"sleep-{os.getpid()}"

    async def main() -> None:
        runtime = ContainerRuntime(
            tmp_path / "state" / "run", socket_folder(tmp_path), on_log=lambda *_: None
        )
        code = f"""
        import signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", {marker!r}], start_new_session=True)
        time.sleep(600)
        """
        container = await runtime.start(spec(image, code, tmp_path))
        await wait_for(lambda: len(processes(marker)) >= 2)
        assert await container.stop(0.5) == -9
        await wait_for(lambda: not processes(marker))

    asyncio.run(main())


def test_a_request_to_end_that_finds_nobody_any_more_takes_the_exit_code_of_nobody(
    image: BuiltImage, tmp_path: Path
) -> None:
    async def main() -> int:
        folder = tmp_path / "state" / "run"
        runtime = ContainerRuntime(folder, socket_folder(tmp_path), on_log=lambda *_: None)
        container = await runtime.start(spec(image, "raise SystemExit(7)", tmp_path))
        process = Path(f"/proc/{container.pid}")
        while (
            process.exists()
        ):  # the loop stands still meanwhile: it has not heard of the end when it asks for one
            time.sleep(0.01)
        return await asyncio.wait_for(container.stop(grace=60), 60)

    assert asyncio.run(main()) == 7


def test_a_plane_that_is_killed_leaves_no_process(image: BuiltImage, tmp_path: Path) -> None:
    marker = f"orphan-{os.getpid()}"
    program = f"""
import asyncio, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from gpuctl.local.containers import ContainerRuntime
from gpuctl.local.images import ImageStore
from test_runtime import socket_folder, spec
async def main():
    image = ImageStore(Path({str(image.tree.parent.parent.parent)!r})).get({image.id!r})
    runtime = ContainerRuntime(
        Path({str(tmp_path)!r}) / "state" / "run", socket_folder(Path({str(tmp_path)!r})), on_log=lambda *_: None)
    code = "import time, sys; sys.argv.append({marker!r}); time.sleep(600)"
    await runtime.start(spec(image, code, Path({str(tmp_path)!r})))
    print("started", flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""
    plane = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert plane.stdout is not None
    assert plane.stdout.readline() == "started\n"
    assert processes(marker)
    plane.kill()
    plane.wait()
    asyncio.run(wait_for(lambda: not processes(marker)))
    runtime = ContainerRuntime(tmp_path / "state" / "run", socket_folder(tmp_path), on_log=lambda *_: None)
    runtime.sweep()
    assert list((tmp_path / "state" / "run").iterdir()) == []


def test_an_installer_ends_with_a_plane_that_is_killed() -> None:
    marker = f"installer-{os.getpid()}"
    program = f"""
import asyncio, sys
from gpuctl.local.installers import run
code = "import time; print('installing', flush=True); time.sleep(600)"
asyncio.run(run([sys.executable, "-c", code, {marker!r}], log=lambda text: print(text, end="", flush=True)))
"""
    plane = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert plane.stdout is not None
    assert plane.stdout.readline() == "installing\n"
    assert len(processes(f"time.sleep(600)\0{marker}")) == 1
    plane.kill()
    plane.wait()
    asyncio.run(wait_for(lambda: not processes(f"time.sleep(600)\0{marker}")))


def test_an_installer_that_is_not_there_is_told() -> None:
    with pytest.raises(ImageBuildError, match="/nowhere/pip: No such file or directory"):
        asyncio.run(installers.run(["/nowhere/pip", "install"], log=lambda _: None))


def processes(marker: str) -> list[str]:
    """The processes of this machine with `marker` in their command line, those of this test aside."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and marker.encode() in (entry / "cmdline").read_bytes():
                found.append(entry.name)
        except OSError:
            continue
    return found


async def wait_for(condition: object, seconds: float = 60) -> None:
    for _ in range(int(seconds / 0.02)):
        if condition():  # type: ignore[operator]
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not come about")


def test_an_isolated_container_reaches_out_but_not_to_this_machine(image: BuiltImage, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        _, out, _ = run(
            image,
            f"""
            import socket, urllib.request, urllib.error
            try: socket.create_connection(("127.0.0.1", {port}), 2)
            except OSError as error: print(error.strerror)
            proxy = urllib.request.ProxyHandler({{"http": "http://127.0.0.1:3128"}})
            no_bypass = urllib.request.build_opener(proxy)
            import os; os.environ["no_proxy"] = ""
            try: no_bypass.open("http://127.0.0.1:{port}/")
            except urllib.error.HTTPError as error: print(error.code, error.read().decode().strip())
            """,
            tmp_path,
            isolated_network=True,
        )
    assert out.splitlines()[0] == "Connection refused"
    assert out.splitlines()[1].startswith("403 127.0.0.1 is this machine")


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "127.9.9.9", "::1", "0.0.0.0", "::ffff:127.0.0.1", "169.254.1.1"]
)
def test_this_machine_is_known_by_all_its_addresses(address: str) -> None:
    assert _is_this_machine(address)


def test_other_machines_are_not_this_one() -> None:
    assert not _is_this_machine("93.184.216.34")


def test_a_shim_is_seen_through_to_the_interpreter(tmp_path: Path) -> None:
    """As pyenv's: a script on the PATH that starts the real one, which is what containers need."""
    real, version = find_python("")
    shim = tmp_path / "python"
    shim.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    shim.chmod(0o755)
    assert interpreter_behind(str(shim)) == (real, version)
    shim.write_text("#!/bin/sh\necho not switched on >&2; exit 127\n")
    assert interpreter_behind(str(shim)) is None
    assert find_python("3.99") == (real, version), "what is not there gives way to the plane's own"


def test_a_build_that_fails_leaves_what_was_there(
    store: ImageStore, base: BuiltImage, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    there.write_text("built")
    commands = ["FROM base", "COPY /there /root/there", "RUN test $(cat /root/there) = built"]
    built, _ = build(store, commands, base.id, there=there)
    image = api_pb2.Image(dockerfile_commands=commands)
    image.base_images.append(api_pb2.BaseImage(docker_tag="base", image_id=base.id))
    there.write_text("otherwise")
    again = store.build(
        built.id, image, context_files={"/there": there}, secret_env={}, log=lambda _: None, force=True
    )
    with pytest.raises(ImageBuildError, match="exit code 1"):
        asyncio.run(again)
    kept = store.get(built.id)
    assert kept is not None, "what is deployed goes on with the image that it has"
    assert (kept.tree / "home/there").read_text() == "built"


def test_a_failed_install_is_named_as_it_was_asked_for(store: ImageStore, base: BuiltImage) -> None:
    with pytest.raises(ImageBuildError) as caught:
        build(store, ["FROM base", "RUN pip install --no-index no-such-package"], base.id)
    assert str(caught.value).startswith(
        "pip install --no-index no-such-package ended with exit code 1:\nERROR: "
    )


def test_a_build_ends_when_nobody_follows_it_any_more() -> None:
    class Never:
        """An ImageStore whose builds take for ever."""

        def __init__(self) -> None:
            self.begun, self.ended = asyncio.Event(), asyncio.Event()

        def image_id(self, *_: object) -> str:
            return "im-1"

        def get(self, _: str) -> None:
            return None

        def remember(self, *_: object) -> None:
            pass

        async def build_recipe(self, _: str, __: object, log: Callable[[str], None], **___: object) -> None:
            log("begun")
            try:
                await asyncio.sleep(3600)
            finally:
                self.ended.set()

    async def run() -> None:
        never: Any = Never()
        nothing: Any = None
        secrets: Any = types.SimpleNamespace(values=lambda _: {})
        images = Images(never, nothing, secrets, alone_seconds=0.2)
        call = Call(task_id="", client_version="")
        answer = await images.get_or_create(api_pb2.ImageGetOrCreateRequest(), call)
        following = images.join(api_pb2.ImageJoinStreamingRequest(image_id=answer.image_id, timeout=60), call)
        assert (await anext(following)).task_logs[0].data == "begun\n"
        await asyncio.sleep(0.6)
        assert not never.ended.is_set(), "it is followed"
        await following.aclose()
        await asyncio.wait_for(never.ended.wait(), 30)
        again = images.join(api_pb2.ImageJoinStreamingRequest(image_id=answer.image_id, timeout=60), call)
        last = [response async for response in again][-1].result
        assert last.status == api_pb2.GenericResult.GENERIC_STATUS_TERMINATED

    asyncio.run(run())


def test_programs_get_this_machines_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its proxies, and those certificates that they can read."""
    (tmp_path / "own.pem").touch()
    for name in [n for n in os.environ if n.lower().endswith("_proxy") or "CERT" in n or "_CA" in n]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:8080")
    monkeypatch.setenv("SSL_CERT_FILE", "/etc/passwd")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "own.pem"))
    monkeypatch.setenv("CURL_CA_BUNDLE", "/etc/no-such-file")
    filesystem = sandbox.Filesystem(hide=(tmp_path,))
    assert filesystem.way_out() == {"https_proxy": "http://127.0.0.1:8080", "SSL_CERT_FILE": "/etc/passwd"}
    assert filesystem.way_out(proxies=False) == {"SSL_CERT_FILE": "/etc/passwd"}


def test_where_no_sandbox_works_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    sandbox.find_backend.cache_clear()
    try:
        with pytest.raises(sandbox.GpuctlError) as caught:
            sandbox.find_backend()
    finally:
        sandbox.find_backend.cache_clear()
    assert "neither bwrap nor unshare is installed" in caught.value.problems[0]
    assert "install bubblewrap" in (caught.value.hint or "")


def test_volumes_in_any_order_beside_and_below_copied_files(image: BuiltImage, tmp_path: Path) -> None:
    volume, source = tmp_path / "volume", tmp_path / "app.py"
    volume.mkdir()
    source.write_text("code\n")
    paths = ("/usr/local/share/x", "/usr/x", "/opt/a/b", "/opt/a", "/app/models", "/var/run/v", "/bin/v")
    for order in (paths, paths[::-1]):
        code, out, err = run(
            image,
            f"""
            import os
            for path in {paths!r}: open(path + "/written", "w").write("kept")
            open("/app/cache", "w").write("a copy of the container's own")
            print(open("/app/main.py").read(), os.path.isdir("/usr/local/bin"), os.path.exists("/usr/bin/env"))
            """,
            tmp_path,
            files=(FileBind(source, "/app/main.py"),),
            volumes=tuple(VolumeBind(volume, path, False) for path in order),
        )
        assert (code, err, out) == (0, "", "code\n True True\n")
    assert "written" in [p.name for p in volume.iterdir()]
    assert source.read_text() == "code\n"
    assert not os.path.lexists("/run/v"), (
        "a link of the host leads out of the container while its mounts are made"
    )


def test_what_is_hidden_stays_so_beside_a_volume_and_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "real" / "state").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    beside = Path("/opt") / f"gpuctl-test-{os.getpid()}"
    filesystem = sandbox.Filesystem(hide=(tmp_path / "link" / "state", beside, Path("/")))
    assert str((tmp_path / "real" / "state").resolve()) in map(str, filesystem.hide)
    try:
        beside.mkdir()
    except PermissionError:
        pytest.skip("needs a folder of its own in /opt")
    try:
        filesystem.bind(tmp_path, "/opt/a/b", read_only=False)
        kinds = [(mount.kind, mount.target) for mount in filesystem.mounts]
    finally:
        beside.rmdir()
    assert kinds.index(("tmpfs", "/opt")) < kinds.index(("ro_bind", str(beside)))
    assert kinds[::-1].index(("tmpfs", str(beside))) < kinds[::-1].index(("ro_bind", str(beside)))


def test_add_python_needs_no_link_and_a_read_only_place_is_explained(
    store: ImageStore, base: BuiltImage, read_only: None
) -> None:
    link = "RUN ln -s /usr/local/bin/python3 /usr/local/bin/python"
    image = api_pb2.Image(dockerfile_commands=["FROM nvidia/cuda:12.4.0", link])
    built = asyncio.run(
        store.build(
            store.image_id(image, "2025.06"),
            image,
            context_files={},
            secret_env={},
            log=lambda _: None,
            python_hint=PYTHON,
        )
    )
    assert built.warnings == (
        "the base image nvidia/cuda:12.4.0 is not applied here: containers see this machine's own system",
    )
    with pytest.raises(ImageBuildError, match="here a build can write to /root, /tmp"):
        build(store, ["FROM base", "RUN mkdir /opt/mine"], base.id)


def test_the_socket_folder_is_remembered_before_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sockets.make(tmp_path)
    assert first.stat().st_mode & 0o777 == 0o700
    second = sockets.make(tmp_path)
    assert second.exists()
    assert not first.exists()

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", killed)
        with pytest.raises(KeyboardInterrupt):
            sockets.make(tmp_path)
    assert not second.exists()
    remembered = (tmp_path / "sockets").readlink()
    remembered.mkdir()
    sockets.remove(tmp_path)
    assert not remembered.exists()
    # A link that leads elsewhere removes nothing.
    (tmp_path / "mine").mkdir()
    (tmp_path / "sockets").symlink_to(tmp_path / "mine")
    sockets.remove(tmp_path)
    assert (tmp_path / "mine").exists()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("long" * 30)))
    third = sockets.make(tmp_path)
    assert len(str(third)) < 30
    sockets.remove(tmp_path)


def test_what_commands_leave_in_folders_of_the_container_s_own(
    store: ImageStore, base: BuiltImage, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of this machine")
    (tmp_path / "folder").mkdir()
    note = tmp_path / "note"
    note.write_text("copied\n")
    commands = [
        "FROM base",
        "RUN for d in /home /mnt /srv /media; do mkdir $d/made && echo $d > $d/made/f; done",
        f"RUN mkdir -p /models/empty /home/empty && cd /models && ln -s {secret} out && ln -s ../srv/made rel",
        f"RUN ln -s /models /models-1 && ln -s {tmp_path / 'folder'} /models/way && ln -s /models /root/way",
        "COPY /note /models/way/note",
        "COPY /note /root/way/note",
    ]
    first, _ = build(store, commands, base.id, note=note)
    second, _ = build(
        store, ["FROM base", "RUN cat /models/note && ls /models-1/empty /home/made/f"], first.id
    )
    assert not any((tmp_path / "folder").iterdir()), "no link leads out of the image"
    code, out, err = run(
        second,
        """
        import os
        print([open(f"{d}/made/f").read().strip() for d in ("/home", "/mnt", "/srv", "/media")])
        print(os.listdir("/models/empty"), os.listdir("/home/empty"), os.readlink("/models-1"))
        print(open("/models-1/rel/f").read().strip(), os.path.exists("/models/out"), open("/root/way/note").read())
        for d in ("/home", "/home/made", "/srv", "/var/tmp", "/models"):
            open(f"{d}/new", "w").close()
        """,
        tmp_path,
    )
    assert code == 0, err
    assert out.splitlines()[:3] == [
        "['/home', '/mnt', '/srv', '/media']",
        "[] [] /models",
        "/srv False copied",
    ]
