"""Layers that an engine builds: a Dockerfile of each, its context, and what its RUN steps are given of this machine.

Imports engines, recipes, layers, rootfs, overlays, installers.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import operator
import os
import shlex
import shutil
import tarfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from modal_proto import api_pb2

from gpuctl.local import machine, recipes
from gpuctl.local.engines import Engine, EngineError, ImageFacts, Order
from gpuctl.local.image_trees import remove_tree
from gpuctl.local.installers import ImageBuildError, Log, goes_without
from gpuctl.local.layers import Layer, RunFunction
from gpuctl.local.overlays import is_opaque, is_whiteout
from gpuctl.local.pythons import LIBRARIES, SETTLE, bring_python

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gpuctl.local.images import ImageStore

_DEFINITION, _CONTEXT = "definition.pb", "context"
_NOT_IN_BUILDS = {"volume_mounts": "no Volumes are there", "gpu_config.type": "no GPU is there"}
# From the client, for Pythons that come without that name.
_NAMES_PYTHON = "RUN ln -s /usr/local/bin/python3 /usr/local/bin/python"
# Mount points of a container, and what each container has of its own.
_NOT_PACKED = {"/dev", "/proc", "/sys", "/run/modal", "/__client", "/etc/resolv.conf", "/etc/hosts"}
_SETTINGS, _LARGEST = "GPUCTL_BUILD_SETTINGS", 100_000  # the kernel takes no larger variable than 128 KiB


@dataclass(frozen=True)
class Recipe:
    """All that a layer is made of: what the client sent, and what is kept of it beside the image."""

    image: api_pb2.Image
    context: Mapping[str, Path]
    secret_env: Mapping[str, str] = field(default_factory=dict)
    python: str = ""
    run_function: RunFunction | None = None
    registry_env: Mapping[str, str] = field(default_factory=dict)  # credentials for the registry of its base
    kept: bool = False  # read from the disk: without secrets and functions, which are not kept there

    @property
    def incomplete(self) -> bool:
        """Whether it takes more to make it again than what is kept."""
        return bool(self.image.secret_ids) or self.image.HasField("build_function")

    def write(self, folder: Path) -> None:
        """Keep it beside the image, its files as hard links where these can be."""
        names: dict[str, str] = {}
        for path, host in self.context.items():
            names[path] = hashlib.sha256(path.encode()).hexdigest()
            place = folder / _CONTEXT / names[path]
            place.parent.mkdir(exist_ok=True)
            place.unlink(missing_ok=True)
            try:
                os.link(host, place)
            except OSError:
                shutil.copy2(host, place)
        definition = {"python": self.python, "context": names}
        (folder / _DEFINITION).write_bytes(self.image.SerializeToString())
        (folder / f"{_DEFINITION}.json").write_text(json.dumps(definition))

    @staticmethod
    def read(folder: Path) -> Recipe | None:
        try:
            image = api_pb2.Image.FromString((folder / _DEFINITION).read_bytes())
            kept = json.loads((folder / f"{_DEFINITION}.json").read_text())
        except (OSError, ValueError):
            return None
        context = {path: folder / _CONTEXT / name for path, name in kept["context"].items()}
        return Recipe(image, context, python=kept["python"], kept=True)


class EngineBuild:
    """One layer, built by an engine; `parent` is what the engine calls its parent's image, with its facts here."""

    def __init__(
        self, store: ImageStore, engine: Engine, folder: Path, recipe: Recipe, log: Log, *, anew: bool
    ) -> None:
        self._store = store
        self._engine = engine
        self._folder = folder
        self._recipe = recipe
        self._log = log
        self._anew = anew

    async def run(self, image_id: str, parent: Layer | None) -> Layer:
        """Build it under the tag of `image_id`. Raises ImageBuildError; EngineError where a registry is away."""
        work = self._folder / "engine"
        await asyncio.to_thread(remove_tree, work)  # of a plane that was killed
        work.mkdir(mode=0o700)
        try:
            if not self._recipe.image.HasField("build_function"):
                return await self._run(work, image_id, parent)
            return await self._run_function(work, image_id, parent)
        finally:
            await asyncio.to_thread(remove_tree, work)

    async def _run_function(self, work: Path, image_id: str, parent: Layer | None) -> Layer:
        """`Image.run_function`: in a container of ours, whose writings the engine then puts upon the parent's image."""
        assert parent is not None  # the client makes no function's layer without one
        if self._recipe.run_function is None:
            raise ImageBuildError(
                f"{image_id} is made by a function that is not known here any more: deploy it with MODAL_FORCE_BUILD=1"
            )
        await self._store.ready_layer(parent, self._log)
        root = work / "root"
        (root / "upper").mkdir(parents=True)
        await self._recipe.run_function(self._store.built(parent), root, self._log)
        context = work / "context"
        context.mkdir()
        removed = await asyncio.to_thread(pack, root / "upper" / "%2F", context / "written.tar")
        text = f"FROM {self._engine.tag(parent.id)}\n"
        secrets = []
        environment = {}
        if removed:
            script = "".join(f"rm -rf -- {shlex.quote(path)}\n" for path in removed)
            environment[_SETTINGS] = script
            secrets = [f"id={recipes.SETTINGS_ID},env={_SETTINGS}"]
            mount = _mount(recipes.SETTINGS_ID, recipes.SETTINGS_PATH)
            text += f"RUN {mount} {json.dumps(['/bin/sh', recipes.SETTINGS_PATH])}\n"
        (work / "Dockerfile").write_text(f"{text}ADD written.tar /\n")
        (work / "Dockerfile.dockerignore").touch()
        tag = self._engine.tag(image_id)
        order = Order(work / "Dockerfile", context, tag, {}, secrets, environment)
        await self._engine.build(order, self._log)
        layer = Layer(**{**asdict(parent), "id": image_id})
        await self._describe(layer, tag)
        return layer

    async def _run(self, work: Path, image_id: str, parent: Layer | None) -> Layer:
        engine, recipe = self._engine, self._recipe
        layer = Layer(**asdict(parent)) if parent else Layer(id=image_id)
        told = await asyncio.to_thread(
            machine.settings, binds=engine.binds, certificates_path=recipes.CERTIFICATES_PATH
        )
        mounts: list[str] = []
        secrets: list[str] = []
        environment: dict[str, str] = {}
        if told.certificates:
            mounts.append(_mount(recipes.CERTIFICATES_ID, recipes.CERTIFICATES_PATH))
            secrets.append(f"id={recipes.CERTIFICATES_ID},src={told.certificates}")
        script = recipes.settings_script(recipe.secret_env, told.variables)
        if script:
            mounts.append(_mount(recipes.SETTINGS_ID, recipes.SETTINGS_PATH))
            secrets.append(f"id={recipes.SETTINGS_ID},env={_SETTINGS}")
            environment[_SETTINGS] = script
            if len(script.encode()) > _LARGEST:
                raise ImageBuildError("the secrets of this build are too large: all of them, 100 kB at most")
        base = engine.tag(parent.id) if parent else ""
        for what in ("volume_mounts", "gpu_config.type"):
            if operator.attrgetter(what)(recipe.image):
                self._log(f"warning: {_NOT_IN_BUILDS[what]} for the commands of this build\n")
                layer.warnings.append(
                    f"{_NOT_IN_BUILDS[what]} for commands that {engine.name} runs in a build"
                )
        commands = list(recipe.image.dockerfile_commands)
        given = recipes.Given(
            base,
            recipe.image.build_args,
            layer.shell,
            mounts,
            bool(script),
            as_root=parent is not None and _has_a_user(await engine.facts(base)),
            left_out=lambda option, url: goes_without(option, url, self._log),
        )
        for reference in recipes.bases(commands, given):
            login = _login(recipe.image.image_registry_config.registry_auth_type, recipe.registry_env)
            await engine.fetch(reference, self._log, login, work)
        context = work / "context"
        await self._lay_out(context)
        if recipe.python:
            await bring_python(
                recipe.python,
                context / "python",
                self._store.pythons,
                self._log,
                lambda: self._store.uv_here(self._log),
                python=not any(c.strip() == _NAMES_PYTHON for c in commands),
            )
            if (context / "python" / LIBRARIES).is_dir():
                given = dataclasses.replace(given, after_python=SETTLE)
        made = await asyncio.to_thread(recipes.for_engine, commands, given)
        if made.uv:
            await self._store.bring_uv(made.uv, context / recipes.UV_CONTEXT.lstrip("/"), self._log)
        await asyncio.to_thread(_open_to_all, context)
        (work / "Dockerfile").write_text(made.text)
        (work / "Dockerfile.dockerignore").touch()  # the client has left out what is to be left out
        tag = engine.tag(image_id)
        await engine.build(
            Order(
                dockerfile=work / "Dockerfile",
                context=context,
                tag=tag,
                build_args=dict(recipe.image.build_args),
                secrets=secrets,
                environment=environment,
                folders=told.folders,
                anew=self._anew,
            ),
            self._log,
        )
        layer.id, layer.shell = image_id, list(made.shell)
        await self._describe(layer, tag)
        return layer

    async def _describe(self, layer: Layer, tag: str) -> None:
        facts = await self._engine.facts(tag)
        if facts is None:
            raise ImageBuildError(f"{self._engine.name} built {tag}, and does not have it")
        layer.engine, layer.engine_image = self._engine.name, facts.id
        layer.tree = str(self._store.root_of(facts.id))
        layer.base_python = layer.python_version = ""
        layer.env, layer.workdir = dict(facts.env), facts.workdir
        layer.entrypoint = list(facts.entrypoint)
        if _has_a_user(facts):
            text = (
                f"USER {facts.user} counts for the commands of its layer alone: containers here run as root"
            )
            layer.warnings = [*(w for w in layer.warnings if not w.startswith("USER ")), text]
            self._log(f"warning: {text}\n")

    async def _lay_out(self, context: Path) -> None:
        """The build's context: copies, that all may read, as the client's files come to be in an image."""
        files = {os.path.normpath("/" + path): host for path, host in self._recipe.context.items()}
        context.mkdir()
        for path, host in files.items():
            place = context / path.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            await asyncio.to_thread(shutil.copyfile, host, place)
            place.chmod(0o755 if host.stat().st_mode & 0o100 else 0o644)
        for file in self._recipe.image.context_files:
            place = context / os.path.normpath("/" + file.filename).lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file.data)
            place.chmod(0o644)


