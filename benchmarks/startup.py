"""How long until gpuctl has said something, against `modal --help`: its help, a whole dry run, and whether it fits."""

from __future__ import annotations

import tempfile

from paired import clean_environment, command, compare, options

HELP_TARGET = 0.25
DRY_RUN_TARGET = 0.5
FIT_TARGET = 0.5


def main() -> int:
    arguments = options(__doc__, rounds=15)
    with tempfile.TemporaryDirectory(prefix="gpuctl-benchmark-") as state:
        env = clean_environment(XDG_STATE_HOME=state)
        modal = command(["modal", "--help"], env)
        print("help:")
        met = compare(command(["gpuctl", "--help"], env), modal, rounds=arguments.rounds, target=HELP_TARGET)
        print("dry run:")
        dry_run = command(["gpuctl", "serve", "llama3", "--gpu", "h100", "--dry-run"], env)
        met &= compare(dry_run, modal, rounds=arguments.rounds, target=DRY_RUN_TARGET)
        print("fit:")
        fit = command(["gpuctl", "fit", "llama3"], env)
        met &= compare(fit, modal, rounds=arguments.rounds, target=FIT_TARGET)
    return 0 if met or not arguments.check else 1


if __name__ == "__main__":
    raise SystemExit(main())
