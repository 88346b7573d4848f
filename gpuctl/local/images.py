"""Images: an app's image definition made into folders on this machine, cached by content. Imports sandbox and errors.

There is no Docker here. What an image adds in Python packages becomes a virtual environment, installed with this
machine's own pip (or uv) settings; ENV, WORKDIR, ENTRYPOINT and copied files are applied; shell commands run in a
sandbox. What cannot be applied (system packages, registry base images) is said, by name, as a warning.

On disk, under the cache folder:
    images/<image id>/image.json   what the image is; written last: a folder without it is an unfinished build
    images/<image id>/tree/        venv/, files/, home/ (what commands left in /root); or none: a parent's
    clients/<python>-<modal>-compiled/   the modal client for containers of that Python: pkg/ (first), deps/ (last)
A layer starts as a copy of its parent's tree made of hard links, so that 3 GB of packages are not copied.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from modal_proto import api_pb2

from gpuctl.local import dockerfile, sandbox

# Where a container finds its image and the modal client. Fixed, so that a tree can be used under any layer's id.
IMAGE_PATH = "/__image"
CLIENT_PATH = "/__client"

_OLD, _OLD_SECONDS = "old-", 86400.0  # images that were built again
LARGE = 64 << 20  # bytes; a file of this size or more is not copied for each container, and read-only in it

Log = Callable[[str], None]


RunFunction = Callable[["BuiltImage", Path, Log], Awaitable[None]]  # with the root folder of its container


class ImageBuildError(Exception):
    """An image cannot be built; the message is for the client, its build log was already sent."""


@dataclass(frozen=True)
class BuiltImage:
    """An image that is ready to run.

    `python` is the interpreter's path in the container, `base_python` the one on this machine that it links to;
    `tree` and `client` are folders on this machine; `files` maps paths in the container to files on this machine.
    """

    id: str
    tree: Path
    client: Path
    base_python: str
    python_version: str
    env: Mapping[str, str]
    workdir: str | None
    entrypoint: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def python(self) -> Path:
        """The interpreter, as the container sees it."""
        return Path(IMAGE_PATH) / "venv" / "bin" / "python"

    @cached_property
    def files(self) -> dict[str, Path]:
        """What COPY and shell commands put outside the virtual environment: files, links, and empty folders."""
        root, found = self.tree / "files", {}
        for at, folders, names in os.walk(root):
            links = [name for name in folders if os.path.islink(os.path.join(at, name))]
            if not folders and not names and at != str(root):
                found["/" + os.path.relpath(at, root)] = Path(at)
            for name in (*names, *links):
                place = Path(at, name)
                found["/" + str(place.relative_to(root))] = place
        return found

    @cached_property
    def large(self) -> dict[str, Path]:
        """Those, and what was left in /root, that are too large to be copied for every container: by their path."""
        found = {path: place for path, place in self.files.items() if _is_large(place)}
        home = self.tree / "home"
        for place in home.rglob("*"):
            if _is_large(place):
                found[f"/root/{place.relative_to(home)}"] = place
        return found


def _is_large(place: Path) -> bool:
    return not place.is_symlink() and place.is_file() and place.stat().st_size >= LARGE


def place_in(tree: Path, path: str) -> Path | None:
    """Where in an image's tree the container's `path` is kept; None for /tmp, which is not."""
    inside = os.path.normpath("/" + path).lstrip("/")
    if inside.startswith("tmp/"):
        return None
    if inside.startswith("root/"):
        return tree / "home" / inside.removeprefix("root/")
    return tree / "files" / inside


def follow_in(tree: Path, path: str) -> str:
    """`path` with the links in it followed that the image of this tree has."""
    return follow(path, lambda inside: place_in(tree, inside))


def follow(path: str, place_of: Callable[[str], Path | None]) -> str:
    """`path` in a container with the links in it followed as there, not as on this machine, where they lead elsewhere.

    `place_of` says where on this machine a path of the container is kept.
    """
    path = os.path.normpath("/" + path.lstrip("/"))
    for _ in range(40):  # as many as the kernel follows
        parts = path.split("/")[1:]
        for count in range(1, len(parts)):  # what is written replaces a link at the end
            prefix = "/" + "/".join(parts[:count])
            place = place_of(prefix)
            if place is not None and place.is_symlink():
                target = os.path.join(os.path.dirname(prefix), os.readlink(place), *parts[count:])
                path = os.path.normpath("/" + target.lstrip("/"))
                break
        else:
            return path
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)


def tops(files: Path) -> list[tuple[Path, str]]:
    """(place on this machine, path in the container) of what an image has outside /root: each folder that this machine
    lacks, as a whole, and each file in one that it has.
    """
    found: list[tuple[Path, str]] = []
    waiting = [files]
    while waiting:
        for place in sorted(waiting.pop().iterdir()):
            path = "/" + str(place.relative_to(files))
            own = any(path.startswith(f"{top}/") for top in sandbox.OWN_PLACES)  # not this machine's
            there = path in sandbox.OWN_PLACES or (Path(path).is_dir() and not own)
            shared = there and place.is_dir() and not place.is_symlink()
            if shared and (path == "/tmp" or not path.startswith("/tmp/")):
                waiting.append(place)
            else:
                found.append((place, path))
    return found


@dataclass
class _Layer:
    """What image.json holds: an image as far as its layers have been applied."""

    id: str
    tree: str = ""
    base_python: str = ""
    python_version: str = ""
    env: dict[str, str] = field(default_factory=dict)
    workdir: str | None = None
    entrypoint: list[str] = field(default_factory=list)
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    warnings: list[str] = field(default_factory=list)


class ImageStore:
    """Builds images and finds those that are built already, by this plane or an earlier one.

    `hide` are folders of this machine that the commands of a build may not see, beside the home and the cache.
    """

    def __init__(self, cache_dir: Path, *, hide: tuple[Path, ...] = ()) -> None:
        # What the commands of a build may not see: secrets, other images.
        self.hide = (Path.home(), cache_dir.absolute(), *hide)
        self._images = cache_dir.absolute() / "images"
        self._clients = cache_dir.absolute() / "clients"
        for folder in (self._images, self._clients):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for old in self._images.glob(f"{_OLD}*"):
            if time.time() - old.stat().st_ctime > _OLD_SECONDS:
                shutil.rmtree(old, ignore_errors=True)

    def image_id(self, image: api_pb2.Image, builder_version: str, context: str = "") -> str:
        """The image's id, by content: its own definition, its parents' ids, and `context` (a digest of its files)."""
        definition = api_pb2.Image()
        definition.CopyFrom(image)
        # Ids of this plane's objects, which change from one deploy to the next; their content counts by `context`.
        definition.ClearField("context_mount_id")
        definition.ClearField("secret_ids")
        digest = hashlib.sha256(definition.SerializeToString(deterministic=True))
        digest.update(f"\0{builder_version}\0{context}\0{_FORMAT}\0{sys.version_info[:2]}".encode())
        return "im-" + digest.hexdigest()[:22]

    def get(self, image_id: str) -> BuiltImage | None:
        """The image, where it is built."""
        layer = self._read(image_id)
        return self.built(layer) if layer else None

    async def build(
        self,
        image_id: str,
        image: api_pb2.Image,
        *,
        context_files: Mapping[str, Path],
        secret_env: Mapping[str, str],
        log: Log,
        python_hint: str = "",
        run_function: RunFunction | None = None,
        force: bool = False,
    ) -> BuiltImage:
        """Build `image`, where it is not there yet; another plane that builds the same is waited for.

        `context_files` maps paths in the build context to files on this machine; `python_hint` is the Python version
        that the context brings along (`add_python`). Raises ImageBuildError.
        """
        folder = self._images / image_id
        async with _locked(self._images / f"{image_id}.lock"):
            if (layer := None if force else self._read(image_id)) is None:
                aside = self._images / f"{_OLD}{os.urandom(8).hex()}"
                if (folder / "image.json").exists():  # containers may run from it: a later plane removes it
                    folder.rename(aside)
                await asyncio.to_thread(shutil.rmtree, folder, True)
                folder.mkdir(mode=0o700)
                try:
                    layer = await _LayerBuild(
                        self,
                        image_id,
                        folder,
                        image,
                        context_files,
                        secret_env,
                        log,
                        python_hint,
                        run_function,
                    ).run()
                    _write_json(folder / "image.json", asdict(layer))
                except BaseException as error:
                    await asyncio.to_thread(shutil.rmtree, folder, True)
                    if (aside / "image.json").exists():  # what apps that are deployed go on with
                        aside.rename(folder)
                    if isinstance(error, OSError):
                        raise ImageBuildError(
                            f"{error.strerror or error}: {error.filename or folder}"
                        ) from error
                    raise
        await self.ensure_client(layer, log)
        return self.built(layer)

    def _read(self, image_id: str) -> _Layer | None:
        if not re.fullmatch(r"im-[0-9A-Za-z]{22}", image_id):
            return None
        try:
            layer = _Layer(**json.loads((self._images / image_id / "image.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None
        # The interpreter may have been removed or upgraded since; then the environment is of no use.
        return layer if Path(layer.tree).is_dir() and Path(layer.base_python).exists() else None

    def parent(self, image: api_pb2.Image) -> _Layer | None:
        """The image that `FROM base` means. Raises ImageBuildError when it is gone."""
        if not image.base_images:
            return None
        layer = self._read(image.base_images[0].image_id)
        if layer is None:
            raise ImageBuildError(
                f"the parent image {image.base_images[0].image_id} is not in the cache any more: deploy again"
            )
        return layer

    def built(self, layer: _Layer) -> BuiltImage:
        return BuiltImage(
            id=layer.id,
            tree=Path(layer.tree),
            client=self._client_folder(layer),
            base_python=layer.base_python,
            python_version=layer.python_version,
            env=layer.env,
            workdir=layer.workdir,
            entrypoint=tuple(layer.entrypoint),
            warnings=tuple(layer.warnings),
        )

    def _client_folder(self, layer: _Layer) -> Path:
        python = ".".join(layer.python_version.split(".")[:2])
        return self._clients / f"{python}-{importlib.metadata.version('modal')}-compiled"

    async def install_uv(self, log: Log) -> str:
        """A uv of our own, where the machine has none; it reads the lock files that only it can read."""
        folder = self._clients / "uv"
        async with _locked(folder.with_suffix(".lock")):
            if not folder.is_dir():
                making = folder.with_suffix(".making")
                await asyncio.to_thread(shutil.rmtree, making, True)
                log("Installing uv (once)\n")
                install = ["install", "--quiet", "--target", str(making), "uv"]
                await _run([*_pip(sys.executable, sys.executable), *install], log=log)
                making.rename(folder)
        return str(folder / "bin" / "uv")

    async def ensure_client(self, layer: _Layer, log: Log) -> None:
        """Install the modal client for containers, once per Python version.

        As in the cloud, it is not part of the image: its own code comes first on the path, its dependencies last,
        so that they never win over what the image installs.
        """
        folder = self._client_folder(layer)
        if folder.is_dir():
            return
        async with _locked(folder.with_suffix(".lock")):
            if folder.is_dir():
                return
            making = folder.with_suffix(".making")
            await asyncio.to_thread(shutil.rmtree, making, True)
            log(f"Installing the modal client for Python {layer.python_version} (once)\n")
            python = str(Path(layer.tree) / "venv" / "bin" / "python")
            version = importlib.metadata.version("modal")
            arguments = [
                "install",
                "--quiet",
                "--no-compile",
                "--target",
                str(making / "deps"),
                f"modal=={version}",
            ]
            await _run([*_pip(python, layer.base_python), *arguments], log=log)
            (making / "pkg").mkdir()
            for entry in list((making / "deps").iterdir()):
                if entry.name.startswith(("modal", "synchronicity")):
                    entry.rename(making / "pkg" / entry.name)
            # Containers see it read-only: what is not compiled here, each of them compiles anew, at every start.
            compileall = ["compileall", "-q", "--invalidation-mode", "unchecked-hash", str(making)]
            await _run([python, "-I", "-m", *compileall], log=log)
            making.rename(folder)


_PATH = f"{IMAGE_PATH}/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_READ_ONLY_HINT = (
    ": here a build can write to /root, /tmp, /home, /mnt, /srv, the Python environment, what add_local_… copied and "
    "new folders at the top; the rest is this machine's own system, read-only"
)
_FORMAT = 2  # of the trees; raise it when old ones can no longer be used


class _LayerBuild:
    """One layer being built: its Dockerfile commands applied, one after another, to a copy of its parent."""

    def __init__(
        self,
        store: ImageStore,
        image_id: str,
        folder: Path,
        image: api_pb2.Image,
        context_files: Mapping[str, Path],
        secret_env: Mapping[str, str],
        log: Log,
        python_hint: str,
        run_function: RunFunction | None,
    ) -> None:
        self._store = store
        self._run_function = run_function
        self._hide = store.hide
        self._folder = folder
        self._image = image
        self._context = {os.path.normpath("/" + path): host for path, host in context_files.items()}
        for file in image.context_files:
            path = os.path.normpath("/" + file.filename)
            host = folder / "context" / hashlib.sha256(path.encode()).hexdigest()
            host.parent.mkdir(exist_ok=True)
            host.write_bytes(file.data)
            self._context[path] = host
        self._secret_env = secret_env
        self._log = log
        self._python_hint = python_hint
        parent = store.parent(image)
        self._layer = _Layer(**{**asdict(parent), "id": image_id}) if parent else _Layer(id=image_id)
        self._own_tree = False
        self._arguments: dict[str, str] = {}  # of ARG
        self._official_python = False

    async def run(self) -> _Layer:
        try:
            await self._apply_all()
        except ImageBuildError as error:
            if not self._layer.warnings:
                raise
            # Often the cause; and what was said while a parent was built, this build's log does not have.
            raise ImageBuildError(f"{error} (note: {'; '.join(self._layer.warnings)})") from error
        shutil.rmtree(self._folder / "context", ignore_errors=True)
        return self._layer

    async def _apply_all(self) -> None:
        for command in dockerfile.join_continuations(self._image.dockerfile_commands):
            await self._apply(command)
        if not self._layer.tree:
            await self._new_environment(self._python_hint)
        if self._image.HasField("build_function"):
            await self._function()

    async def _apply(self, command: str) -> None:
        word, _, rest = command.strip().partition(" ")
        rest = rest.strip()
        match word.upper():
            case "" | "CMD" | "LABEL" | "EXPOSE" | "MAINTAINER" | "STOPSIGNAL" | "HEALTHCHECK" | "USER":
                pass  # no meaning for how a Function's container runs here
            case "ARG":
                for argument in dockerfile.expand(rest, self._variables):
                    name, _, default = argument.partition("=")
                    self._arguments[name] = self._image.build_args.get(name, default)
            case "SHELL":
                shell = json.loads(rest)
                if shutil.which(shell[0]):
                    self._layer.shell = shell
                else:
                    self._warn(f"SHELL {rest} is not applied here: {shell[0]} is not on this machine")
            case "FROM":
                await self._from(dockerfile.expand(rest, self._arguments)[0])
            case "ENV":
                self._layer.env |= dockerfile.parse_env(rest, self._variables)
            case "WORKDIR":
                folder = " ".join(dockerfile.expand(rest, self._variables))
                self._layer.workdir = os.path.join(self._layer.workdir or "/", folder)
            case "ENTRYPOINT":
                self._layer.entrypoint = json.loads(rest) if rest.startswith("[") else ["/bin/sh", "-c", rest]
            case "COPY" | "ADD":
                await self._copy(rest)
            case "RUN":
                await self._run(rest)
            case "#" | _ if word.startswith("#"):
                pass
            case _:
                self._warn(f"{word} is not applied here: {command.strip()}")

    @property
    def _variables(self) -> dict[str, str]:
        """What a Dockerfile line can refer to."""
        return {"PATH": _PATH, "HOME": "/root", **self._arguments, **self._layer.env}

    async def _from(self, reference: str) -> None:
        if reference == "base":
            return
        if match := re.match(r"(?:docker\.io/)?(?:library/)?python:(\d+\.\d+)", reference):
            self._official_python = True
            await self._new_environment(match[1])
            return
        self._warn(
            f"the base image {reference} is not applied here: containers see this machine's own system"
        )
        if self._python_hint:
            await self._new_environment(self._python_hint)

    async def _new_environment(self, wanted: str) -> None:
        """A virtual environment with pip alone, of Python `wanted` ("3.12"; "" for any) where this machine has it."""
        executable, version = await asyncio.to_thread(find_python, wanted)
        if wanted and not version.startswith(wanted + "."):
            self._warn(f"Python {wanted} is not on this machine: {version} is used instead")
        self._layer.base_python, self._layer.python_version = executable, version
        tree = self._tree()
        venv = tree / "venv"
        try:
            await _run([executable, "-m", "venv", str(venv)], log=lambda _: None)
        except ImageBuildError:
            # Debian splits ensurepip off into python3-venv: our own pip can fill an environment without one.
            await _run([executable, "-m", "venv", "--clear", "--without-pip", str(venv)], log=self._log)
            await _run(
                [*_pip(str(venv / "bin" / "python"), executable), "install", "--quiet", "pip"], log=self._log
            )
        site = next(venv.glob("lib/python*/site-packages"))
        _relocate_scripts(venv)
        (site / "zz_modal_client.pth").write_text(f"{CLIENT_PATH}/deps\n")
        self._log(f"Python {version} environment\n")

    def _tree(self) -> Path:
        """This layer's own tree, made of hard links to the parent's files on first use."""
        tree = self._folder / "tree"
        if not self._own_tree:
            if self._layer.tree:
                _link_tree(Path(self._layer.tree), tree)
            else:
                tree.mkdir()
            self._layer.tree = str(tree)
            self._own_tree = True
        return tree

    async def _copy(self, arguments: str) -> None:
        words = json.loads(arguments) if arguments.startswith("[") else shlex.split(arguments)
        options = [w for w in words if w.startswith("--")]
        *sources, target = [w for w in words if not w.startswith("--")]
        if any("astral-sh/uv" in option for option in options):
            return  # packages are installed by this machine's own installer
        if any(option.startswith("--from") for option in options):
            self._warn(f"COPY {arguments} is not applied here")
            return
        if "/python/." in sources and self._python_hint:
            return  # add_python: the environment stands for it
        if not os.path.isabs(target):
            target = os.path.join(self._layer.workdir or "/", target)
        copied = 0
        for source in sources:
            source = os.path.normpath("/" + source)
            prefix = source.rstrip("/") + "/"
            for path, host in self._context.items():
                if path == source:
                    into = target.endswith("/") or len(sources) > 1
                    place = os.path.join(target, os.path.basename(path)) if into else target
                elif path.startswith(prefix):
                    place = os.path.join(target, path.removeprefix(prefix))
                else:
                    continue
                self._place(host, place)
                copied += 1
        if not copied:
            self._warn(f"COPY {arguments}: nothing of that name in the build context")

    def _on_disk(self, path: str) -> Path:
        """Where in the tree a file of the image is; what is copied to /tmp is there for the commands of builds."""
        tree = self._tree()
        path = follow_in(tree, path)
        return place_in(tree, path) or tree / "files" / path.lstrip("/")

    def _place(self, host: Path, target: str) -> None:
        place = self._on_disk(target)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)  # it may be a hard link to the parent's
        shutil.copyfile(host, place)

    async def _run(self, command: str) -> None:
        if not self._layer.tree:
            await self._new_environment(self._python_hint)
        if self._official_python and "debconf-set-selections" in command:
            return
        if (split := dockerfile.without_system_packages(command)) is not None:
            command, absent = split
            self._warn_of_system_packages(absent)
            if not command:
                return
        words = dockerfile.words(command)
        if words is None:
            await self._shell(command)
            return
        if (wanted := dockerfile.micromamba_packages(words)) is not None:
            await self._micromamba(wanted)
            return
        if words[:2] == ["/.uv/uv", "sync"]:
            await self._uv_sync(words[2:])
            return
        if words == ["ln", "-s", "/usr/local/bin/python3", "/usr/local/bin/python"]:
            return  # from the client, for add_python="3.12" and older; the environment has both names
        if (install := dockerfile.package_command(words)) is not None:
            if self._official_python and install[1:] == ["--upgrade", "pip", "wheel", "uv"]:
                return  # debian_slim's own tools: this machine's installer does their work
            await self._install(install)
            return
        await self._shell(command)

    def _warn_of_system_packages(self, packages: list[str]) -> None:
        # What debian_slim itself installs is the machine's own business.
        absent = [] if self._official_python else [p for p in packages if not shutil.which(p)]
        if absent:
            self._warn(f"system packages are not installed here: {' '.join(absent)}")

    async def _micromamba(self, packages: list[str]) -> None:
        for package in packages:
            if match := re.fullmatch(r"python=+(\d+\.\d+).*", package):
                await self._new_environment(match[1])
        wanted = [p for p in packages if not re.match(r"(?:python=.*|python|pip)$", p)]
        if wanted:
            self._warn(f"packages of micromamba are not installed here: {' '.join(wanted)}")

    async def _uv_sync(self, options: list[str]) -> None:
        """`uv sync` of a project that COPY placed: what its lock file says, into the layer's own environment."""
        kept = {"--no-install-workspace": "--no-emit-workspace", "--no-install-project": "--no-emit-project"}
        skipped = ("--project", "--compile-bytecode", "--python")
        arguments = [kept.get(o, o) for o in options if not o.startswith(skipped)]
        project, listed = self._on_disk("/.uv"), self._folder / "uv-requirements.txt"
        uv = shutil.which("uv") or await self._store.install_uv(self._log)
        export = ["export", "--quiet", "--project", str(project), "--no-hashes", "--output-file", str(listed)]
        await _run([uv, *export, *arguments], log=self._log, cwd=project)
        await self._install(["install", "-r", str(listed)])
        listed.unlink()

    async def _install(self, arguments: list[str]) -> None:
        """`pip install …` or `pip uninstall …` into the layer's environment, with this machine's own settings."""
        tree = self._tree()
        python = tree / "venv" / "bin" / "python"
        command = f"pip {shlex.join(arguments)}"
        self._log(f"{command}\n")
        arguments = [await self._localise(a) for a in _without_unreachable_indexes(arguments, self._log)]
        environment = {
            **os.environ,
            **self._layer.env,
            **self._secret_env,
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_TARGET", "PIP_PREFIX", "PIP_USER"):
            environment.pop(name, None)
        quiet = ["--progress-bar", "off"] if arguments[0] == "install" else []
        await _run(
            [str(python), "-m", "pip", arguments[0], *quiet, *arguments[1:]],
            log=self._log,
            env=environment,
            cwd=tree,
            name=command,
        )
        _relocate_scripts(tree / "venv")

    async def _localise(self, argument: str) -> str:
        """A requirements file that COPY placed, by its path on this machine."""
        place = self._on_disk(argument)
        return str(place) if argument.startswith("/") and place.is_file() else argument

    async def _function(self) -> None:
        """`Image.run_function`: as a shell command, but that a container of Modal's own runtime does it."""
        if self._run_function is None:
            raise ImageBuildError("run_function: its function was not sent")
        tree = await self._writable_tree()
        root = self._folder / "root"
        root.mkdir(exist_ok=True)
        await self._store.ensure_client(self._layer, self._log)
        try:
            await self._run_function(self._store.built(self._layer), root, self._log)
            _keep_tops(root, tree / "files")
        finally:
            shutil.rmtree(root, ignore_errors=True)

    async def _writable_tree(self) -> Path:
        """This layer's tree, for a program that may change it in place: the parent's must not change with it."""
        tree = self._tree()
        for name in ("home", "files"):
            (tree / name).mkdir(exist_ok=True)
        await asyncio.to_thread(_break_links, tree)
        return tree

    async def _shell(self, command: str) -> None:
        """A shell command in a sandbox.

        It may change the environment, /root, the copied files, and make folders at the top; nothing else.
        """
        if re.search(r"(?:^|[\s;&|(])uv\s", command) and not (self._tree() / "venv" / "bin" / "uv").exists():
            await self._install(["install", "--quiet", "uv"])  # Modal's base images have it
        tree = await self._writable_tree()
        root = self._folder / "root"
        root.mkdir(exist_ok=True)
        filesystem = sandbox.Filesystem(hide=self._hide, root=root)
        filesystem.bind(tree / "home", "/root", read_only=False)
        for folder in sandbox.interpreter_folders(self._layer.base_python):
            filesystem.show(folder)
        filesystem.bind(tree, IMAGE_PATH, read_only=False)
        scratch = self._folder / "scratch"
        (scratch / "tmp").mkdir(parents=True)
        filesystem.bind(scratch / "tmp", "/tmp", read_only=False)
        for source, target in tops(tree / "files"):
            filesystem.place(source, target)
        installer = {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("PIP_", "UV_")) and name != "PIP_CERT"
        }
        environment = {
            "PATH": _PATH,
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "UV_PYTHON": f"{IMAGE_PATH}/venv/bin/python",  # what `uv pip install --system` is to mean
            **installer,
            **filesystem.way_out(),
            **self._arguments,
            **self._layer.env,
            **self._secret_env,
        }
        program = sandbox.Program((*self._layer.shell, command), environment, self._layer.workdir or "/root")
        self._log(f"$ {command}\n")
        launched = await sandbox.launch(scratch, filesystem, program, merge_stderr=True)
        code, reason = -9, ""
        try:
            tail = await _copy_output(launched.process, self._log)
            async for raw in launched.reader:
                word, _, rest = raw.decode(errors="replace").strip().partition(" ")
                if word == "exit":
                    code = int(rest)
                elif word == "error":
                    reason = rest
            await launched.process.wait()
            if code == 0:
                _keep_tops(root, tree / "files")
        finally:
            launched.writer.close()  # whatever happened, nothing of it runs on
            shutil.rmtree(scratch, ignore_errors=True)
            shutil.rmtree(root, ignore_errors=True)
        if code != 0:
            hint = _READ_ONLY_HINT if os.strerror(errno.EROFS) in tail + reason else ""
            raise ImageBuildError(f"RUN {command} ended with {reason or f'exit code {code}'}{hint}")

    def _warn(self, text: str) -> None:
        if text not in self._layer.warnings:
            self._layer.warnings.append(text)
        self._log(f"warning: {text}\n")


