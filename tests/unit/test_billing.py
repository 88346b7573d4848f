"""What was spent: read from what the pinned client itself prints, its own commands running on played answers."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import modal.cli.billing
import modal.cli.container
import pytest
from hypothesis import given
from hypothesis import strategies as st
from modal._workspace import _WorkspaceBillingRates
from modal.cli.entry_point import entrypoint_cli
from modal.output import enable_output
from modal.types import BillingReportItem, WorkspaceBillingSummary

from gpuctl.billing import Charge, Spending, Tag, spending
from gpuctl.billing import _lines as lines_of
from gpuctl.cli.console import Console
from gpuctl.errors import GpuctlError
from gpuctl.modal_cli import MODAL, Completed, ModalEnv
from gpuctl.paths import state_dir
from gpuctl.prices import rates
from gpuctl.records import DeploymentRecord, Records
from gpuctl.target import Target

AT = datetime(2026, 11, 21, 11, 30, tzinfo=UTC)
HOUR = AT.replace(minute=0)
TODAY = AT.replace(hour=0, minute=0)


@dataclass
class Account:
    """A workspace of Modal's, as far as its client's billing commands ask; `asked` is what it heard."""

    rows: Sequence[BillingReportItem] = ()
    credits: str | None = "-0.28"
    billed: str = "0E-8"
    plan_cost: str = "0"
    containers: Sequence[Any] = ()
    asked: list[dict[str, Any]] = field(default_factory=list)

    async def report(self, *, start: datetime, end: datetime, resolution: str, tag_names: list[str]) -> Any:
        self.asked.append({"start": start, "end": end, "resolution": resolution, "tag_names": tag_names})
        width = timedelta(days=1) if resolution == "d" else timedelta(hours=1)
        return [row for row in self.rows if start <= row.interval_start and row.interval_start + width <= end]

    async def summary(self, *, cycle: str) -> WorkspaceBillingSummary:
        self.asked.append({"cycle": cycle})
        adjustments = {"Plan Cost": Decimal(self.plan_cost)}
        if self.credits is not None:
            adjustments["Credits"] = Decimal(self.credits)
        breakdown = {"Deployed Apps": Decimal("0.28"), "Volumes": Decimal(0)}
        return WorkspaceBillingSummary(
            TODAY, TODAY, Decimal("0.28"), breakdown, adjustments, Decimal(self.billed)
        )

    async def rates(self) -> _WorkspaceBillingRates:
        return _WorkspaceBillingRates({"gpu_hour_cost_h100": "3.00000"}, {}, {}, "")

    async def tasks(self, request: Any) -> Any:
        self.asked.append({"environment": request.environment_name})
        return SimpleNamespace(tasks=list(self.containers))


@dataclass
class TheClient:
    """Runs `modal …` as a child would, in this process: the client's own commands, options and printing."""

    calls: list[list[str]] = field(default_factory=list)
    fails: str | None = None
    says: str = "Error: denied"

    def run(self, argv: Sequence[str], env: ModalEnv, *, timeout: float | None = None) -> Completed:
        assert tuple(argv[: len(MODAL)]) == MODAL
        words = list(argv[len(MODAL) :])
        self.calls.append(words)
        if self.fails is not None and " ".join(words).startswith(self.fails):
            return Completed(1, "", self.says)
        out, code = io.StringIO(), 0
        with contextlib.redirect_stdout(out), enable_output():
            try:
                entrypoint_cli(words, standalone_mode=True)
            except SystemExit as exit_:
                code = int(exit_.code or 0)
        assert code == 0, f"the pinned client refuses: modal {' '.join(words)}"
        return Completed(code, out.getvalue(), "")


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Account:
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("MODAL_CONFIG_PATH", str(tmp_path / "none.toml"))
    monkeypatch.setenv("MODAL_TOKEN_ID", "ak-mine")
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.delenv("MODAL_ENVIRONMENT", raising=False)
    made = Account()
    workspace = SimpleNamespace(from_context=lambda **_: SimpleNamespace(billing=made))
    monkeypatch.setattr(modal.cli.billing, "_Workspace", workspace)

    async def from_env() -> Any:
        return SimpleNamespace(_stub=SimpleNamespace(TaskList=made.tasks))

    monkeypatch.setattr(modal.cli.container, "_Client", SimpleNamespace(from_env=from_env))
    return made


