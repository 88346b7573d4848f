"""For all tiers: a test that passed passes again on the same code.

`pytest --hypothesis-profile=default` looks for new examples instead.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)  # a busy machine is no error
# Whether this machine has Docker or Podman is nothing to these tests; those that are about it say so themselves.
os.environ["GPUCTL_LOCAL_ENGINE"] = "none"
