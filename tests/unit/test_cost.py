"""What a deployment costs: exact, never less for more, and each figure by hand once."""

from __future__ import annotations

import json
from decimal import Decimal
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuctl import catalog
from gpuctl.catalog.pricing import pricing
from gpuctl.cost import Cost, cost_of, plans_exceeded, region_multiplier, usd, usd_range, within
from gpuctl.errors import GpuctlError
from gpuctl.prices import Price, Rates
from gpuctl.specs.serve import ServeSpec

USD = {
    "T4": "0.59",
    "L4": "0.80",
    "L40S": "1.95",
    "A100-80GB": "2.50",
    "H100": "3.95",
    "H200": "4.54",
    "B200": "6.25",
}


def price(amount: str) -> Price:
    return Price(Decimal(amount), "account", "2026-11-21T12:00:00Z", "a test")


RATES = Rates(
    gpus=MappingProxyType({name: price(USD.get(name, "5.00")) for name in catalog.gpus()}),
    cpu_core=price("0.0473"),
    memory_gib=price("0.008"),
    reason=None,
)
RESERVED = Decimal("0.0473") / 8 + Decimal("0.008") / 8  # 0.125 cores and 128 MiB


def a_spec(**options: Any) -> ServeSpec:
    return ServeSpec.from_options(**{"model": "qwen3", "gpu": "H100"} | options)


def a_cost(**options: Any) -> Cost:
    spec = a_spec(**options)
    assert spec.gpu is not None
    return cost_of(spec, spec.gpu.choices, RATES)


def lowered(**options: Any) -> tuple[ServeSpec, str | None]:
    spec = a_spec(**options)
    assert spec.gpu is not None
    return within(spec, spec.gpu.choices, RATES)


def refused(**options: Any) -> str:
    with pytest.raises(GpuctlError) as error:
        lowered(**options)
    assert error.value.exit_code == 2
    return str(error.value)


# -- by hand


def test_a_container_by_hand() -> None:
    cost = a_cost()
    assert cost.dearest.usd == Decimal("3.95") + RESERVED == Decimal("3.9569125")
    assert cost.idle_tail_usd == cost.dearest.usd / 12
    assert cost.month_usd == 0
    assert cost.most_usd == cost.dearest.usd


def test_what_is_reserved_is_paid_for() -> None:
    cost = a_cost(gpu="H100:2", cpu="4", memory="16384")
    assert cost.dearest.gpus_usd == Decimal("7.90")
    assert cost.dearest.cpu_usd == Decimal("0.1892")
    assert cost.dearest.memory_usd == Decimal("0.128")


def test_a_disk_is_paid_for_as_memory_where_that_is_more() -> None:
    assert (
        a_cost(ephemeral_disk="512000").reserved.gib == 25
    )  # Modal's own example: 500 GiB of disk, 25 of memory
    assert a_cost(ephemeral_disk="512000", memory="32768").reserved.gib == 32


def test_limits_bound_the_most() -> None:
    cost = a_cost(cpu="2,8", memory="1024,65536", max_containers="3")
    assert cost.dearest.usd == Decimal("3.95") + 2 * Decimal("0.0473") + Decimal("0.008")
    assert cost.most_usd == 3 * (Decimal("3.95") + 8 * Decimal("0.0473") + 64 * Decimal("0.008"))
    assert "comes on top" not in "\n".join(cost.notes())
    for less in ({}, {"cpu": "2,8"}, {"cpu": "2", "memory": "1024,2048"}):
        assert "comes on top" in "\n".join(a_cost(**less).notes())


@pytest.mark.parametrize(
    ("region", "times"),
    [
        ("us", "1.5"),
        ("us-west", "1.75"),
        ("us-west-2", "1.75"),
        ("us-west,eu", "1.5"),
        ("us-west,eu-west", "1.75"),
    ],
)
def test_a_region_multiplies_everything(region: str, times: str) -> None:
    cost = a_cost(region=region, cpu="4", memory="16384,32768")
    free = a_cost(cpu="4", memory="16384,32768")
    assert cost.dearest.usd == free.dearest.usd * Decimal(times)
    assert cost.most_usd == free.most_usd * Decimal(times)
    said = "\n".join(cost.notes())
    assert f"Modal charges {times} times" in said
    assert pricing().region.origin.as_of in said
    assert "region-selection" in said
    assert "region" not in "\n".join(free.notes())