def item(
    name: str, cost: str, at: datetime, *, id_: str | None = None, environment: str = "main", **tags: str
) -> BillingReportItem:
    by_resource = {"CPU": Decimal(0), "H100": Decimal(cost)}
    return BillingReportItem(id_ or f"ap-{name}", name, environment, at, Decimal(cost), by_resource, tags)


def container(app: str, started: datetime | None, app_id: str | None = None) -> Any:
    return SimpleNamespace(
        task_id="ta-1",
        app_id=app_id or f"ap-{app}",
        app_description=app,
        started_at=started.timestamp() if started else 0.0,
    )


def a_record(name: str, **more: Any) -> DeploymentRecord:
    document = json.loads((Path(__file__).parents[1] / "cli" / "record.json").read_text())
    document |= {
        "name": name,
        "app_id": f"ap-{name}",
        "target": "modal",
        "gpu": ["H100"],
        "usd_per_hour": 4.0,
    }
    record = replace(DeploymentRecord.from_document(document), **more)
    Records(state_dir()).save(record)
    return record


def spent(
    name: str | None = None, *, client: TheClient | None = None, at: datetime = AT, **options: Any
) -> tuple[Spending, str]:
    err = io.StringIO()
    defaults = {"since": None, "tag": None, "target": Target.MODAL, "environment": None}
    found = spending(
        name,
        **defaults | options,
        runner=client or TheClient(),  # type: ignore[arg-type]
        console=Console(verbose=True, stderr=err),
        at=at,
    )
    return found, err.getvalue()


def rows(found: Spending) -> list[tuple[str, str | None, str, str]]:
    return [
        (line.name, line.environment, f"{line.billed.normalize():f}", f"{line.estimated.normalize():f}")
        for line in found.lines
    ]


# -- what is billed


def test_everything_of_the_month_days_first_and_the_hours_of_today(account: Account) -> None:
    month = TODAY.replace(day=1)
    account.rows = [
        item("llama3", "1.25", TODAY - timedelta(days=3)),
        item("llama3", "0.50", HOUR - timedelta(hours=1)),
        item("other", "4.00", month, environment="dev"),
        item("weights", "0.01", month, id_="vo-1"),
        item("llama3", "99", HOUR),  # an hour that is not full
        item("llama3", "99", month - timedelta(days=1)),
    ]
    found, err = spent()
    assert [(ask.get("start"), ask.get("end"), ask.get("resolution")) for ask in account.asked[:2]] == [
        (month, TODAY, "d"),
        (TODAY, HOUR, "h"),
    ]
    assert account.asked[0]["tag_names"] == ["*"]
    assert rows(found) == [
        ("other", "dev", "4", "0"),
        ("llama3", "main", "1.75", "0"),
        ("weights", "main", "0.01", "0"),
    ]
    assert found.billed == Decimal("5.76")
    assert (found.since, found.billed_until) == (month, HOUR)
    assert "$ modal billing report --start 2026-11-01T00:00:00 --end 2026-11-21T00:00:00" in err


def test_a_week_is_asked_for_by_the_hour(account: Account) -> None:
    found, _ = spent(since="90m")
    assert account.asked[0]["start"] == AT.replace(hour=10, minute=0)
    assert account.asked[0]["resolution"] == "h"
    assert found.since == AT.replace(hour=10, minute=0)
    spent(since="7d")
    assert [ask["resolution"] for ask in account.asked if "resolution" in ask] == ["h", "h"]
    spent(since="8d")
    assert [ask["resolution"] for ask in account.asked if "resolution" in ask][2:] == ["d", "h"]


def test_less_than_an_hour_is_not_asked_for_at_all(account: Account) -> None:
    a_record("llama3")
    account.containers = [container("llama3", AT - timedelta(minutes=20))]
    found, _ = spent("llama3", since="10m")
    assert not [ask for ask in account.asked if "start" in ask]
    assert found.estimated == Decimal(4) / 6  # ten minutes of the twenty
    assert (found.since, found.billed_until) == (AT - timedelta(minutes=10),) * 2


