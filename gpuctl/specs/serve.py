"""What `gpuctl serve` was asked for, checked once. May import: gpuctl.errors, catalog, target, specs.

`ServeSpec.from_options` takes what was typed, and raises one usage error that lists every problem of the command.
Whatever Modal would refuse later, or take silently and misread, is refused here by the flag's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpuctl import catalog
from gpuctl.errors import usage_error
from gpuctl.specs import names
from gpuctl.specs.engine_args import check_engine_args, stages
from gpuctl.specs.gpu import AUTO, GpuRequest
from gpuctl.specs.model import ModelRef
from gpuctl.specs.resources import (
    CLOUDS,
    OWN_TAG,
    Amount,
    ResourceReader,
    VolumeMount,
    python_package,
    system_package,
)
from gpuctl.target import Target

if TYPE_CHECKING:
    from collections.abc import Sequence
    from decimal import Decimal

DEFAULT_CONCURRENCY = 32
DEFAULT_MIN_CONTAINERS = 0
DEFAULT_MAX_CONTAINERS = 1  # a finite bill; see --max-containers
DEFAULT_SCALEDOWN = 300  # seconds
ROUTING_REGIONS = ("us-east", "us-west", "eu-west", "ap-south")
STRATEGIES = ("rolling", "recreate")

_LONGEST_TIMEOUT = 24 * 3600  # seconds: Modal's limit for time-outs
_SCALEDOWN = (2, 3600)  # seconds: modal 1.6.4, `_functions.py`

# The default of --startup-timeout: what a container may take from its start until it answers.
_BOOT_SECONDS = 600  # image pull, imports, torch.compile and CUDA graphs; an assumption on the safe side
_SECONDS_PER_GIB = 20  # a first download at about 54 MB/s, also an assumption on the safe side
_UNKNOWN_SIZE_SECONDS = 3600


@dataclass(frozen=True)
class ServeSpec:
    """A valid request to serve a model. Seconds and MiB; None: left to Modal's or the engine's own default.

    `gpu` is None where there is none, or where it is yet to be chosen (`auto`). `concurrency_asked`: whether that was
    asked, and is no default.
    """

    name: str
    model: ModelRef
    gpu: GpuRequest | None
    auto: bool
    drop_unfit: bool
    force: bool
    concurrency: int
    concurrency_asked: bool
    min_containers: int
    max_containers: int
    buffer_containers: int | None
    max_hourly_cost: Decimal | None  # USD
    scaledown: int
    max_model_len: int | None
    cpu: Amount | None
    memory: Amount | None
    ephemeral_disk: int | None
    region: tuple[str, ...]
    routing_region: str
    cloud: str | None
    startup_timeout: int
    secrets: tuple[str, ...]
    secrets_from_env: tuple[str, ...]
    env_vars: tuple[tuple[str, str], ...]
    volumes: tuple[VolumeMount, ...]
    environment: str | None
    tags: tuple[tuple[str, str], ...]
    deploy_tag: str | None
    strategy: str | None
    auth: bool
    vllm_version: str
    pip: tuple[str, ...]
    apt: tuple[str, ...]
    engine_args: tuple[str, ...]
    target: Target

    @classmethod
    def from_options(
        cls,
        *,
        model: str,
        gpu: str | None = None,
        drop_unfit: bool = False,
        force: bool = False,
        name: str | None = None,
        concurrency: str | None = None,
        min_containers: str | None = None,
        max_containers: str | None = None,
        buffer_containers: str | None = None,
        max_hourly_cost: str | None = None,
        scaledown: str | None = None,
        max_model_len: str | None = None,
        cpu: str | None = None,
        memory: str | None = None,
        ephemeral_disk: str | None = None,
        region: str | None = None,
        routing_region: str | None = None,
        cloud: str | None = None,
        startup_timeout: str | None = None,
        secret: Sequence[str] = (),
        secret_from_env: Sequence[str] = (),
        env_var: Sequence[str] = (),
        volume: Sequence[str] = (),
        env: str | None = None,
        tag: Sequence[str] = (),
        deploy_tag: str | None = None,
        strategy: str | None = None,
        auth: bool = True,
        vllm_version: str | None = None,
        pip: Sequence[str] = (),
        apt: Sequence[str] = (),
        engine_args: Sequence[str] = (),
        target: Target = Target.MODAL,
    ) -> ServeSpec:
        """Check what was typed (texts as they came; None: not given) and put the defaults in."""
        read = ResourceReader()
        model_ref = read.parsed(_chat_model, model)
        auto = target is Target.MODAL if gpu is None else gpu.strip().lower() == AUTO
        gpu_request = None if gpu is None or auto else read.parsed(GpuRequest.parse, gpu)
        if "--local" in engine_args:
            read.problem("-- --local: use --local before the --: what follows that goes to vLLM")
        read.rule("--name", name, names.app_name)
        read.rule("--env", env, names.environment_name)
        read.rule("--deploy-tag", deploy_tag, lambda text: names.tag(text, longest=50))

        at_once = read.whole("--concurrency", concurrency, DEFAULT_CONCURRENCY)
        least = read.whole("--min-containers", min_containers, DEFAULT_MIN_CONTAINERS, at_least=0)
        most = read.whole("--max-containers", max_containers, DEFAULT_MAX_CONTAINERS)
        if least > most:
            read.problem(
                f"--min-containers: {least} is more than --max-containers {most}"
                + (" (its default)" if max_containers is None else "")
            )
        buffer = read.optional_whole("--buffer-containers", buffer_containers, at_least=0)
        hourly = read.dollars("--max-hourly-cost", max_hourly_cost)
        idle = read.whole(
            "--scaledown",
            scaledown,
            DEFAULT_SCALEDOWN,
            at_least=_SCALEDOWN[0],
            at_most=_SCALEDOWN[1],
            unit="seconds",
        )
        model_len = read.optional_whole("--max-model-len", max_model_len, unit="tokens")
        cores = read.amount("--cpu", cpu, whole=False, unit="cores, as in 4, 2.5 or REQUEST,LIMIT")
        mebibytes = read.amount(
            "--memory", memory, whole=True, unit="MiB, as in 16384 (16 GiB) or REQUEST,LIMIT"
        )
        disk = read.optional_whole("--ephemeral-disk", ephemeral_disk, unit="MiB")
        regions = read.regions(region)
        routing = read.one_of("--routing-region", routing_region, ROUTING_REGIONS) or ROUTING_REGIONS[0]
        provider = read.one_of("--cloud", cloud, CLOUDS)
        timeout = read.whole(
            "--startup-timeout",
            startup_timeout,
            default_startup_timeout(model_ref.download_gib if model_ref else None),
            at_most=_LONGEST_TIMEOUT,
            unit="seconds",
        )

        secrets = read.many("--secret", secret, names.object_name)
        from_env = read.many("--secret-from-env", secret_from_env, names.variable)
        build = catalog.vllm().cpu if target is Target.LOCAL else catalog.vllm().cuda
        variables = read.env_vars(env_var, set_by_file=build.env, from_env=from_env)
        mounts = read.volumes(volume)
        app_tags = read.tags(tag)
        if OWN_TAG[0] not in dict(app_tags):
            app_tags = (OWN_TAG, *app_tags)
        rollout = read.one_of("--strategy", strategy, STRATEGIES)
        version = read.version("--vllm-version", vllm_version)
        python_packages = read.many("--pip", pip, python_package)
        system_packages = read.many("--apt", apt, system_package)
        read.problems += check_engine_args(engine_args)

        if read.problems or model_ref is None:
            raise usage_error(read.problems)
        return cls(
            name=name if name is not None else model_ref.default_name,
            model=model_ref,
            gpu=gpu_request,
            auto=auto,
            drop_unfit=drop_unfit,
            force=force,
            concurrency=at_once,
            concurrency_asked=concurrency is not None,
            min_containers=least,
            max_containers=most,
            buffer_containers=buffer,
            max_hourly_cost=hourly,
            scaledown=idle,
            max_model_len=model_len,
            cpu=cores,
            memory=mebibytes,
            ephemeral_disk=disk,
            region=regions,
            routing_region=routing,
            cloud=provider,
            startup_timeout=timeout,
            secrets=secrets,
            secrets_from_env=from_env,
            env_vars=variables,
            volumes=mounts,
            environment=env,
            tags=app_tags,
            deploy_tag=deploy_tag,
            strategy=rollout,
            auth=auth,
            vllm_version=version,
            pip=python_packages,
            apt=system_packages,
            engine_args=tuple(engine_args),
            target=target,
        )

    @property
    def pipeline_parallel(self) -> int:
        """Stages that the model's layers are dealt out to, as the engine's arguments say."""
        return stages(self.engine_args)

    @property
    def engine_build(self) -> catalog.Build:
        """How the engine's image is built for the device of the target."""
        engine = catalog.vllm()
        return engine.cpu if self.target is Target.LOCAL else engine.cuda


