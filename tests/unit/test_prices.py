"""Prices: the account's own, kept for a day, else the catalogue's; and each says which it is."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest

from fakes import FakeRunner
from gpuctl import catalog
from gpuctl.catalog.pricing import pricing
from gpuctl.modal_cli import TIMED_OUT, Completed
from gpuctl.prices import KEPT_SECONDS, Rates, rates
from gpuctl.target import Target

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
ACCOUNT = {"MODAL_TOKEN_ID": "ak-mine", "MODAL_TOKEN_SECRET": "as-mine"}
# What the client prints (modal/cli/billing.py: `dumps({k: str(v) …}, sort_keys=True)`), the keys and values as
# users published them, but for an H100 that this account gets cheaper.
TOLD = {
    "cpu_hour_cost": "0.04730",
    "cpu_hour_cost_sandbox": "0.141900",
    "egress_gib_cost": "0.04",
    "gpu_hour_cost_a100_40gb": "2.10000",
    "gpu_hour_cost_a100_80gb": "2.50000",
    "gpu_hour_cost_a10g": "1.10000",
    "gpu_hour_cost_b200": "6.25000",
    "gpu_hour_cost_b300": "7.10000",
    "gpu_hour_cost_h100": "3.50000",
    "gpu_hour_cost_h200": "4.54000",
    "gpu_hour_cost_l4": "0.80000",
    "gpu_hour_cost_l40s": "1.95000",
    "gpu_hour_cost_rtx6000": "3.03000",
    "gpu_hour_cost_t4": "0.59000",
    "mem_gib_hour_cost": "0.00800",
    "mem_gib_hour_cost_sandbox": "0.024000",
    "volume_storage_gib_month_cost": "0.09000",
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("MODAL_CONFIG_PATH", str(tmp_path / "none.toml"))
    return tmp_path


def answering(told: object = TOLD, code: int = 0, stderr: str = "") -> FakeRunner:
    text = told if isinstance(told, str) else json.dumps(told)
    return FakeRunner({"billing rates --json": Completed(code, text, stderr)})


def ask(runner: FakeRunner | None, at: datetime = NOW, environ: dict[str, str] | None = None) -> Rates:
    return rates(Target.MODAL, runner=runner, environ=ACCOUNT if environ is None else environ, at=at)


def test_the_accounts_own_prices_win() -> None:
    found = ask(answering())
    assert found.gpus["H100"].usd_per_hour == Decimal("3.5")
    assert found.gpus["H100"].usd_per_second * 3600 == pytest.approx(Decimal("3.5"))
    assert found.gpus["A10"].usd_per_hour == Decimal("1.1")
    assert found.gpus["B200+"].usd_per_hour == found.gpus["B200"].usd_per_hour == Decimal("6.25")
    assert found.cpu_core.usd_per_hour == Decimal("0.0473")
    assert found.memory_gib.usd_per_hour == Decimal("0.008")
    assert (found.source, found.from_catalogue, found.unrecognised) == ("account", (), ())
    assert found.gpus["H100"].where == "modal billing rates --json: gpu_hour_cost_h100"


def test_every_card_has_a_key_that_a_user_has_seen() -> None:
    assert set(pricing().rate_keys.gpus) == set(catalog.gpus())
    assert pricing().rate_keys.known == set(TOLD)


def test_they_are_kept_for_a_day_and_their_age_is_said() -> None:
    runner = answering()
    ask(runner)
    later = NOW + timedelta(hours=3)
    kept = ask(runner, later)
    assert runner.calls == [["billing", "rates", "--json"]]
    assert kept == ask(None, later)
    assert "3h old" in kept.said(at=later)
    assert kept.document(at=later)["age_seconds"] == 3 * 3600
    old = NOW + timedelta(seconds=KEPT_SECONDS)
    assert ask(None, old).source == "catalogue"
    ask(runner, old)
    assert len(runner.calls) == 2


def test_a_cache_from_the_future_is_asked_for_again() -> None:
    ask(answering())
    assert ask(None, NOW - timedelta(minutes=1)).source == "catalogue"


def test_each_account_profile_and_server_has_its_own(own_cache: Path) -> None:
    ask(answering())
    other = {"MODAL_TOKEN_ID": "ak-other", "MODAL_TOKEN_SECRET": "as-other"}
    assert ask(None, environ=other).source == "catalogue"
    assert ask(None, environ=ACCOUNT | {"MODAL_SERVER_URL": "http://127.0.0.1:1"}).source == "catalogue"
    config = own_cache / "modal.toml"
    config.write_text('[one]\ntoken_id="ak-1"\n[two]\ntoken_id="ak-2"\nactive=true\n')
    profiles = {"MODAL_CONFIG_PATH": str(config)}
    ask(answering(), environ=profiles)
    assert ask(None, environ=profiles | {"MODAL_PROFILE": "two"}).source == "account"
    assert ask(None, environ=profiles | {"MODAL_PROFILE": "one"}).source == "catalogue"


def test_nothing_is_started_and_nothing_written_without_a_runner(own_cache: Path) -> None:
    found = ask(None)
    assert found.gpus["H100"].usd_per_hour == Decimal("3.9492")
    assert found.reason is not None
    assert "gpuctl gpus" in found.reason
    assert list(own_cache.iterdir()) == []


def test_no_credentials_or_this_machine_are_the_catalogues_prices_and_ask_nobody() -> None:
    runner = answering()
    assert "no credentials for Modal" in ask(runner, environ={}).said()
    assert "this machine" in rates(Target.LOCAL, runner=runner, environ=ACCOUNT).said()
    assert runner.calls == []
    h100 = ask(runner, environ={}).gpus["H100"]
    assert (h100.source, h100.as_of) == ("catalogue", catalog.gpus()["H100"].price_as_of)
    assert h100.where == catalog.gpus()["H100"].price_source


def test_a_key_that_is_not_recognised_falls_back_and_is_said() -> None:
    renamed = {key: usd for key, usd in TOLD.items() if key not in ("gpu_hour_cost_h100", "cpu_hour_cost")}
    found = ask(answering(renamed | {"gpu_hour_cost_h100_sxm": "3.00000"}))
    assert found.gpus["H100"].source == found.cpu_core.source == "catalogue"
    assert found.gpus["H200"].source == "account"
    assert (found.source, found.from_catalogue) == ("mixed", ("H100", "CPU core"))
    assert found.unrecognised == ("gpu_hour_cost_h100_sxm",)
    said = found.said(at=NOW)
    assert "list prices of" in said
    assert "for H100, CPU core" in said
    assert "not recognised: gpu_hour_cost_h100_sxm" in said


def test_many_strange_keys_are_not_all_named() -> None:
    strange = {f"key_{n}": "1" for n in range(9)}
    found = ask(answering(TOLD | strange))
    assert "not recognised: key_0, key_1, key_2, key_3, key_4, key_5 and 3 more" in found.said(at=NOW)
    assert found.document()["unrecognised_keys"] == sorted(strange)


@pytest.mark.parametrize("usd", ["-1", "NaN", "Infinity", "free", "", None, [], {}])
def test_a_price_that_is_none_falls_back(usd: object) -> None:
    found = ask(answering(TOLD | {"gpu_hour_cost_h100": usd}))
    assert found.from_catalogue == ("H100",)


def test_only_strange_keys() -> None:
    found = ask(answering({"h100": "1"}))
    assert found.source == "catalogue"
    assert "none of the keys that gpuctl knows; not recognised: h100" in found.said()


@pytest.mark.parametrize(
    ("runner", "why"),
    [
        (answering("", 1, "Error: Could not connect to the Modal server."), "failed: Could not connect"),
        (answering("", 2, "Error: No such command 'rates'."), "No such command"),
        (answering("", TIMED_OUT, "no answer within 15 s"), "no answer within 15 s"),
        (answering("", 1), "exit code 1"),
        (answering("not JSON"), "printed no prices"),
        (answering([]), "printed no prices"),
        (answering({}), "printed no prices"),
    ],
)
def test_what_cannot_be_had_is_the_catalogues_and_says_why(
    runner: FakeRunner, why: str, own_cache: Path
) -> None:
    found = ask(runner)
    assert found.source == "catalogue"
    assert why in found.said()
    assert not list(own_cache.rglob("*.json"))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 1, "fetched_at": "2026-11-21T12:00:00", "rates": {}}']
)
def test_a_broken_cache_is_no_cache(text: str, own_cache: Path) -> None:
    ask(answering())
    (file,) = own_cache.rglob("*.json")
    file.write_text(text)
    assert ask(None).source == "catalogue"
    assert ask(answering()).source == "account"


def test_a_cache_that_cannot_be_written_costs_only_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert ask(answering()).source == "account"


def test_facts_have_a_source_a_day_and_how_certain_they_are() -> None:
    table = pricing()
    origins = [table.cpu_core_hour.origin, table.memory_gib_hour.origin, table.reservation.origin]
    origins += [table.region.origin, *(plan.origin for plan in table.plans)]
    for origin in origins:
        assert datetime.fromisoformat(origin.as_of)
        assert "modal" in origin.source
        assert origin.certain
    assert [(plan.name, plan.gpus, plan.containers) for plan in table.plans] == [
        ("Starter", 10, 100),
        ("Team", 50, 1000),
    ]