def test_at_midnight_and_on_the_first_no_span_is_empty(account: Account) -> None:
    spent(at=TODAY)
    first = TODAY.replace(day=1)
    spent(at=first + timedelta(minutes=5))
    spans = [(ask["start"], ask["end"], ask["resolution"]) for ask in account.asked if "start" in ask]
    assert spans == [(first, TODAY, "d")]


def test_one_app_by_name_or_id_in_every_environment_or_one(account: Account) -> None:
    account.rows = [
        item("llama3", "1", HOUR - timedelta(hours=2)),
        item("llama3", "2", HOUR - timedelta(hours=2), environment="dev", id_="ap-dev"),
        item("other", "4", HOUR - timedelta(hours=2)),
    ]
    assert rows(spent("llama3", since="1d")[0]) == [
        ("llama3", "dev", "2", "0"),
        ("llama3", "main", "1", "0"),
    ]
    assert rows(spent("llama3", since="1d", environment="dev")[0]) == [("llama3", "dev", "2", "0")]
    assert rows(spent("ap-dev", since="1d")[0]) == [("llama3", "dev", "2", "0")]
    assert spent("llama3", since="1d")[0].credits is None  # those are the workspace's


def test_what_was_deployed_twice_is_one_line_with_two_ids(account: Account) -> None:
    account.rows = [
        item("a", "1", HOUR - timedelta(hours=2)),
        item("a", "2", HOUR - timedelta(hours=3), id_="ap-2"),
    ]
    (line,) = spent(since="1d")[0].lines
    assert line.object_ids == ("ap-a", "ap-2")
    assert line.billed == 3


# -- by tag


def test_by_the_values_of_a_tag(account: Account) -> None:
    at = HOUR - timedelta(hours=2)
    account.rows = [
        item("a", "1", at, team="nlp"),
        item("b", "2", at, team="nlp", stage="prod"),
        item("c", "5", at, team="vision"),
        item("d", "1", at),
    ]
    found, _ = spent(since="1d", tag="team")
    assert rows(found) == [("vision", None, "5", "0"), ("nlp", None, "3", "0"), ("-", None, "1", "0")]
    assert found.header()[0] == "TEAM"
    assert found.lines[1].tags == {"team": "nlp"}
    only, _ = spent(since="1d", tag="team=nlp")
    assert rows(only) == [("b", "main", "2", "0"), ("a", "main", "1", "0")]
    assert rows(spent(since="1d", tag="team=none")[0]) == []


@pytest.mark.parametrize("text", ["", "=", "=nlp", "team="])
def test_a_tag_that_is_none(account: Account, text: str) -> None:
    with pytest.raises(GpuctlError, match="--tag: ") as error:
        spent(tag=text)
    assert error.value.exit_code == 2
    assert account.asked == []


# -- what is estimated


def test_what_runs_since_the_last_full_hour_is_estimated(account: Account) -> None:
    a_record("llama3", usd_per_hour=4.0)
    account.rows = [item("llama3", "1", HOUR - timedelta(hours=1), **{"managed-by": "gpuctl"})]
    account.containers = [
        container("llama3", HOUR - timedelta(hours=5)),  # half an hour of it is not billed yet
        container("llama3", AT - timedelta(minutes=15)),
        container("llama3", None),  # pending: not charged
        container("foreign", HOUR - timedelta(hours=5)),  # what it costs is not known
    ]
    found, _ = spent(since="1d")
    assert rows(found) == [("llama3", "main", "1", "3")]
    assert list(found.cells()) == [("llama3", "main", "$1.00", "~$3.00", "$4.00")]
    assert found.lines[0].tags == {"managed-by": "gpuctl"}
    assert account.asked[1] == {"environment": "main"}


def test_what_was_just_deployed_has_its_tags_from_its_command(account: Account) -> None:
    argv = ("serve", "x", "--tag", "team=nlp", "--tag=stage=dev", "--", "--tag", "no=no")
    a_record("new", argv=argv)
    account.containers = [container("new", AT - timedelta(minutes=15))]
    found, _ = spent(since="1d", tag="team")
    assert rows(found) == [("nlp", None, "0", "1")]
    assert found.lines[0].tags == {"managed-by": "gpuctl", "team": "nlp", "stage": "dev"}


