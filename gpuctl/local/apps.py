"""Apps: created, published, listed, stopped; what they consist of, and their history. Imports the other nouns."""

from __future__ import annotations

import asyncio
import difflib
import json
import math
import time
from typing import TYPE_CHECKING, Any, cast

from modal_proto import api_pb2

from gpuctl.local.environments import Environments, check_name
from gpuctl.local.ids import new_id
from gpuctl.local.store import App, Deployment, Layout, Store
from gpuctl.local.wire import WORKSPACE, Call, conflict, empty, invalid, not_found, rpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from gpuctl.local import pools, servers
    from gpuctl.local.calls import Calls
    from gpuctl.local.functions import Functions
    from gpuctl.local.image_rpcs import Images
    from gpuctl.local.logs import Logs
    from gpuctl.local.mounts import Mounts
    from gpuctl.local.schedules import Schedules
    from gpuctl.local.servers import Servers
    from gpuctl.local.tasks import Tasks
    from gpuctl.local.volumes import Volumes

DEPLOYED, STOPPED, STOPPING = (
    api_pb2.APP_STATE_DEPLOYED,
    api_pb2.APP_STATE_STOPPED,
    api_pb2.APP_STATE_STOPPING,
)
INITIALIZING = api_pb2.APP_STATE_INITIALIZING
_EPHEMERAL, _DETACHED = api_pb2.APP_STATE_EPHEMERAL, api_pb2.APP_STATE_DETACHED
_CLIENT_BOUND = (INITIALIZING, _EPHEMERAL)  # these end when their client does
_HEARTBEAT_SECONDS = 60.0  # the client beats every 15 s
_IDLE_SECONDS = 0.5  # how often a detached app that its client has left is looked at
_LISTED_SECONDS = 86400.0  # how long a stopped app stays in `modal app list`


