"""`gpuctl gpus` as a user meets it. Modal's client is played."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fakes import FakeRunner
from gpuctl.__main__ import main
from gpuctl.modal_cli import Completed

CREDENTIALS = {"MODAL_TOKEN_ID": "ak-1", "MODAL_TOKEN_SECRET": "as-1"}


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("MODAL_CONFIG_PATH", str(tmp_path / "none.toml"))
    for name in ("GPUCTL_TARGET", "MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET", "MODAL_ENVIRONMENT"):
        monkeypatch.delenv(name, raising=False)


def gpuctl(
    capsys: pytest.CaptureFixture[str], *words: str, runner: FakeRunner | None = None
) -> tuple[int, str, str]:
    code = main(words, runner=runner or FakeRunner())
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def column(out: str, name: str) -> list[str]:
    header, *rows = (line.split() for line in out.splitlines())
    at = header.index(name)
    return [row[at] for row in rows]


def test_every_gpu_and_where_the_prices_are_from(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = gpuctl(capsys, "gpus")
    assert code == 0
    assert column(out, "GPU") == [
        "T4", "L4", "A10", "L40S", "A100", "A100-40GB", "A100-80GB", "RTX-PRO-6000", "H100", "H200", "B200", "B200+",
    ]  # fmt: skip
    assert column(out, "$/H")[8] == "3.95"
    assert column(out, "TOTAL")[2] == "96"
    assert "list prices of 2026-05-07" in err
    assert "no credentials for Modal" in err


def test_the_account_s_own_prices_are_asked_for_and_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    runner = FakeRunner(
        {"billing rates": Completed(0, json.dumps({"gpu_hour_cost_h100": "1.5", "new": "1"}), "")}
    )
    code, out, err = gpuctl(capsys, "gpus", runner=runner)
    assert code == 0
    assert column(out, "$/H")[8] == "1.50"
    assert "your account's own prices" in err
    assert "not recognised: new" in err
    # Within a day nobody is asked again.
    again = FakeRunner()
    assert column(gpuctl(capsys, "gpus", runner=again)[1], "$/H")[8] == "1.50"
    assert again.calls == []


@pytest.mark.parametrize(
    ("by", "first", "last"),
    [
        ("price", "T4", "B200+"),
        ("price-per-gib", "A100-80GB", "A100-40GB"),
        ("vram", "B200", "T4"),
        ("fp4", "B200", "H200"),
        ("bandwidth", "B200", "L4"),
        ("compute-capability", "RTX-PRO-6000", "T4"),
        ("name", "A10", "T4"),
    ],
)
def test_sorted(capsys: pytest.CaptureFixture[str], by: str, first: str, last: str) -> None:
    code, out, _ = gpuctl(capsys, "gpus", "--sort", by)
    names = column(out, "GPU")
    assert code == 0
    assert (names[0], len(names)) == (first, 12)
    assert names[-1] == last


def test_enough_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert column(gpuctl(capsys, "gpus", "--min-vram", "96")[1], "GPU") == [
        "RTX-PRO-6000",
        "H200",
        "B200",
        "B200+",
    ]
    code, out, err = gpuctl(capsys, "gpus", "--min-vram", "193")
    assert (code, out) == (0, "")
    assert "no GPU has 193 GiB" in err


def test_compared_with_other_clouds(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = gpuctl(capsys, "gpus", "--compare")
    assert code == 0
    assert column(out, "RUNPOD")[8] != "-"
    assert "RunPod: https://" in err
    _, out, _ = gpuctl(capsys, "gpus", "--compare", "--json")
    [h100] = [gpu for gpu in json.loads(out)["gpus"] if gpu["name"] == "H100"]
    assert {"cloud", "usd_per_hour", "note", "where", "as_of"} == set(h100["elsewhere"][0])
    [a100] = [gpu for gpu in json.loads(out)["gpus"] if gpu["name"] == "A100"]
    assert a100["elsewhere"], "the same card under another name"


def test_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = gpuctl(capsys, "gpus", "--json", "--sort", "price", "--min-vram", "80")
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert [gpu["name"] for gpu in document["gpus"]][:2] == ["A100-80GB", "RTX-PRO-6000"]
    assert document["prices"]["source"] == "catalogue"
    h100 = next(gpu for gpu in document["gpus"] if gpu["name"] == "H100")
    assert h100["usd_per_second"] == 0.001097
    assert h100["compute_capability"] == "9.0"
    assert h100["tflops"] == {"bf16": 989, "fp8": 1978}
    assert "elsewhere" not in h100


def test_bad_values_are_named_all_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = gpuctl(capsys, "gpus", "--sort", "bf17", "--min-vram", "lots")
    assert (code, out) == (2, "")
    assert "--sort: unknown 'bf17'; did you mean bf16?" in err
    assert "--min-vram: 'lots'" in err
    for bad in ("0", "-1", "nan", "inf", ""):
        assert gpuctl(capsys, "gpus", f"--min-vram={bad}")[0] == 2