def test_nobody_is_asked_for_containers_where_nothing_runs(account: Account) -> None:
    a_record("old", stopped_at="2026-11-20T00:00:00Z")
    assert not spent(since="1d")[0].estimated
    assert not [ask for ask in account.asked if "environment" in ask]


def test_a_record_without_a_price_takes_its_dearest_gpu_at_todays(account: Account) -> None:
    a_record("old", usd_per_hour=None, gpu=("L4", "H100!:2"))
    account.containers = [container("old", AT - timedelta(minutes=30))]
    expected = 2 * Decimal(3) + Decimal("0.0473") / 8 + Decimal("0.008") / 8
    assert spent(since="1d")[0].estimated == expected / 2


# -- the credits


def test_what_is_left_of_the_credits_by_the_plans_that_it_may_be(account: Account) -> None:
    said = "\n".join(spent()[0].notes())
    assert "credits: $0.28 used this month; Modal does not tell what is left" in said
    assert "$29.72 on Starter or $99.72 on Team" in said
    assert spent()[0].document()["credits"] == {
        "used_usd": 0.28,
        "left_usd_by_plan": {"Starter": 29.72, "Team": 99.72},
        "billed_beyond_usd": 0.0,
    }
    account.plan_cost, account.billed = "209.67741935", "209.67741935"
    said = "\n".join(spent()[0].notes())
    assert "$99.72 on Team" in said
    assert "Starter" not in said
    account.plan_cost, account.billed, account.credits = "0", "4.10", "-30"
    assert "credits: $30.00 used this month, and $4.10 is billed beyond them" in "\n".join(spent()[0].notes())


def test_credits_that_are_not_told_are_left_out(account: Account) -> None:
    account.credits = None
    assert spent()[0].credits is None
    found, _ = spent(client=TheClient(fails="billing summary"))
    assert found.credits is None
    assert "credits" not in "\n".join(found.notes())


# -- bad input, bad luck


@pytest.mark.parametrize(
    "since",
    ["", "x", "7", "-1d", "1w", "1.5h", "٣d", "2026-13-01", "99999999999999d", "2027-01-01", "tomorrow"],
)
def test_a_time_that_is_none_or_to_come(account: Account, since: str) -> None:
    with pytest.raises(GpuctlError, match="--since: ") as error:
        spent(since=since)
    assert error.value.exit_code == 2
    assert repr(since) in str(error.value)
    assert account.asked == []


@pytest.mark.parametrize(
    ("since", "start"),
    [
        ("2026-11-20", datetime(2026, 11, 20, tzinfo=UTC)),
        ("2026-11-21T09:59:00", datetime(2026, 11, 21, 9, tzinfo=UTC)),
        ("2026-11-21T09:59:00+02:00", datetime(2026, 11, 21, 7, tzinfo=UTC)),
        ("3600s", datetime(2026, 11, 21, 10, tzinfo=UTC)),
    ],
)
def test_times(account: Account, since: str, start: datetime) -> None:
    assert spent(since=since)[0].since == start
    assert account.asked[0]["start"] == start


def test_an_unknown_name_says_what_is_near(account: Account) -> None:
    account.rows = [item("llama3", "1", HOUR - timedelta(hours=2))]
    a_record("qwen3")
    with pytest.raises(GpuctlError, match="did you mean 'llama3'") as error:
        spent("llama")
    assert error.value.exit_code == 2
    with pytest.raises(GpuctlError, match="did you mean 'qwen3'"):
        spent("qwen")
    with pytest.raises(GpuctlError, match="in environment 'dev'"):
        spent("llama3", environment="dev")
    assert spent("qwen3")[0].lines == ()  # deployed, and nothing charged yet


