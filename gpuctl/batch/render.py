"""A job becomes source: the App that answers its rows. May import: catalog, render, specs, target."""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING, Any

from gpuctl import catalog
from gpuctl.batch.rows import Url
from gpuctl.render import OFFLINE, Code, engine_context, header, rendered, resources_context
from gpuctl.specs.batch import PREFIX
from gpuctl.specs.engine_args import gives
from gpuctl.specs.remote_paths import GCS, GCS_ENDPOINT, REQUIRED_KEYS
from gpuctl.specs.resources import CACHES, HUGGINGFACE_CACHE
from gpuctl.target import Target

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuctl.specs.batch import BatchSpec
    from gpuctl.specs.model import ModelRef

# What `vllm[audio]` brings, as a layer of its own: the engine's is gigabytes, and shared with all other work.
_AUDIO = ("av", "scipy", "soundfile", "soxr")
_SHARDS_AT_ONCE = 3  # one that ends, one that is worked on, one that begins


def render_batch(
    spec: BatchSpec,
    *,
    job: str,
    url: Url,
    usd_per_second: float | None,
    argv: Sequence[str],
    head: Sequence[str] = (),
) -> str:
    """The module of the job named `job`, whose rows ask for `url`.

    `usd_per_second`: of one container, at most; None where nothing is charged.
    """
    context: dict[str, Any] = {
        **resources_context(spec),
        "header": header(argv, head),
        "job": job,
        "name": PREFIX + job,
        "build": spec.engine_build,
        "env": spec.env_vars,
        "max_containers": spec.max_containers,
        "shards_at_once": _SHARDS_AT_ONCE,
        "retries": spec.retries,
        "usd_per_second": usd_per_second,
        "max_usd": None if spec.max_cost is None or usd_per_second is None else float(spec.max_cost),
        "startup_timeout": spec.startup_timeout,
    }
    if spec.function is not None:
        context |= {
            "kind": Code("function"),
            "processor": Code("FunctionProcessor"),
            "function_file": str(spec.function.file.resolve()),
            "function_there": f"/work/{spec.function.file.name}",
            "function_name": spec.function.name,
            "concurrency": spec.concurrency or 1,
            "batch_size": spec.batch_size,
        }
    if spec.model is not None and url is Url.IMAGES:
        context |= _pictures(spec, spec.model)
    elif spec.model is not None:
        context |= {
            **engine_context(spec, spec.model),
            "kind": Code("vllm"),
            "processor": Code("VllmProcessor"),
            "concurrency": spec.concurrency,
        }
        if url is Url.EMBEDDINGS and not gives(spec.engine_args, "--runner"):
            # Models that can also write are taken for writers otherwise.
            context["engine_args"] = ["--runner", "pooling", *context["engine_args"]]
        context["transcribes"] = url is Url.TRANSCRIPTIONS
        if url is Url.TRANSCRIPTIONS:
            context["pip"] = [*_AUDIO, *spec.pip]
        if url is Url.TRANSCRIPTIONS and spec.model.repo is None:
            # The small Whisper: its weights are made beforehand, and its context is its own.
            context["engine_args"] = [
                *dict.fromkeys([*spec.engine_build.args, "--enforce-eager"]),
                *spec.engine_args,
            ]
            context["max_model_len"] = None
    # Twice: which imports it needs is known when it is there.
    context |= _files(spec)
    context |= {"modules": [], "abstract": Code("Iterable"), "typing": Code("Any")}
    context |= _imports(rendered("batch/app.py.jinja", context))
    # Where a piece is left out, the empty lines around it stay.
    return re.sub(r"\n{4,}", "\n\n\n", rendered("batch/app.py.jinja", context))


def _pictures(spec: BatchSpec, model: ModelRef) -> dict[str, Any]:
    """The values of the templates that start a pipeline of diffusers, and of its image."""
    engine = catalog.diffusers()
    build = engine.cpu if spec.target is Target.LOCAL else engine.cuda
    caches = [mount for mount in CACHES if mount[1] == HUGGINGFACE_CACHE]
    return {
        "kind": Code("diffusers"),
        "processor": Code("DiffusersProcessor"),
        "tiny": model.tiny,
        "model_folder": None if model.folder is None else str(model.folder),
        "model": model.title if model.folder is None else "/model",
        "pinned": model.pinned,
        "revision": model.revision or "main",
        "diffusers_version": engine.version,
        "build": build,
        "pip_method": Code("uv_pip_install" if build.index is None else "pip_install"),
        "env": [*build.env.items(), *({} if model.repo else OFFLINE).items(), *spec.env_vars],
        "batch_size": spec.batch_size or 1,
        "volumes": [*caches, *((mount.name, mount.path) for mount in spec.volumes)],
    }


# What reading rows and writing answers takes beside gpuctl's own code: the versions of requirements.lock.
_FILES_PACKAGES = ("jinja2==3.1.6", "pyarrow==26.0.1")


def _files(spec: BatchSpec) -> dict[str, Any]:
    """What the template says of rows and answers that are in the cloud, and of the schedule."""
    reads, writes = spec.mounts
    every = {mount.path: mount for mount in (*reads, *writes)}.values()
    created = {mount.path for mount in writes} - {mount.path for mount in reads}
    return {
        "files": bool(every),
        "files_packages": _FILES_PACKAGES,
        "reads": reads,
        "writes": writes,
        "schedule": spec.schedule
        and {
            "cron": spec.schedule.cron,
            "timezone": spec.schedule.timezone,
            "unit": Code(spec.schedule.unit or ""),
            "count": spec.schedule.count,
        },
        "mounted_volumes": [
            {"path": mount.path, "place": mount.place, "create": mount.path in created}
            for mount in every
            if not mount.in_bucket
        ],
        "mounted_buckets": [
            {
                "path": mount.path,
                "place": mount.place,
                "endpoint": GCS_ENDPOINT if mount.scheme == GCS else spec.bucket_endpoint,
                "key_prefix": f"{mount.folder}/" if mount.folder else None,
                "secret": spec.bucket_secret,
                "required_keys": REQUIRED_KEYS[mount.scheme],
                "read_only": mount.read_only,
            }
            for mount in every
            if mount.in_bucket
        ],
    }


# What the pieces use of the standard library by the module's name, and of collections.abc by its own.
_MODULES = (
    "asyncio", "base64", "collections", "concurrent.futures", "contextlib", "copy", "dataclasses", "datetime",
    "functools", "gc", "gzip", "hashlib", "heapq", "importlib.util", "inspect", "io", "itertools", "json",
    "logging", "math", "os", "pathlib", "pkgutil", "queue", "random", "re", "secrets", "shlex", "shutil", "struct",
    "subprocess", "sys", "tempfile", "threading", "time", "traceback", "types", "urllib.parse", "urllib.request",
    "uuid",
)  # fmt: skip
_ABSTRACT = ("AsyncIterator", "Awaitable", "Callable", "Iterable", "Iterator", "Mapping", "Sequence")


def _imports(source: str) -> dict[str, Any]:
    """The imports that the pieces of a module need: a name that nothing uses is not imported."""
    nodes = list(ast.walk(ast.parse(source)))
    used = {ast.unparse(node) for node in nodes if isinstance(node, ast.Name | ast.Attribute)}
    abstract = [name for name in _ABSTRACT if name in used or f"[{name}" in source]
    return {
        "modules": [Code(module) for module in _MODULES if module in used],
        "abstract": Code(", ".join(abstract)),
    }
