"""What to paste to use a deployment: a curl command and a Python program, both of which retry 503 and 429.

A Modal Server answers 503 while no container is up and 429 above its limit, and does not queue: clients must
retry. May import: `gpuctl.target`.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass

from gpuctl.target import Target


@dataclass(frozen=True)
class Use:
    """What the snippets need to know of a deployment."""

    name: str
    target: Target
    environment: str | None  # as given with --env
    base_url: str
    model: str
    auth: bool
    startup_timeout: int  # seconds: clients should be as patient as the first container needs
    gpuctl: str = "gpuctl"  # how this shell finds it
    python: str = "python3"  # one that has the OpenAI client
    has_openai: bool = True

    @property
    def flags(self) -> str:
        """The flags that every further command about this deployment takes."""
        flags = " --local" if self.target is Target.LOCAL else ""
        return flags + (f" --env {shlex.quote(self.environment)}" if self.environment else "")

    @property
    def token_command(self) -> str:
        return f"{self.gpuctl} token {self.name}{self.flags}"

    @property
    def logs_command(self) -> str:
        return f"{self.gpuctl} logs {self.name} -f{self.flags}"

    @property
    def stop_command(self) -> str:
        return f"{self.gpuctl} stop {self.name}{self.flags}"


def curl(use: Use) -> str:
    body = json.dumps({"model": use.model, "messages": [{"role": "user", "content": "Hello!"}]})
    lines = [
        f"curl --no-progress-meter --fail --retry {max(10, use.startup_timeout // 5)} --retry-delay 5 "
        f"--retry-connrefused",
        f"  {shlex.quote(use.base_url + '/chat/completions')}",
        "  -H 'Content-Type: application/json'",
    ]
    if use.auth:
        lines.append(f'  -H "Authorization: Bearer $({use.token_command})"')
    lines.append(f"  -d {shlex.quote(body)}")
    return " \\\n".join(lines)


def openai_client(use: Use) -> str:
    key = 'os.environ["OPENAI_API_KEY"]' if use.auth else '"none"'
    # The client doubles its pauses up to 8 s.
    retries = max(10, use.startup_timeout // 8)
    program = "\n".join(
        [
            "import os" if use.auth else "",
            "from openai import OpenAI",
            f"client = OpenAI(base_url={json.dumps(use.base_url)}, api_key={key}, max_retries={retries})",
            'messages = [{"role": "user", "content": "Hello!"}]',
            f"answer = client.chat.completions.create(model={json.dumps(use.model)}, messages=messages)",
            "print(answer.choices[0].message.content)",
        ]
    ).lstrip("\n")
    install = "" if use.has_openai else "pip install openai\n"
    export = f"export OPENAI_API_KEY=$({use.token_command})\n" if use.auth else ""
    return f"{install}{export}{use.python} - <<'EOF'\n{program}\nEOF"
