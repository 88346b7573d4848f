"""Images that a container engine builds, for the tests: `modal run engine.py` prints what is found, as JSON."""

import json
import os
import sys
from pathlib import Path

import modal

HERE = Path(__file__).parent
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
app = modal.App("engine")
volume = modal.Volume.from_name("engine-data", create_if_missing=True)
secret = modal.Secret.from_dict({"TOKEN": os.environ.get("T_TOKEN", "")})


def function():
    """Run when the image is built."""
    print("in a function of the build")
    Path("/opt/by-function").write_text(os.environ["TOKEN"][:3])
    Path("/usr/share/deep/gone").unlink()
    Path("/data/from-build").write_text("built")


bare = modal.Image.from_registry(os.environ.get("T_BARE", "localhost/none"), add_python=PYTHON)
layered = (
    bare.run_commands(
        "mkdir -p /usr/share/deep && touch /usr/share/deep/gone /usr/share/deep/kept",
        "test ${#TOKEN} -gt 10 && id > /usr/share/deep/id",
        secrets=[secret],
    )
    .pip_install("iniconfig==2.0.0")
    .run_function(function, secrets=[secret], volumes={"/data": volume})
    .run_commands("test ! -e /usr/share/deep/gone && cat /opt/by-function > /opt/read")
    .env({"WORDS": "two words"})
    .workdir("/wd")
    .entrypoint(["/usr/bin/env", "FROM_ENTRYPOINT=yes"])
    .add_local_python_source("helper_package")
    .add_local_file(HERE / "plain.py", "/etc/plain.py")
)
docker = modal.Image.from_dockerfile(
    HERE / "Dockerfile.engine", build_args={"BASE": os.environ.get("T_PYTHON", "x")}
).run_commands("id -u > /usr/as")
without = modal.Image.from_registry(os.environ.get("T_BARE", "localhost/none"))
failing = bare.run_commands("echo the reason of it >&2; exit 7")
slow = bare.run_commands("echo begun; sleep 9876", force_build=True)


def look():
    import helper_package
    import iniconfig

    return {
        "release": Path("/etc/os-release").read_text(),
        "top": sorted(p.name for p in Path("/").iterdir()),
        "deep": sorted(p.name for p in Path("/usr/share/deep").iterdir()),
        "id": Path("/usr/share/deep/id").read_text().partition(" ")[0],
        "read": Path("/opt/read").read_text(),
        "packages": iniconfig.__file__.startswith("/usr/local/lib/"),
        "client": modal.__file__,
        "source": helper_package.WORD,
        "mounted": Path("/etc/plain.py").is_file(),
        "volume": Path("/data/from-build").read_text(),
        "env": [
            os.environ["WORDS"],
            os.environ.get("FROM_ENTRYPOINT"),
            "TOKEN" in os.environ,
            os.environ["PATH"],
        ],
        "cwd": str(Path.cwd()),
        "python": sys.executable,
    }


def in_layered():
    Path("/usr/bin/new").write_text("its own")
    return look()


def in_docker():
    return {
        "copied": sorted(p.name for p in Path("/copied").iterdir()),
        "mode": oct(Path("/copied/plain.py").stat().st_mode & 0o777),
        "owner": Path("/by-worker/id").read_text().strip(),
        "bash": Path("/by-worker/bash").read_text().strip(),
        "stage": Path("/from-stage").read_text().strip(),
        "env": os.environ["GREETING"],
        "upon": Path("/usr/as").read_text().strip(),
    }


def nothing():
    return 1


# One of them: the client builds the images of all functions that an app has.
work, image = {
    "in_layered": (in_layered, layered),
    "in_docker": (in_docker, docker),
    "in_without": (nothing, without),
    "in_failing": (nothing, failing),
    "in_slow": (nothing, slow),
}[os.environ.get("T_ONLY", "in_layered")]
chosen = app.function(image=image, volumes={"/data": volume}, name="chosen")(work)


@app.local_entrypoint()
def run():
    print(json.dumps(chosen.remote()))