def _has_a_user(facts: ImageFacts | None) -> bool:
    """Another than root."""
    return facts is not None and facts.user.partition(":")[0] not in ("", "root", "0")


def _login(kind: int, env: Mapping[str, str]) -> tuple[str, str] | None:
    """The name and password for a registry, as the secret of `from_registry` and its kin has them."""
    if not env:
        return None
    if kind == api_pb2.REGISTRY_AUTH_TYPE_GCP:
        return "_json_key", env.get("SERVICE_ACCOUNT_JSON", "")
    if kind == api_pb2.REGISTRY_AUTH_TYPE_AWS:
        raise EngineError("registries of AWS are not asked from here: their passwords come from AWS's API")
    return env.get("REGISTRY_USERNAME", ""), env.get("REGISTRY_PASSWORD", "")


def _open_to_all(context: Path) -> None:
    """Whatever the plane's mask is: an image's folders are open to all."""
    for at, _, _ in os.walk(context):
        Path(at).chmod(0o755)


def pack(upper: Path, archive: Path) -> list[str]:
    """What a container wrote, as root's, into a tar; returns the paths that it removed or replaced.

    Those have to be gone before the tar is unpacked.
    """
    removed: list[str] = []

    def add(folder: Path, inside: str) -> None:
        for entry in sorted(os.scandir(folder), key=lambda e: e.name):
            path, place = f"{inside}/{entry.name}", Path(entry.path)
            if path in _NOT_PACKED:
                continue
            if is_whiteout(place):
                removed.append(path)
                continue
            info = tar.gettarinfo(entry.path, arcname=path.lstrip("/"))
            if info is None:  # a socket
                continue
            info.uid = info.gid = 0
            info.uname = info.gname = ""
            if entry.is_dir(follow_symlinks=False):
                place.chmod(info.mode | 0o700)
                if is_opaque(place):
                    removed.append(path)
                tar.addfile(info)
                add(place, path)
            elif info.isreg():
                with place.open("rb") as file:
                    tar.addfile(info, file)
            elif info.issym() or info.islnk():
                tar.addfile(info)

    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        if upper.is_dir():
            add(upper, "")
    archive.chmod(0o644)
    return removed


def _mount(name: str, target: str) -> str:
    return f"--mount=type=secret,id={name},target={target},mode=0444"
