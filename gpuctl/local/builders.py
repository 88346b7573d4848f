"""Functions that are run to build an image (`Image.run_function`). Imports tasks, functions, images, wire.

It is a container like any other, with Modal's own runtime, but for this: what it writes to the image's places stays,
its one input comes from the image's definition, and what it prints goes to whoever waits for the build.
"""

from __future__ import annotations

import asyncio
import dataclasses
import pickle
from typing import TYPE_CHECKING, Any

from modal_proto import api_pb2

from gpuctl.local.image_trees import follow_in, place_in
from gpuctl.local.installers import ImageBuildError
from gpuctl.local.store import Deployment, Layout

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gpuctl.local.containers import ContainerSpec
    from gpuctl.local.functions import Functions
    from gpuctl.local.layers import BuiltImage
    from gpuctl.local.tasks import Task, Tasks


class Build:
    """The one input of a build's function, and its output."""

    def __init__(self, function_input: bytes, log: Callable[[str], None]) -> None:
        self._input = function_input
        self._asked = False
        self.log = log
        self.output: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def inputs(self) -> Any:
        """What its container gets for FunctionGetInputs: the input, then the end."""
        response = api_pb2.FunctionGetInputsResponse()
        entry = response.inputs.add(kill_switch=self._asked)
        if not self._asked:
            self._asked = True
            entry.input_id = "in-build"
            entry.input.ParseFromString(self._input)
            entry.input.final_input = True
        return response

    def put(self, outputs: Any) -> None:
        for item in outputs:
            if not self.output.done():
                self.output.set_result(item.result)


class Builders:
    """Runs them."""

    def __init__(self, functions: Functions, tasks: Tasks) -> None:
        self._functions = functions
        self._tasks = tasks

    async def run(
        self, function_id: str, definition: Any, image: BuiltImage, root: Path, log: Callable[[str], None]
    ) -> None:
        """Run the function of an api_pb2.BuildFunction in `image`, whose tree is this build's own.

        `root` becomes the container's root folder. Raises ImageBuildError.
        """
        row = self._functions.row(function_id)
        data = self._functions.data(row.draft_id)
        function = data.ranked_functions[0].function
        given = definition.input if definition.HasField("input") else None
        empty = api_pb2.FunctionInput(args=pickle.dumps(((), {})), data_format=api_pb2.DATA_FORMAT_PICKLE)
        build = Build((given or empty).SerializeToString(), log)
        layout = Layout({row.name: row.id}, {}, {row.id: row.draft_id})
        deployment = Deployment(row.app_id, 0, 0, "", "", 0, b"", layout)
        brought: list[Path] = []  # what the client mounts is not part of the image

        def adapt(spec: ContainerSpec) -> ContainerSpec:
            places = [place_in(image.tree, follow_in(image.tree, file.path)) for file in spec.files]
            brought.extend(place for place in places if place is not None and not place.exists())
            return dataclasses.replace(spec, image=image, build_root=root)

        task = self._tasks.create(row, row.draft_id)
        task.build = build
        log(f"Running {row.name}()\n")
        try:
            await self._tasks.start(task, deployment, adapt=adapt)
            await self._finish(task, build, function.timeout_secs or None)
        finally:
            await self._tasks.stop(task, grace=5)
            for place in brought:
                place.unlink(missing_ok=True)

    async def _finish(self, task: Task, build: Build, seconds: float | None) -> None:
        ended = asyncio.ensure_future(task.ended.wait())
        try:
            waiting: set[Any] = {build.output, ended}
            done, _ = await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
        if not done:
            raise ImageBuildError(f"run_function: it did not end within its timeout of {seconds:.0f} s")
        if not build.output.done():
            why = task.failure or f"its container ended with {task.exit_code}"
            raise ImageBuildError(f"run_function: {why}")
        result = build.output.result()
        if result.status != api_pb2.GenericResult.GENERIC_STATUS_SUCCESS:
            raise ImageBuildError(f"run_function: {result.exception or 'it failed'}")
