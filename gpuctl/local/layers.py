"""One layer of an image: its Dockerfile commands applied, one after another, to a copy of its parent.

Imports dockerfile, recipes, image_trees, installers, sandbox.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from gpuctl.local import dockerfile, recipes, sandbox
from gpuctl.local.image_trees import (
    CLIENT_PATH,
    IMAGE_PATH,
    break_links,
    follow,
    is_large,
    keep_tops,
    link_tree,
    place_in,
    relocate_scripts,
    remove_tree,
    tops,
)
from gpuctl.local.installers import (
    ImageBuildError,
    Log,
    copy_output,
    find_python,
    pip_for,
    run,
    without_unreachable_indexes,
)
from gpuctl.local.overlays import make_folder

if TYPE_CHECKING:
    from modal_proto import api_pb2

    from gpuctl.local.images import ImageStore

RunFunction = Callable[["BuiltImage", Path, Log], Awaitable[None]]  # with the root folder of its container

_PATH = f"{IMAGE_PATH}/venv/bin:{sandbox.SYSTEM_PATH}"
_READ_ONLY_HINT = (
    ": here a build can write to /root, /tmp, /home, /mnt, /srv, the Python environment, what add_local_… copied and "
    "new folders at the top; the rest is this machine's own system, read-only, because overlayfs does not mount: "
)


@dataclass(frozen=True)
class BuiltImage:
    """An image that is ready to run.

    `python` is the interpreter's path in the container, `base_python` the one on this machine that it links to;
    `tree` and `client` are folders on this machine; `files` maps paths in the container to files on this machine.
    What an engine built has neither Python nor client until `ImageStore.ready` has brought its file system here.
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
    # Of an image that an engine built: its root is `files` of its tree, and containers see nothing of this machine's.
    engine: str = ""
    interpreter: str = ""
    packages: str = ""  # where its Python looks for packages, in there

    @property
    def python(self) -> Path:
        """The interpreter, as the container sees it."""
        return Path(self.interpreter) if self.engine else Path(IMAGE_PATH) / "venv" / "bin" / "python"

    @property
    def has_client(self) -> bool:
        """Whether the client for its Python is here, or comes when the rest of it does."""
        return bool(self.engine) or self.client.is_dir()

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
        found = {path: place for path, place in self.files.items() if is_large(place)}
        home = self.tree / "home"
        for place in home.rglob("*"):
            if is_large(place):
                found[f"/root/{place.relative_to(home)}"] = place
        return found


@dataclass
class Layer:
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
    overlaid: bool = False  # whether commands of it wrote to an overlay
    engine: str = ""  # the one that built it, and its id there; `tree` is then where its file system belongs
    engine_image: str = ""