def _keep_tops(root: Path, files: Path) -> None:
    """What a program made at the top of its container, where the host has nothing, becomes the image's; so does what
    it made in the folders that are a container's own.
    """
    own = [root / place.lstrip("/") for place in sandbox.OWN_PLACES]
    made = [place for place in root.iterdir() if place not in own and not os.path.lexists(f"/{place.name}")]
    for place in own:
        made += place.iterdir() if place.is_dir() else ()
    for place in made:
        kept = files / place.relative_to(root)
        if place.is_symlink() and kept.is_symlink():
            kept.unlink()
        if not place.name.startswith("__") and not os.path.lexists(kept):
            kept.parent.mkdir(exist_ok=True)
            shutil.move(place, kept)


def find_python(wanted: str) -> tuple[str, str]:
    """(path, version) of an interpreter of version `wanted` ("3.12"), else of the one that runs the plane."""
    own = str(getattr(sys, "_base_executable", None) or sys.executable)
    own_version = ".".join(map(str, sys.version_info[:3]))
    if not wanted or own_version.startswith(wanted + "."):
        return own, own_version
    home = Path.home()
    candidates = [
        shutil.which(f"python{wanted}"),
        *sorted(map(str, home.glob(f".pyenv/versions/{wanted}.*/bin/python{wanted}")), reverse=True),
        *sorted(
            map(str, home.glob(f".local/share/uv/python/cpython-{wanted}.*/bin/python{wanted}")), reverse=True
        ),
    ]
    for candidate in filter(None, candidates):
        # A pyenv shim is on the PATH for versions that are not switched on: only one that answers counts, and what
        # counts is the interpreter behind it.
        if found := _interpreter_behind(candidate):
            return found
    return own, own_version