def test_the_month_of_what_always_runs() -> None:
    cost = a_cost(min_containers="2", max_containers="5")
    assert cost.month_usd == 2 * 730 * cost.dearest.usd
    assert "$5,777.09 a month (730 h) for 2 containers that always run" in cost.said()
    assert "$0.33 for each cold start's idle tail of 300 s" in cost.said()
    always = a_cost(min_containers="1").said()
    assert "for the container that always runs" in always
    assert "idle tail" not in always  # none of them is ever started for a request


def test_of_several_gpus_the_dearest_counts_and_the_range_is_said() -> None:
    cost = a_cost(gpu="H100,L4:2,H200", max_containers="3")
    assert (cost.cheapest.gpu, cost.dearest.gpu) == ("L4:2", "H200")
    said = cost.said()
    assert "$1.61 to $4.55 an hour for each container" in said
    assert "(H100 $3.96, L4:2 $1.61, H200 $4.55)" in said
    assert "at most $13.64 an hour, with 3 containers up, all on H200" in said
    assert cost.gpus_at_once == 6


def test_any_is_from_the_cheapest_to_the_dearest() -> None:
    cost = a_cost(gpu="any")
    assert [container.gpu for container in cost.containers] == ["any: T4", "any: B200"]
    assert "$0.60 to $6.26" in cost.said()


def test_the_line() -> None:
    assert list(a_cost(scaledown="60").notes()) == [
        "cost: $3.96 an hour for each container while it runs (H100 $3.95, CPU and memory as reserved $0.0069); "
        "$0.07 for each cold start's idle tail of 60 s; nothing while none runs; "
        "at most $3.96 an hour, with its container up",
        f"prices: {RATES.only(['H100']).said()}; what is used beyond the reservation (0.125 cores, 0.125 GiB) comes "
        "on top: --cpu and --memory REQUEST,LIMIT bound it",
    ]


def test_the_document() -> None:
    document = a_cost(gpu="H100,H200", min_containers="1", max_containers="12", region="us").document()
    assert json.loads(json.dumps(document)) == document
    assert document["usd_per_hour"] == 6.820369
    assert document["usd_per_hour_max"] == 81.844425
    assert document["usd_per_month_min"] == 4978.869188
    assert document["usd_per_idle_tail"] == 0.568364
    assert document["containers"][0] == {
        "gpu": "H100",
        "usd_per_hour": 5.935369,
        "gpus_usd_per_hour": 5.925,
        "cpu_usd_per_hour": 0.008869,
        "memory_usd_per_hour": 0.0015,
    }
    assert document["region_multiplier"] == 1.5
    assert document["plans_exceeded"] == ["Starter"]
    assert document["prices"]["source"] == "account"
    assert document["limited"] is False


# -- the plans of Modal


@pytest.mark.parametrize(
    ("gpu", "containers", "short"),
    [
        ("H100", "10", []),
        ("H100", "11", ["Starter"]),
        ("H100:2", "5", []),
        ("H100:2", "6", ["Starter"]),
        ("H100:8", "6", ["Starter"]),
        ("H100:8", "7", ["Starter", "Team"]),
        ("T4,H100:8", "2", ["Starter"]),
        ("any", "51", ["Starter", "Team"]),
    ],
)
def test_a_plan_that_cannot_start_it_all_is_warned_of(gpu: str, containers: str, short: list[str]) -> None:
    cost = a_cost(gpu=gpu, max_containers=containers)
    said = "\n".join(cost.warnings())
    assert [plan.name for plan in cost.plans_exceeded()] == short
    assert bool(said) == bool(short)
    for name in short:
        assert name in said
    assert ("; Team runs 50 and 1,000" in said) == (short == ["Starter"])


