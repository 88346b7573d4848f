"""Many `modal` command lines, each in a process of its own, after one start of Python; for the tests.

Starting Python and importing the client is most of the time of a `modal` command. This imports it once and forks for
each command line: what then runs is the client's own `main`, unmodified. Each line of standard input is a command
as JSON, {"argv", "env", "cwd"}; each line of standard output its [exit code, stdout, stderr].
"""

from __future__ import annotations

import json
import os
import sys
import tempfile


def main() -> None:
    import modal.__main__

    for line in sys.stdin:
        command = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if not child:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                os.environ.clear()
                os.environ.update(command["env"])
                os.chdir(command["cwd"])
                sys.argv = ["modal", *command["argv"]]
                modal.__main__.main()
                sys.exit(0)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            out.seek(0)
            err.seek(0)
            print(json.dumps([code, out.read().decode(), err.read().decode()]), flush=True)


if __name__ == "__main__":
    main()
