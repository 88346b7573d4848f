"""Volumes from inside functions and from outside, for the tests: `modal run storage.py` prints JSON."""

import io
import json
from pathlib import Path

import modal

app = modal.App("storage")
data = modal.Volume.from_name("storage-data", create_if_missing=True)
image = modal.Image.debian_slim()


def outcome(action):
    try:
        return action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@app.function(
    image=image,
    volumes={"/data": data, "/new/place": modal.Volume.from_name("storage-other", create_if_missing=True)},
)
def write(name, text):
    path = Path("/data", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    data.commit()
    Path("/new/place/x").write_text(text)
    return sorted(p.name for p in Path("/new/place").iterdir())


@app.function(image=image, volumes={"/data": data})
def append(number):
    for _ in range(50):
        with Path("/data/shared.txt").open("a") as file:
            file.write(f"{number}\n")
    Path(f"/data/own/{number}").parent.mkdir(exist_ok=True)
    Path(f"/data/own/{number}").write_text("x" * 100_000)
    data.commit()
    return number


@app.function(image=image, volumes={"/data": data.with_mount_options(read_only=True)})
def read(name):
    data.reload()
    return [Path("/data", name).read_text(), outcome(lambda: Path("/data/denied").write_text("x"))]


@app.function(image=image, volumes={"/part": data.with_mount_options(sub_path="own")})
def below():
    return sorted(p.name for p in Path("/part").iterdir())


@app.local_entrypoint()
def main():
    found = {"two places": write.remote("a/b.txt", "one")}
    found["concurrent"] = sorted(append.map(range(4)))
    found["lines"] = len(b"".join(data.read_file("shared.txt")).splitlines())
    found["read only"] = read.remote("a/b.txt")
    found["sub path"] = below.remote()
    with data.batch_upload(force=True) as batch:
        batch.put_file(__file__, "up/code.py")
        batch.put_directory(Path(__file__).parent, "up/all", recursive=False)
        same = b"\0" * 100 + b"y" * (9 << 20) + b"\0" * (17 << 20)
        batch.put_file(io.BytesIO(same), "up/zeros")
        batch.put_file(io.BytesIO(same), "up/zeros again")
    found["zeros"] = [b"".join(data.read_file(f"up/zeros{n}")) == same for n in ("", " again")]
    found["code"] = b"".join(data.read_file("up/code.py")) == Path(__file__).read_bytes()
    found["listdir"] = sorted(e.path for e in data.listdir("up"))
    found["iterdir"] = len([e for e in data.iterdir("/", recursive=True) if e.path.startswith("own/")])
    data.copy_files(["up/code.py", "shared.txt"], "a/")
    found["copied"] = sorted(e.path for e in data.listdir("a"))
    data.remove_file("up", recursive=True)
    found["removed"] = outcome(lambda: data.listdir("up"))
    found["missing"] = outcome(lambda: list(data.read_file("never")))
    found["info"] = data.info().name
    with modal.Volume.ephemeral() as brief:
        with brief.batch_upload() as batch:
            batch.put_file(__file__, "x")
        found["ephemeral"] = [e.path for e in brief.listdir("/")]
    modal.Volume.objects.create("storage-more", allow_existing=True)
    found["objects"] = "storage-more" in [v.name for v in modal.Volume.objects.list()]
    modal.Volume.objects.delete("storage-more")
    found["gone"] = outcome(lambda: modal.Volume.from_name("storage-more").hydrate())
    print(json.dumps(found))
