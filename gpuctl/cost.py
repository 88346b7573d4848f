"""What a deployment costs, before it is deployed: arithmetic over frozen values, exact (`Decimal`), no I/O.

    container = (cards * GPU + cores * CPU + GiB * memory) * multiplier of the region        USD an hour
    idle tail = container * scaledown / 3600                                                 USD a cold start
    month     = container * min_containers * 730                                             USD a month
    most      = container * max_containers, CPU and memory at their limits where they have some

Of several GPUs that may be handed out, the dearest counts. docs/cost.md has the sources. May import:
`gpuctl.errors`, `catalog`, `prices` (its values), `specs`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from decimal import ROUND_FLOOR, ROUND_HALF_UP, Decimal
from typing import TYPE_CHECKING, Any

from gpuctl import catalog
from gpuctl.catalog.pricing import pricing
from gpuctl.errors import usage_error
from gpuctl.specs.gpu import ANY, GpuChoice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gpuctl.catalog.pricing import ModalPlan
    from gpuctl.prices import Rates
    from gpuctl.specs.resources import Amount
    from gpuctl.specs.serve import ServeSpec

HOURS_PER_MONTH = 730  # 8760 / 12
_MIB_PER_GIB = 1024
_CENT = Decimal("0.01")
_COUNTS = (1, 2, 4, 8)  # of cards in a container: what a model's heads can be divided by
_FEW = 3  # GPUs that a refusal names


@dataclass(frozen=True)
class Reserved:
    """What a container reserves, and its hard limits (None: none), in cores and GiB."""

    cores: Decimal
    gib: Decimal
    most_cores: Decimal | None
    most_gib: Decimal | None

    @property
    def limited(self) -> bool:
        """Whether neither CPU nor memory can cost more than their limits."""
        return self.most_cores is not None and self.most_gib is not None


@dataclass(frozen=True)
class ContainerCost:
    """USD for an hour of one container with these GPUs, the multiplier included."""

    gpu: str  # as Modal spells it; of `any`, "any: T4"
    cards: int
    gpus_usd: Decimal
    cpu_usd: Decimal
    memory_usd: Decimal
    most_usd: Decimal  # with CPU and memory at their limits, where they have some

    @property
    def usd(self) -> Decimal:
        """As reserved."""
        return self.gpus_usd + self.cpu_usd + self.memory_usd


@dataclass(frozen=True)
class Cost:
    """The cost of a deployment; `containers` has one entry for each GPU that may be handed out, in their order."""

    containers: tuple[ContainerCost, ...]
    reserved: Reserved
    region: tuple[str, ...]
    multiplier: Decimal  # for the region; 1 where none is chosen
    scaledown: int  # seconds
    min_containers: int
    max_containers: int
    rates: Rates

    @property
    def dearest(self) -> ContainerCost:
        return max(self.containers, key=lambda container: container.most_usd)

    @property
    def cheapest(self) -> ContainerCost:
        return min(self.containers, key=lambda container: container.usd)

    @property
    def idle_tail_usd(self) -> Decimal:
        """What a container costs from its last request until it ends."""
        return self.dearest.usd * self.scaledown / 3600

    @property
    def month_usd(self) -> Decimal:
        """What the containers that always run cost in a month of 730 hours."""
        return self.dearest.usd * self.min_containers * HOURS_PER_MONTH

    @property
    def most_usd(self) -> Decimal:
        """The most for an hour, all containers up."""
        return self.dearest.most_usd * self.max_containers

    def said(self) -> str:
        """The one line."""
        each = usd_range(self.cheapest.usd, self.dearest.usd)
        parts = [f"cost: {each} an hour for each container while it runs ({self._made_of()})"]
        if self.max_containers > self.min_containers:
            worst = " at most" if len(self.containers) > 1 else ""
            parts.append(
                f"{usd(self.idle_tail_usd)}{worst} for each cold start's idle tail of {self.scaledown} s"
            )
        if self.min_containers:
            many = f"{self.min_containers} containers that always run"
            one = "the container that always runs"
            parts.append(
                f"{usd(self.month_usd)} a month ({HOURS_PER_MONTH} h) for {one if self.min_containers == 1 else many}"
            )
        else:
            parts.append("nothing while none runs")
        on = f", all on {self.dearest.gpu}" if len(self.containers) > 1 else ""
        up = "its container" if self.max_containers == 1 else f"{self.max_containers:,} containers"
        parts.append(f"at most {usd(self.most_usd)} an hour, with {up} up{on}")
        return "; ".join(parts)

    def notes(self) -> Iterator[str]:
        """The line, what it rests on, and what it leaves out."""
        yield self.said()
        if self.multiplier != 1:
            origin = pricing().region.origin
            yield (
                f"--region {','.join(self.region)}: Modal charges {self.multiplier} times for GPU, CPU and memory "
                f"({origin.source}, {origin.as_of}; {origin.certain})"
            )
        beyond = ""
        if not self.reserved.limited:
            beyond = (
                f"; what is used beyond the reservation ({_plain(self.reserved.cores)} cores, "
                f"{_plain(self.reserved.gib)} GiB) comes on top: --cpu and --memory REQUEST,LIMIT bound it"
            )
        yield f"prices: {self.rates.said()}{beyond}"

    def document(self) -> dict[str, Any]:
        """`cost` in `serve --json` (docs/json.md): USD as numbers, rounded to a millionth."""
        return {
            "usd_per_hour": _number(self.dearest.usd),
            "usd_per_idle_tail": _number(self.idle_tail_usd),
            "usd_per_month_min": _number(self.month_usd),
            "usd_per_hour_max": _number(self.most_usd),
            "max_containers": self.max_containers,
            "containers": [
                {
                    "gpu": container.gpu,
                    "usd_per_hour": _number(container.usd),
                    "gpus_usd_per_hour": _number(container.gpus_usd),
                    "cpu_usd_per_hour": _number(container.cpu_usd),
                    "memory_usd_per_hour": _number(container.memory_usd),
                }
                for container in self.containers
            ],
            "region_multiplier": float(self.multiplier),
            "limited": self.reserved.limited,
            "plans_exceeded": [plan.name for plan in self.plans_exceeded()],
            "prices": self.rates.document(),
        }

    def plans_exceeded(self) -> tuple[ModalPlan, ...]:
        """The plans that cannot run all containers at once, the smallest first."""
        return plans_exceeded(gpus=self.gpus_at_once, containers=self.max_containers)

    @property
    def gpus_at_once(self) -> int:
        return self.max_containers * max(container.cards for container in self.containers)

    def warnings(self) -> Iterator[str]:
        """What a plan of Modal's cannot start."""
        short = self.plans_exceeded()
        if not short:
            return
        limits = " and ".join(
            f"{plan.name} ({plan.gpus} GPUs, {plan.containers:,} containers)" for plan in short
        )
        enough = [plan for plan in pricing().plans if plan not in short]
        rest = f"; {enough[0].name} runs {enough[0].gpus} and {enough[0].containers:,}" if enough else ""
        origin = short[0].origin
        yield (
            f"--max-containers {self.max_containers}: {self.gpus_at_once:,} GPUs in {self.max_containers:,} containers "
            f"are more at once than Modal's plan{'s' * (len(short) > 1)} {limits} run{'s' * (len(short) == 1)}{rest} "
            f"(published {origin.as_of}); the containers beyond that do not start"
        )

    def _made_of(self) -> str:
        times = f", times {self.multiplier} for the region, included" if self.multiplier != 1 else ""
        if len(self.containers) > 1:
            return ", ".join(f"{container.gpu} {usd(container.usd)}" for container in self.containers) + times
        only = self.containers[0]
        rest = only.cpu_usd + only.memory_usd
        return f"{only.gpu} {usd(only.gpus_usd)}, CPU and memory as reserved {usd(rest)}{times}"


