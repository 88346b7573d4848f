"""A writable root for containers and builds: this machine's folders and an image's below, what is written above.

Imports sandbox, image_trees, gpus. Linux's overlayfs does it, in the container's own namespaces: nothing of this
machine's changes, and what one container writes no other sees. A build's writings become its image's (`merge`).

Of every overlay, from the top: what is written (`upper/`), what the client brought and where things are mounted
(`top/`), the image's tree, a skeleton, this machine's own folder. The skeleton has the folders of this machine that
belong to somebody else, as folders of this user's: what belongs to nobody in a user namespace cannot be written to.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import stat
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING

from gpuctl.errors import GpuctlError
from gpuctl.local import sandbox
from gpuctl.local.gpus import DRIVER_PLACE, driver_files
from gpuctl.local.image_trees import IMAGE_PATH, follow, remove_tree
from gpuctl.local.sandbox import Filesystem, Mount

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)

VENV = f"{IMAGE_PATH}/venv"
_OPAQUE = "user.overlay.opaque"
_OTHERS_MAY_LOOK = 0o005
# What overlays may lie upon; folders of others are shown as they are, read-only.
_FILESYSTEMS = {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs"}
_DEEPEST = 3  # of mount points: those of container engines lie deeper, and come and go
_TRIAL = (
    "touch /__trial/a/new /usr/__trial && rm -r /__trial/b && mkdir /__trial/b && test ! -e /__trial/b/file"
)


class Overlays:
    """Makes roots for containers and builds, where the kernel can. `folder` is its own, and begun anew."""

    def __init__(self, folder: Path, *, hide: tuple[Path, ...] = ()) -> None:
        self._folder = folder
        self._hide = tuple(Path(os.path.realpath(hidden)) for hidden in (*hide, folder))
        self._preparing = asyncio.Lock()
        self._prepared = False
        self.problem = ""  # why there are none
        self._surveys = 0
        self._points: set[str] = set()  # where something was mounted then
        self.skeleton = folder / "skeleton"
        self.shared: list[str] = []  # this machine's folders that overlays lie upon
        self.as_they_are: list[str] = []  # those that are shown read-only

    async def prepare(self) -> bool:
        """Find out, once, whether and upon what overlays can be made here."""
        async with self._preparing:
            if not self._prepared or self._mounted_since():
                await asyncio.to_thread(self._survey)
                await self._try()
                self._prepared = True
                if self.problem:
                    log.warning(
                        "overlayfs does not mount here (%s): containers and builds see /etc, /opt, /usr, /var "
                        "and the like read-only",
                        self.problem,
                    )
        return not self.problem

    def _mounted_since(self) -> bool:
        """Whether something is mounted now in a folder that overlays lie upon, which the kernel then refuses: others'
        container engines do that.
        """
        points = {point for point, _ in _mount_points()}
        return any(_lies_in(point, *self.shared) for point in points - self._points)

    async def carry(self, tree: Path) -> bool:
        """Whether an image of this tree can be the part of a root."""
        if not await self.prepare():
            return False
        files = tree / "files"  # one of an older gpuctl may have a folder where this machine has a link
        made = files.iterdir() if files.is_dir() else ()
        return not any(
            place.is_dir() and not place.is_symlink() and (self.skeleton / place.name).is_symlink()
            for place in made
        )

    def root(
        self,
        folder: Path,
        tree: Path,
        hide: tuple[Path, ...],
        gpus: tuple[int, ...] | None,
        *,
        whole: bool = False,
    ) -> Root:
        """A root of `tree` that writes under `folder`; with `whole` the tree is all of it, without this machine's."""
        kind = WholeRoot if whole else Root
        return kind(hide=hide, gpus=gpus, overlays=self, folder=folder, tree=tree)

    def scratch(self) -> Path:
        """A folder for the root of a program that is asked something; who makes it removes it."""
        folder = self._folder / f"scratch-{os.urandom(8).hex()}"
        folder.mkdir(mode=0o700)
        return folder

    def _survey(self) -> None:
        if not self._surveys:
            remove_tree(self._folder)
        self._surveys += 1  # containers lie upon the skeleton of an earlier one
        self.skeleton = self._folder / f"skeleton-{self._surveys}"
        self.skeleton.mkdir(parents=True)
        for name in ("proc", "dev", "run", "root", "tmp", *(place[1:] for place in sandbox.OWN_PLACES)):
            _make(self.skeleton / name, 0o1777 if name == "tmp" else 0o755)
        kinds = dict(_mount_points())
        self._points = set(kinds)
        self.shared, self.as_they_are = [], []
        for entry in sorted(os.scandir("/"), key=lambda e: e.name):
            place = self.skeleton / entry.name
            if entry.path in sandbox.HIDDEN:
                continue
            if entry.is_symlink():
                place.symlink_to(os.readlink(entry.path))
            elif not entry.is_dir():
                place.touch()
                self.as_they_are.append(entry.path)
            else:
                _make(place, 0o755)
                usable = kinds.get(entry.path, "ext4") in _FILESYSTEMS
                holds_hidden = any(hidden.is_relative_to(entry.path) for hidden in self._hide)
                (self.shared if usable and not holds_hidden else self.as_they_are).append(entry.path)
        for point, kind in sorted(kinds.items()):
            inside = any(point.startswith(f"{top}/") for top in self.shared)
            if inside and point.count("/") <= _DEEPEST and os.path.exists(point):
                usable = kind in _FILESYSTEMS and os.path.isdir(point)
                (self.shared if usable else self.as_they_are).append(point)
        for top in self.shared:
            self._outline(top, set(kinds))
        if (temporary := self.skeleton / "var/tmp").parent.is_dir() and "/var" in self.shared:
            _make(temporary, 0o1777)
            os.setxattr(temporary, _OPAQUE, b"y")  # what others have in there is not the container's

    def _outline(self, folder: str, mounted: set[str]) -> None:
        """The folders in it that are somebody else's and open to all."""
        try:
            children = [e for e in os.scandir(folder) if e.is_dir(follow_symlinks=False)]
        except OSError:
            return
        for child in children:
            try:
                state = child.stat(follow_symlinks=False)
                mine = state.st_uid == os.geteuid()
                if child.path in mounted or not (
                    mine or state.st_mode & _OTHERS_MAY_LOOK == _OTHERS_MAY_LOOK
                ):
                    continue
                if not mine:
                    self._sketch(child.path)
            except (
                FileNotFoundError
            ):  # others' folders come and go, as those of a container engine's builds do
                continue
            self._outline(child.path, mounted)

    def _sketch(self, folder: str) -> None:
        place = self.skeleton / folder[1:]
        if not place.is_dir():
            self._sketch(os.path.dirname(folder))
            _make(place, stat.S_IMODE(os.stat(folder).st_mode) & 0o1777 | 0o700)

    async def _try(self) -> None:
        """Start a container; without the overlays that the kernel refuses."""
        tree, trial = self._folder / "tree", self._folder / "trial"
        for name in ("a", "b"):
            (tree / "files" / "__trial" / name).mkdir(parents=True, exist_ok=True)
            (tree / "files" / "__trial" / name / "file").touch()
        for _ in range(len(self.shared) + 1):
            trial.mkdir()
            root = self.root(trial, tree, self._hide, ())
            program = sandbox.Program(("/bin/sh", "-c", _TRIAL), {"PATH": os.defpath}, "/")
            try:
                launched = await sandbox.launch(trial, root, program, merge_stderr=True)
                assert launched.process.stdout is not None
                said = (await launched.process.stdout.read()).decode(errors="replace").strip()
                words = (await launched.reader.read()).decode(errors="replace").strip().splitlines()
                await launched.process.wait()
                launched.writer.close()
            except (OSError, GpuctlError) as error:
                said, words = str(error), []
            finally:
                await asyncio.to_thread(remove_tree, trial)
            self.problem = ""
            if words[-1:] == ["exit 0"]:
                return
            self.problem = said or next((w.removeprefix("error ") for w in words), "no reason given")
            refused = [top for top in self.shared if f"new_root{top}: " in self.problem]
            if not refused:
                return
            self.shared.remove(refused[0])
            self.as_they_are.append(refused[0])

    def merge(self, folder: Path, tree: Path) -> None:
        """What was written to the root that wrote under `folder` becomes the tree's own."""
        for upper in sorted((folder / "upper").iterdir()):
            target = urllib.parse.unquote(upper.name)
            place = image_place(tree, target)
            place.mkdir(parents=True, exist_ok=True)
            if target == "/":  # mount points of other overlays; sockets of programs
                for name in ("dev", "proc", "sys", "run/modal"):
                    remove_tree(upper / name)
            _merge(upper, place, Path(target) if target in self.shared else None)


