"""Images: an app's image definition made into folders on this machine, cached by content. Imports layers.

There is no Docker here. What an image adds in Python packages becomes a virtual environment, installed with this
machine's own pip (or uv) settings; ENV, WORKDIR, ENTRYPOINT and copied files are applied; shell commands run in a
sandbox. What cannot be applied (system packages, registry base images) is said, by name, as a warning.

On disk, under the cache folder:
    images/<image id>/image.json   what the image is; written last: a folder without it is an unfinished build
    images/<image id>/tree/        what `image_trees` says; or none: a parent's
    clients/<python>-<modal>-compiled/   the modal client for containers of that Python: pkg/ (first), deps/ (last)
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modal_proto import api_pb2

from gpuctl.local.image_trees import remove_tree
from gpuctl.local.installers import ImageBuildError, Log, pip_for, run
from gpuctl.local.layers import BuiltImage, Layer, LayerBuild, RunFunction
from gpuctl.local.overlays import Overlays

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

_OLD, _OLD_SECONDS = "old-", 86400.0  # images that were built again
_FORMAT = 2  # of the trees; raise it when old ones can no longer be used


class ImageStore:
    """Builds images and finds those that are built already, by this plane or an earlier one.

    `hide` are folders of this machine that the commands of a build may not see, beside the home and the cache.
    `overlays` make the roots of builds; without them it keeps some of its own.
    """

    def __init__(
        self, cache_dir: Path, *, hide: tuple[Path, ...] = (), overlays: Overlays | None = None
    ) -> None:
        # What the commands of a build may not see: secrets, other images.
        self.hide = (Path.home(), cache_dir.absolute(), *hide)
        self.overlays = overlays or Overlays(cache_dir.absolute() / "host", hide=self.hide)
        self._images = cache_dir.absolute() / "images"
        self._clients = cache_dir.absolute() / "clients"
        for folder in (self._images, self._clients):
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
                await asyncio.to_thread(remove_tree, folder)
                folder.mkdir(mode=0o700)
                try:
                    layer = await LayerBuild(
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
                    document = asdict(layer)
                    if not layer.overlaid:
                        del document["overlaid"]  # an older gpuctl can use it, too
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
        await self.ensure_client(layer, log)
        return self.built(layer)

    def _read(self, image_id: str) -> Layer | None:
        if not re.fullmatch(r"im-[0-9A-Za-z]{22}", image_id):
            return None
        try:
            layer = Layer(**json.loads((self._images / image_id / "image.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None
        if layer.overlaid and self.overlays.problem:
            return None  # what it removed of this machine's cannot be left out
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

    def _client_folder(self, layer: Layer) -> Path:
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
                await run([*pip_for(sys.executable, sys.executable), *install], log=log)
                making.rename(folder)
        return str(folder / "bin" / "uv")

    async def ensure_client(self, layer: Layer, log: Log) -> None:
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
            await run([*pip_for(python, layer.base_python), *arguments], log=log)
            (making / "pkg").mkdir()
            for entry in list((making / "deps").iterdir()):
                if entry.name.startswith(("modal", "synchronicity")):
                    entry.rename(making / "pkg" / entry.name)
            # Containers see it read-only: what is not compiled here, each of them compiles anew, at every start.
            compileall = ["compileall", "-q", "--invalidation-mode", "unchecked-hash", str(making)]
            await run([python, "-I", "-m", *compileall], log=log)
            making.rename(folder)


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
