"""A function that leaves a mark whenever its schedule calls it."""

import os
import time
from pathlib import Path

import modal

app = modal.App(os.environ.get("T_NAME", "scheduled"))
marks = modal.Volume.from_name(f"marks-{os.environ.get('T_NAME', 'scheduled')}", create_if_missing=True)

if "T_CRON" in os.environ:
    schedule: modal.Cron | modal.Period = modal.Cron(
        os.environ["T_CRON"], timezone=os.environ.get("T_ZONE", "UTC")
    )
else:
    schedule = modal.Period(seconds=float(os.environ.get("T_SECONDS", "2")))


@app.function(
    schedule=None if os.environ.get("T_SECONDS") == "0" else schedule,
    volumes={"/marks": marks},
    image=modal.Image.debian_slim().env(
        {"VERSION": os.environ.get("T_VERSION", "1"), "NAME": os.environ.get("T_NAME", "scheduled")}
    ),
)
def tick() -> None:
    with Path(f"/marks/{os.environ['NAME']}").open("a") as file:
        file.write(f"{os.environ['VERSION']} {time.time():.3f}\n")
