"""Functions: their definitions, and what the client is told of them. Imports store, wire, ids.

A definition that the client sends is a draft until the app is published; equal definitions are one, so that
publishing can tell whether anything changed. All are kept as FunctionData, also those sent as a plain Function.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from modal_proto import api_pb2

from gpuctl.local import schedules
from gpuctl.local.ids import is_id, new_id
from gpuctl.local.store import App, Deployment, Function, Layout, Store
from gpuctl.local.variants import apply_options
from gpuctl.local.wire import Call, conflict, invalid, not_found, rpc, unimplemented

if TYPE_CHECKING:
    from gpuctl.local.environments import Environments
    from gpuctl.local.gpus import Gpus
    from gpuctl.local.variants import Variants

UrlOf = Callable[[str], str]
_LIVE_STATES = (api_pb2.APP_STATE_DEPLOYED, api_pb2.APP_STATE_EPHEMERAL, api_pb2.APP_STATE_DETACHED)


class Functions:
    """Definitions by function. `open_url` gives a server its URL, `url_of` says what it is ("" for none)."""

    def __init__(
        self,
        store: Store,
        environments: Environments,
        variants: Variants,
        *,
        open_url: Callable[[str], Any],
        url_of: UrlOf,
        gpus: Gpus,
    ) -> None:
        self._store = store
        self.variants = variants
        self._environments = environments
        self._open_url = open_url
        self._url_of = url_of
        self._gpus = gpus

    # ---- what the other nouns ask

    def row(self, function_id: str) -> Function:
        row = self._store.function(function_id)
        if row is None:
            raise not_found(f"Function '{function_id}' not found.")
        return row

    def data(self, definition_id: str) -> Any:
        """A definition, as api_pb2.FunctionData."""
        stored = self._store.definition(definition_id)
        if stored is None:
            raise not_found(f"Function definition '{definition_id}' not found.")
        return api_pb2.FunctionData.FromString(stored)

    def data_of(self, function_id: str, definition_id: str) -> Any:
        """The same for one function: a variant has options of its own."""
        data = self.data(definition_id)
        variant = self.variants.get(function_id)
        if variant is not None:
            apply_options(data, api_pb2.FunctionOptions.FromString(variant.options))
        return data

    def parameters(self, function_id: str) -> bytes:
        """What a variant's class is made with; b"" for the others."""
        variant = self.variants.get(function_id)
        return variant.parameters if variant else b""

    def base_of(self, function_id: str) -> str:
        """The function that the app's layout knows: of a variant its base, of the others themselves."""
        variant = self.variants.get(function_id)
        return variant.base_id if variant else function_id

    def definition_of(self, function_id: str) -> str:
        """The definition that counts: the deployed one, else the draft."""
        function_id = self.base_of(function_id)
        row = self.row(function_id)
        app = self._store.app(row.app_id)
        deployment = self._store.deployment(row.app_id, app.version) if app and app.version else None
        if deployment is not None and function_id in deployment.layout.definition_ids:
            return deployment.layout.definition_ids[function_id]
        return row.draft_id

    def metadata(self, function_id: str, data: Any, definition_id: str) -> Any:
        """The handle that the client keeps of a function."""
        url = self._url_of(function_id)
        methods = {
            name: api_pb2.FunctionHandleMetadata(
                function_name=method.function_name,
                function_type=method.function_type,
                is_method=True,
                use_method_name=name,
                function_schema=method.function_schema,
                supported_input_formats=method.supported_input_formats,
                supported_output_formats=method.supported_output_formats,
            )
            for name, method in data.method_definitions.items()
        }
        return api_pb2.FunctionHandleMetadata(
            function_name=data.function_name,
            function_type=data.function_type,
            definition_id=definition_id,
            app_id=self.row(function_id).app_id,
            base_function_id=base if (base := self.base_of(function_id)) != function_id else "",
            is_method=data.is_method,
            class_parameter_info=data.class_parameter_info,
            method_handle_metadata=methods,
            function_schema=data.function_schema,
            _experimental_flash_urls=[url] if url else [],
            supported_input_formats=data.supported_input_formats,
            supported_output_formats=data.supported_output_formats,
        )

    def with_url(self, function_id: str, data: Any) -> Any:
        """A copy of the definition that carries the server's URL, as the client shows it."""
        answer = api_pb2.FunctionData()
        answer.CopyFrom(data)
        if url := self._url_of(function_id):
            answer.flash_service_urls[:] = [url]
        return answer

    def layout(self, layout: Layout, volume: Callable[[str], Any], mount: Callable[[str], Any]) -> Any:
        """The AppLayout of a deployment: every object that its code can refer to, with its metadata.

        `volume` and `mount` give the metadata of an object of that kind.
        """
        objects = api_pb2.AppLayout(function_ids=layout.function_ids, class_ids=layout.class_ids)
        seen = {*layout.class_ids.values(), *layout.function_ids.values()}
        for class_id in layout.class_ids.values():
            objects.objects.add(object_id=class_id, class_handle_metadata=api_pb2.ClassHandleMetadata())
        for function_id in layout.function_ids.values():
            definition_id = layout.definition_ids.get(function_id) or self.row(function_id).draft_id
            data = self.data(definition_id)
            objects.objects.add(
                object_id=function_id,
                function_handle_metadata=self.metadata(function_id, data, definition_id),
            )
            for dependency in (
                data.ranked_functions[0].function.object_dependencies if data.ranked_functions else ()
            ):
                if dependency.object_id in seen:
                    continue
                seen.add(dependency.object_id)
                entry = objects.objects.add(object_id=dependency.object_id)
                if is_id(dependency.object_id, "vo"):
                    entry.volume_metadata.CopyFrom(volume(dependency.object_id))
                elif is_id(dependency.object_id, "mo"):
                    entry.mount_handle_metadata.CopyFrom(mount(dependency.object_id))
                elif is_id(dependency.object_id, "fu"):
                    other = self.definition_of(dependency.object_id)
                    entry.function_handle_metadata.CopyFrom(
                        self.metadata(dependency.object_id, self.data_of(dependency.object_id, other), other)
                    )
                elif is_id(dependency.object_id, "cs"):
                    entry.class_handle_metadata.SetInParent()
        return objects

    # ---- RPCs

    @rpc("FunctionPrecreate")
    async def precreate(self, request: Any, _call: Call) -> Any:
        _refuse_web(request.function_name, [request.webhook_config], request.method_definitions)
        row = self._row_for(request.app_id, request.function_name, request.existing_function_id)
        sketch = api_pb2.FunctionData(
            function_name=request.function_name,
            function_type=request.function_type,
            method_definitions=request.method_definitions,
            function_schema=request.function_schema,
            supported_input_formats=request.supported_input_formats,
            supported_output_formats=request.supported_output_formats,
        )
        metadata = self.metadata(row.id, sketch, row.draft_id)
        return api_pb2.FunctionPrecreateResponse(function_id=row.id, handle_metadata=metadata)

    @rpc(
        "FunctionCreate",
        differs="web functions are refused; GPUs and memory snapshots are warned of at publish",
    )
    async def create(self, request: Any, _call: Call) -> Any:
        data = _as_data(request)
        first = data.ranked_functions[0].function
        _refuse_web(data.function_name, [data.webhook_config, first.webhook_config], data.method_definitions)
        if data.HasField("http_config") and not data.is_server:
            raise unimplemented(
                f"'{data.function_name}' is served by @modal.experimental.http_server, which the local control "
                "plane does not have; @app.server it does"
            )
        _refuse_mounts(data.function_name, first)
        schedules.check(data)
        if data._experimental_group_size > 1:
            raise unimplemented(
                f"'{data.function_name}' is clustered (modal.clustered): Clustered functions do not exist in the local "
                "control plane"
            )
        row = self._row_for(request.app_id, data.function_name, request.existing_function_id)
        for ranked in data.ranked_functions:
            # The client sends a set, in another order each time.
            ranked.function.mount_ids[:] = sorted(ranked.function.mount_ids)
        content = data.SerializeToString(deterministic=True)
        digest = hashlib.sha256(content).hexdigest()
        definition_id = self._store.add_definition(new_id("de"), row.id, digest, content)
        self._store.set_function(row.id, draft_id=definition_id)
        if data.is_server:
            await self._open_url(row.id)
        answer = self.with_url(row.id, data)
        function = api_pb2.Function()
        function.CopyFrom(first)
        function.flash_service_urls[:] = answer.flash_service_urls
        return api_pb2.FunctionCreateResponse(
            function_id=row.id,
            function=function,
            function_data=answer,
            handle_metadata=self.metadata(row.id, data, definition_id),
        )

    def _row_for(self, app_id: str, name: str, existing_id: str) -> Function:
        """The function of that name in the app, made when it is new."""
        app = self._store.app(app_id)
        if app is None:
            raise not_found(f"App '{app_id}' not found.")
        if app.state in (api_pb2.APP_STATE_STOPPED, api_pb2.APP_STATE_STOPPING):
            raise conflict(f"App '{app_id}' is stopped.")
        row = self._store.function_named(app_id, name)
        if row is None and existing_id:
            row = self._store.function(existing_id)
            if row is not None and row.app_id != app_id:
                raise invalid(f"Function '{existing_id}' belongs to another app.")
        if row is None:
            row = Function(new_id("fu"), app_id, name, "", 0, b"")
            self._store.add_function(row)
        return row

    def _deployed(self, name: str, environment_name: str, version: int) -> tuple[App, Deployment, str]:
        """The deployed app of that name, what it consists of, and how to speak of it."""
        environment = self._environments.named(environment_name)
        where = f"App '{name}' in environment '{environment.name}'"
        apps = self._store.apps_named(environment.id, name)
        app = next((app for app in apps if app.state == api_pb2.APP_STATE_DEPLOYED), None)
        deployment = self._store.deployment(app.id, app.version) if app else None
        if app is None or deployment is None:
            raise not_found(f"{where} is not deployed.")
        if version not in (0, app.version):
            raise unimplemented(
                f"{where}: version {version} is not the deployed one, and the local control plane runs no other"
            )
        return app, deployment, where

    @rpc("FunctionGet", differs="only the deployed version can be asked for")
    async def get(self, request: Any, _call: Call) -> Any:
        _, deployment, where = self._deployed(request.app_name, request.environment_name, request.app_version)
        function_id = deployment.layout.function_ids.get(request.object_tag)
        if function_id is None:
            raise not_found(f"{where} has no Function or Server '{request.object_tag}'.")
        definition_id = self.definition_of(function_id)
        data = self.data(definition_id)
        return api_pb2.FunctionGetResponse(
            function_id=function_id,
            handle_metadata=self.metadata(function_id, data, definition_id),
            function=self.with_url(function_id, data),
        )

    @rpc("FunctionGetById")
    async def get_by_id(self, request: Any, _call: Call) -> Any:
        definition_id = self.definition_of(request.function_id)
        data = self.data_of(request.function_id, definition_id)
        return api_pb2.FunctionGetByIdResponse(
            function=self.with_url(request.function_id, data),
            handle_metadata=self.metadata(request.function_id, data, definition_id),
        )

    @rpc("FunctionBindParams", differs="only the deployed version can be bound")
    async def bind(self, request: Any, _call: Call) -> Any:
        base = self.row(request.function_id)
        _refuse_mounts(base.name, request.function_options)
        variant = self.variants.add(base.id, request.serialized_params, request.function_options)
        if self._store.function(variant.id) is None:
            name = self.row(variant.base_id).name
            self._store.add_function(Function(variant.id, base.app_id, f"{name} {variant.id}", "", 0, b""))
        definition_id = self.definition_of(variant.id)
        return api_pb2.FunctionBindParamsResponse(
            bound_function_id=variant.id,
            handle_metadata=self.metadata(variant.id, self.data_of(variant.id, definition_id), definition_id),
        )

    @rpc("ClassGet", differs="only the deployed version can be asked for")
    async def get_class(self, request: Any, _call: Call) -> Any:
        _, deployment, where = self._deployed(request.app_name, request.environment_name, request.app_version)
        class_id = deployment.layout.class_ids.get(request.object_tag)
        if class_id is None:
            raise not_found(f"{where} has no Cls '{request.object_tag}'.")
        return api_pb2.ClassGetResponse(class_id=class_id, handle_metadata=api_pb2.ClassHandleMetadata())

    @rpc("ClassCreate")
    async def create_class(self, request: Any, _call: Call) -> Any:
        app = self._store.app(request.app_id)
        if app is None:
            raise not_found(f"App '{request.app_id}' not found.")
        class_id = request.existing_class_id if is_id(request.existing_class_id, "cs") else new_id("cs")
        self._store.add_class(class_id, app.id)
        metadata = api_pb2.ClassHandleMetadata(methods=request.methods)
        return api_pb2.ClassCreateResponse(class_id=class_id, handle_metadata=metadata)

    # ---- what a deployment is told

    def warnings(self, deployment: Deployment, image_warnings: Callable[[str], Iterable[str]]) -> list[str]:
        """What of this deployment does not work here as in the cloud; each said once."""
        said: dict[str, None] = {}
        for name, function_id in sorted(deployment.layout.function_ids.items()):
            data = self.data(deployment.layout.definition_ids[function_id])
            first = data.ranked_functions[0].function
            if said_of_gpus := self.gpu_warning(name, data):
                said[said_of_gpus] = None
            if first.checkpointing_enabled:
                said[f"{name}: no memory snapshot is taken; what is to be in it runs in every container."] = (
                    None
                )
            if first.proxy_id:
                said[f"{name}: the proxy is not used; the local control plane has none."] = None
            for warning in image_warnings(first.image_id):
                said[warning] = None
        return list(said)

    def gpu_warning(self, name: str, data: Any) -> str:
        """What is not as asked of its GPUs; "" where nothing is."""
        gpus = [
            r.function.resources.gpu_config
            for r in data.ranked_functions
            if r.function.resources.gpu_config.count
        ]
        note = self._gpu_note(gpus[0].gpu_type, gpus[0].count) if gpus else ""
        wanted = " or ".join(f"{gpu.gpu_type}:{gpu.count}" for gpu in gpus)
        return note and f"{name}: GPU {wanted} asked for; {note}"

    def _gpu_note(self, kind: str, count: int) -> str:
        """What is not as asked; "" where this machine has such cards, and enough of them."""
        here = self._gpus.all
        if not self._gpus.covers(count):
            has = f"{len(here)}" if here else "none"
            return f"this machine has {has}, so the local control plane runs it on the CPU."
        models = sorted({card.model for card in here})
        letters = kind.partition("-")[0].rstrip("!+").upper()
        if letters in ("", "ANY") or all(
            re.search(rf"\b{re.escape(letters)}\b", model.upper()) for model in models
        ):
            return ""
        return f"this machine has {' and '.join(models)}, so it gets {count} of those."


