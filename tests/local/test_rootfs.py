"""The file systems of images as folders here: unpacked, packed, looked into. No engine is needed."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuctl.local.engine_builds import pack
from gpuctl.local.image_trees import remove_tree
from gpuctl.local.rootfs import RootPython, _platforms, extract, find_program


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode, info.mtime = kind, link, mode, 1_700_000_000
    info.uid = info.gid = 4242
    info.size = 3 if kind == tarfile.REGTYPE else 0
    return info


def archive(*members: tarfile.TarInfo) -> io.BytesIO:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for info in members:
            tar.addfile(info, io.BytesIO(b"abc") if info.size else None)
    out.seek(0)
    return out


def unpack(folder: Path, *members: tarfile.TarInfo) -> None:
    folder.mkdir()
    extract(archive(*members), folder)


def test_a_file_system_is_this_user_s(tmp_path: Path) -> None:
    root = tmp_path / "root"
    unpack(
        root,
        member("./", tarfile.DIRTYPE, mode=0o755),
        member("usr/bin/tool", mode=0o4755),
        member("usr/lib/", tarfile.DIRTYPE, mode=0o1777),
        member("lib", tarfile.SYMTYPE, "usr/lib"),
        member("out", tarfile.SYMTYPE, "/etc/passwd"),
        member("usr/bin/same", tarfile.LNKTYPE, "./usr/bin/tool"),
        member("closed/", tarfile.DIRTYPE, mode=0),
        member("closed/file", mode=0),
        member("dev/sda", tarfile.BLKTYPE),
        member("fifo", tarfile.FIFOTYPE),
        member("proc", tarfile.SYMTYPE, "/etc"),
        member("run/gpuctl-folders/0/", tarfile.DIRTYPE),
    )
    tool = root / "usr/bin/tool"
    assert tool.read_bytes() == b"abc"
    assert stat.S_IMODE(tool.stat().st_mode) == 0o755
    assert (tool.stat().st_uid, tool.stat().st_mtime) == (os.getuid(), 1_700_000_000)
    assert (root / "usr/bin/same").stat().st_ino == tool.stat().st_ino
    assert stat.S_IMODE((root / "usr/lib").stat().st_mode) == 0o1777
    assert [str((root / name).readlink()) for name in ("lib", "out")] == ["usr/lib", "/etc/passwd"]
    assert stat.S_IMODE((root / "closed").stat().st_mode) == 0o700
    assert not (root / "fifo").exists()
    for name in ("dev", "proc", "sys"):
        assert not (root / name).is_symlink()
        assert list((root / name).iterdir()) == []
    assert list((root / "run").iterdir()) == []


@pytest.mark.parametrize(
    "members",
    [
        [member("../evil")],
        [member("a/../../evil")],
        [member("link", tarfile.SYMTYPE, "../outside"), member("link/evil")],
        [member("link", tarfile.SYMTYPE, "../outside"), member("link", tarfile.DIRTYPE), member("link/evil")],
        [member("hard", tarfile.LNKTYPE, "../outside/kept")],
        [member("link", tarfile.SYMTYPE, "../outside"), member("hard", tarfile.LNKTYPE, "link/kept")],
    ],
)
def test_nothing_of_it_lands_anywhere_else(tmp_path: Path, members: list[tarfile.TarInfo]) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("as it was")
    with pytest.raises((OSError, ValueError)):
        unpack(tmp_path / "root", *members)
    assert not (tmp_path / "evil").exists()
    assert [p.name for p in outside.iterdir()] == ["kept"]
    assert (outside / "kept").stat().st_nlink == 1
    assert (outside / "kept").read_text() == "as it was"


_NAMES = st.lists(st.sampled_from(["a", "b", "..", ".", "/", "l"]), min_size=1, max_size=4).map("/".join)
_KINDS = st.sampled_from(
    [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE]
)


@given(st.lists(st.tuples(_NAMES, _KINDS, _NAMES), max_size=8))
def test_whatever_the_archive_says(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[str, bytes, str]]
) -> None:
    around = tmp_path_factory.mktemp("around")
    with contextlib.suppress(OSError, ValueError, tarfile.TarError):
        unpack(around / "root", *(member(*entry) for entry in entries))
    assert [p.name for p in around.iterdir()] == ["root"]
    remove_tree(around)


def test_programs_are_found_as_in_there(tmp_path: Path) -> None:
    for name in ("opt/py/bin/python3.12", "usr/bin/python3"):
        place = tmp_path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch(mode=0o755)
    (tmp_path / "usr/local").mkdir()
    (tmp_path / "usr/local/bin").symlink_to("/opt/py/bin")  # of the image, not of this machine
    (tmp_path / "opt/py/bin/python").symlink_to("python3.12")
    (tmp_path / "usr/bin/python").symlink_to("/nowhere")
    (tmp_path / "usr/bin/loop").symlink_to("loop")
    assert (
        find_program(tmp_path, "relative::/usr/local/bin:/usr/bin", "python", "python3")
        == "/usr/local/bin/python"
    )
    assert find_program(tmp_path, "/usr/bin", "python", "python3") == "/usr/bin/python3"
    assert find_program(tmp_path, "/usr/bin:/none", "loop", "sh") is None


def test_what_a_function_wrote_is_packed(tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    for name in ("opt/new", "run/modal", "etc"):
        (upper / name).mkdir(parents=True)
    (upper / "opt/new/file").write_text("x")
    (upper / "opt/link").symlink_to("/opt/new/file")
    (upper / "etc/resolv.conf").touch()
    (upper / "run/modal/plane.sock").touch()
    try:
        os.mknod(upper / "etc/gone", stat.S_IFCHR, 0)
        os.setxattr(upper / "opt/new", "user.overlay.opaque", b"y")
    except OSError as error:
        pytest.skip(f"no whiteouts can be made here: {error}")
    assert sorted(pack(upper, tmp_path / "a.tar")) == ["/etc/gone", "/opt/new"]
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert sorted(tar.getnames()) == ["etc", "opt", "opt/link", "opt/new", "opt/new/file", "run"]
        assert {(m.uid, m.gid) for m in tar} == {(0, 0)}
    assert pack(tmp_path / "none", tmp_path / "b.tar") == []


def test_wheels_for_another_libc() -> None:
    tags = _platforms(RootPython("/p", "3.11.2", "/s", "glibc 2.17", "x86_64"))
    assert tags[:2] == ["manylinux_2_17_x86_64", "manylinux2014_x86_64"]
    assert tags[-1] == "linux_x86_64"
    assert _platforms(RootPython("/p", "3.12.0", "/s", "musl", "aarch64"))[0] == "musllinux_1_2_aarch64"
