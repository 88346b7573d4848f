"""Every golden rendering, deployed to a control plane by the unmodified `modal deploy`, as a user's own file.

Only the lines that install packages are taken out: an engine is gigabytes, and the end-to-end test has a real one.
What stays is all that the client and the plane must agree on: the image's other steps, GPUs, Volumes, Secrets, tags,
limits, regions, Environments. No container is asked for, but where `--min-containers` wants one.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .planes import TestPlane

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.parent for path in GOLDEN.glob("*/command.txt"))
SERVED = [case for case in CASES if not case.name.startswith("batch-")]
# Buckets are refused by name: test_batch_remote.py.
BATCHES = [case for case in CASES if case.name.startswith("batch-") and case.name != "batch-s3"]
INSTALLS = re.compile(
    r"^    \.(?:uv_pip_install|pip_install|apt_install|run_commands)\(.*?\)\n(?=    \.)"
    r"|(?<=\))\.pip_install\(.*?\)$",
    re.M | re.S,
)


def without_packages(source: str) -> str:
    kept, count = INSTALLS.subn("", source)
    assert count >= 1
    steps = {node.attr for node in ast.walk(ast.parse(kept)) if isinstance(node, ast.Attribute)}
    assert not steps & {"uv_pip_install", "pip_install", "apt_install", "run_commands"}
    return kept


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_modal_deploys_it(case: Path, plane: TestPlane, tmp_path: Path) -> None:
    source = without_packages((case / "app.py").read_text(encoding="utf-8"))
    name = f"golden-{case.name}"
    file = tmp_path / "endpoint.py"
    file.write_text(re.sub(r"^APP_NAME = .*$", f'APP_NAME = "{name}"', source, flags=re.M), encoding="utf-8")
    make_secrets(source, plane, tmp_path)

    deployed = plane.modal("deploy", str(file), HF_TOKEN="of-this-test").stdout
    assert "App deployed" in deployed
    info = plane.json("server", "info", f"{name}/Server")
    plane.modal("app", "stop", name, "--yes")
    wrote = constants(source)
    asked = wrote.get("GPU", [])
    gpus = [asked] if isinstance(asked, str) else asked
    assert [f"{kind}:{count}" for kind, count in info["gpus"]] == [
        (gpu if ":" in gpu else f"{gpu}:1").upper() for gpu in gpus
    ]
    assert info["target_concurrency"] == wrote["CONCURRENCY"]
    assert info["startup_timeout"] == wrote["STARTUP_TIMEOUT"]
    assert info["exit_grace_period"] == wrote["EXIT_GRACE_PERIOD"]
    assert info["unauthenticated"] == (case.name == "no-auth")
    assert len(info["secrets"]) == source.count("modal.Secret.")
    assert len(info["volumes"]) == source.count("modal.Volume.")
    for setting in ("min_containers", "max_containers", "scaledown_window"):
        assert f"    {setting}={info[setting]},\n" in source


@pytest.mark.parametrize("case", BATCHES, ids=lambda case: case.name)
def test_modal_deploys_a_job(case: Path, plane: TestPlane, tmp_path: Path) -> None:
    source = without_packages((case / "app.py").read_text(encoding="utf-8"))
    name = f"golden-{case.name}"
    file = tmp_path / "job.py"
    source = re.sub(r"^APP_NAME = .*$", f'APP_NAME = "{name}"', source, flags=re.M)
    file.write_text(source.replace("/home/ann/gpuctl", str(GOLDEN.parents[1])), encoding="utf-8")
    make_secrets(source, plane, tmp_path)
    for volume in re.findall(r'Volume\.from_name\("([^"]+)"\)', source):  # one that must be there
        plane.modal("volume", "create", volume)
    deployed = plane.modal("deploy", str(file), HF_TOKEN="of-this-test").stdout
    assert "App deployed" in deployed
    assert name in [row["name"] for row in plane.json("volume", "list")]
    plane.modal("app", "stop", name, "--yes")


def make_secrets(source: str, plane: TestPlane, tmp_path: Path) -> None:
    """Those that must be there."""
    for secret in re.findall(r'Secret\.from_name\("([^"]+)"', source):
        (tmp_path / "secret.env").write_text("HF_TOKEN=of-this-test\n")
        plane.modal("secret", "create", "--force", secret, "--from-dotenv", str(tmp_path / "secret.env"))


def constants(source: str) -> dict[str, Any]:
    """The settings at the top of the file."""
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id.isupper()
    }