@pytest.mark.parametrize("command", ["billing report", "container list"])
def test_a_client_that_fails(account: Account, command: str) -> None:
    a_record("llama3")
    with pytest.raises(GpuctlError, match=f"`modal {command}.*failed: denied") as error:
        spent(since="1d", client=TheClient(fails=command))
    assert error.value.exit_code == 1
    gone = "Error: Environment 'dev' not found"
    with pytest.raises(GpuctlError, match="no environment named 'dev'") as error:
        spent(since="1d", client=TheClient(fails=command, says=gone))
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    "text",
    ["", "no", "{}", '[{"cost": "1"}]', '[{"object_id":"a","description":"a","environment":"e","cost":"x"}]'],
)
def test_a_report_that_is_none(account: Account, text: str) -> None:
    class Odd(TheClient):
        def run(self, argv: Sequence[str], env: ModalEnv, *, timeout: float | None = None) -> Completed:
            return Completed(0, text, "")

    if text == "{}":
        assert spent(since="1d", client=Odd())[0].lines == ()
        return
    with pytest.raises(GpuctlError, match="printed"):
        spent(since="1d", client=Odd())


def test_without_credentials_nobody_is_asked(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODAL_TOKEN_ID")
    with pytest.raises(GpuctlError, match="modal setup") as error:
        spent()
    assert error.value.exit_code == 2


def test_on_this_machine_nothing_is_charged(account: Account) -> None:
    found, err = spent(target=Target.LOCAL)
    assert list(found.cells()) == [("total", "-", "$0", "-", "$0")]
    assert found.document()["usd"] == 0
    assert list(found.notes()) == []
    assert "nothing is charged on this machine" in err
    assert account.asked == []
    with pytest.raises(GpuctlError, match="no deployment named 'x' on this machine"):
        spent("x", target=Target.LOCAL)
    a_record("mine", target=Target.LOCAL)
    assert spent("mine", target=Target.LOCAL)[0].lines == ()


def test_the_document(account: Account) -> None:
    a_record("llama3")
    account.rows = [item("llama3", "1.0000004", HOUR - timedelta(hours=1), team="nlp")]
    account.containers = [container("llama3", AT - timedelta(minutes=15))]
    found, _ = spent("llama3", since="2h")
    document = found.document()
    assert json.loads(json.dumps(document)) == document
    assert document == {
        "target": "modal",
        "since": "2026-11-21T09:00:00Z",
        "billed_until": "2026-11-21T11:00:00Z",
        "at": "2026-11-21T11:30:00Z",
        "tag": None,
        "billed_usd": 1.0,
        "estimated_usd": 1.0,
        "usd": 2.0,
        "lines": [
            {
                "name": "llama3",
                "environment": "main",
                "object_ids": ["ap-llama3"],
                "tags": {"team": "nlp"},
                "billed_usd": 1.0,
                "estimated_usd": 1.0,
                "usd": 2.0,
            }
        ],
        "credits": None,
    }


def test_the_pinned_client_prints_rates_as_they_are_read(account: Account) -> None:
    found = rates(Target.MODAL, runner=TheClient())  # type: ignore[arg-type]
    assert found.gpus["H100"].usd_per_hour == 3
    assert found.source == "mixed"


# -- what always holds

charges = st.lists(
    st.builds(
        lambda name, environment, tags, billed, estimated: Charge(
            f"ap-{name}", name, environment, tags, billed, estimated
        ),
        st.sampled_from("abc"),
        st.sampled_from(["main", "dev"]),
        st.dictionaries(st.sampled_from(["team", "stage"]), st.sampled_from("xy")),
        st.decimals(0, 1000, places=8),
        st.decimals(0, 1000, places=8),
    ),
    max_size=30,
)


@given(charges, st.sampled_from([None, Tag("team", None), Tag("stage", None), Tag("none", None)]))
def test_no_cent_is_lost_or_counted_twice(found: list[Charge], tag: Tag | None) -> None:
    lines = lines_of(found, tag)
    assert sum(line.billed for line in lines) == sum(charge.billed for charge in found)
    assert sum(line.estimated for line in lines) == sum(charge.estimated for charge in found)
    assert all(line.billed >= 0 and line.estimated >= 0 for line in lines)
    assert [line.total for line in lines] == sorted((line.total for line in lines), reverse=True)
