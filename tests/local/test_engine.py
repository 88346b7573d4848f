"""Images that Docker or Podman builds, really built by this machine's, of base images made of its own files."""

from __future__ import annotations

import asyncio
import hashlib
import http.server
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from modal_proto import api_pb2

from gpuctl.local import client
from gpuctl.local.engines import Engine
from gpuctl.local.image_trees import remove_tree
from gpuctl.local.images import ImageStore
from gpuctl.local.installers import ImageBuildError

from . import bases
from .planes import APPS, TestPlane, eventually, processes
from .test_runtime import run

pytestmark = pytest.mark.slow
TOKEN = 's3cret-of-a-build\'s "own" $HOME'


@dataclass
class EnginePlane(TestPlane):
    """A plane that may use the engine, with a cache of its own."""

    cache: Path = Path()

    def up(self, port: int | None = None) -> client.Plane:
        return client.up(self.state_dir, self.cache, port=port)

    def run(self, name: str, *, check: bool = True, **extra: str) -> subprocess.CompletedProcess[str]:
        settings = {"T_BARE": bases.BARE, "T_PYTHON": bases.WITH_PYTHON, "T_TOKEN": TOKEN, "T_ONLY": name}
        return self.modal("run", "engine.py", check=check, **settings, **extra)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    found, problem = bases.engine()
    if found is None:
        pytest.skip(f"no container engine: {problem}")
    bases.make(found, tmp_path_factory.mktemp("bases"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GPUCTL_LOCAL_ENGINE", raising=False)
        yield found


def _tags(engine: Engine, cache: Path) -> list[str]:
    """What the engine has built for this cache."""
    label = hashlib.sha256(str(cache.absolute()).encode()).hexdigest()[:12]
    listed = bases.ask(engine, "images", "--format", "{{.Repository}}:{{.Tag}}")
    return [
        tag for tag in listed.split() if tag.startswith("localhost/gpuctl/") and tag.endswith(f":{label}")
    ]


def _forget(engine: Engine, cache: Path) -> None:
    if tags := _tags(engine, cache):
        bases.ask(engine, "rmi", "--force", *tags)
    remove_tree(cache)


@pytest.fixture(scope="module")
def engine_plane(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EnginePlane]:
    folder = tmp_path_factory.mktemp("engine")
    plane = EnginePlane(folder / "state", folder / "cache")
    plane.up()
    yield plane
    plane.down()
    assert plane.containers() == []
    _forget(engine, plane.cache)


@pytest.fixture(scope="module")
def store(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageStore]:
    cache = tmp_path_factory.mktemp("cache")
    yield ImageStore(cache)
    _forget(engine, cache)


def found_in(done: subprocess.CompletedProcess[str]) -> object:
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def test_an_image_of_a_registry_with_all_that_the_sdk_adds(engine_plane: EnginePlane, engine: Engine) -> None:
    done = engine_plane.run("in_layered")
    found = found_in(done)
    assert isinstance(found, dict)
    top = found.pop("top")
    assert found == {
        "release": "NAME=gpuctl-tests\n",
        "deep": ["id", "kept"],
        "id": "uid=0(root)",
        "read": "s3c",
        "packages": True,
        "client": "/__client/pkg/modal/__init__.py",
        "source": "from the package",
        "mounted": True,
        "volume": "built",
        "env": ["two words", "yes", False, "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        "cwd": "/wd",
        "python": "/usr/local/bin/python",
    }
    usual = [
        "__client",
        "bin",
        "data",
        "dev",
        "etc",
        "lib",
        "lib64",
        "opt",
        "proc",
        "root",
        "run",
        "sbin",
        "sys",
        "tmp",
        "usr",
        "var",
        "wd",
    ]
    assert top == usual, "nothing of this machine"
    assert "in a function of the build" in done.stdout + done.stderr

    again = engine_plane.run("in_layered")
    assert found_in(again) == {**found, "top": top}
    assert f"{engine.name} build" not in again.stdout + again.stderr, "it is built once"

    # A secret of a build is in no layer, no history, no file of ours, and no log.
    for tag in _tags(engine, engine_plane.cache):
        for words in (["history", "--no-trunc"], ["image", "inspect"]):
            told = bases.ask(engine, *words, tag)
            assert TOKEN not in told
            assert "s3cret" not in told
    for place in engine_plane.cache.rglob("*"):
        if place.is_file() and not place.is_symlink() and "secrets" not in place.parts:
            assert b"s3cret-of-a-build" not in place.read_bytes(), place
    assert "s3cret" not in (engine_plane.state_dir / "plane.log").read_text()


def test_a_dockerfile(engine_plane: EnginePlane) -> None:
    done = engine_plane.run("in_docker")
    assert found_in(done) == {
        "copied": ["plain.py", "web.py"],
        "mode": "0o644",
        "owner": "1234",
        "bash": "2",
        "stage": "made in another stage",
        "env": "hello   nobody",
        "upon": "0",
    }
    assert "USER worker counts for the commands of its layer alone" in done.stdout + done.stderr


def test_a_server_and_commands_in_its_container(engine_plane: EnginePlane) -> None:
    url = engine_plane.deploy("served", open=1, min=1, mode="x", base=bases.WITH_PYTHON)
    task = engine_plane.ready(f"{url}/who").json["task"]

    def run(*argv: str) -> str:
        return engine_plane.quick("container", "exec", "--no-pty", task, "--", *argv).stdout

    assert run("cat", "/etc/os-release") == "NAME=gpuctl-tests\n"
    assert run("sh", "-c", "echo $0 $MODAL_TASK_ID; ls /data /work 2>/dev/null") == f"sh {task}\n/data:\n"
    assert run("python", "-c", "import sys, modal; print(sys.executable)") == "/usr/local/bin/python\n"
    engine_plane.quick("app", "stop", "served", "--yes")
    logs = engine_plane.logs("served")
    assert "exit: hook ran" in logs


def test_a_step_that_fails_says_why(engine_plane: EnginePlane) -> None:
    done = engine_plane.run("in_failing", check=False)
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert "the reason of it" in said.partition("failed with the exception")[2]


def test_without_python_it_is_said_what_to_do(engine_plane: EnginePlane) -> None:
    done = engine_plane.run("in_without", check=False)
    assert done.returncode != 0
    assert 'add_python="' in done.stdout + done.stderr


def test_a_plane_that_is_killed_leaves_no_build(engine_plane: EnginePlane, engine: Engine) -> None:
    settings = {"T_BARE": bases.BARE, "T_PYTHON": bases.WITH_PYTHON, "T_ONLY": "in_slow"}
    building = subprocess.Popen(
        [sys.executable, "-m", "modal", "run", "engine.py"],
        env=engine_plane.environment(**settings),
        cwd=APPS,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        eventually(lambda: processes("sleep", "9876"), seconds=300)
        engine_plane.crash()
        eventually(lambda: not processes("sleep", "9876"), seconds=60)
        eventually(lambda: not processes(engine.name, "build", str(engine_plane.cache)), seconds=60)
    finally:
        building.send_signal(signal.SIGINT)
        building.wait()
    eventually(lambda: client.running(engine_plane.state_dir))


# ---- without a plane


def build(store: ImageStore, commands: list[str], base: str = "", **options: object) -> tuple[str, str]:
    image = api_pb2.Image(dockerfile_commands=commands)
    if base:
        image.base_images.append(api_pb2.BaseImage(docker_tag="base", image_id=base))
    lines: list[str] = []
    image_id = store.image_id(image, "2025.06")

    async def both() -> None:
        await store.build(image_id, image, context_files={}, secret_env={}, log=lines.append)
        await store.ready(image_id, lines.append)

    asyncio.run(both())
    return image_id, "".join(lines)


def test_system_packages_upon_an_environment_of_ours(
    store: ImageStore, engine: Engine, tmp_path: Path
) -> None:
    parent, log = build(store, [f"FROM {bases.OFFICIAL}"])
    assert engine.name not in log, "it is an environment of ours, as ever"
    environment = store.get(parent)
    assert environment is not None
    assert not environment.engine
    child, log = build(
        store, ["FROM base", "RUN apt-get update", "RUN apt-get install -y gpuctl-tests-tool"], parent
    )
    assert f"{engine.name} builds {parent}" in log
    image = store.get(child)
    assert image is not None
    assert image.warnings == ()
    code = "import subprocess; print(subprocess.check_output(['gpuctl-tests-tool'], text=True))"
    done = run(image, code, tmp_path)
    assert done[:2] == (0, "gpuctl-tests-tool of the image\n\n")
    assert "builds" not in build(store, ["FROM base", "RUN apt-get install -y gpuctl-tests-other"], parent)[
        1
    ].replace(f"{engine.name} {engine.version} builds this", ""), "its parent was built once"


def test_a_registry_that_is_away_is_a_warning(
    store: ImageStore, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = "127.0.0.1:9/nobody/listens:1"
    image_id, _log = build(store, [f"FROM {reference}"])
    image = store.get(image_id)
    assert image is not None
    assert not image.engine
    assert f"{engine.name} could not fetch {reference}" in " ".join(image.warnings)
    assert f"the base image {reference} is not applied here" in " ".join(image.warnings)


class _Registry(http.server.BaseHTTPRequestHandler):
    """Has nothing, and says so as registries do."""

    def do_GET(self) -> None:
        there = self.path.rstrip("/") == "/v2"
        body = (
            b"{}" if there else b'{"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]}'
        )
        self.send_response(200 if there else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


def test_a_base_that_there_is_not(store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Registry) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        registry = f"127.0.0.1:{server.server_port}"
        settings = tmp_path / "registries.conf"
        settings.write_text(f'[[registry]]\nlocation = "{registry}"\ninsecure = true\n')
        monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(settings))
        with pytest.raises(ImageBuildError, match=rf"FROM {registry}/no/such:1: .*manifest unknown"):
            build(store, [f"FROM {registry}/no/such:1"])
        server.shutdown()


def test_none_is_used_where_it_is_refused(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.engines, "_wanted", "none")
    image_id, log = build(store, [f"FROM {bases.BARE}", "ENV A=1"])
    image = store.get(image_id)
    assert image is not None
    assert not image.engine
    assert f"the base image {bases.BARE} is not applied here" in log
    # It is built again, once there may be one.
    monkeypatch.setattr(store.engines, "_wanted", "")
    with pytest.raises(ImageBuildError, match="add_python"):
        build(store, [f"FROM {bases.BARE}", "ENV A=1"])
    image = store.get(image_id)
    assert image is not None
    assert image.engine


def test_links_of_an_image_lead_nowhere_else(store: ImageStore, engine: Engine, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    image_id, _ = build(
        store,
        [
            f"FROM {bases.WITH_PYTHON}",
            f"RUN ln -s {outside} /opt/link && mkdir -m 0 /opt/closed && touch /opt/closed/file && rm -rf /mnt",
            f"RUN ln -s {outside} /mnt",
        ],
    )
    image = store.get(image_id)
    assert image is not None
    code = """
        import os
        print(os.path.exists("/opt/link"), os.listdir("/opt/closed"), os.path.exists("/mnt"))
        os.makedirs(os.readlink("/mnt")); open("/mnt/file", "w").close(); print(os.listdir("/opt/link"))
    """
    assert run(image, code, tmp_path) == (0, "False ['file'] False\n['file']\n", "")
    assert not list(outside.iterdir())