def image_place(tree: Path, target: str) -> Path:
    """Where an image's tree keeps what an overlay at `target` shows of it."""
    if target == VENV:
        return tree / "venv"
    return tree / "home" if target == "/root" else tree / "files" / target.lstrip("/")


class Root(Filesystem):
    """The mounts of a container that may write anywhere. What it brings is put in `top`, by its path."""

    def __init__(
        self,
        *,
        hide: tuple[Path, ...],
        gpus: tuple[int, ...] | None,
        overlays: Overlays,
        folder: Path,
        tree: Path,
    ) -> None:
        self._skeleton, self._shared = overlays.skeleton, overlays.shared
        self._as_they_are = overlays.as_they_are
        self._folder = folder
        self._tree = tree
        self.top = folder / "top"
        self.top.mkdir(parents=True, exist_ok=True)
        self.top.chmod(0o755)
        super().__init__(hide=hide, gpus=gpus)

    def _make_base(self) -> None:
        tree = self._tree
        self._targets = ["/", *self._shared, "/root"]
        if (tree / "venv").is_dir():
            self._targets.append(VENV)
        self._devices()
        if resolver := self._resolver():
            self.bind(Path(resolver), resolver, read_only=True)
        for path in filter(os.path.exists, self._as_they_are):
            self.bind(Path(path), path, read_only=True)
            for hidden in self.hide:
                if hidden.is_relative_to(path) and hidden.is_dir():
                    self._placed.append(Mount("tmpfs", str(hidden)))
        for place in self._covered(tree / "files"):
            self.bind(place, "/" + str(place.relative_to(tree / "files")), read_only=True)

    def _covered(self, files: Path) -> Iterator[Path]:
        """What the image has in folders that are shown as they are."""
        for path in self._as_they_are:
            for at, _, names in os.walk(files / path.lstrip("/")):
                yield from (Path(at, name) for name in names)

    @property
    def mounts(self) -> list[Mount]:
        first = [Mount("overlay", target, self._options(target)) for target in self._targets]
        return [*first, Mount("proc", "/proc"), *super().mounts]

    def place(self, source: Path, target: str) -> None:
        """Bring one file, of the container's own from then on."""
        target = follow(target, self._found)
        if self._visible(target):
            super().place(source, target)
            return
        place = self._make_parents(target)
        shutil.copyfile(source, place)
        shutil.copymode(source, place)

    def bind(self, source: Path, target: str, *, read_only: bool) -> None:
        super().bind(source, target, read_only=read_only)
        point = self._placed[-1].target
        if not self._visible(point) and not _lies_in(point, "/dev", "/proc") and self._found(point) is None:
            place = self._make_parents(point)
            if source.is_dir():
                _make(place, 0o755)
            else:
                place.touch()

    def _make_parents(self, path: str) -> Path:
        """The place of `path` in `top`; the folders above it are there, as they are below."""
        place = self.top / path.lstrip("/")
        if not place.parent.is_dir():
            parent = os.path.dirname(path)
            self._make_parents(parent)
            below = self._found(parent)
            _make(
                place.parent,
                stat.S_IMODE(below.stat().st_mode) | 0o700 if below and below.is_dir() else 0o755,
            )
        return place

    def directory(self, target: str) -> None:
        """Nothing: process 1 makes the folder that it starts the program in."""

    def _options(self, target: str) -> str:
        name = urllib.parse.quote(target, safe="")
        upper, work = self._folder / "upper" / name, self._folder / "work" / name
        for folder in (upper, work):
            folder.mkdir(parents=True, exist_ok=True)
        upper.chmod(0o700 if target == "/root" else 0o755)
        point = self._make_parents(target)  # a place for the mount, and never none below
        _make(point, 0o755)
        below = [point, image_place(self._tree, target), self._skeleton / target.lstrip("/")]
        below += [Path(target)] if target in self._shared else []
        lowers = ":".join(_escaped(place) for place in below if place.is_dir() and not place.is_symlink())
        return f"lowerdir={lowers},upperdir={_escaped(upper)},workdir={_escaped(work)},userxattr,index=off,volatile"

    def _visible(self, path: str) -> bool:
        return _lies_in(path, *self._as_they_are) and super()._visible(path)

    def _found(self, path: str) -> Path | None:
        """Where on this machine that is which the container sees at `path`, before it has written anything."""
        target = max((t for t in self._targets if _lies_in(path, t)), key=len)
        inside = os.path.relpath(path, target)
        layers = [image_place(self._tree, target), self._skeleton / target.lstrip("/")]
        layers += [Path(target)] if target in self._shared or self._visible(path) else []
        for place in (self.top / path.lstrip("/"), *(layer / inside for layer in layers)):
            if os.path.lexists(place):
                return place
        return None

    def _real(self, target: str) -> str:
        """`target` with the links followed that the container has there, not those of this machine."""
        return os.path.dirname(follow(f"{target.rstrip('/')}/.x", self._found))