def _interpreter_behind(python: str) -> tuple[str, str] | None:
    """(path, version) of the installed interpreter that the command `python` starts, if it starts one."""
    code = (
        "import ctypes, ssl, sys; print(getattr(sys, '_base_executable', sys.executable)); "
        "print('.'.join(map(str, sys.version_info[:3])))"
    )
    try:
        done = subprocess.run(
            [python, "-I", "-c", code], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    executable, version = done.stdout.splitlines()
    return executable, version


def _pip(python: str, base_python: str) -> list[str]:
    """A pip that installs into the environment of `python`: its own, ours, the base interpreter's, or uv."""
    site = Path(python).parent.parent
    if any(site.glob("lib/python*/site-packages/pip")):
        return [python, "-m", "pip"]
    for other in (sys.executable, base_python):
        if (
            subprocess.run([other, "-m", "pip", "--version"], capture_output=True, check=False).returncode
            == 0
        ):
            return [other, "-m", "pip", "--python", python]
    if uv := shutil.which("uv"):
        return [uv, "pip", "--python", python]
    raise ImageBuildError(
        "no pip on this machine to install packages with: install python3-pip, python3-venv or uv"
    )


# A program of this machine's ends with the plane, as containers do: the kernel kills it, however the plane ended.
# Otherwise an installer would go on writing to the folder that the next plane's build begins anew.
_ENDS_WITH_PLANE = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
if os.getppid() == int(sys.argv[1]):
    try:
        os.execvp(sys.argv[2], sys.argv[2:])
    except OSError as error:
        sys.exit(f"{sys.argv[2]}: {error.strerror}")
"""


async def _run(
    argv: list[str],
    *,
    log: Log,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    name: str = "",
) -> None:
    """Run a command of this machine's, its output to `log`. Raises ImageBuildError, with `name`, when it fails."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", "-c", _ENDS_WITH_PLANE, str(os.getpid())),
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=env,
        cwd=cwd,
        start_new_session=True,
    )
    try:
        tail = await _copy_output(process, log)
        code = await process.wait()
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        raise
    if code != 0:
        raise ImageBuildError(f"{name or shlex.join(argv)} ended with exit code {code}:\n{tail}")


