"""Programs in a fresh interpreter, their modules compiled, as an installer leaves them.

uv compiles nothing when it installs, and `PYTHONDONTWRITEBYTECODE` is often set: a program would then compile all that
it imports on every start. So an interpreter may write bytecode here, and does so in the round that warms up.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

REPORT = """
import json, os
paths = [getattr(module, "__cached__", None) for module in list(sys.modules.values())]
print(json.dumps([result, [path for path in paths if path and not os.path.exists(path)]]), flush=True)
"""


def result_of(program: str) -> Any:
    """Run a program that imports `sys` and sets `result`, and return that.

    Raises:
        RuntimeError: A module that it has imported is not compiled, so its times mean nothing.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-W", "ignore", "-c", program + REPORT]
    done = subprocess.run(command, capture_output=True, check=True, env=environment)
    result, uncompiled = json.loads(done.stdout)
    if uncompiled:
        raise RuntimeError(f"no bytecode could be written to {uncompiled[0]}: install where this user may write")
    return result
