"""Images: an app's image definition made into folders on this machine, cached by content. Imports layers,
engine_builds, engines, rootfs.

What an image adds in Python packages becomes a virtual environment, installed with this machine's own pip (or uv)
settings; ENV, WORKDIR, ENTRYPOINT and copied files are applied; shell commands run in a sandbox. What needs more than
that (system packages, registry base images) an engine builds, where one runs; else it is said, by name, as a warning.

On disk, under the cache folder:
    images/<image id>/image.json   what the image is; written last: a folder without it is an unfinished build
    images/<image id>/tree/        what `image_trees` says; or none: a parent's, or a root
    images/<image id>/definition.pb, context/   what it was made of; by-engine.json, what an engine made of that
    roots/<engine's id>/           the file system of an engine's image, as `rootfs` says
    pythons/                       those that uv has downloaded for images
    clients/<python>-<modal>-compiled/   the modal client for containers of that Python: pkg/ (first), deps/ (last)
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import sys
import tarfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modal_proto import api_pb2

from gpuctl.local import recipes
from gpuctl.local.engine_builds import EngineBuild, Recipe
from gpuctl.local.engines import Engine, EngineError, Engines
from gpuctl.local.image_trees import remove_tree
from gpuctl.local.installers import ImageBuildError, Log, pip_for, run
from gpuctl.local.layers import BuiltImage, Layer, LayerBuild, RunFunction
from gpuctl.local.overlays import Overlays
from gpuctl.local.rootfs import (
    RootPython,
    export,
    find_python,
    install_client_for,
    kept_python,
    run_in,
    split_client,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

_OLD, _OLD_SECONDS = "old-", 86400.0  # images that were built again
_LOCK_SECONDS = 0.05  # between two looks whether a lock is free
_AGAIN = 600.0  # seconds after which an engine is tried again that could not build an image
_COMPILE = ("-I", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash")
_FORMAT = 2  # of the trees; raise it when old ones can no longer be used


class ImageStore:
    """Builds images and finds those that are built already, by this plane or an earlier one.

    `hide` are folders of this machine that the commands of a build may not see, beside the home and the cache.
    `overlays` make the roots of builds; without them it keeps some of its own.
    """

    def __init__(
        self,
        cache_dir: Path,
        *,
        hide: tuple[Path, ...] = (),
        overlays: Overlays | None = None,
        engines: Engines | None = None,
    ) -> None:
        # What the commands of a build may not see: secrets, other images.
        self.hide = (Path.home(), cache_dir.absolute(), *hide)
        self.overlays = overlays or Overlays(cache_dir.absolute() / "host", hide=self.hide)
        label = hashlib.sha256(str(cache_dir.absolute()).encode()).hexdigest()[:12]
        self.engines = engines or Engines(label)
        self._recipes: dict[str, Callable[[], Recipe]] = {}
        self._fallen_back: dict[str, float] = {}  # images that an engine could not build, and when
        self._images = cache_dir.absolute() / "images"
        self._clients = cache_dir.absolute() / "clients"
        self._roots = cache_dir.absolute() / "roots"
        self.pythons = cache_dir.absolute() / "pythons"
        for folder in (self._images, self._clients, self._roots):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for old in self._images.glob(f"{_OLD}*"):
            if time.time() - old.stat().st_ctime > _OLD_SECONDS:
                remove_tree(old)

    def image_id(self, image: api_pb2.Image, builder_version: str, context: str = "") -> str:
        """The image's id, by content: its own definition, its parents' ids, and `context` (a digest of its files)."""
        definition = api_pb2.Image()
        definition.CopyFrom(image)
        # Ids of this plane's objects, which change from one deploy to the next; their content counts by `context`.
        definition.ClearField("context_mount_id")
        definition.ClearField("secret_ids")
        if definition.image_registry_config.secret_id:
            definition.image_registry_config.ClearField("secret_id")
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
        recipe = Recipe(image, context_files, secret_env, python_hint, run_function)
        return await self.build_recipe(image_id, recipe, log, force=force)

    async def build_recipe(
        self, image_id: str, recipe: Recipe, log: Log, *, force: bool = False
    ) -> BuiltImage:
        """The same."""
        image = recipe.image
        folder = self._images / image_id
        engine = await self._engine_for(image, log)
        async with locked(self._images / f"{image_id}.lock"):
            layer = None if force or await self.outdated(image_id, image) else self._read(image_id)
            if layer is None:
                aside = self._images / f"{_OLD}{os.urandom(8).hex()}"
                if (folder / "image.json").exists():  # containers may run from it: a later plane removes it
                    folder.rename(aside)
                await asyncio.to_thread(remove_tree, folder)
                folder.mkdir(mode=0o700)
                try:
                    layer = await self._build(engine, image_id, folder, recipe, log, force=force)
                    await asyncio.to_thread(recipe.write, folder)
                    newer = (
                        "overlaid",
                        "engine",
                        "engine_image",
                    )  # an older gpuctl can use those without, too
                    document = {k: v for k, v in asdict(layer).items() if v or k not in newer}
                    _write_json(folder / "image.json", document)
                except BaseException as error:
                    await asyncio.to_thread(remove_tree, folder)
                    if (aside / "image.json").exists():  # what apps that are deployed go on with
                        aside.rename(folder)
                    if isinstance(error, OSError):
                        raise ImageBuildError(
                            f"{error.strerror or error}: {error.filename or folder}"
                        ) from error
                    raise
        if not layer.engine:
            await self.ensure_client(layer, log)
        return self.built(layer)

    # ---- by an engine

    def remember(self, image_id: str, recipe: Callable[[], Recipe]) -> None:
        """How an image would be made, with its secrets: of one that is built, an engine may have to make another."""
        self._recipes[image_id] = recipe

    def wants_engine(self, image: api_pb2.Image) -> list[str]:
        """What of it, or of what it is made from, only an engine applies."""
        if image.base_images and (parent := self._read(image.base_images[0].image_id)) and parent.engine:
            return [f"its parent, which {parent.engine} built"]
        return recipes.beyond(image.dockerfile_commands, recipes.has_program)

    async def outdated(self, image_id: str, image: api_pb2.Image) -> bool:
        """Whether it was built without an engine that there is now and that it wants, or by one that lost it."""
        layer = self._read(image_id)
        if layer is None:
            return True
        if layer.engine:
            if Path(layer.tree).is_dir():
                return False
            engine = await self.engines.find()
            return engine is None or await engine.facts(layer.engine_image) is None
        if (
            not self.wants_engine(image)
            or time.monotonic() - self._fallen_back.get(image_id, -math.inf) < _AGAIN
        ):
            return False
        return await self.engines.find() is not None and await self.overlays.prepare()

    async def _engine_for(self, image: api_pb2.Image, log: Log) -> Engine | None:
        """The engine that is to build it; None where none need, or can, after a word why."""
        reasons = self.wants_engine(image)
        if not reasons or self.engines.refused:
            return None
        if not await self.overlays.prepare():
            log(
                f"without Docker and Podman, because overlayfs does not mount here: {self.overlays.problem}\n"
            )
            return None
        engine = await self.engines.find()
        if engine is None:
            log(f"without Docker and Podman: {self.engines.problem}\n")
            return None
        log(f"{engine.name} {engine.version} builds this, for {'; '.join(reasons)}\n")
        return engine

    async def _build(
        self, engine: Engine | None, image_id: str, folder: Path, recipe: Recipe, log: Log, *, force: bool
    ) -> Layer:
        why = ""
        if engine is not None:
            try:
                parent = await self._parent_in(engine, recipe.image, log, anew=force)
                return await EngineBuild(self, engine, folder, recipe, log, anew=force).run(image_id, parent)
            except EngineError as error:
                self._fallen_back[image_id] = time.monotonic()
                why = str(error).partition("\n")[0]
                log(f"warning: {why}\n")
        parent = self.parent(recipe.image)
        if parent is not None and parent.engine:
            raise ImageBuildError(
                f"{parent.engine} built {parent.id}, from which this is made, and cannot go on: "
                f"{why or self.engines.problem}; MODAL_FORCE_BUILD=1 builds all of it without"
            )
        layer = await LayerBuild(
            self,
            image_id,
            folder,
            recipe.image,
            recipe.context,
            recipe.secret_env,
            log,
            recipe.python,
            recipe.run_function,
        ).run()
        layer.warnings += [why] if why else []
        return layer

    async def _parent_in(self, engine: Engine, image: api_pb2.Image, log: Log, *, anew: bool) -> Layer | None:
        """The parent as the engine has it: built again by it, all the chain, where it was a virtual environment."""
        if (layer := self.parent(image)) is None:
            return None
        if layer.engine and await engine.facts(engine.tag(layer.id)) is not None:
            return layer  # else it was built by another one, or removed from this
        folder = self._images / layer.id
        kept = folder / "by-engine.json"
        async with locked(self._images / f"{layer.id}.lock"):
            try:
                twin = Layer(**json.loads(kept.read_text()))
                if await engine.facts(engine.tag(twin.id)) is not None:
                    return twin
            except (OSError, ValueError, TypeError):
                pass
            known = self._recipes.get(layer.id)
            recipe = known() if known else Recipe.read(folder)
            if recipe is None or (recipe.kept and recipe.incomplete):
                raise ImageBuildError(
                    f"{engine.name} has to build its parent {layer.id}, too, and what that is made of is not known "
                    "here any more: deploy an app that names all of its layers"
                )
            grandparent = await self._parent_in(engine, recipe.image, log, anew=anew)
            log(f"{engine.name} builds {layer.id}, from which this is made\n")
            twin = await EngineBuild(self, engine, folder, recipe, log, anew=anew).run(layer.id, grandparent)
            _write_json(kept, asdict(twin))
            return twin

    def root_of(self, engine_image: str) -> Path:
        """Where the file system of an engine's image belongs."""
        return self._roots / engine_image

    async def ready(self, image_id: str, log: Log) -> None:
        """Bring an engine's image here, where that has not been done: its files, its Python, its client.

        Raises ImageBuildError.
        """
        layer = self._read(image_id)
        if layer is not None and layer.engine:
            await self.ready_layer(layer, log)

    async def ready_layer(self, layer: Layer, log: Log) -> None:
        """The same, of an engine's image that is not in the cache by itself."""
        tree = Path(layer.tree)
        if (kept := kept_python(tree)) and self._client_of(kept).is_dir():
            return
        async with locked(self._roots / f"{layer.engine_image}.lock"):
            if not tree.is_dir():
                await self._export(layer, tree, log)
            python = await find_python(self.overlays, tree, layer.env)
        await self._ensure_engine_client(python, tree, log)

    async def _export(self, layer: Layer, tree: Path, log: Log) -> None:
        engine = await self.engines.find()
        if engine is None:
            raise ImageBuildError(
                f"{layer.engine} built the image {layer.id}, and is not there: {self.engines.problem}"
            )
        log(f"{engine.name} export {engine.tag(layer.id)} (once)\n")
        making = tree.with_suffix(".making")
        await asyncio.to_thread(remove_tree, making)
        try:
            (making / "files").mkdir(parents=True, mode=0o755)
            await export(engine, layer.engine_image, making / "files")
        except (EngineError, OSError, ValueError, tarfile.TarError) as error:
            await asyncio.to_thread(remove_tree, making)
            raise ImageBuildError(f"the image {layer.id} could not be exported: {error}") from error
        making.rename(tree)

    async def _ensure_engine_client(self, python: RootPython, tree: Path, log: Log) -> None:
        folder = self._client_of(python)
        async with locked(folder.with_suffix(".lock")):
            if not folder.is_dir():
                making = folder.with_suffix(".making")
                await asyncio.to_thread(shutil.rmtree, making, True)
                log(f"Installing the modal client for the image's Python {python.version} (once)\n")
                await install_client_for(python, making, log)
                compile_ = (*_COMPILE, "/__client_new")
                await run_in(
                    self.overlays, tree, (python.executable, *compile_), {}, binds={making: "/__client_new"}
                )
                making.rename(folder)

    def _read(self, image_id: str) -> Layer | None:
        if not re.fullmatch(r"im-[0-9A-Za-z]{22}", image_id):
            return None
        try:
            layer = Layer(**json.loads((self._images / image_id / "image.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None
        if layer.overlaid and self.overlays.problem:
            return None  # what it removed of this machine's cannot be left out
        if layer.engine:
            return layer
        # The interpreter may have been removed or upgraded since; then the environment is of no use.
        return layer if Path(layer.tree).is_dir() and Path(layer.base_python).exists() else None

    def parent(self, image: api_pb2.Image) -> Layer | None:
        """The image that `FROM base` means. Raises ImageBuildError when it is gone."""
        if not image.base_images:
            return None
        layer = self._read(image.base_images[0].image_id)
        if layer is None:
            raise ImageBuildError(
                f"the parent image {image.base_images[0].image_id} is not in the cache any more: deploy again"
            )
        return layer

    def built(self, layer: Layer) -> BuiltImage:
        python = kept_python(Path(layer.tree)) if layer.engine else None
        client = self._client_folder(layer)
        if python is not None:
            client = self._client_of(python)
        return BuiltImage(
            id=layer.id,
            tree=Path(layer.tree),
            client=client,
            base_python=layer.base_python,
            python_version=python.version if python else layer.python_version,
            engine=layer.engine,
            interpreter=python.executable if python else "",
            packages=python.site if python else "",
            env=layer.env,
            workdir=layer.workdir,
            entrypoint=tuple(layer.entrypoint),
            warnings=tuple(layer.warnings),
        )

    def _client_of(self, python: RootPython) -> Path:
        return self._clients / f"{python.key}-{importlib.metadata.version('modal')}"

    def _client_folder(self, layer: Layer) -> Path:
        python = ".".join(layer.python_version.split(".")[:2])
        return self._clients / f"{python}-{importlib.metadata.version('modal')}-compiled"

    async def uv_here(self, log: Log) -> str:
        """A uv for this machine: its own, or one of ours."""
        return shutil.which("uv") or await self.install_uv(log)

    async def install_uv(self, log: Log, version: str = "latest", *, anywhere: bool = False) -> str:
        """A uv of our own, where the machine has none; with `anywhere` one that runs in any image."""
        folder = self._clients / "uv"
        options: list[str] = []
        if anywhere:
            folder = self._clients / f"uv-{version}-anywhere"
            # It is linked to no library at all.
            machine = os.uname().machine
            options = ["--only-binary=:all:", "--platform", f"musllinux_1_1_{machine}", "--no-deps"]
        async with locked(folder.with_name(f"{folder.name}.lock")):
            if not folder.is_dir():
                making = folder.with_name(f"{folder.name}.making")
                await asyncio.to_thread(shutil.rmtree, making, True)
                log("Installing uv (once)\n")
                wanted = "uv" if version == "latest" else f"uv=={version}"
                install = ["install", "--quiet", *options, "--target", str(making), wanted]
                await run([*pip_for(sys.executable, sys.executable), *install], log=log)
                making.rename(folder)
        return str(folder / "bin" / "uv")

    async def bring_uv(self, version: str, folder: Path, log: Log) -> None:
        """A uv that runs in any image into the context of a build, as uv's own image has it."""
        uv = Path(await self.install_uv(log, version, anywhere=True))
        folder.mkdir(parents=True)
        for program in ("uv", "uvx"):
            if uv.with_name(program).is_file():
                await asyncio.to_thread(shutil.copyfile, uv.with_name(program), folder / program)
                (folder / program).chmod(0o755)

    async def ensure_client(self, layer: Layer, log: Log) -> None:
        """Install the modal client for containers, once per Python version.

        As in the cloud, it is not part of the image: its own code comes first on the path, its dependencies last,
        so that they never win over what the image installs.
        """
        folder = self._client_folder(layer)
        if folder.is_dir():
            return
        async with locked(folder.with_suffix(".lock")):
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
            await run([*pip_for(python, layer.base_python), *arguments], log=log)
            split_client(making)
            # Containers see it read-only: what is not compiled here, each of them compiles anew, at every start.
            await run([python, *_COMPILE, str(making)], log=log)
            making.rename(folder)


@contextlib.asynccontextmanager
async def locked(path: Path) -> AsyncIterator[None]:
    """Hold an exclusive lock file: other planes may share this cache.

    Who waits keeps no thread: what holds the lock needs one to go on.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                await asyncio.sleep(_LOCK_SECONDS)
            else:
                break
        yield
    finally:
        os.close(descriptor)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    making = path.with_suffix(".making")
    making.write_text(json.dumps(document, indent=1))
    making.replace(path)