def plans_exceeded(*, gpus: int, containers: int) -> tuple[ModalPlan, ...]:
    """Modal's plans that run fewer at once, by the published limits, the smallest first."""
    return tuple(plan for plan in pricing().plans if gpus > plan.gpus or containers > plan.containers)


def cost_of(spec: ServeSpec, choices: Sequence[GpuChoice], rates: Rates) -> Cost:
    """What `spec` costs with any of these GPUs."""
    reserved = _reserved(spec.cpu, spec.memory, spec.ephemeral_disk)
    multiplier = region_multiplier(spec.region)
    containers = tuple(
        _container(choice, name, reserved, multiplier, rates)
        for choice in choices
        for name in _types(choice, rates)
    )
    names = {name for choice in choices for name in _types(choice, rates)}
    return Cost(
        containers=containers,
        reserved=reserved,
        region=spec.region,
        multiplier=multiplier,
        scaledown=spec.scaledown,
        min_containers=spec.min_containers,
        max_containers=spec.max_containers,
        rates=rates.only(names),
    )


def without_gpu(
    cpu: Amount | None, memory: Amount | None, disk_mib: int | None, region: Sequence[str], rates: Rates
) -> Decimal:
    """USD for an hour of a container that has no GPU, CPU and memory at their limits where they have some."""
    reserved = _reserved(cpu, memory, disk_mib)
    cores = reserved.cores if reserved.most_cores is None else reserved.most_cores
    gib = reserved.gib if reserved.most_gib is None else reserved.most_gib
    return (rates.cpu_core.usd_per_hour * cores + rates.memory_gib.usd_per_hour * gib) * region_multiplier(
        region
    )