def _as_data(request: Any) -> Any:
    """The FunctionData of a FunctionCreate request, which may carry only a Function."""
    if request.HasField("function_data"):
        if not request.function_data.ranked_functions:
            raise invalid("FunctionCreate without a function.")
        return request.function_data
    function = request.function
    data = api_pb2.FunctionData()
    for field in api_pb2.FunctionData.DESCRIPTOR.fields:
        same = api_pb2.Function.DESCRIPTOR.fields_by_name.get(field.name)
        if same is None or same.type != field.type:
            continue
        # A map's entries are of a type of the message's own.
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        if same.message_type != field.message_type and not is_map:
            continue
        if field.is_repeated or field.message_type:
            value = getattr(function, field.name)
            if field.is_repeated:
                if is_map:
                    getattr(data, field.name).MergeFrom(value)
                else:
                    getattr(data, field.name).extend(value)
            elif function.HasField(field.name):
                getattr(data, field.name).CopyFrom(value)
        elif not same.has_presence or function.HasField(field.name):
            setattr(data, field.name, getattr(function, field.name))
    data.ranked_functions.add(rank=0, function=function)
    return data


def _refuse_web(name: str, configs: Iterable[Any], methods: Any) -> None:
    found = [name] if any(config.type for config in configs) else []
    found += [name.removesuffix("*") + key for key, method in methods.items() if method.webhook_config.type]
    if found:
        raise unimplemented(
            f"'{min(found)}' is a web function (@modal.fastapi_endpoint, asgi_app, wsgi_app or web_server), which the "
            "local control plane does not serve yet; @app.server it does"
        )


def _refuse_mounts(name: str, options: Any) -> None:
    """`options` is an api_pb2.Function, or what a class is to run with instead."""
    for mount in options.cloud_bucket_mounts:
        raise unimplemented(
            f"'{name}' mounts the bucket '{mount.bucket_name}' at {mount.mount_path}: Cloud bucket mounts do not exist "
            "in the local control plane; modal.Volume does"
        )
    for shared in getattr(options, "shared_volume_mounts", ()):
        raise unimplemented(
            f"'{name}' mounts a network file system at {shared.mount_path}: modal.NetworkFileSystem does not exist in "
            "the local control plane; modal.Volume does"
        )