def _chat_model(text: str) -> ModelRef:
    """MODEL, refused where the catalogue knows that it answers no chat requests: its container would never be ready."""
    ref = ModelRef.parse(text)
    entry = ref.entry
    if entry is not None and not entry.chats:
        raise usage_error(not_for_chat(ref.title if ref.alias is None else ref.alias, entry.kind))
    return ref


def not_for_chat(model: str, kind: str) -> str:
    """Why `serve` does not take a model of this kind."""
    return (
        f"MODEL: {model} is {_KINDS.get(kind, kind)}, and answers no chat requests, so the endpoint that serve makes "
        "would never be ready; `gpuctl models --kind llm` and `--kind vision` list what it serves"
    )


_KINDS = {
    "embedding": "an embedding model",
    "reranker": "a reranker",
    "speech": "a speech model",
    "image": "a model that makes images",
}


def default_startup_timeout(download_gib: float | None) -> int:
    """Seconds that a container may take from its start until it answers, when `--startup-timeout` says nothing.

    600 s + 20 s per GiB of weights, rounded up to a minute; 3600 s where the size is not known. Both figures are
    assumptions on the safe side, not measurements: a slow image pull and engine start, and a first download at
    54 MB/s. A longer limit costs nothing; one that is too short ends a start that would have succeeded, again and
    again (Modal's own default is 30 s).
    """
    if download_gib is None:
        return _UNKNOWN_SIZE_SECONDS
    seconds = _BOOT_SECONDS + _SECONDS_PER_GIB * download_gib
    return min(int(-(-seconds // 60) * 60), _LONGEST_TIMEOUT)