class WholeRoot(Root):
    """The mounts of a container whose image brings its own system: of this machine's files it sees none."""

    def _make_base(self) -> None:
        self._skeleton, self._shared, self._as_they_are = self._folder / "bare", [], []
        self._skeleton.mkdir(exist_ok=True)
        for name in ("dev", "proc", "run", "sys", "tmp"):
            _make(self._skeleton / name, 0o1777 if name == "tmp" else 0o755)
        self._targets = ["/"]
        self._devices()
        self.bind(Path("/sys"), "/sys", read_only=True)
        for inside, place in driver_files().items() if self.gpus else ():
            self.bind(Path(place), f"{DRIVER_PLACE}/{inside}", read_only=True)
        # Names are found as on this machine, whose network it is: the container's own copies.
        for path in ("/etc/resolv.conf", "/etc/hosts"):
            if os.path.isfile(path):
                self._make_parents(path)
                shutil.copyfile(path, self.top / path.lstrip("/"))
                (self.top / path.lstrip("/")).chmod(0o644)

    def way_out(self, *, proxies: bool = True) -> dict[str, str]:
        """As of any; the certificates that this machine trusts are at a place of their own."""
        found = {n: v for n, v in super().way_out(proxies=proxies).items() if n not in sandbox.CERTIFICATES}
        shown: dict[str, str] = {}
        for name in sandbox.CERTIFICATES:
            value = os.environ.get(name, "")
            if os.path.isfile(value):
                if value not in shown:
                    shown[value] = f"/run/modal/certificates-{len(shown)}.pem"
                    self.bind(Path(value), shown[value], read_only=True)
                found[name] = shown[value]
        return found


