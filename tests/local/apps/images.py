"""Images of every kind, for the tests: `modal run images.py` prints what each function finds, as JSON."""

import json
import os
import sys
from pathlib import Path

import modal

HERE = Path(__file__).parent
app = modal.App("images")
volume = modal.Volume.from_name("images-data", create_if_missing=True)


def download(word, times=1):
    """Run when the image is built."""
    print("downloading", word)
    Path("/model").mkdir()
    Path("/model/weights.bin").write_bytes(b"w" * (65 << 20))
    Path("/model/config.json").write_text(json.dumps([word] * times))
    Path("/root/.cache/hub").mkdir(parents=True)
    Path("/root/.cache/hub/kept").write_text(os.environ["TOKEN"])
    Path("/data/from-build").write_text("built")
    volume.commit()


base = modal.Image.debian_slim().uv_pip_install("iniconfig==2.0.0")
built = (
    base.run_commands(
        "mkdir -p /made/by && echo command > /made/by/hand", "echo $A > /root/a", env={"A": "from env"}
    )
    .env({"MODE": "test", "QUOTED": "two words"})
    .workdir("/made")
    .run_function(
        download,
        args=("weights",),
        kwargs={"times": 2},
        secrets=[modal.Secret.from_dict({"TOKEN": "t0ken"})],
        volumes={"/data": volume},
    )
)
brought = (
    base.add_local_file(HERE / "plain.py", "/srv-files/plain.py", copy=True)
    .add_local_dir(HERE / "helper_package", "/opt-files/package", copy=True)
    .run_commands("cp /srv-files/plain.py /root/copied.py")
    .entrypoint(["/usr/bin/env", "FROM_ENTRYPOINT=yes"])
    .add_local_python_source("helper_package")
    .add_local_file(HERE / "web.py", "/later/web.py")
    .add_local_dir(HERE / "helper_package", "/root/mounted")
)
listed = modal.Image.debian_slim().pip_install_from_requirements(str(HERE / "requirements.txt"))
project = modal.Image.debian_slim().pip_install_from_pyproject(str(HERE / "pyproject_app.toml"), ["extra"])
synced = modal.Image.debian_slim().uv_sync(str(HERE / "uv_project"), groups=["more"])
docker = (
    modal.Image.from_dockerfile(HERE / "Dockerfile", add_python="3.11", build_args={"WHO": "args"})
    .dockerfile_commands("ENV LAST=$WORD")
    .apt_install("no-such-system-package")
)
poetic = base.dockerfile_commands(
    "COPY requirements.txt /tmp/poetry/", "COPY requirements.txt /usr/local/share/here/", context_dir=HERE
).run_commands(
    "cd /tmp/poetry && cp requirements.txt /root/seen && cat /usr/local/share/here/requirements.txt"
)
conda = modal.Image.micromamba(python_version="3.11").micromamba_install("numpy", channels=["conda-forge"])
older = modal.Image.debian_slim(python_version="3.12").pip_install("iniconfig==2.0.0")

with base.imports():
    import iniconfig


@app.function(image=built)
def in_built():
    weights = Path("/model/weights.bin")
    return {
        "weights": weights.stat().st_size,
        "config": json.loads(Path("/model/config.json").read_text()),
        "cache": Path("/root/.cache/hub/kept").read_text(),
        "hand": Path("/made/by/hand").read_text(),
        "a": Path("/root/a").read_text(),
        "env": [os.environ["MODE"], os.environ["QUOTED"], os.environ.get("TOKEN")],
        "cwd": str(Path.cwd()),
        "source": Path("/root/download").exists(),
    }


@app.function(image=brought)
def in_brought():
    import helper_package

    return {
        "copied": Path("/root/copied.py").read_text() == Path("/srv-files/plain.py").read_text(),
        "dir": sorted(p.name for p in Path("/opt-files/package").iterdir() if p.suffix == ".py"),
        "source": helper_package.WORD,
        "later": Path("/later/web.py").exists(),
        "mounted": Path("/root/mounted/__init__.py").exists(),
        "entrypoint": os.environ.get("FROM_ENTRYPOINT"),
    }


@app.function(image=base)
def in_base():
    return iniconfig.__version__ if hasattr(iniconfig, "__version__") else "imported"


@app.function(image=listed)
def in_listed():
    import importlib.metadata

    return importlib.metadata.version("iniconfig")


@app.function(image=project)
def in_project():
    import importlib.metadata

    return [importlib.metadata.version("iniconfig"), importlib.metadata.version("toml")]


@app.function(image=synced)
def in_synced():
    import importlib.metadata

    return [importlib.metadata.version("iniconfig"), importlib.metadata.version("toml")]


@app.function(image=docker)
def in_docker():
    return [os.environ.get(name) for name in ("WORD", "LAST")] + [Path("/made-by-docker").read_text()]


@app.function(image=poetic)
def in_poetic():
    return Path("/root/seen").read_text()


@app.function(image=conda)
def in_conda():
    return list(sys.version_info[:2])


@app.function(image=older)
def in_older():
    return list(sys.version_info[:2])


@app.local_entrypoint()
def main():
    functions = {
        "built": in_built,
        "brought": in_brought,
        "base": in_base,
        "listed": in_listed,
        "project": in_project,
        "older": in_older,
        "synced": in_synced,
        "docker": in_docker,
        "poetic": in_poetic,
        "conda": in_conda,
    }
    calls = {name: function.spawn() for name, function in functions.items()}
    print(json.dumps({name: call.get() for name, call in calls.items()}))