def region_multiplier(region: Sequence[str]) -> Decimal:
    """What a choice of regions multiplies the price by: "us" is broad, "us-west" narrow, the smaller one counts."""
    multipliers = pricing().region
    return min(
        (multipliers.narrow if "-" in name else multipliers.broad for name in region), default=Decimal(1)
    )


def within(
    spec: ServeSpec,
    choices: Sequence[GpuChoice],
    rates: Rates,
    *,
    starts: Callable[[GpuChoice], bool] = lambda _: True,
) -> tuple[ServeSpec, str | None]:
    """`spec` with as many containers as `--max-hourly-cost` pays for, and what was lowered, in words.

    A usage error where not one container can be paid, or not those that always run; of what could be asked for instead
    it names what `starts` the model.
    """
    limit = spec.max_hourly_cost
    if limit is None:
        return spec, None
    cost = cost_of(spec, choices, rates)
    each = cost.dearest.most_usd
    if each > limit:
        raise usage_error(
            f"--max-hourly-cost: {usd(limit)} is less than one container costs, {usd(each)} an hour on "
            f"{cost.dearest.gpu} by {cost.rates.named()}; {_cheaper(spec, choices, rates, limit, starts)}"
        )
    affordable = int((limit / each).to_integral_value(ROUND_FLOOR)) if each else spec.max_containers
    if affordable < spec.min_containers:
        raise usage_error(
            f"--max-hourly-cost: {usd(limit)} is less than --min-containers {spec.min_containers} cost, "
            f"{usd(each * spec.min_containers)} an hour by {cost.rates.named()}; it pays for {affordable}"
        )
    if affordable >= spec.max_containers:
        return spec, None
    said = (
        f"--max-hourly-cost {_plain(limit)}: at most {_containers(affordable)} instead of {spec.max_containers:,}, "
        f"{usd(each * affordable)} an hour ({affordable + 1:,} would cost {usd(each * (affordable + 1))})"
    )
    return dataclasses.replace(spec, max_containers=affordable), said


def usd(amount: Decimal) -> str:
    """`$3.96`, `$1,234.50`; below a cent two digits that count, `$0.0012`; `$0`."""
    if amount == 0:
        return "$0"
    if abs(amount) >= _CENT:
        return f"${amount.quantize(_CENT, ROUND_HALF_UP):,}"
    digits = amount.quantize(Decimal(1).scaleb(amount.adjusted() - 1), ROUND_HALF_UP)
    return f"${_plain(digits)}"


def usd_range(low: Decimal, high: Decimal) -> str:
    """`$2.51 to $3.96`, or one of them where they read the same."""
    return usd(high) if usd(low) == usd(high) else f"{usd(low)} to {usd(high)}"


def _containers(count: int) -> str:
    return f"{count:,} container{'' if count == 1 else 's'}"


