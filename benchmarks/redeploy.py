"""What gpuctl costs on top of `modal deploy`: redeploying a server to the local plane, image cached, no waiting.

`gpuctl serve tiny --local --no-wait` against `modal deploy` of the file that it rendered, into the same plane:
once where nothing changed, and once where each deploy replaces the other's (the same program by another file name).
The server scales to zero and nothing is asked of it, so no engine runs beside the measurement.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from paired import BIN, clean_environment, command, compare, options

TARGET = 1.3
SERVE = ["serve", "tiny", "--local", "--name", "redeploy", "--yes", "--no-wait"]


def main() -> int:
    arguments = options(__doc__, rounds=7)
    with tempfile.TemporaryDirectory(prefix="gpuctl-benchmark-") as folder:
        env = clean_environment(XDG_STATE_HOME=folder)
        try:
            print("first deploy (builds the image unless it is cached) ...", flush=True)
            ours = command(["gpuctl", *SERVE], env)
            ours.seconds()
            (deployed,) = Path(folder).glob("gpuctl/apps/**/redeploy/*.py")
            renamed = Path(folder) / "redeploy.py"
            shutil.copy(deployed, renamed)
            met = True
            for what, file in (("nothing changed:", deployed), ("each replaces the other:", renamed)):
                print(what)
                bare = command(["modal", "deploy", str(file)], plane_environment(env))
                met &= compare(ours, bare, rounds=arguments.rounds, target=TARGET)
        finally:
            subprocess.run([BIN / "gpuctl", "local", "down"], env=env, capture_output=True, check=False)
    return 0 if met or not arguments.check else 1


def plane_environment(env: dict[str, str]) -> dict[str, str]:
    """What points a bare `modal` at the plane that gpuctl has just used."""
    from gpuctl import paths
    from gpuctl.local import client

    os.environ["XDG_STATE_HOME"] = env["XDG_STATE_HOME"]
    plane = client.running(paths.state_dir() / "local")
    if plane is None:
        raise SystemExit("the local control plane is not running after a deploy")
    return env | plane.client_env()


if __name__ == "__main__":
    raise SystemExit(main())