def _make(folder: Path, mode: int) -> None:
    """Make a folder of this mode, whatever the plane's mask is: programs see it."""
    folder.mkdir(exist_ok=True)
    folder.chmod(mode)


def is_whiteout(place: Path) -> bool:
    """Whether it stands for something below that was removed."""
    state = place.lstat()
    return stat.S_ISCHR(state.st_mode) and state.st_rdev == 0


def make_folder(folder: Path) -> None:
    """Make a folder of an image's tree, and those above it; where something was removed, it begins empty."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    again = os.path.lexists(folder) and is_whiteout(folder)
    if again:
        folder.unlink()
    _make(folder, 0o755)
    if again:
        os.setxattr(folder, _OPAQUE, b"y")


def _merge(upper: Path, place: Path, host: Path | None) -> None:
    """Move what is in `upper` upon what is in `place`; `host` is the folder of this machine that is below, if any."""
    for entry in list(os.scandir(upper)):
        ours, theirs = Path(entry.path), place / entry.name
        below = host / entry.name if host else None
        if entry.is_dir(follow_symlinks=False):
            mode = stat.S_IMODE(entry.stat(follow_symlinks=False).st_mode)
            ours.chmod(mode | 0o700)  # without that, its owner could neither read nor move it
            if theirs.is_dir() and not theirs.is_symlink() and not is_opaque(ours):
                theirs.chmod(mode | 0o700)
                _merge(ours, theirs, below)
                continue
        _remove(theirs)
        if not is_whiteout(ours) or (below is not None and os.path.lexists(below)):
            os.rename(ours, theirs)


def is_opaque(folder: Path) -> bool:
    """Whether it hides what is below it."""
    try:
        return os.getxattr(folder, _OPAQUE) == b"y"
    except OSError:
        return False


def _remove(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        remove_tree(place)
    else:
        place.unlink(missing_ok=True)


def _escaped(place: Path) -> str:
    return str(place).replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")


def _lies_in(path: str, *places: str) -> bool:
    return any(path == place or path.startswith(place.rstrip("/") + "/") for place in places)


def _mount_points() -> Iterator[tuple[str, str]]:
    """(path, kind) of the file systems of this machine."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split(" ")
        path = fields[4].encode().decode("unicode_escape").encode("latin-1").decode(errors="replace")
        yield path, fields[fields.index("-") + 1]