def _plain(number: Decimal) -> str:
    """Without an exponent and without trailing zeros: `0.125`, `16`."""
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _number(amount: Decimal) -> float:
    return float(round(amount, 6))


def _types(choice: GpuChoice, rates: Rates) -> tuple[str, ...]:
    """The card of a choice; of `any`, the cheapest and the dearest that there are."""
    if choice.type != ANY:
        return (choice.type,)
    by_price = sorted(rates.gpus, key=lambda name: rates.gpus[name].usd_per_hour)
    return (by_price[0], by_price[-1])


def _reserved(cpu: Amount | None, memory: Amount | None, disk_mib: int | None) -> Reserved:
    """Modal's default where nothing is asked. A disk counts as memory, 20 MiB for one, if that is more."""
    default = pricing().reservation
    cores = default.cpu_cores if cpu is None else Decimal(str(cpu.request))
    mib = Decimal(default.memory_mib) if memory is None else Decimal(str(memory.request))
    by_disk = Decimal(disk_mib or 0) / default.disk_per_memory
    gib = max(mib, by_disk) / _MIB_PER_GIB
    most_cores = None if cpu is None or cpu.limit is None else Decimal(str(cpu.limit))
    most_gib = None if memory is None or memory.limit is None else Decimal(str(memory.limit)) / _MIB_PER_GIB
    return Reserved(cores, gib, most_cores, None if most_gib is None else max(gib, most_gib))


def _container(
    choice: GpuChoice, name: str, reserved: Reserved, multiplier: Decimal, rates: Rates
) -> ContainerCost:
    gpus = rates.gpus[name].usd_per_hour * choice.count * multiplier
    core, gib = rates.cpu_core.usd_per_hour * multiplier, rates.memory_gib.usd_per_hour * multiplier
    cores_at_most = reserved.cores if reserved.most_cores is None else reserved.most_cores
    gib_at_most = reserved.gib if reserved.most_gib is None else reserved.most_gib
    return ContainerCost(
        gpu=f"{ANY}: {name}" if choice.type == ANY else str(choice),
        cards=choice.count,
        gpus_usd=gpus,
        cpu_usd=core * reserved.cores,
        memory_usd=gib * reserved.gib,
        most_usd=gpus + core * cores_at_most + gib * gib_at_most,
    )


def _cheaper(
    spec: ServeSpec,
    choices: Sequence[GpuChoice],
    rates: Rates,
    limit: Decimal,
    starts: Callable[[GpuChoice], bool],
) -> str:
    """What one could ask for instead: as many cards first, the dearest first; else the cheapest that starts it."""
    count = choices[0].count

    def each(choice: GpuChoice) -> Decimal:
        return cost_of(spec, (choice,), rates).dearest.most_usd

    kept = [choice for choice in choices if each(choice) <= limit]
    if kept:
        rest = ",".join(map(str, kept))
        return f"cheap enough: --gpu {rest} ({usd(max(map(each, kept)))})"
    if spec.region and _without_region(spec, choices, rates) <= limit:
        return f"cheap enough: without --region ({usd(_without_region(spec, choices, rates))})"
    others = [
        GpuChoice(card.name, cards)
        for card in catalog.gpus().values()
        for cards in sorted({count, *_COUNTS})
        if cards <= card.max_count
    ]
    others.sort(key=lambda choice: (choice.count != count, -each(choice), choice.count))
    found = [choice for choice in others if each(choice) <= limit and starts(choice)]
    if found:
        named = {each(choice): choice for choice in reversed(found)}  # of two names of one card, the first
        few = sorted(named.items(), key=lambda pair: found.index(pair[1]))[:_FEW]
        return "cheap enough: " + ", ".join(f"--gpu {choice} ({usd(price)})" for price, choice in few)
    enough = [choice for choice in others if starts(choice)]
    if not enough:
        return "no GPU that starts it is known"
    cheapest = min(enough, key=each)
    return f"the cheapest that starts it is --gpu {cheapest}, {usd(each(cheapest))}"


def _without_region(spec: ServeSpec, choices: Sequence[GpuChoice], rates: Rates) -> Decimal:
    return cost_of(dataclasses.replace(spec, region=()), choices, rates).dearest.most_usd
