"""Templates and catalogue are found from a wheel, an sdist and an editable install, and all render alike.

Each is built and installed into an environment of its own. The dependencies come from the environment that
runs the tests, over a path file, so nothing is downloaded; gpuctl itself does not.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
DRY_RUN = ["serve", "tiny", "--local", "--dry-run"]


def run(argv: list[str], cwd: Path, home: Path | None = None) -> str:
    """Its stdout; the test fails with its stderr where it fails."""
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(home or cwd),
        "PIP_NO_INDEX": "1",
        "PIP_NO_CACHE_DIR": "1",
    }
    done = subprocess.run(argv, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project: building it leaves nothing in the repository."""
    copy = tmp_path_factory.mktemp("source") / "gpuctl"
    leave = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "dist", "build")
    shutil.copytree(REPO, copy, ignore=leave, ignore_dangling_symlinks=True)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(source / "out")], source)
    (made,) = (source / "out").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def sdist(source: Path) -> Path:
    run([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(source / "out")], source)
    (made,) = (source / "out").glob("*.tar.gz")
    return made


def installed(what: list[str], folder: Path) -> Path:
    """The interpreter of a new environment with gpuctl installed from `what`."""
    environment = folder / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", str(environment)], folder)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site_packages = environment / "lib" / version / "site-packages"
    # A path out of a .pth file brings its modules but not its own .pth files: not our editable install.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", str(environment), "install", "--quiet"]
    run([*pip, "--no-deps", "--no-build-isolation", "--force-reinstall", *what], folder)
    return environment / "bin" / "python"


def rendering(python: Path, folder: Path, *, package_in: Path) -> str:
    """What the installed gpuctl renders, the console script and `python -m gpuctl` alike."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    package = Path(run([str(python), "-c", "import gpuctl; print(gpuctl.__file__)"], elsewhere).strip())
    assert package.is_relative_to(package_in)
    by_module = run([str(python), "-m", "gpuctl", *DRY_RUN], elsewhere)
    by_script = run([str(python.with_name("gpuctl")), *DRY_RUN], elsewhere)
    assert by_module == by_script
    assert "@app.server" in by_module
    return by_module


@pytest.fixture(scope="module")
def expected(source: Path) -> str:
    """What the working tree renders."""
    return run([sys.executable, "-m", "gpuctl", *DRY_RUN], source)


def test_from_a_wheel(wheel: Path, expected: str, tmp_path: Path) -> None:
    python = installed([str(wheel)], tmp_path)
    assert rendering(python, tmp_path, package_in=tmp_path) == expected


def test_from_an_sdist(sdist: Path, expected: str, tmp_path: Path) -> None:
    python = installed([str(sdist)], tmp_path)
    assert rendering(python, tmp_path, package_in=tmp_path) == expected


def test_from_an_editable_install(source: Path, expected: str, tmp_path: Path) -> None:
    python = installed(["--editable", str(source)], tmp_path)
    assert rendering(python, tmp_path, package_in=source) == expected


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def test_every_data_file_is_in_the_wheel(source: Path, wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {path.relative_to(source).as_posix() for path in files(source / "gpuctl")}
    templates = {"gpuctl/" + path.relative_to(source).as_posix() for path in files(source / "templates")}
    assert package | templates <= names


def test_the_sdist_has_what_its_tests_and_its_users_need(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = ("README.md", "LICENSE", "CHANGELOG.md", "requirements.lock", "docs/cli.md", ".ci/run")
    assert [name for name in wanted if name not in names] == []
