"""Decide what a job runs on, and what that costs: pure. May import: configs (values), cost, prices, specs, verdicts.

A job's model is judged as an endpoint of the same engine would be: the arithmetic does not know who asks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpuctl.cost import cost_of, usd, without_gpu
from gpuctl.errors import usage_error
from gpuctl.specs.serve import DEFAULT_CONCURRENCY, ServeSpec
from gpuctl.target import Target

if TYPE_CHECKING:
    from collections.abc import Sequence
    from decimal import Decimal

    from gpuctl.configs import Found
    from gpuctl.fit.values import Candidate
    from gpuctl.prices import Rates
    from gpuctl.specs.batch import BatchSpec


@dataclass(frozen=True)
class Decided:
    """A request whose GPUs and context are decided, and what to say of it before it starts.

    `usd_per_hour` is of one container, at most; None where nothing is charged. `head` stands in the file.
    """

    spec: BatchSpec
    usd_per_hour: Decimal | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    found: Found | None = (
        None  # what is known of the model, and the prices: for what is reckoned with the rows
    )
    rates: Rates | None = None

    @property
    def usd_per_second(self) -> float | None:
        return None if self.usd_per_hour is None else float(self.usd_per_hour / 3600)

    def document(self) -> dict[str, Any] | None:
        """`cost` in `batch --json`."""
        if self.usd_per_hour is None:
            return None
        return {
            "usd_per_hour": float(round(self.usd_per_hour, 6)),
            "usd_per_hour_max": float(round(self.usd_per_hour * self.spec.max_containers, 6)),
            "max_usd": None if self.spec.max_cost is None else float(self.spec.max_cost),
        }


def is_pipeline(found: Found) -> bool:
    """Whether a model is a pipeline of diffusers that makes pictures: its parts are in folders, and it has no
    config.json of its own.
    """
    return found.pipeline == "text-to-image" and not found.config


def decide(
    spec: BatchSpec, found: Found | None, rates: Rates, *, argv: Sequence[str], pictures: bool = False
) -> Decided:
    """`found`: what is known of the model; None for a function; `pictures`: whether the rows ask for them. A usage
    error where the model does not fit, or makes something else.
    """
    spec.check_for(pictures=pictures)
    decided = Decided(spec, rates=rates)
    if spec.model is not None and found is not None:
        if not spec.model.tiny and not (spec.force and spec.model.repo):
            _check_kind(found, pictures=pictures)
        decided = _judged(spec, found, rates, argv, pictures=pictures)
        if pictures:
            decided = _of_pictures(decided)
    spec = decided.spec
    if spec.target is Target.LOCAL:
        if spec.max_cost is None:
            return decided
        note = "--max-cost: nothing is charged on this machine, and the job does not stop for it"
        return dataclasses.replace(decided, notes=(*decided.notes, note))
    if spec.gpu is not None:
        cost = cost_of(endpoint(spec), spec.gpu.choices, rates)
        each, warnings = cost.dearest.most_usd, tuple(cost.warnings())
    else:
        each, warnings = without_gpu(spec.cpu, spec.memory, spec.ephemeral_disk, spec.region, rates), ()
    most = f"{spec.max_containers} containers" if spec.max_containers > 1 else "one container"
    cap = "" if spec.max_cost is None else f"; the job stops at {usd(spec.max_cost)}"
    said = f"cost: {usd(each)} an hour for each container while it runs, {usd(each * spec.max_containers)} for {most}"
    return dataclasses.replace(
        decided,
        usd_per_hour=each,
        notes=(*decided.notes, said + cap, f"prices: {rates.said()}"),
        warnings=(*decided.warnings, *warnings),
    )


def _judged(spec: BatchSpec, found: Found, rates: Rates, argv: Sequence[str], *, pictures: bool) -> Decided:
    """The verdict. Pictures have no context, and what makes them runs on one GPU."""
    from gpuctl.verdicts import settle

    settled = settle(
        endpoint(spec),
        found,
        rates,
        argv=argv,
        chats=False,
        has_context=not pictures,
        most_gpus=1 if pictures else None,
    )
    return Decided(
        dataclasses.replace(spec, gpu=settled.spec.gpu, max_model_len=settled.spec.max_model_len),
        notes=(*found.notes, *settled.notes),
        warnings=settled.warnings,
        head=settled.head,
        candidates=settled.candidates,
        found=found,
        rates=rates,
    )


def _check_kind(found: Found, *, pictures: bool) -> None:
    if is_pipeline(found) and not pictures:
        raise usage_error(
            f"MODEL: {found.name} makes pictures, and the rows ask for something else",
            hint="--task images, and a prompt in each row"
            + ("" if found.repo is None else "; if it does what they ask for, give --force"),
        )
    if pictures and found.config:
        raise usage_error(
            f"MODEL: {found.name} makes no pictures: it has a config.json, and no model_index.json of diffusers",
            hint="name a model such as z-image-turbo (`gpuctl models --kind image`); if it is a pipeline, give --force",
        )


def _of_pictures(decided: Decided) -> Decided:
    decided.spec.check_gpus()
    if decided.spec.target is not Target.MODAL:
        return decided
    note = (
        "fit: what pictures take beside the weights grows with their size, and is not known before: a row that "
        "has no room ends as out_of_memory"
    )
    return dataclasses.replace(decided, notes=(*decided.notes, note))


def endpoint(spec: BatchSpec) -> ServeSpec:
    """The endpoint that would be judged, and charged, as the job's containers are."""
    from gpuctl.specs.model import TINY, ModelRef

    return ServeSpec(
        name="job",
        model=spec.model or ModelRef(TINY, None),
        gpu=spec.gpu,
        auto=spec.auto,
        drop_unfit=False,
        force=spec.force,
        concurrency=spec.concurrency or DEFAULT_CONCURRENCY,
        concurrency_asked=spec.concurrency is not None,
        min_containers=0,
        max_containers=spec.max_containers,
        buffer_containers=None,
        max_hourly_cost=None,
        scaledown=30,
        max_model_len=spec.max_model_len,
        cpu=spec.cpu,
        memory=spec.memory,
        ephemeral_disk=spec.ephemeral_disk,
        region=spec.region,
        routing_region="us-east",
        cloud=spec.cloud,
        startup_timeout=spec.startup_timeout,
        secrets=spec.secrets,
        secrets_from_env=spec.secrets_from_env,
        env_vars=spec.env_vars,
        volumes=spec.volumes,
        environment=spec.environment,
        tags=spec.tags,
        deploy_tag=None,
        strategy=None,
        auth=True,
        vllm_version=spec.vllm_version,
        pip=spec.pip,
        apt=spec.apt,
        engine_args=spec.engine_args,
        target=spec.target,
    )
