"""Writing anywhere: the roots of containers and builds, really mounted by this kernel."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import textwrap
from pathlib import Path

import pytest

from gpuctl.local.containers import FileBind, VolumeBind
from gpuctl.local.image_trees import remove_tree
from gpuctl.local.images import ImageStore
from gpuctl.local.installers import ImageBuildError
from gpuctl.local.layers import BuiltImage
from gpuctl.local.overlays import Overlays, _mount_points, make_folder

from .planes import TestPlane
from .test_runtime import BASE, build, run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    store = ImageStore(tmp_path_factory.mktemp("cache"))
    if not asyncio.run(store.overlays.prepare()):
        pytest.skip(f"overlayfs does not mount here: {store.overlays.problem}")
    return store


@pytest.fixture(scope="module")
def base(store: ImageStore) -> BuiltImage:
    return build(store, BASE)[0]


def test_what_a_build_writes_anywhere_is_the_image_s(
    store: ImageStore, base: BuiltImage, tmp_path: Path
) -> None:
    before = Path("/etc/passwd").read_bytes()
    first, _ = build(
        store,
        [
            "FROM base",
            "RUN mkdir -p /opt/mine/deep /usr/local/lib/mine /var/lib/mine /root/mine /data/mine && "
            "for d in /opt/mine/deep /usr/local/lib/mine /etc /var/lib/mine /root/mine /data/mine /srv /tmp /run; "
            "do echo $d > $d/gpuctl-mine; done; ln -s gpuctl-mine /etc/gpuctl-link; "
            "printf '#!/bin/sh\\necho mine' > /usr/local/bin/gpuctl-mine; chmod +x /usr/local/bin/gpuctl-mine",
            "RUN rm /usr/bin/env; cp /etc/passwd /etc/p && echo more >> /etc/p && mv /etc/p /etc/passwd",
            "RUN cd /usr/share && rm -r common-licenses && mkdir common-licenses && touch common-licenses/a",
        ],
        base.id,
    )
    second, _ = build(
        store,
        [
            "FROM base",
            "RUN gpuctl-mine > /opt/said && rm -r /data/mine /opt/mine/deep && test ! -e /usr/bin/env && "
            'test "$(ls /usr/share/common-licenses)" = a && tail -n 1 /etc/passwd',
            "COPY /note /data/mine/note",
            "COPY /note /var/run/note",
            "COPY /note /lib/gpuctl-note",
        ],
        first.id,
        note=Path(__file__),
    )
    code = """
        import json, os, pathlib
        p = pathlib.Path
        print(json.dumps({
            "said": p("/opt/said").read_text(),
            "deep": os.path.exists("/opt/mine/deep"),
            "data": os.listdir("/data/mine"),
            "env": os.path.exists("/usr/bin/env"),
            "licenses": os.listdir("/usr/share/common-licenses"),
            "passwd": p("/etc/passwd").read_text().splitlines()[-1],
            "link": p("/etc/gpuctl-link").read_text().strip(),
            "places": [d for d in ("/usr/local/lib/mine", "/var/lib/mine", "/root/mine", "/srv", "/tmp", "/run")
                       if p(d, "gpuctl-mine").read_text().strip() == d],
            "copied": [p(x).is_file() for x in ("/run/note", "/var/run/note", "/usr/lib/gpuctl-note",
                                                "/lib/gpuctl-note")],
            "modes": [oct(p(d).stat().st_mode & 0o7777) for d in ("/", "/etc", "/usr/local", "/tmp", "/var/tmp",
                                                                  "/root")],
        }))
    """
    exit_code, out, err = run(second, code, tmp_path)
    assert (exit_code, err) == (0, "")
    assert json.loads(out) == {
        "said": "mine\n",
        "deep": False,
        "data": ["note"],
        "env": False,
        "licenses": ["a"],
        "passwd": "more",
        "link": "/etc",
        "places": ["/usr/local/lib/mine", "/var/lib/mine", "/root/mine", "/srv", "/tmp", "/run"],
        "copied": [True] * 4,
        "modes": ["0o755", "0o755", "0o755", "0o1777", "0o1777", "0o700"],
    }
    # The layer below has what it had, and this machine, too.
    again = run(
        first, "import os; print(os.listdir('/opt/mine/deep'), os.path.exists('/opt/said'))", tmp_path
    )
    assert again[1] == "['gpuctl-mine'] False\n"
    assert Path("/etc/passwd").read_bytes() == before
    assert Path("/usr/bin/env").exists()
    for path in (
        "/opt/mine",
        "/etc/gpuctl-mine",
        "/data/mine",
        "/run/gpuctl-mine",
        "/usr/local/bin/gpuctl-mine",
    ):
        assert not os.path.lexists(path), path


def test_what_a_container_writes_is_its_own(store: ImageStore, base: BuiltImage, tmp_path: Path) -> None:
    image, _ = build(
        store, ["FROM base", "RUN mkdir /opt/i /root/i; echo 1 > /opt/i/f; echo 1 > /root/i/f"], base.id
    )
    volume, source = tmp_path / "volume", tmp_path / "app.py"
    volume.mkdir()
    source.write_text("code\n")
    code = """
        import os, pathlib, subprocess, sys
        for path in ("/opt/i/f", "/root/i/f", "/opt/app/main.py", "/usr/share/x/new", "/etc/new"):
            place = pathlib.Path(path)
            print(place.read_text() if place.exists() else "absent", end=" ")
            place.parent.mkdir(exist_ok=True)
            place.write_text("changed")
        import six_of_this_container
    """
    install = (
        "from pathlib import Path; import site, shutil; d = site.getsitepackages()[0]; "
        "Path(d, 'six_of_this_container.py').write_text('print(6)'); Path('/opt/models/kept').touch()\n"
    )
    for _ in range(2):
        done = run(
            image,
            install + textwrap.dedent(code),
            tmp_path,
            files=(FileBind(source, "/opt/app/main.py"),),
            volumes=(VolumeBind(volume, "/opt/models", False),),
        )
        assert done == (0, "1\n 1\n code\n absent absent 6\n", "")
    assert source.read_text() == "code\n"
    assert (volume / "kept").exists()
    assert (image.tree / "files/opt/i/f").read_text() == "1\n"
    assert not (image.tree / "files/opt/models").exists()
    assert not list((tmp_path / "state" / "run").iterdir())


def test_a_layer_leaves_its_parent_as_it_is(store: ImageStore, base: BuiltImage) -> None:
    parent, _ = build(store, ["FROM base", "RUN pip install six==1.17.0 && echo a > /opt/a"], base.id)
    child, _ = build(
        store,
        [
            "FROM base",
            "RUN pip install --no-deps six==1.16.0 && echo b >> /opt/a",
            "RUN rm -r /__image/venv/lib/*/site-packages/pip",
        ],
        parent.id,
    )

    def found(image: BuiltImage) -> tuple[list[str], str]:
        site = next(image.tree.glob("venv/lib/python*/site-packages"))
        return sorted(p.name for p in site.glob("six-*")), (image.tree / "files/opt/a").read_text()

    assert found(parent) == (["six-1.17.0.dist-info"], "a\n")
    assert found(child) == (["six-1.16.0.dist-info"], "a\nb\n")
    assert not list(child.tree.glob("venv/lib/python*/site-packages/pip/*"))


def test_what_is_hidden_stays_so_whatever_a_container_does(base: BuiltImage, tmp_path: Path) -> None:
    beside = Path("/var/tmp") / f"gpuctl-test-{os.getpid()}"
    beside.write_text("not for containers")
    code = """
        import errno, os, shutil
        for path in ("/home", "/mnt", "/var/tmp", "/tmp", "/run/lock"):
            shutil.rmtree(path, ignore_errors=True)
            os.makedirs(path, exist_ok=True)
            for name in ("opaque", "redirect", "origin", "whiteout"):
                try: os.setxattr(path, f"user.overlay.{name}", b"n")
                except OSError: pass
                try: os.removexattr(path, f"user.overlay.{name}")
                except OSError: pass
            print(os.listdir(path), end=" ")
        for call in (lambda: os.rename("/etc", "/e"), lambda: os.rmdir("/usr"), lambda: os.rename("/usr", "/u"),
                     lambda: os.mknod("/dev/x", 0o20600, 1), lambda: os.link("/etc/passwd", "/srv/passwd")):
            try: call(); print("done")
            except OSError as error: print(errno.errorcode[error.errno], end=" ")
    """
    try:
        assert run(base, code, tmp_path)[:2] == (0, "[] [] [] [] [] EBUSY EBUSY EBUSY EPERM EXDEV \n")
        assert beside.read_text() == "not for containers"
    finally:
        beside.unlink()


def test_a_failed_build_leaves_nothing(store: ImageStore, base: BuiltImage) -> None:
    images = base.tree.parent.parent
    before = sorted(p.name for p in images.iterdir() if p.is_dir())
    with pytest.raises(ImageBuildError, match="exit code 3"):
        build(store, ["FROM base", "RUN mkdir -m 0 /opt/closed /root/closed; exit 3"], base.id)
    assert sorted(p.name for p in images.iterdir() if p.is_dir()) == before


def test_it_is_said_once_where_none_can_be_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpuctl.local.overlays._TRIAL", "echo no such thing here; exit 1")
    overlays = Overlays(tmp_path / "host", hide=(tmp_path,))

    async def twice() -> list[bool]:
        return [await overlays.prepare(), await overlays.carry(tmp_path)]

    assert asyncio.run(twice()) == [False, False]
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "overlayfs does not mount here (no such thing here): containers and builds see /etc, /opt, /usr, /var and the "
        "like read-only"
    ]


def test_folders_that_hold_what_is_hidden_are_shown_as_they_are(store: ImageStore, tmp_path: Path) -> None:
    overlays = Overlays(tmp_path / "host", hide=(Path("/var/lib/some-state"),))
    assert asyncio.run(overlays.prepare())
    assert "/var" in overlays.as_they_are
    assert "/var" not in overlays.shared
    assert {"/etc", "/usr"} <= set(overlays.shared)


def test_removing_what_its_owner_has_closed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o755)
    closed = tmp_path / "tree" / "a" / "closed"
    closed.mkdir(parents=True)
    (closed / "file").touch()
    (tmp_path / "tree" / "link").symlink_to(outside)
    closed.chmod(0)
    remove_tree(tmp_path / "tree")
    assert [p.name for p in tmp_path.iterdir()] == ["outside"]
    assert stat.S_IMODE(outside.stat().st_mode) == 0o755


def test_a_folder_where_one_was_removed_begins_empty(tmp_path: Path) -> None:
    os.mknod(tmp_path / "gone", stat.S_IFCHR, 0)
    make_folder(tmp_path / "gone" / "below")
    assert os.getxattr(tmp_path / "gone", "user.overlay.opaque") == b"y"
    assert (tmp_path / "gone" / "below").is_dir()


def test_an_app_writes_anywhere(plane: TestPlane) -> None:
    done = plane.modal("run", "anywhere.py")
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert found == {
        "by command": "/opt/x/by-command\n",
        "by function": "by a function",
        "environment": "changed by a build",
        "machine's": [False, True],
        "first": ["absent", "absent"],
        "again": ["absent", "absent"],
    }
    assert not os.path.lexists("/opt/x")


def test_what_is_mounted_later_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overlays = Overlays(tmp_path / "host", hide=(tmp_path,))
    if not asyncio.run(overlays.prepare()):
        pytest.skip(f"overlayfs does not mount here: {overlays.problem}")
    first = overlays.skeleton
    asyncio.run(overlays.prepare())
    assert overlays.skeleton == first, "it looks once"
    real = list(_mount_points())
    monkeypatch.setattr(
        "gpuctl.local.overlays._mount_points", lambda: iter([*real, ("/usr/share/doc", "fuse")])
    )
    asyncio.run(overlays.prepare())
    assert overlays.skeleton != first
    assert first.is_dir(), "containers that run lie upon it"
    second = overlays.skeleton
    asyncio.run(overlays.prepare())
    assert overlays.skeleton == second
