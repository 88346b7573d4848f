"""Writing where this machine has its own: in builds, and in containers that keep nothing. Prints JSON."""

import json
from pathlib import Path

import modal

app = modal.App("anywhere")


def by_function():
    Path("/usr/share/by-function").write_text("by a function")
    Path("/etc/environment").unlink(missing_ok=True)
    Path("/etc/environment").write_text("changed by a build")
    Path("/usr/bin/yes").unlink()
    Path("/opt/x/brought").mkdir()


image = (
    modal.Image.debian_slim()
    .run_commands("mkdir /opt/x && cd /opt/x && echo $PWD/by-command > by-command")
    .run_function(by_function)
    .run_commands("test -d /opt/x/brought && test ! -e /usr/bin/yes")
)


@app.function(image=image, single_use_containers=True)
def look():
    places = [Path("/etc/of-a-container"), Path("/usr/lib/of-a-container/deep/file")]
    found = [place.read_text() if place.exists() else "absent" for place in places]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("written")
    return {
        "by command": Path("/opt/x/by-command").read_text(),
        "by function": Path("/usr/share/by-function").read_text(),
        "environment": Path("/etc/environment").read_text(),
        "machine's": [Path("/usr/bin", name).exists() for name in ("yes", "true")],
        "places": found,
    }


@app.local_entrypoint()
def main():
    first, again = look.remote(), look.remote()
    first["first"], first["again"] = first.pop("places"), again["places"]
    print(json.dumps(first))