class Apps:
    """`modal app …`, `modal deploy`, and the life of an app from creation to its stop.

    `forget_environment`: what removes the other objects of an environment (by its id) that is deleted.
    """

    def __init__(
        self,
        store: Store,
        environments: Environments,
        functions: Functions,
        images: Images,
        mounts: Mounts,
        volumes: Volumes,
        servers: Servers,
        calls: Calls,
        tasks: Tasks,
        logs: Logs,
        schedules: Schedules,
        forget_environment: Sequence[Callable[[str], None]],
    ) -> None:
        self._store = store
        self._forget_environment = forget_environment
        self._environments = environments
        self._functions = functions
        self._images = images
        self._mounts = mounts
        self._volumes = volumes
        self._servers = servers
        self._calls = calls
        self._tasks = tasks
        self._logs = logs
        self._schedules = schedules
        self._heartbeats: dict[str, float] = {}
        self._stops: dict[str, asyncio.Task[None]] = {}
        self._idle_stops: set[asyncio.Task[None]] = set()

    # ---- the plane's own start, end and watch

    async def resume(self) -> None:
        """After a start of the plane: serve again what was deployed, and finish the stops that were under way."""
        now = time.monotonic()
        for app in self._store.apps():
            if app.state == DEPLOYED and (deployment := self._store.deployment(app.id, app.version)):
                await self._servers.publish(deployment)
                await self._calls.publish(deployment)
            elif app.state == STOPPING:
                self._store.set_app(app.id, state=STOPPED, stopped_at=time.time())
            elif app.state in _CLIENT_BOUND:
                self._heartbeats[app.id] = now  # its client may still be there
            if app.state in (_EPHEMERAL, _DETACHED) and (
                deployment := self._store.deployment(app.id, app.version)
            ):
                await self._calls.publish(deployment)
        self._calls.resume()
        self._schedules.start()

    async def watch_clients(self) -> None:
        """Stop the apps whose client is gone without a word. Runs for ever."""
        while True:
            await asyncio.sleep(_HEARTBEAT_SECONDS / 4)
            for app in self._store.apps(states=_CLIENT_BOUND):
                beat = self._heartbeats.setdefault(app.id, time.monotonic())
                if time.monotonic() - beat > _HEARTBEAT_SECONDS:
                    await self.stop_app(app)
            for app in self._store.apps(states=(_DETACHED,)):
                beat = self._heartbeats.setdefault(app.id, time.monotonic())
                if (
                    time.monotonic() - beat > _HEARTBEAT_SECONDS
                    and not self._calls.busy(app.id)
                    and not self._servers.of_app(app.id)
                ):
                    await self.stop_app(app)

    def require(self, app_id: str) -> App:
        app = self._store.app(app_id)
        if app is None:
            raise not_found(f"App '{app_id}' not found.")
        return app

    async def stop_app(self, app: App) -> None:
        """Stop it, and return when nothing of it is left; whoever asks meanwhile waits for the same stop."""
        if app.state == STOPPED:
            return
        job = self._stops.get(app.id)
        if job is None:
            job = self._stops[app.id] = asyncio.create_task(self._stop(app))
            job.add_done_callback(lambda _: self._stops.pop(app.id, None))
        await asyncio.shield(job)

    async def _stop(self, app: App) -> None:
        self._store.set_app(app.id, state=STOPPING)
        self._schedules.forget(app.id)
        await asyncio.gather(self._servers.close_app(app.id), self._calls.close_app(app.id))
        await self._tasks.stop_all(app.id)
        if app.state == DEPLOYED:  # who runs an ephemeral one sees its end
            self._logs.say(app.id, "", "", "app stopped")
        self._logs.flush()
        self._store.set_app(app.id, state=STOPPED, stopped_at=time.time())
        self._heartbeats.pop(app.id, None)
        self._logs.wake()

    # ---- creation

    def _add(self, environment_id: str, name: str, state: int, tags: dict[str, str]) -> App:
        app = App(new_id("ap"), environment_id, name, state, time.time(), 0, 0, 0, _tags(tags))
        self._store.add_app(app)
        self._heartbeats[app.id] = time.monotonic()
        return app

    def _deployed(self, environment_id: str, name: str) -> App | None:
        apps = self._store.apps_named(environment_id, name)
        return next((app for app in apps if app.state == DEPLOYED), None)

    @rpc("AppCreate")
    async def create(self, request: Any, _call: Call) -> Any:
        environment = self._environments.named(request.environment_name)
        app = self._add(
            environment.id, request.description, request.app_state or INITIALIZING, dict(request.tags)
        )
        return api_pb2.AppCreateResponse(
            app_id=app.id, app_page_url=_page(app.id), app_logs_url=_page(app.id)
        )

    @rpc("AppGetOrCreate")
    async def get_or_create(self, request: Any, _call: Call) -> Any:
        environment = self._environments.named(request.environment_name)
        app = self._deployed(environment.id, request.app_name)
        if app is None:
            if request.object_creation_type != api_pb2.OBJECT_CREATION_TYPE_CREATE_IF_MISSING:
                raise not_found(f"App '{request.app_name}' not found in environment '{environment.name}'.")
            app = self._add(environment.id, check_name(request.app_name, "App"), DEPLOYED, {})
        return api_pb2.AppGetOrCreateResponse(app_id=app.id)

    @rpc("AppHeartbeat")
    async def heartbeat(self, request: Any, _call: Call) -> Any:
        self._heartbeats[self.require(request.app_id).id] = time.monotonic()
        return empty()

    @rpc("AppClientDisconnect")
    async def disconnect(self, request: Any, _call: Call) -> Any:
        app = self.require(request.app_id)
        if app.state in _CLIENT_BOUND:
            await self.stop_app(app)
        elif app.state == _DETACHED:
            self._heartbeats[app.id] = -math.inf
            self._idle_stops.add(job := asyncio.create_task(self._stop_when_idle(app)))
            job.add_done_callback(self._idle_stops.discard)
        return empty()

    async def _stop_when_idle(self, app: App) -> None:
        """End a detached app that its client has left, once nothing of it runs."""
        while self._calls.busy(app.id) or self._servers.of_app(app.id):
            await asyncio.sleep(_IDLE_SECONDS)
        await self.stop_app(app)

    # ---- deployment

    @rpc("AppPublish", differs="staged deployments are refused")
    async def publish(self, request: Any, call: Call) -> Any:
        app = self.require(request.app_id)
        if app.state in (STOPPED, STOPPING):
            raise conflict(f"App '{app.id}' is stopped.")
        if request.staged:
            raise invalid("Staged deployments do not exist in the local control plane.")
        layout = self._layout(request)
        deployed = request.app_state == DEPLOYED
        if deployed:
            check_name(request.name, "App")
            other = self._deployed(app.environment_id, request.name)
            if other is not None and other.id != app.id:
                raise conflict(f"Another App is deployed as '{request.name}'; deploy again.")
        before = self._store.deployment(app.id, app.version) if app.version else None
        tags = _tags(request.tags)
        if (
            before
            and before.layout == layout
            and tags == app.tags
            and not request.deployment_tag
            and deployed
        ):
            self._store.forget_live_settings(app.id)
            for pool in self._pools(app):
                pool.configure()
                pool.forgive()
            return api_pb2.AppPublishResponse(url=_page(app.id))  # no deployed_at: "no changes detected"
        deployment = Deployment(
            app_id=app.id,
            version=app.version + 1,
            deployed_at=time.time(),
            tag=request.deployment_tag,
            client_version=request.client_version or call.client_version,
            rollback_version=0,
            commit_info=request.commit_info.SerializeToString(),
            layout=layout,
        )
        await self._deploy(
            app, deployment, name=request.name or app.name, state=request.app_state or app.state, tags=tags
        )
        return api_pb2.AppPublishResponse(
            url=_page(app.id), server_warnings=self._warnings(deployment), deployed_at=deployment.deployed_at
        )

    def _layout(self, request: Any) -> Layout:
        definitions = {}
        for name, function_id in request.function_ids.items():
            row = self._functions.row(function_id)
            definitions[function_id] = request.definition_ids.get(function_id) or row.draft_id
            if (
                row.app_id != request.app_id
                or not self._functions.data(definitions[function_id]).ranked_functions
            ):
                raise invalid(f"Function '{name}' was not created in this app.")
        return Layout(dict(request.function_ids), dict(request.class_ids), definitions)

    async def _deploy(self, app: App, deployment: Deployment, *, name: str, state: int, tags: str) -> None:
        with self._store.transaction():
            self._store.add_deployment(deployment)
            columns = {"name": name, "state": state, "version": deployment.version, "tags": tags}
            self._store.set_app(
                app.id, **columns, deployed_at=deployment.deployed_at if state == DEPLOYED else 0
            )
            self._store.forget_live_settings(app.id)
        await self._servers.publish(deployment)
        await self._calls.publish(deployment)
        if state == DEPLOYED:
            self._schedules.publish(deployment)

    def _warnings(self, deployment: Deployment) -> list[Any]:
        def of_image(image_id: str) -> Iterable[str]:
            return self._images.built(image_id).warnings if image_id else ()

        kind = api_pb2.Warning.WARNING_TYPE_FUNCTION_CONFIGURATION
        return [
            api_pb2.Warning(type=kind, message=text)
            for text in self._functions.warnings(deployment, of_image)
        ]

    @rpc("AppRollback")
    async def rollback(self, request: Any, call: Call) -> Any:
        app = self._deployed_or_fail(request.app_id)
        version = request.version if request.version > 0 else app.version + request.version
        earlier = self._store.deployment(app.id, version)
        if earlier is None:
            raise not_found(f"App '{app.name}' has no version {version}.")
        deployment = self._again(app, earlier, call, rollback_version=version)
        await self._deploy(app, deployment, name=app.name, state=DEPLOYED, tags=app.tags)
        return api_pb2.AppRollbackResponse(
            url=_page(app.id), server_warnings=self._warnings(deployment), deployed_at=deployment.deployed_at
        )

    @rpc("AppRollover")
    async def rollover(self, request: Any, call: Call) -> Any:
        app = self._deployed_or_fail(request.app_id)
        current = self._store.deployment(app.id, app.version)
        if current is None:
            raise conflict(f"App '{app.name}' has nothing deployed.")
        deployment = self._again(app, current, call, rollback_version=0)
        await self._deploy(app, deployment, name=app.name, state=DEPLOYED, tags=app.tags)
        for pool in self._pools(app):
            pool.roll()
        return api_pb2.AppRolloverResponse(
            url=_page(app.id), server_warnings=self._warnings(deployment), deployed_at=deployment.deployed_at
        )

    def _pools(self, app: App) -> list[servers.Pool | pools.Pool]:
        return [*self._servers.of_app(app.id), *self._calls.of_app(app.id)]

    def _deployed_or_fail(self, app_id: str) -> App:
        app = self.require(app_id)
        if app.state != DEPLOYED:
            raise conflict(f"App '{app.name}' is not deployed.")
        return app

    def _again(self, app: App, earlier: Deployment, call: Call, *, rollback_version: int) -> Deployment:
        return Deployment(
            app_id=app.id,
            version=app.version + 1,
            deployed_at=time.time(),
            tag="",
            client_version=call.client_version,
            rollback_version=rollback_version,
            commit_info=earlier.commit_info,
            layout=earlier.layout,
        )

    @rpc("AppStop", differs="answers when every container has ended")
    async def stop(self, request: Any, _call: Call) -> Any:
        await self.stop_app(self.require(request.app_id))
        return empty()

    # ---- questions

    @rpc("AppGetByDeploymentName")
    async def by_name(self, request: Any, _call: Call) -> Any:
        environment = self._environments.named(request.environment_name)
        answer = api_pb2.AppGetByDeploymentNameResponse(environment_name=environment.name)
        apps = self._store.apps_named(environment.id, request.name)
        # A `modal run` has the name for as long as it runs, and is found by its id only.
        named = [app for app in apps if app.deployed_at or app.state == DEPLOYED]
        app = next((a for a in named if a.state == DEPLOYED), None) or next(iter(named), None)
        if app is not None:
            if app.state == DEPLOYED:
                answer.app_id = app.id
            else:
                answer.previous_app_id = app.id
            answer.lifecycle.CopyFrom(_lifecycle(app))
        return answer

    @rpc("AppGetLifecycle")
    async def lifecycle(self, request: Any, _call: Call) -> Any:
        return api_pb2.AppGetLifecycleResponse(lifecycle=_lifecycle(self.require(request.app_id)))

    @rpc("AppGetLayout")
    async def layout(self, request: Any, _call: Call) -> Any:
        app = self.require(request.app_id)
        deployment = self._store.deployment(app.id, app.version)
        if deployment is None:
            return api_pb2.AppGetLayoutResponse()
        return api_pb2.AppGetLayoutResponse(
            app_layout=self._functions.layout(
                deployment.layout, self._volumes.metadata, self._mounts.metadata
            )
        )

    @rpc("AppList", differs="stopped apps are listed for a day")
    async def list(self, request: Any, _call: Call) -> Any:
        environment = self._environments.named(request.environment_name)
        oldest = time.time() - _LISTED_SECONDS
        running: dict[str, int] = {}
        for task in self._tasks.live.values():
            running[task.app_id] = running.get(task.app_id, 0) + 1
        items = [
            api_pb2.AppListResponse.AppListItem(
                app_id=app.id,
                description=app.name,
                name=app.name if app.state == DEPLOYED else "",
                state=cast("Any", app.state),
                created_at=app.created_at,
                stopped_at=app.stopped_at,
                n_running_tasks=running.get(app.id, 0),
                metadata=self._metadata(app),
            )
            for app in self._store.apps(environment_id=environment.id)
            if app.state != STOPPED or app.stopped_at > oldest
        ]
        return api_pb2.AppListResponse(apps=items)

    def _metadata(self, app: App) -> Any:
        deployment = self._store.deployment(app.id, app.version) if app.version else None
        names = deployment.layout.function_ids if deployment else {}
        servers = {
            name: function_id
            for name, function_id in names.items()
            if deployment and self._functions.data(deployment.layout.definition_ids[function_id]).is_server
        }
        return api_pb2.AppHandleMetadata(
            description=app.name,
            app_id=app.id,
            environment_name=self._environments.name_of(app.environment_id),
            lifecycle=_lifecycle(app),
            functions={name: function_id for name, function_id in names.items() if name not in servers},
            servers=servers,
        )

    @rpc("AppGetInfo")
    async def info(self, request: Any, _call: Call) -> Any:
        app = self.require(request.app_id)
        answer = api_pb2.AppGetInfoResponse(info=self._metadata(app))
        deployment = self._store.deployment(app.id, app.version) if app.version else None
        for function_id, definition_id in (deployment.layout.definition_ids if deployment else {}).items():
            data = self._functions.data(definition_id)
            summary = answer.function_info_summaries[function_id]
            for ranked in data.ranked_functions:
                if ranked.function.resources.gpu_config.count:
                    summary.gpu_config.add().CopyFrom(ranked.function.resources.gpu_config)
            if data.is_server:
                summary.requires_proxy_auth = not data.http_config.unauthenticated
                summary.is_sessioned = data.is_sessioned
            if data.HasField("schedule"):
                summary.schedule.CopyFrom(data.schedule)
        return answer

    @rpc("AppDeploymentHistory")
    async def history(self, request: Any, _call: Call) -> Any:
        app = self.require(request.app_id)
        histories = [
            api_pb2.AppDeploymentHistory(
                app_id=app.id,
                version=d.version,
                client_version=d.client_version,
                deployed_at=d.deployed_at,
                deployed_by=WORKSPACE,
                tag=d.tag,
                rollback_version=d.rollback_version,
                rollback_allowed=d.version != app.version,
                commit_info=api_pb2.CommitInfo.FromString(d.commit_info),
            )
            for d in self._store.deployments(app.id)
        ]
        return api_pb2.AppDeploymentHistoryResponse(
            app_deployment_histories=histories, production_app_version=app.version
        )

    @rpc("AppGetTags")
    async def tags(self, request: Any, _call: Call) -> Any:
        return api_pb2.AppGetTagsResponse(tags=json.loads(self.require(request.app_id).tags))

    @rpc("AppSetTags")
    async def set_tags(self, request: Any, _call: Call) -> Any:
        self._store.set_app(self.require(request.app_id).id, tags=_tags(request.tags))
        return empty()

    @rpc("ObjectSuggest")
    async def suggest(self, request: Any, _call: Call) -> Any:
        environment = self._environments.named(request.environment_name)
        apps = [app for app in self._store.apps(environment_id=environment.id) if app.state == DEPLOYED]
        candidates: list[tuple[str, str]] = []  # (app, object)
        if request.kind == api_pb2.ObjectSuggestRequest.OBJECT_SUGGEST_KIND_APP:
            candidates = [("", app.name) for app in apps]
        else:
            servers = request.kind == api_pb2.ObjectSuggestRequest.OBJECT_SUGGEST_KIND_SERVER
            for app in apps:
                metadata = self._metadata(app)
                candidates += [
                    (app.name, name) for name in (metadata.servers if servers else metadata.functions)
                ]
        names = {f"{app}/{name}" if app else name: (app, name) for app, name in candidates}
        near = difflib.get_close_matches(request.query, names, n=request.limit or 3, cutoff=0.5)
        return api_pb2.ObjectSuggestResponse(
            suggestions=[
                api_pb2.ObjectSuggestion(app_name=names[n][0], object_name=names[n][1]) for n in near
            ]
        )

    @rpc("EnvironmentDelete")
    async def delete_environment(self, request: Any, _call: Call) -> Any:
        environment = self._environments.named(request.name)
        if environment.name == self._environments.named("").name:
            raise conflict(f"The default Environment '{environment.name}' cannot be deleted.")
        for app in self._store.apps(environment_id=environment.id):
            await self.stop_app(app)
        self._store.delete_environment(environment.id)
        for forget in self._forget_environment:
            forget(environment.id)
        return empty()


def _lifecycle(app: App) -> Any:
    return api_pb2.AppLifecycle(
        app_state=cast("Any", app.state),
        created_at=app.created_at,
        created_by=WORKSPACE,
        deployed_at=app.deployed_at,
        deployed_by=WORKSPACE if app.deployed_at else "",
        version=app.version,
        stopped_at=app.stopped_at,
        stopped_by=WORKSPACE if app.stopped_at else "",
    )


def _tags(tags: Mapping[str, str]) -> str:
    return json.dumps(dict(tags), sort_keys=True)


def _page(app_id: str) -> str:
    """What stands where the cloud prints the address of a dashboard: how to see the same here."""
    return f"gpuctl local exec -- modal app info {app_id}"