def test_containers_are_limited_too() -> None:
    assert [plan.name for plan in plans_exceeded(gpus=0, containers=101)] == ["Starter"]
    assert [plan.name for plan in plans_exceeded(gpus=0, containers=1001)] == ["Starter", "Team"]
    assert plans_exceeded(gpus=10, containers=100) == ()


# -- --max-hourly-cost


def test_it_lowers_the_containers_and_says_so() -> None:
    spec, said = lowered(max_containers="5", max_hourly_cost="10")
    assert spec.max_containers == 2
    assert said == (
        "--max-hourly-cost 10: at most 2 containers instead of 5, $7.91 an hour (3 would cost $11.87)"
    )


@pytest.mark.parametrize(
    "options", [{}, {"max_hourly_cost": "100"}, {"max_hourly_cost": "3.956913"}, {"max_hourly_cost": "3.96"}]
)
def test_what_is_cheap_enough_is_left_alone(options: dict[str, str]) -> None:
    assert lowered(**options) == (a_spec(**options), None)


def test_less_than_one_container_is_refused_with_what_would_do() -> None:
    said = refused(max_hourly_cost="3")
    assert "--max-hourly-cost: $3.00 is less than one container costs, $3.96 an hour on H100" in said
    assert "by your account's prices; cheap enough: --gpu A100-80GB ($2.51), --gpu L40S ($1.96)" in said
    assert "cheap enough: --gpu L4,T4 ($0.81)" in refused(gpu="H100,L4,T4", max_hourly_cost="3")
    assert "cheap enough: without --region ($3.96)" in refused(region="us", max_hourly_cost="4")
    assert "cheap enough: --gpu L4:4 ($3.21)" in refused(gpu="H100:8", max_hourly_cost="3.30")
    assert "the cheapest that starts it is --gpu T4, $0.60" in refused(max_hourly_cost="0.5")
    assert "on any: B200 " in refused(gpu="any", max_hourly_cost="5")


def test_only_what_starts_the_model_is_named() -> None:
    def instead(limit: str, *starting: str) -> str:
        spec = a_spec(max_hourly_cost=limit)
        assert spec.gpu is not None
        with pytest.raises(GpuctlError) as error:
            within(spec, spec.gpu.choices, RATES, starts=lambda choice: str(choice) in starting)
        return str(error.value).partition("; ")[2]

    assert instead("3", "L40S", "L4:2", "H200:8") == "cheap enough: --gpu L40S ($1.96), --gpu L4:2 ($1.61)"
    assert instead("1", "L40S", "L4:2") == "the cheapest that starts it is --gpu L4:2, $1.61"
    assert instead("1") == "no GPU that starts it is known"


def test_limits_count_and_not_the_reservation() -> None:
    assert "$7.74 an hour" in refused(cpu="1,80", memory="128,128", max_hourly_cost="5")


def test_those_that_always_run_must_be_paid() -> None:
    said = refused(min_containers="3", max_containers="4", max_hourly_cost="8")
    assert "--min-containers 3 cost, $11.87 an hour" in said
    assert "it pays for 2" in said
    spec, _ = lowered(min_containers="2", max_containers="4", max_hourly_cost="8")
    assert (spec.min_containers, spec.max_containers) == (2, 2)


@pytest.mark.parametrize(
    "text", ["", "0", "0.00", "-1", "ten", "$5", "1e3", "nan", "inf", "5,50", "12345678", "٣"]
)
def test_an_amount_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(GpuctlError, match="--max-hourly-cost: ") as error:
        a_spec(max_hourly_cost=text)
    assert repr(text) in str(error.value)
    assert "US dollars" in str(error.value)


# -- money as it is read


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        ("0", "$0"),
        ("3.9569125", "$3.96"),
        ("1234567.891", "$1,234,567.89"),
        ("0.01", "$0.01"),
        ("0.005", "$0.0050"),
        ("0.00691", "$0.0069"),
        ("0.0000001234", "$0.00000012"),
        ("0.0099999", "$0.010"),
        ("2.675", "$2.68"),
    ],
)
def test_dollars(amount: str, text: str) -> None:
    assert usd(Decimal(amount)) in (text, text.rstrip("0"))


