"""Images over the API: builds that are started once and followed by whoever waits. Imports images, mounts."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

from modal_proto import api_pb2

from gpuctl.errors import GpuctlError
from gpuctl.local.engine_builds import Recipe
from gpuctl.local.installers import ImageBuildError, Log
from gpuctl.local.wire import IMAGE_BUILDER_VERSION, Call, not_found, rpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from gpuctl.local.builders import Builders
    from gpuctl.local.images import ImageStore
    from gpuctl.local.layers import BuiltImage
    from gpuctl.local.mounts import Mounts
    from gpuctl.local.secrets import Secrets

_SUCCESS = api_pb2.GenericResult.GENERIC_STATUS_SUCCESS
_FAILURE = api_pb2.GenericResult.GENERIC_STATUS_FAILURE
_TERMINATED = api_pb2.GenericResult.GENERIC_STATUS_TERMINATED


_SAME_DEPLOY_SECONDS = 60.0
_ALONE_SECONDS = 10.0  # how long a build goes on that nobody follows; a client that waits asks again at once


class _Build:
    """A build that runs or has run: its log so far, its result, and a signal for each change."""

    def __init__(self, forced_by: str | None) -> None:
        self.forced_by = forced_by  # the app that wanted it anew
        self.followers = 0
        self.ended_at = 0.0
        self.lines: list[Any] = []
        self.result: Any = None
        self.metadata: Any = None
        self.task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    def log(self, text: str) -> None:
        if text:
            line = text if text.endswith("\n") else text + "\n"
            self.lines.append(
                api_pb2.TaskLogs(
                    data=line, file_descriptor=api_pb2.FILE_DESCRIPTOR_STDOUT, timestamp=time.time()
                )
            )
            self.change()

    def end(self, status: Any, exception: str = "") -> None:
        """Its result; the first one stays."""
        if self.result is None:
            self.result = api_pb2.GenericResult(status=status, exception=exception)
            self.ended_at = time.monotonic()
        self.change()

    def change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def watch(self, seconds: float) -> None:
        """End it, unless somebody follows it by then: whoever wanted it is gone."""
        asyncio.get_running_loop().call_later(seconds, self._end_where_alone)

    def _end_where_alone(self) -> None:
        if not self.followers and self.result is None and self.task is not None:
            self.task.cancel()
            self.end(_TERMINATED, "nobody waited for it any more")

    async def wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), max(seconds, 0))


class Images:
    """`ImageStore` as the client sees it."""

    def __init__(
        self, images: ImageStore, mounts: Mounts, secrets: Secrets, *, alone_seconds: float = _ALONE_SECONDS
    ) -> None:
        self._images = images
        self._mounts = mounts
        self._secrets = secrets
        self._builds: dict[str, _Build] = {}
        self._builders: Builders | None = None
        self._alone_seconds = alone_seconds

    def attach(self, builders: Builders) -> None:
        """Give it what runs functions to build images."""
        self._builders = builders

    def built(self, image_id: str) -> BuiltImage:
        """Raises NOT_FOUND when it was never built, or its files are gone."""
        image = self._images.get(image_id)
        if image is None:
            raise not_found(f"Image '{image_id}' is not built here; deploy the app again.")
        return image

    async def ready(self, image_id: str, say: Log) -> None:
        """Bring an image here whose files an engine has; `say` is told what takes long. Raises GpuctlError."""
        try:
            await self._images.ready(image_id, say)
        except ImageBuildError as error:
            raise GpuctlError(str(error)) from error

    @rpc("ImageGetOrCreate", differs="what needs Docker or Podman and finds none is warned of; see above")
    async def get_or_create(self, request: Any, _call: Call) -> Any:
        definition, mount_id = request.image, request.image.context_mount_id
        version = request.builder_version or IMAGE_BUILDER_VERSION
        # A context mount's id is its content, so the image's id covers it.
        image_id = self._images.image_id(definition, version, mount_id)
        image = self._images.get(image_id)
        force = (request.force_build or request.ignore_cache) and not self._just_forced(
            request.app_id, image_id
        )
        self._images.remember(image_id, lambda: self._recipe(definition, request.build_function_id))
        outdated = image is None or await self._images.outdated(image_id, definition)
        build = self._builds.get(image_id)
        building = build is not None and build.result is None
        if image is not None and not outdated and image.has_client and not force and not building:
            return api_pb2.ImageGetOrCreateResponse(
                image_id=image_id, result=api_pb2.GenericResult(status=_SUCCESS), metadata=_metadata(image)
            )
        if not building:
            recipe = self._recipe(definition, request.build_function_id)
            build = self._builds[image_id] = _Build(request.app_id if force else None)
            build.task = asyncio.create_task(self._run(build, image_id, recipe, force))
            build.watch(self._alone_seconds)
        return api_pb2.ImageGetOrCreateResponse(image_id=image_id)

    def _just_forced(self, app_id: str, image_id: str) -> bool:
        """Whether the app has it anew already: one deploy asks for an image as often as others are made from it."""
        build = self._builds.get(image_id)
        if build is None or build.forced_by != app_id:
            return False
        return build.result is None or time.monotonic() - build.ended_at < _SAME_DEPLOY_SECONDS

    def _recipe(self, definition: Any, function_id: str) -> Recipe:
        """What an image is made of. Raises NOT_FOUND for a mount or a secret that is gone."""
        mount_id = definition.context_mount_id
        registry = definition.image_registry_config.secret_id

        async def run_function(base: BuiltImage, root: Path, log: Log) -> None:
            assert self._builders is not None
            await self._builders.run(function_id, definition.build_function, base, root, log)

        return Recipe(
            definition,
            {file.path: file.host for file in self._mounts.files(mount_id)} if mount_id else {},
            self._secrets.values(definition.secret_ids),
            self._mounts.python_version(mount_id) if mount_id else "",
            run_function if function_id else None,
            self._secrets.values([registry]) if registry else {},
        )

    async def _run(self, build: _Build, image_id: str, recipe: Recipe, force: bool) -> None:
        try:
            image = await self._images.build_recipe(image_id, recipe, build.log, force=force)
        except ImageBuildError as error:
            build.end(_FAILURE, str(error))
        except asyncio.CancelledError:
            build.end(_TERMINATED, "the local control plane was stopped")
            raise
        except Exception as error:
            build.end(_FAILURE, repr(error))
            raise
        else:
            build.metadata = _metadata(image)
            build.end(_SUCCESS)

    @rpc("ImageJoinStreaming")
    async def join(self, request: Any, _call: Call) -> AsyncIterator[Any]:
        build = self._builds.get(request.image_id)
        if build is None:
            image = self.built(request.image_id)
            yield api_pb2.ImageJoinStreamingResponse(
                result=api_pb2.GenericResult(status=_SUCCESS), metadata=_metadata(image), eof=True
            )
            return
        build.followers += 1
        try:
            async for response in _follow(build, request):
                yield response
        finally:
            build.followers -= 1
            if build.result is None:
                build.watch(self._alone_seconds)

    @rpc("ImageFromId")
    async def from_id(self, request: Any, _call: Call) -> Any:
        return api_pb2.ImageFromIdResponse(
            image_id=request.image_id, metadata=_metadata(self.built(request.image_id))
        )

    async def stop(self) -> None:
        """End the builds that run."""
        tasks = [build.task for build in self._builds.values() if build.task and not build.task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _metadata(image: BuiltImage) -> Any:
    return api_pb2.ImageMetadata(
        # What an engine built is asked for its Python when its files are here.
        python_version_info=f"Python {image.python_version}" if image.python_version else "",
        workdir=image.workdir or None,
        image_builder_version=IMAGE_BUILDER_VERSION,
    )


async def _follow(build: _Build, request: Any) -> AsyncIterator[Any]:
    """What the build has said and says, and its result; for as long as the client asked."""
    seen = int(request.last_entry_id or 0)
    deadline = time.monotonic() + request.timeout
    while True:
        if lines := build.lines[seen:]:
            seen += len(lines)
            yield api_pb2.ImageJoinStreamingResponse(task_logs=lines, entry_id=str(seen))
        elif build.result is not None:
            yield api_pb2.ImageJoinStreamingResponse(result=build.result, metadata=build.metadata, eof=True)
            return
        elif time.monotonic() >= deadline:
            return
        else:
            await build.wait(deadline - time.monotonic())