class LayerBuild:
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
        self._layer = Layer(**{**asdict(parent), "id": image_id}) if parent else Layer(id=image_id)
        self._own_tree = False
        self._arguments: dict[str, str] = {}  # of ARG
        self._official_python = False

    async def run(self) -> Layer:
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
                await self._run_command(rest)
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
        if match := recipes.OFFICIAL_PYTHON.match(reference):
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
            await run([executable, "-m", "venv", str(venv)], log=lambda _: None)
        except ImageBuildError:
            # Debian splits ensurepip off into python3-venv: our own pip can fill an environment without one.
            await run([executable, "-m", "venv", "--clear", "--without-pip", str(venv)], log=self._log)
            await run(
                [*pip_for(str(venv / "bin" / "python"), executable), "install", "--quiet", "pip"],
                log=self._log,
            )
        site = next(venv.glob("lib/python*/site-packages"))
        relocate_scripts(venv)
        (site / "zz_modal_client.pth").write_text(f"{CLIENT_PATH}/deps\n")
        self._log(f"Python {version} environment\n")

    def _tree(self) -> Path:
        """This layer's own tree, made of hard links to the parent's files on first use."""
        tree = self._folder / "tree"
        if not self._own_tree:
            if self._layer.tree:
                link_tree(Path(self._layer.tree), tree)
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

        def found(inside: str) -> Path:
            place = place_in(tree, inside) or tree / "files" / inside.lstrip("/")
            return Path(inside) if sandbox.on_host(inside) and not os.path.lexists(place) else place

        path = follow(path, found)
        return place_in(tree, path) or tree / "files" / path.lstrip("/")

    def _place(self, host: Path, target: str) -> None:
        place = self._on_disk(target)
        make_folder(place.parent)
        place.unlink(missing_ok=True)  # it may be a hard link to the parent's
        shutil.copyfile(host, place)

    async def _run_command(self, command: str) -> None:
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
        absent = recipes.absent_packages(packages, recipes.has_program, official=self._official_python)
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
        uv = await self._store.uv_here(self._log)
        export = ["export", "--quiet", "--project", str(project), "--no-hashes", "--output-file", str(listed)]
        await run([uv, *export, *arguments], log=self._log, cwd=project)
        await self._install(["install", "-r", str(listed)])
        listed.unlink()

    async def _install(self, arguments: list[str]) -> None:
        """`pip install …` or `pip uninstall …` into the layer's environment, with this machine's own settings."""
        tree = self._tree()
        python = tree / "venv" / "bin" / "python"
        command = f"pip {shlex.join(arguments)}"
        self._log(f"{command}\n")
        arguments = [await self._localise(a) for a in without_unreachable_indexes(arguments, self._log)]
        environment = {
            **os.environ,
            **self._layer.env,
            **self._secret_env,
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_TARGET", "PIP_PREFIX", "PIP_USER"):
            environment.pop(name, None)
        quiet = ["--progress-bar", "off"] if arguments[0] == "install" else []
        await run(
            [str(python), "-m", "pip", arguments[0], *quiet, *arguments[1:]],
            log=self._log,
            env=environment,
            cwd=tree,
            name=command,
        )
        relocate_scripts(tree / "venv")

    async def _localise(self, argument: str) -> str:
        """A requirements file that COPY placed, by its path on this machine."""
        place = self._on_disk(argument)
        return str(place) if argument.startswith("/") and place.is_file() else argument

    async def _function(self) -> None:
        """`Image.run_function`: as a shell command, but that a container of Modal's own runtime does it."""
        if self._run_function is None:
            raise ImageBuildError("run_function: its function was not sent")
        root = await self._make_root()
        await self._store.ensure_client(self._layer, self._log)
        try:
            await self._run_function(self._store.built(self._layer), root, self._log)
            await self._keep(root)
        finally:
            await asyncio.to_thread(remove_tree, root)

    async def _make_root(self) -> Path:
        """A folder for what a program of the build writes; `upper` is in it where overlays are made.

        Without them the program changes this layer's tree in place: the parent's must not change with it.
        """
        tree, root = self._tree(), self._folder / "root"
        for name in ("home", "files"):
            (tree / name).mkdir(exist_ok=True)
        if await self._store.overlays.carry(tree):
            (root / "upper").mkdir(parents=True)
        else:
            root.mkdir()
            await asyncio.to_thread(break_links, tree)
        return root

    async def _keep(self, root: Path) -> None:
        """What was written becomes the layer's."""
        tree = self._tree()
        if (root / "upper").is_dir():
            self._layer.overlaid = True
            await asyncio.to_thread(self._store.overlays.merge, root, tree)
        else:
            keep_tops(root, tree / "files")

    async def _shell(self, command: str) -> None:
        """A shell command in a sandbox.

        Where no overlays are made, it may change the environment, /root, the copied files, and make folders at the
        top; nothing else.
        """
        if re.search(r"(?:^|[\s;&|(])uv\s", command) and not (self._tree() / "venv" / "bin" / "uv").exists():
            await self._install(["install", "--quiet", "uv"])  # Modal's base images have it
        tree, root = self._tree(), await self._make_root()
        scratch = self._folder / "scratch"
        scratch.mkdir()
        filesystem: sandbox.Filesystem
        if (root / "upper").is_dir():
            filesystem = self._store.overlays.root(root, tree, self._hide, None)
        else:
            filesystem = sandbox.Filesystem(hide=self._hide, root=root)
            filesystem.bind(tree / "home", "/root", read_only=False)
            filesystem.bind(tree, IMAGE_PATH, read_only=False)
            (scratch / "tmp").mkdir()
            filesystem.bind(scratch / "tmp", "/tmp", read_only=False)
            for source, target in tops(tree / "files"):
                filesystem.place(source, target)
        for folder in sandbox.interpreter_folders(self._layer.base_python):
            filesystem.show(folder)
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
            tail = await copy_output(launched.process, self._log)
            async for raw in launched.reader:
                word, _, rest = raw.decode(errors="replace").strip().partition(" ")
                if word == "exit":
                    code = int(rest)
                elif word == "error":
                    reason = rest
            await launched.process.wait()
            if code == 0:
                await self._keep(root)
        finally:
            launched.writer.close()  # whatever happened, nothing of it runs on
            for made in (scratch, root):
                await asyncio.to_thread(remove_tree, made)
        if code != 0:
            problem = self._store.overlays.problem
            hint = _READ_ONLY_HINT + problem if problem and os.strerror(errno.EROFS) in tail + reason else ""
            raise ImageBuildError(f"RUN {command} ended with {reason or f'exit code {code}'}{hint}")

    def _warn(self, text: str) -> None:
        if text not in self._layer.warnings:
            self._layer.warnings.append(text)
        self._log(f"warning: {text}\n")