def test_a_range_that_reads_the_same_is_one_figure() -> None:
    assert usd_range(Decimal("1.001"), Decimal("1.002")) == "$1.00"
    assert usd_range(Decimal(1), Decimal(2)) == "$1.00 to $2.00"


# -- what always holds

gpus = st.sampled_from(sorted(catalog.gpus()))
requests = st.lists(
    st.tuples(gpus, st.integers(1, 4)).map(lambda pair: f"{pair[0]}:{pair[1]}"),
    min_size=1,
    max_size=3,
    unique=True,
).map(",".join)
shapes = st.fixed_dictionaries(
    {
        "gpu": requests,
        "cpu": st.integers(1, 64).map(str),
        "memory": st.integers(128, 300_000).map(str),
        "scaledown": st.integers(2, 3600).map(str),
        "max_containers": st.integers(1, 2000).map(str),
        "region": st.sampled_from([None, "us", "us-west", "eu,us-west"]),
    }
)


@given(shapes, st.integers(0, 5))
def test_never_negative_and_additive(shape: dict[str, Any], least: int) -> None:
    cost = a_cost(**shape | {"min_containers": str(min(least, int(shape["max_containers"])))})
    assert all(part >= 0 for part in (cost.month_usd, cost.cheapest.gpus_usd, cost.cheapest.cpu_usd))
    assert 0 < cost.cheapest.usd <= cost.dearest.usd <= cost.dearest.most_usd <= cost.most_usd
    assert cost.most_usd == cost.dearest.most_usd * cost.max_containers
    assert 0 < cost.idle_tail_usd <= cost.dearest.usd
    for container in cost.containers:
        assert container.usd == container.gpus_usd + container.cpu_usd + container.memory_usd


@given(
    shapes,
    st.sampled_from(["cpu", "memory", "scaledown", "max_containers"]),
    st.integers(1, 100),
)
def test_more_never_costs_less(shape: dict[str, Any], what: str, more: int) -> None:
    bigger = shape | {what: str(min(int(shape[what]) + more, 3600 if what == "scaledown" else 10**6))}
    one, other = a_cost(**shape), a_cost(**bigger)
    assert other.most_usd >= one.most_usd
    assert other.idle_tail_usd >= one.idle_tail_usd
    assert other.dearest.usd >= one.dearest.usd


@given(gpus, st.integers(1, 3))
def test_twice_the_cards_twice_the_price_of_the_cards(name: str, count: int) -> None:
    one, two = a_cost(gpu=f"{name}:1"), a_cost(gpu=f"{name}:{count}")
    assert two.dearest.gpus_usd == one.dearest.gpus_usd * count
    assert two.dearest.cpu_usd == one.dearest.cpu_usd


@given(shapes, st.decimals("0.01", "100000", places=2))
def test_what_is_bounded_stays_under_it_and_is_not_lowered_too_far(
    shape: dict[str, Any], limit: Decimal
) -> None:
    try:
        spec, said = lowered(**shape, max_hourly_cost=str(limit))
    except GpuctlError:
        assert a_cost(**shape | {"max_containers": "1"}).most_usd > limit
        return
    asked = int(shape["max_containers"])
    assert a_cost(**shape | {"max_containers": str(spec.max_containers)}).most_usd <= limit
    assert (said is None) == (spec.max_containers == asked)
    if spec.max_containers < asked:
        assert a_cost(**shape | {"max_containers": str(spec.max_containers + 1)}).most_usd > limit


@given(st.lists(st.sampled_from(["us", "eu", "us-west", "eu-west", "ap-south"]), max_size=4))
def test_a_region_never_makes_it_cheaper(regions: list[str]) -> None:
    assert region_multiplier(regions) in (1, Decimal("1.5"), Decimal("1.75"))
    assert (region_multiplier(regions) == 1) == (not regions)