async def _copy_output(process: asyncio.subprocess.Process, log: Log) -> str:
    """Everything that the process says to `log`, as it comes; returns the last 2,000 characters."""
    assert process.stdout is not None
    tail = ""
    pending = b""
    while data := await process.stdout.read(64 * 1024):
        pending += data
        whole, newline, pending = pending.rpartition(b"\n")
        if newline:
            text = whole.decode(errors="replace") + "\n"
            log(text)
            tail = (tail + text)[-2000:]
    if pending:
        log(pending.decode(errors="replace") + "\n")
        tail += pending.decode(errors="replace")
    return tail


@contextlib.asynccontextmanager
async def _locked(path: Path) -> AsyncIterator[None]:
    """Hold an exclusive lock file: other planes may share this cache."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        await asyncio.to_thread(fcntl.flock, descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    making = path.with_suffix(".making")
    making.write_text(json.dumps(document, indent=1))
    making.replace(path)


def _without_unreachable_indexes(arguments: list[str], log: Log) -> list[str]:
    """Leave out extra package indexes that cannot be reached: pip would retry each for every single package."""
    out: list[str] = []
    pairs = iter(arguments)
    for word in pairs:
        option, equals, value = word.partition("=")
        if option not in ("--extra-index-url", "--find-links", "-f"):
            out.append(word)
            continue
        url = value if equals else next(pairs, "")
        if url.startswith(("http://", "https://")) and (reason := _unreachable(url)):
            log(f"going on without {option} {url}, which cannot be reached from here: {reason}\n")
        else:
            out += [option, url]
    return out


def _unreachable(url: str) -> str | None:
    """None when something listens there (or a proxy stands before it: then pip is left to find out)."""
    parts = urllib.parse.urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    if urllib.request.getproxies().get(parts.scheme) and not urllib.request.proxy_bypass(host):
        return None
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        return str(error)
    return None


def _link_tree(source: Path, target: Path) -> None:
    """A copy of a folder tree made of hard links: quick, and small until something is replaced."""
    shutil.copytree(source, target, symlinks=True, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _break_links(tree: Path) -> None:
    """Make every file of the tree a file of its own."""
    for folder, _, names in os.walk(tree):
        for name in names:
            path = os.path.join(folder, name)
            state = os.lstat(path)
            if state.st_nlink > 1 and not os.path.islink(path):
                shutil.copy2(path, path + ".own")
                os.replace(path + ".own", path)


def _relocate_scripts(venv: Path) -> None:
    """Let the environment's scripts start the interpreter where containers see it.

    pip writes the path of the environment that it filled into the first line of every script.
    """
    here = f"{venv}/bin/"
    for script in (venv / "bin").iterdir():
        if script.is_symlink() or not script.is_file():
            continue
        with script.open("rb") as file:
            head = file.read(1024)
        if not head.startswith(b"#!") or here.encode() not in head:
            continue
        text = script.read_bytes().replace(here.encode(), f"{IMAGE_PATH}/venv/bin/".encode(), 2)
        mode = script.stat().st_mode
        script.unlink()  # it may be a hard link to the parent's
        script.write_bytes(text)
        script.chmod(mode)
